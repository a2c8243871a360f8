// bench_nccl.cpp: how fast the NCCL stand-in is, beside memory copies and beside MPICH's own blocking calls.
//
//   for n in 2 4 8; do mpiexec -n $n build/cpu/tests/bench_nccl; done
//
// size      the largest buffer of the call: what all-gather fills, what reduce-scatter reads, what all-reduce, broadcast and send move
// us        median over repetitions of the slowest rank's time for one call, out of place; small calls are timed in rows of 50
// traffic   bytes that all ranks together must read and write, over that time. Per rank, S the size, n the ranks: all-gather and broadcast
//           2 S; reduce-scatter S + S/n; all-reduce that plus 2 S (n-1)/n; send and receive around a ring 2 S
// of copy   traffic over the same for a plain memory copy of S (2 S a rank) that all ranks make at the same time
// CPU builds only: the copies and MPICH read device memory as host memory
// MPICH     the blocking call of the same kind on the same buffers, and how many times the stand-in's time it takes
#include <cstdio>
#include <algorithm>

#include "comm.h"
#include "tests/test.h"

namespace {

double now() { return MPI_Wtime(); }

// Seconds of one call: median over the repetitions of the slowest rank.
template <class Call> double time_of(const Job& job, size_t bytes, Call call) {
  const int row = bytes < (1 << 18) ? 50 : 2, repetitions = job.size > 4 && bytes > (1 << 22) ? 5 : 9;
  std::vector<double> mine, slowest(repetitions);
  call();
  for (int i = 0; i < repetitions; i++) {
    barrier();
    const double start = now();
    for (int j = 0; j < row; j++) call();
    mine.push_back((now() - start) / row);
  }
  MPI_Request request;
  MPI_Iallreduce(mine.data(), slowest.data(), repetitions, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD, &request);
  wait(request);
  std::nth_element(slowest.begin(), slowest.begin() + repetitions / 2, slowest.end());
  return slowest[repetitions / 2];
}

struct Bench {
  const Job& job;
  ncclComm_t comm;
  float *a, *b;  // each as large as the largest size

  void row(const char* name, size_t bytes, double copy_rate, double traffic_each, double nccl, double mpi) const {
    if (job.rank) return;
    const double rate = traffic_each * job.size / nccl;
    const std::string size = bytes < 1 << 20 ? sentence(bytes >> 10, " KiB") : sentence(bytes >> 20, " MiB");
    printf("%5d  %-14s %8s %11.1f %9.2f %8.0f%% %11.1f %7.1fx\n", job.size, name, size.c_str(), nccl * 1e6, rate / 1e9, 100 * rate / copy_rate,
           mpi * 1e6, mpi / nccl);
    fflush(stdout);
  }

  void all(size_t bytes) const {
    const int n = job.size, right = (job.rank + 1) % n, left = (job.rank + n - 1) % n;
    const size_t count = bytes / 4, slice = count / n;
    const double s = double(bytes);
    const int icount = int(count), islice = int(slice);
    const double copy_time = time_of(job, bytes, [&] { memcpy(b, a, bytes); });
    const double rate = 2 * s * n / copy_time;
    if (!job.rank) printf("%5d  %-14s %8s %11.1f %9.2f %8d%%\n", n, "memory copy", "", copy_time * 1e6, rate / 1e9, 100);

    row("all-gather", bytes, rate, 2 * s, time_of(job, bytes, [&] { NCCL_CHECK(ncclAllGather(a, b, slice, ncclFloat, comm, nullptr)); }),
        time_of(job, bytes, [&] { MPI_Allgather(a, islice, MPI_FLOAT, b, islice, MPI_FLOAT, MPI_COMM_WORLD); }));
    row("reduce-scatter", bytes, rate, s + s / n,
        time_of(job, bytes, [&] { NCCL_CHECK(ncclReduceScatter(a, b, slice, ncclFloat, ncclSum, comm, nullptr)); }),
        time_of(job, bytes, [&] { MPI_Reduce_scatter_block(a, b, islice, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD); }));
    row("all-reduce", bytes, rate, s + s / n + 2 * s * (n - 1) / n,
        time_of(job, bytes, [&] { NCCL_CHECK(ncclAllReduce(a, b, count, ncclFloat, ncclSum, comm, nullptr)); }),
        time_of(job, bytes, [&] { MPI_Allreduce(a, b, icount, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD); }));
    row("broadcast", bytes, rate, 2 * s, time_of(job, bytes, [&] { NCCL_CHECK(ncclBroadcast(a, b, count, ncclFloat, 0, comm, nullptr)); }),
        time_of(job, bytes, [&] { MPI_Bcast(b, icount, MPI_FLOAT, 0, MPI_COMM_WORLD); }));
    row("send/receive", bytes, rate, 2 * s, time_of(job, bytes, [&] {
          NCCL_CHECK(ncclGroupStart());
          NCCL_CHECK(ncclSend(a, count, ncclFloat, right, comm, nullptr));
          NCCL_CHECK(ncclRecv(b, count, ncclFloat, left, comm, nullptr));
          NCCL_CHECK(ncclGroupEnd());
        }), time_of(job, bytes, [&] {
          MPI_Sendrecv(a, icount, MPI_FLOAT, right, 0, b, icount, MPI_FLOAT, left, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
        }));
  }
};

}  // namespace

int main(int argc, char** argv) {
#if defined(CPU_FAST) || defined(CPU_FAITHFUL)
  cpu::share_device_memory();
#endif
  Job job(&argc, &argv);
  try {
    constexpr size_t kMost = 32 << 20;
    ncclUniqueId id;
    if (!job.rank) NCCL_CHECK(ncclGetUniqueId(&id));
    MPI_Bcast(&id, sizeof id, MPI_BYTE, 0, MPI_COMM_WORLD);
    Bench bench{job, nullptr, nullptr, nullptr};
    NCCL_CHECK(ncclCommInitRank(&bench.comm, job.size, id, job.rank));
    CUDA_CHECK(cudaMalloc(&bench.a, kMost));
    CUDA_CHECK(cudaMalloc(&bench.b, kMost));
    CUDA_CHECK(cudaMemset(bench.a, 0, kMost));
    CUDA_CHECK(cudaMemset(bench.b, 0, kMost));
    if (!job.rank) printf("%5s  %-14s %8s %11s %9s %9s %11s %8s\n", "ranks", "call", "size", "us", "GB/s", "of copy", "MPICH us", "MPICH");
    for (size_t bytes : {size_t(4 << 10), size_t(1 << 20), kMost}) bench.all(bytes);
    NCCL_CHECK(ncclCommDestroy(bench.comm));
    CUDA_CHECK(cudaFree(bench.a));
    CUDA_CHECK(cudaFree(bench.b));
    return 0;
  } catch (const Error& e) {
    job.abort(e.what());
  }
}
