// bench_links.cpp: what a link between ranks carries: the rate and the latency of an all-reduce, as
// a machine's file has them (theory/machine.h). network/experiment.sh calibrates predictions so.
//
//   mpiexec -n 2 build/cpu/tests/bench_links        prints: GB/s that a rank sends, us of a call
//
// idea      A call of b bytes on n ranks takes latency + 2 (n-1)/n b / rate. Two sizes give both.
#include <algorithm>
#include <cstdio>

#include "launch/job.h"
#include "tensor.h"
#include "tests/test.h"

// Seconds of an all-reduce of `bytes`: the median of several, of the slowest rank
static double seconds(ncclComm_t comm, const Tensor& x, size_t bytes) {
  std::vector<double> times;
  for (int i = 0; i < 8; i++) {
    synchronize();
    barrier();
    const double start = MPI_Wtime();
    NCCL_CHECK(ncclAllReduce(x.data<float>(), x.data<float>(), bytes / 4, ncclFloat, ncclSum, comm,
                             device().compute));
    synchronize();
    double mine = MPI_Wtime() - start, slowest = 0;
    MPI_Iallreduce(&mine, &slowest, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD, Finished());
    if (i > 0) times.push_back(slowest);  // the first opens connections
  }
  std::ranges::sort(times);
  return times[times.size() / 2];
}

int main(int argc, char** argv) {
  Job job(&argc, &argv);
  try {
    open_device(job.local_rank % device_count(), 0);
    constexpr size_t kSmall = 4 << 10, kLarge = 4 << 20;
    {
      const Tensor x({kLarge / 4}, Dtype::f32, Memory::data);
      fill(x, 0);
      ncclUniqueId id;
      if (!job.rank) NCCL_CHECK(ncclGetUniqueId(&id));
      MPI_Ibcast(&id, sizeof id, MPI_BYTE, 0, MPI_COMM_WORLD, Finished());
      ncclComm_t comm;
      NCCL_CHECK(ncclCommInitRank(&comm, job.size, id, job.rank));
      const double small = seconds(comm, x, kSmall), large = seconds(comm, x, kLarge),
                   sent = 2.0 * (job.size - 1) / job.size,
                   rate = sent * double(kLarge - kSmall) / (large - small);
      if (!job.rank)
        printf("%.4f %.1f\n", rate / 1e9, 1e6 * (small - sent * double(kSmall) / rate));
      NCCL_CHECK(ncclCommDestroy(comm));
    }
    close_device();
    return job.leave(0);
  } catch (const Error& e) {
    job.abort(e.what());
  }
}
