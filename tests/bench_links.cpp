// bench_links.cpp: what the links between ranks carry, as a machine's file has it
// (theory/machine.h). network/experiment.sh calibrates its predictions so, and counts bytes.
//
//   mpiexec -n 4 build/cpu/tests/bench_links                  inside a node and between nodes:
//       inside 2.1 14 : measured      GB/s that a rank sends, and us of an all-gather
//       between 0.06 90 : measured    (all ranks of a node send to their neighbours at once)
//       short 45 : measured           us of a call of 4 KiB between nodes, which a decoding waits for
//   mpiexec -n 3 build/cpu/tests/bench_links all_reduce 1048576 20
//       so many calls of a buffer of so many bytes; prints the bytes that rank 0 sends by the ledger
//
// idea      An all-reduce on 2 ranks sends its buffer's bytes in two rounds. Two sizes give the
//           latency of a round and the rate.
#include <algorithm>
#include <cstdio>

#include "autograd.h"
#include "launch/job.h"
#include "tensor.h"
#include "tests/test.h"

static void call(ncclComm_t comm, int ranks, Collective collective, const Tensor& x, size_t bytes) {
  const size_t all = bytes / 4, part = all / size_t(ranks);
  float* data = x.data<float>();
  const cudaStream_t stream = device().compute;
  if (collective == Collective::all_gather)
    NCCL_CHECK(ncclAllGather(data, data + all, part, ncclFloat, comm, stream));
  else if (collective == Collective::reduce_scatter)
    NCCL_CHECK(ncclReduceScatter(data, data + all, part, ncclFloat, ncclSum, comm, stream));
  else NCCL_CHECK(ncclAllReduce(data, data, all, ncclFloat, ncclSum, comm, stream));
}

// Seconds of one of `times` all-reduces (0 bytes: none), each after some work: ranks that share
// cores do not come to it together, and those who wait leave the core to others.
static double seconds(ncclComm_t comm, const Tensor& x, int times, size_t bytes, int work) {
  const Tensor a({512, 512}, Dtype::f32, Memory::workspace),
      c({512, 512}, Dtype::f32, Memory::workspace);
  fill(a, 0);
  barrier();
  const double start = MPI_Wtime();
  for (int i = 0; i < times; i++) {
    for (int k = 0; k < work; k++) product(c, a, false, a, false, 0);
    if (bytes) call(comm, 2, Collective::all_reduce, x, bytes);
    synchronize();
  }
  double mine = MPI_Wtime() - start, slowest = 0;
  MPI_Iallreduce(&mine, &slowest, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD, Finished());
  return slowest / times;
}

static void measure(const Job& job, const char* name, ncclComm_t world, int color,
                    const Tensor& x) {
  constexpr size_t kSmall = 128 << 10, kLarge = 4 << 20;
  constexpr int kWork = 3;  // products, some 10 ms
  ncclComm_t pair;
  NCCL_CHECK(ncclCommSplit(world, color, job.rank, &pair, nullptr));
  seconds(pair, x, 3, kLarge, 0);  // opens connections
  const double alone = seconds(pair, x, 60, 0, kWork),
               small = seconds(pair, x, 60, kSmall, kWork) - alone,
               large = seconds(pair, x, 12, kLarge, kWork) - alone,
               rate = double(kLarge - kSmall) / (large - small),
               latency = std::max(0.0, small - double(kSmall) / rate) / 2,
               short_call = seconds(pair, x, 100, 4 << 10, 0);
  NCCL_CHECK(ncclCommDestroy(pair));
  if (job.rank) return;
  printf("%s %.4f %.1f : measured\n", name, rate / 1e9, 1e6 * latency);
  if (std::string(name) == "between") printf("short %.1f : measured\n", 1e6 * short_call);
}

int main(int argc, char** argv) {
  Job job(&argc, &argv);
  try {
    open_device(job.local_rank % device_count(), 0);
    {
      ncclUniqueId id;
      if (!job.rank) NCCL_CHECK(ncclGetUniqueId(&id));
      MPI_Ibcast(&id, sizeof id, MPI_BYTE, 0, MPI_COMM_WORLD, Finished());
      ncclComm_t world;
      NCCL_CHECK(ncclCommInitRank(&world, job.size, id, job.rank));
      const size_t bytes = argc == 4 ? std::stoul(argv[2]) : 4 << 20;
      const Tensor x({int64_t(bytes) / 2}, Dtype::f32, Memory::data);
      fill(x, 0);
      if (argc == 4) {
        Ledger sent;
        const std::string name = argv[1];
        const Collective collective = name == "all_gather"       ? Collective::all_gather
                                      : name == "reduce_scatter" ? Collective::reduce_scatter
                                                                 : Collective::all_reduce;
        for (int i = 0; i < std::stoi(argv[3]); i++) {
          call(world, job.size, collective, x, bytes);
          sent.enter({"", job.size}, collective, int64_t(bytes));
        }
        synchronize();
        if (!job.rank) printf("%lld\n", (long long)sent.bytes());
      } else {
        if (job.local_size > 1) measure(job, "inside", world, job.rank / job.local_size, x);
        measure(job, "between", world, job.local_rank, x);
      }
      NCCL_CHECK(ncclCommDestroy(world));
    }
    close_device();
    return job.leave(0);
  } catch (const Error& e) {
    job.abort(e.what());
  }
}
