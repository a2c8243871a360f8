// mpi_test.h: test.h for programs that run under mpiexec: a test passes when it passes on every
// rank, and rank 0 prints the line.
#pragma once
#include <utility>

#include "launch/job.h"
#include "tensor.h"
#include "tests/test.h"

inline Job*& the_job() {
  static Job* job = nullptr;
  return job;
}
inline Job& job() { return *the_job(); }

// every layout of so many ranks, the slowest axis changing last
inline std::vector<Layout> layouts_of(int64_t ranks) {
  std::vector<Layout> all{Layout{}};
  for (size_t a = 0; a < kAxes.size(); a++) {
    const std::vector<Layout> shorter = std::exchange(all, {});
    const bool last = a + 1 == kAxes.size();
    for (Layout l : shorter)
      for (int64_t n = 1; n <= ranks; n++) {
        l.sizes[a] = n;
        if (last ? l.ranks() == ranks : ranks % l.ranks() == 0) all.push_back(l);
        l.sizes[a] = 1;
      }
  }
  return all;
}

// Of the stand-in for NCCL, which lets ranks share a GPU: null in a program that has NCCL itself
namespace nccl_referee {
__attribute__((weak)) void watch(double seconds);
}

inline int run_mpi_tests(int argc, char** argv) {
  Job job(&argc, &argv);
  job.check_launcher();
  the_job() = &job;
  setenv("NCCL_NVLS_ENABLE", "0", 0);  // sums in one order: launch/program.h
  open_device(job.local_rank % device_count(), 0);
  const bool crowded =
      device().is_gpu && job.local_size > device_count() && nccl_referee::watch == nullptr;
  if (!job.agree(crowded ? "too few" : "").empty()) {
    if (job.speaks)
      printf(
          "SKIP all  %d ranks of this node have %d GPUs (with COMM=mpi they share)\n"
          "0 passed, 0 failed, 1 skipped\n",
          job.local_size, device_count());
    return close_device(), 0;
  }
  test::agree = [&job](const std::string& error) {
    return job.agree(error.empty() ? "" : sentence("rank ", job.rank, ": ", error));
  };
  test::prints = job.speaks;
  const int status = run_tests(argc, argv);
  close_device();
  return status;
}
