// bench_links.cpp: what the links between ranks carry, as a machine's file has it
// (theory/machine.h). network/experiment.sh calibrates its predictions so, and counts bytes.
//
//   network/nodes.sh run -n 4 build/cpu/tests/bench_links     inside two nodes and between them:
//       inside 2.1 14 : measured      GB/s that a rank sends, and us of an all-gather
//       between 0.06 90 : measured    (all ranks of a node send to their neighbours at once)
//       overlap 0.7 : measured        of what travels beside computing, what costs no time
//       short 45 : measured           us of a call of 64 bytes between nodes, behind products of
//                                     one row, as decoding has them
//   network/nodes.sh run -n 3 build/cpu/tests/bench_links all_reduce 1179648 20
//       so many calls on a buffer of so many bytes; prints what rank 0 sends by the ledger
//
// idea      An all-reduce on 2 ranks sends its buffer's bytes in two rounds. Two sizes give the
//           latency of a round and the rate. A call is timed as a step has it, behind products and
//           before products: many turns of both, less the same products alone.
#include <algorithm>
#include <cstdio>

#include "autograd.h"
#include "launch/job.h"
#include "tensor.h"
#include "tests/test.h"

static void call(ncclComm_t comm, int ranks, Collective collective, const Tensor& x, size_t bytes,
                 cudaStream_t stream = device().compute) {
  const size_t all = bytes / 4, part = all / size_t(ranks);
  float* data = x.data<float>();
  if (collective == Collective::all_gather)
    NCCL_CHECK(ncclAllGather(data, data + all, part, ncclFloat, comm, stream));
  else if (collective == Collective::reduce_scatter)
    NCCL_CHECK(ncclReduceScatter(data, data + all, part, ncclFloat, ncclSum, comm, stream));
  else NCCL_CHECK(ncclAllReduce(data, data, all, ncclFloat, ncclSum, comm, stream));
}

// So many turns of some products, each of so many rows, and an all-reduce of so many bytes (0:
// none) behind them; or beside them.
struct Turns {
  int count, products, rows;
  size_t bytes = 0;
  bool beside = false;
};
// Their seconds on the slowest rank: the median of `times`.
static double seconds(ncclComm_t comm, const Tensor& x, int times, const Turns& turns) {
  const Tensor a({turns.rows, 512}, Dtype::f32, Memory::workspace),
      b({512, 512}, Dtype::f32, Memory::workspace), c(a.shape(), a.dtype(), Memory::data);
  fill(a, 0);
  fill(b, 0);
  const cudaStream_t compute = device().compute;
  cudaStream_t other;
  CUDA_CHECK(cudaStreamCreate(&other));
  std::vector<double> all;
  for (int i = 0; i < times; i++) {
    synchronize();
    barrier();
    const double start = MPI_Wtime();
    for (int turn = 0; turn < turns.count; turn++) {
      if (turns.beside) call(comm, 2, Collective::all_reduce, x, turns.bytes, other);
      for (int k = 0; k < turns.products; k++) product(c, a, false, b, false, 0);
      if (!turns.beside && turns.bytes) {
        make_wait(other, compute);
        call(comm, 2, Collective::all_reduce, x, turns.bytes, other);
      }
      make_wait(compute, other);
    }
    synchronize();
    double mine = MPI_Wtime() - start, slowest = 0;
    MPI_Iallreduce(&mine, &slowest, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD, Finished());
    all.push_back(slowest);
  }
  CUDA_CHECK(cudaStreamDestroy(other));
  std::ranges::sort(all);
  return all[all.size() / 2];
}

static void measure(const Job& job, const char* name, ncclComm_t world, int color,
                    const Tensor& x) {
  constexpr size_t kSmall = 128 << 10, kLarge = 4 << 20;
  ncclComm_t pair;
  NCCL_CHECK(ncclCommSplit(world, color, job.rank, &pair, nullptr));
  seconds(pair, x, 1, {1, 0, 1, kLarge});  // opens connections
  const auto of_a_call = [&](int turns, int products, int rows, size_t bytes) {
    const double both = seconds(pair, x, 9, {turns, products, rows, bytes}),
                 alone = seconds(pair, x, 9, {turns, products, rows});
    return std::max(0.0, both - alone) / turns;
  };
  const double small = of_a_call(20, 1, 512, kSmall), large = of_a_call(3, 1, 512, kLarge),
               rate = double(kLarge - kSmall) / (large - small),
               latency = std::max(0.0, small - double(kSmall) / rate) / 2,
               one = seconds(pair, x, 9, {20, 1, 512}) / 20, short_call = of_a_call(50, 4, 1, 64);
  REQUIRE(large > small, "this link is too fast to be measured beside a product");
  const int many = 1 + int(1.5 * large / one);  // they take longer than what is beside them
  const double behind = seconds(pair, x, 9, {1, many, 512, kLarge}),
               beside = seconds(pair, x, 9, {1, many, 512, kLarge, true});
  NCCL_CHECK(ncclCommDestroy(pair));
  if (job.rank) return;
  printf("%s %.4f %.1f : measured\n", name, rate / 1e9, 1e6 * latency);
  if (std::string(name) != "between") return;
  printf("overlap %.3f : measured\n", std::clamp((behind - beside) / large, 0.0, 1.0));
  printf("short %.1f : measured\n", 1e6 * short_call);
}

int main(int argc, char** argv) {
  Job job(&argc, &argv);
  try {
    REQUIRE(argc == 4 || (argc == 1 && job.local_size <= 2 && job.size == 2 * job.local_size),
            "bench_links measures the links of two nodes with one rank or two each, or takes a"
            " collective, bytes and a number of calls");
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
        const std::map<std::string, Collective> known{{"all_gather", Collective::all_gather},
                                                      {"reduce_scatter",
                                                       Collective::reduce_scatter},
                                                      {"all_reduce", Collective::all_reduce}};
        REQUIRE(known.contains(argv[1]), "bench_links knows no collective '", argv[1], "'");
        const Collective collective = known.at(argv[1]);
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
