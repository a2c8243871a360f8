// bench_nccl.cpp: how fast the collectives are, NCCL's on GPUs and the stand-in's elsewhere, beside
// memory copies and, where memory is the host's, beside MPICH's own blocking calls.
//
//   for n in 2 4 8; do mpiexec -n $n build/cpu/tests/bench_nccl; done
//
// size      the largest buffer of the call: what all-gather fills, what reduce-scatter reads, what
//           all-reduce, broadcast and send move
// us        of one call out of place: the slowest rank's time, median of 9; small calls are timed
//           in rows of 20
// GB/s      bytes that all ranks together must read and write, over that time. A rank's, with S the
//           size and n the ranks: all-gather, broadcast, and send and receive around a ring 2 S;
//           reduce-scatter S + S/n; all-reduce that plus 2 S (n-1)/n
// copy      the same for a copy of S bytes (2 S a rank) by all ranks at once; it takes turns with
//           the calls. `of copy` is their ratio. Up to 1 MiB a copy stays in the caches, where the
//           calls' bytes cannot: compare at 32 MiB
// MPICH     the blocking call of the same kind on the same buffers, and how many times the
//           stand-in's time it takes
#include <algorithm>
#include <cstdio>
#include <functional>

#include "launch/job.h"
#include "tensor.h"
#include "tests/test.h"

namespace {

// Seconds of one call of each kind: the median over the repetitions of the slowest rank. The kinds
// take turns, so that what else the machine does falls on all of them.
std::vector<double> times_of(size_t bytes, const std::vector<std::function<void()>>& calls) {
  const int row = bytes < (1 << 18) ? 20 : 1, repetitions = 9,
            count = int(calls.size()) * repetitions;
  std::vector<double> mine, slowest(count), medians;
  for (const auto& call : calls) call();
  for (int i = 0; i < repetitions; i++)
    for (const auto& call : calls) {
      synchronize();
      barrier();
      const double start = MPI_Wtime();
      for (int j = 0; j < row; j++) call();
      synchronize();
      mine.push_back((MPI_Wtime() - start) / row);
    }
  MPI_Iallreduce(mine.data(), slowest.data(), count, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD,
                 UntilDone());
  for (size_t k = 0; k < calls.size(); k++) {
    std::vector<double> times;
    for (int i = 0; i < repetitions; i++) times.push_back(slowest[i * calls.size() + k]);
    std::nth_element(times.begin(), times.begin() + repetitions / 2, times.end());
    medians.push_back(times[repetitions / 2]);
  }
  return medians;
}

struct Bench {
  const Job& job;
  ncclComm_t comm;
  float *a, *b;  // each as large as the largest size
  cudaStream_t stream;

  // traffic: bytes that a rank reads and writes in one call.
  void row(const char* name, size_t bytes, double traffic, const std::function<void()>& nccl,
           const std::function<void()>& mpi) const {
    const auto copy = [&] {
      CUDA_CHECK(cudaMemcpyAsync(b, a, bytes, cudaMemcpyDeviceToDevice, stream));
    };
    std::vector<std::function<void()>> calls{copy, nccl};
    if (!device().is_gpu) calls.push_back(mpi);
    const std::vector<double> t = times_of(bytes, calls);
    if (job.rank) return;
    const std::string size =
        bytes < 1 << 20 ? sentence(bytes >> 10, " KiB") : sentence(bytes >> 20, " MiB");
    const double rate = traffic * job.size / t[1],
                 copy_rate = 2.0 * double(bytes) * job.size / t[0];
    printf("%5d  %-14s %8s %11.1f %9.2f %9.2f %8.0f%%", job.size, name, size.c_str(), t[1] * 1e6,
           rate / 1e9, copy_rate / 1e9, 100 * rate / copy_rate);
    if (t.size() > 2) printf(" %11.1f %7.1fx", t[2] * 1e6, t[2] / t[1]);
    printf("\n");
    fflush(stdout);
  }

  void all(size_t bytes) const {
    const int n = job.size, right = (job.rank + 1) % n, left = (job.rank + n - 1) % n;
    const size_t count = bytes / 4, slice = count / n;
    const double s = double(bytes);
    const int icount = int(count), islice = int(slice);
    row(
        "all-gather", bytes, 2 * s,
        [&] { NCCL_CHECK(ncclAllGather(a, b, slice, ncclFloat, comm, stream)); },
        [&] { MPI_Allgather(a, islice, MPI_FLOAT, b, islice, MPI_FLOAT, MPI_COMM_WORLD); });
    row(
        "reduce-scatter", bytes, s + s / n,
        [&] { NCCL_CHECK(ncclReduceScatter(a, b, slice, ncclFloat, ncclSum, comm, stream)); },
        [&] { MPI_Reduce_scatter_block(a, b, islice, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD); });
    row(
        "all-reduce", bytes, s + s / n + 2 * s * (n - 1) / n,
        [&] { NCCL_CHECK(ncclAllReduce(a, b, count, ncclFloat, ncclSum, comm, stream)); },
        [&] { MPI_Allreduce(a, b, icount, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD); });
    row(
        "broadcast", bytes, 2 * s,
        [&] { NCCL_CHECK(ncclBroadcast(a, b, count, ncclFloat, 0, comm, stream)); },
        [&] { MPI_Bcast(b, icount, MPI_FLOAT, 0, MPI_COMM_WORLD); });
    row(
        "send/receive", bytes, 2 * s,
        [&] {
          NCCL_CHECK(ncclGroupStart());
          NCCL_CHECK(ncclSend(a, count, ncclFloat, right, comm, stream));
          NCCL_CHECK(ncclRecv(b, count, ncclFloat, left, comm, stream));
          NCCL_CHECK(ncclGroupEnd());
        },
        [&] {
          MPI_Sendrecv(a, icount, MPI_FLOAT, right, 0, b, icount, MPI_FLOAT, left, 0,
                       MPI_COMM_WORLD, MPI_STATUS_IGNORE);
        });
  }
};

void bench(const Job& job) {
  constexpr size_t kMost = 32 << 20;
  ncclUniqueId id;
  if (!job.rank) NCCL_CHECK(ncclGetUniqueId(&id));
  MPI_Bcast(&id, sizeof id, MPI_BYTE, 0, MPI_COMM_WORLD);
  const Tensor a({kMost / 4}, Dtype::f32, Memory::data), b({kMost / 4}, Dtype::f32, Memory::data);
  fill(a, 0);
  fill(b, 0);
  Bench bench{job, nullptr, a.data<float>(), b.data<float>(), device().compute};
  NCCL_CHECK(ncclCommInitRank(&bench.comm, job.size, id, job.rank));
  if (!job.rank)
    printf("%5s  %-14s %8s %11s %9s %9s %9s%s\n", "ranks", "call", "size", "us", "GB/s",
           "copy GB/s", "of copy", device().is_gpu ? "" : "    MPICH us    MPICH");
  for (size_t bytes : {size_t(4 << 10), size_t(1 << 20), kMost}) bench.all(bytes);
  NCCL_CHECK(ncclCommDestroy(bench.comm));
}

}  // namespace

int main(int argc, char** argv) {
  Job job(&argc, &argv);
  try {
    open_device(job.local_rank % device_count(), 0);
    bench(job);
    close_device();
    return 0;
  } catch (const Error& e) {
    job.abort(e.what());
  }
}
