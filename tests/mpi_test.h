// mpi_test.h: test.h for programs that run under mpiexec: a test passes when it passes on every
// rank, and rank 0 prints the line.
#pragma once
#include "comm.h"
#include "tensor.h"
#include "tests/test.h"

inline Job*& the_job() {
  static Job* job = nullptr;
  return job;
}
inline Job& job() { return *the_job(); }

inline int run_mpi_tests(int argc, char** argv) {
  Job job(&argc, &argv);
  job.check_launcher();
  the_job() = &job;
  open_device(job.local_rank % device_count(), 0);
  // NCCL gives each rank a GPU of its own.
  if (!job.agree(device().is_gpu && job.local_size > device_count() ? "too few" : "").empty()) {
    if (job.speaks)
      printf("SKIP all  %d ranks of this node have %d GPUs\n0 passed, 0 failed, 1 skipped\n",
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
