// bench_links.cpp: what the links between ranks carry, as a machine's file has it
// (theory/machine.h). network/experiment.sh calibrates its predictions so, and counts bytes.
//
//   network/nodes.sh run -n 4 build/cpu/tests/bench_links     inside two nodes and between them:
//       inside 2.1 14 : measured      GB/s that a rank sends, and us of an all-gather
//       between 0.06 90 : measured    (all ranks of a node send to their neighbours at once)
//       overlap 0.7 : measured        of what travels beside computing, what costs no time
//       short 22 : measured           us of a round of an all-reduce of 2 KiB after products of one
//                                     row: what decoding sends
//   network/nodes.sh run -n 3 build/cpu/tests/bench_links all_reduce 1179648 20
//       so many calls on a buffer of so many bytes; prints what rank 0 sends by the ledger
//
// idea      An all-reduce on 2 ranks sends its buffer's bytes in two rounds. Two sizes give the
//           latency of a round and the rate. A call is timed as a step has it, after products and
//           before products: turns of both, less the same products alone.
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

// So many turns of some products, each of so many rows and the next matrix, and an all-reduce of so
// many bytes (0: none) after them; or beside them.
struct Turns {
  int count, products, rows;
  size_t bytes = 0;
  bool beside = false;
};

// A pair of ranks that takes turns. All of its matrices are larger than a cache; each has memory of
// its own, as parameters have.
class Pair {
 public:
  Pair(const Job& job, ncclComm_t world, int color, const Tensor& x) : x_(x) {
    NCCL_CHECK(ncclCommSplit(world, color, job.rank, &comm_, nullptr));
    CUDA_CHECK(cudaStreamCreate(&other_));
    fill(a_, 0);
    for (int64_t i = 0; i < kMatrices; i++) {
      b_.emplace_back(Shape{kInner, kColumns}, Dtype::f32, Memory::parameters);
      fill(b_.back(), 0);
    }
    seconds({1, 0, 1, kLarge});  // opens connections
  }
  ~Pair() {
    ncclCommDestroy(comm_);
    cudaStreamDestroy(other_);
  }
  Pair(const Pair&) = delete;

  static constexpr size_t kLarge = 4 << 20;
  // on the slowest rank
  double seconds(const Turns& turns) {
    const Tensor a = a_.view(0, {turns.rows, kInner}), c = c_.view(0, {turns.rows, kColumns});
    const cudaStream_t compute = device().compute;
    synchronize();
    barrier();
    const double start = MPI_Wtime();
    for (int turn = 0; turn < turns.count; turn++) {
      if (turns.beside) call(comm_, 2, Collective::all_reduce, x_, turns.bytes, other_);
      for (int k = 0; k < turns.products; k++, next_++)
        product(c, a, false, b_[next_ % kMatrices], false);
      if (!turns.beside && turns.bytes) {
        make_wait(other_, compute);
        call(comm_, 2, Collective::all_reduce, x_, turns.bytes, other_);
      }
      make_wait(compute, other_);
    }
    synchronize();
    double mine = MPI_Wtime() - start, slowest = 0;
    MPI_Iallreduce(&mine, &slowest, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD, UntilDone());
    return slowest;
  }
  // What a turn of `more` takes longer than one of `less`, which take turns themselves, so that
  // what else the machine does meets both alike: the median.
  double difference(const Turns& more, const Turns& less) {
    std::vector<double> all;
    for (int i = 0; i < 9; i++) all.push_back((seconds(more) - seconds(less)) / more.count);
    std::ranges::sort(all);
    return std::max(0.0, all[all.size() / 2]);
  }
  static constexpr int64_t kRows = 256, kInner = 512, kColumns = 1024, kMatrices = 64;

 private:
  const Tensor& x_;
  const Tensor a_{{kRows, kInner}, Dtype::f32, Memory::workspace},
      c_{{kRows, kColumns}, Dtype::f32, Memory::workspace};
  std::vector<Tensor> b_;
  ncclComm_t comm_ = nullptr;
  cudaStream_t other_ = nullptr;
  int64_t next_ = 0;
};

static void measure(const Job& job, const char* name, ncclComm_t world, int color,
                    const Tensor& x) {
  Pair pair(job, world, color, x);
  constexpr int kRows = Pair::kRows;
  constexpr size_t kLarge = Pair::kLarge, kSmall = 128 << 10, kShort = 2 << 10;
  const double small = pair.difference({20, 1, kRows, kSmall}, {20, 1, kRows}),
               large = pair.difference({3, 1, kRows, kLarge}, {3, 1, kRows}),
               rate = double(kLarge - kSmall) / (large - small),
               latency = std::max(0.0, small - double(kSmall) / rate) / 2;
  REQUIRE(large > small, "this link is too fast to be measured beside a product");
  const double one = pair.difference({20, 1, kRows}, {20, 0, kRows});
  const int many = 1 + int(1.5 * large / one);  // they take longer than what is beside them
  const double hidden = pair.difference({1, many, kRows, kLarge}, {1, many, kRows, kLarge, true});
  // as decoding has them: products of one row
  const double short_call = pair.difference({100, 2, 1, kShort}, {100, 2, 1});
  if (job.rank) return;
  printf("%s %.4f %.1f : measured\n", name, rate / 1e9, 1e6 * latency);
  if (std::string(name) != "between") return;
  printf("overlap %.3f : measured\n", std::min(hidden / large, 1.0));
  printf("short %.1f : measured\n", 1e6 * short_call / 2);
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
      MPI_Ibcast(&id, sizeof id, MPI_BYTE, 0, MPI_COMM_WORLD, UntilDone());
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
