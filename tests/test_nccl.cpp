// test_nccl.cpp: the NCCL stand-in computes what a plain loop computes, and refuses or reports what
// would hang or corrupt a cluster.
//
//   mpiexec -n 1..8 build/cpu/tests/test_nccl [part of a test's name]      worlds of 1..n are made
//   by ncclCommSplit
//
// Values repeat with the prime period 251, so that the reference of a million elements is a table;
// sums are compared bit by bit.
#include <cuda_bf16.h>
#include <sys/resource.h>
#include <unistd.h>

#include <csignal>
#include <map>
#include <memory>
#include <random>
#include <set>

#include "cpu/nccl/nccl_referee.h"
#include "support/files.h"
#include "tests/mpi_test.h"

namespace {

using nccl_referee::Call;

#if defined(CPU_FAST) || defined(CPU_FAITHFUL)
constexpr bool kCpu = true;
void queue_streams(uint64_t seed) {
  seed ? cpu::queue_streams(seed) : cpu::run_streams_immediately();
}
#else
constexpr bool kCpu = false;
void queue_streams(uint64_t) {}
#endif
struct Queued {
  explicit Queued(uint64_t seed) { queue_streams(seed); }
  ~Queued() { queue_streams(0); }
};
struct Strict {
  Strict() { nccl_referee::strict(true); }
  ~Strict() { nccl_referee::strict(false); }
};
struct Watch {
  explicit Watch(double seconds) { nccl_referee::watch(seconds); }
  ~Watch() { nccl_referee::watch(60); }
};

// ---- communicators and memory

ncclComm_t new_world(bool shared_memory) {
  ncclUniqueId id;
  if (!job().rank) NCCL_CHECK(ncclGetUniqueId(&id));
  MPI_Ibcast(&id, sizeof id, MPI_BYTE, 0, MPI_COMM_WORLD, UntilDone());
  ncclComm_t comm;
  nccl_referee::use_shared_memory(shared_memory);
  NCCL_CHECK(ncclCommInitRank(&comm, job().size, id, job().rank));
  nccl_referee::use_shared_memory(true);
  return comm;
}
ncclComm_t world(bool shared_memory = true) {
  static std::map<bool, ncclComm_t> worlds;
  if (!worlds.count(shared_memory)) worlds[shared_memory] = new_world(shared_memory);
  return worlds[shared_memory];
}
// The first n ranks; null on the others. Fresh, so that a test may break it.
struct Comm {
  ncclComm_t comm = nullptr;
  int rank = -1;
  explicit Comm(int n, bool shared_memory = true) {
    NCCL_CHECK(ncclCommSplit(world(shared_memory), job().rank < n ? 0 : NCCL_SPLIT_NOCOLOR,
                             job().rank, &comm, nullptr));
    if (comm) rank = job().rank;
  }
  ~Comm() {
    if (comm) ncclCommDestroy(comm);
  }
  Comm(const Comm&) = delete;
};

struct Stream {
  cudaStream_t stream;
  Stream() { CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)); }
  ~Stream() { cudaStreamDestroy(stream); }
  Stream(const Stream&) = delete;
  void wait() const { CUDA_CHECK(cudaStreamSynchronize(stream)); }
};

// ---- values and the plain reference

constexpr size_t kPeriod = 251;

template <class T> constexpr ncclDataType_t dtype_of();
template <> constexpr ncclDataType_t dtype_of<int32_t>() { return ncclInt32; }
template <> constexpr ncclDataType_t dtype_of<float>() { return ncclFloat32; }
template <> constexpr ncclDataType_t dtype_of<double>() { return ncclFloat64; }
template <> constexpr ncclDataType_t dtype_of<__nv_bfloat16>() { return ncclBfloat16; }

template <class T> T value(int rank, size_t i) {
  const int v = int((i % kPeriod * 37 + size_t(rank) * 101 + 11) % 199) - 99;
  if constexpr (std::is_integral_v<T>) return T(v * 1234567);
  else return T(float(v) * 0.37f);
}
// Element i of the reduction over n ranks, which begins with rank `first` and goes round: each sum
// is rounded to T.
template <class T> T reduced(int n, size_t i, ncclRedOp_t op, int first) {
  using Wide = std::conditional_t<std::is_same_v<T, __nv_bfloat16>, float, T>;
  Wide sum = Wide(value<T>(first, i));
  for (int r = 1; r < n; r++) {
    const Wide x = Wide(value<T>((first + r) % n, i));
    sum = op == ncclMax ? std::max(sum, x) : sum + x;
    sum = Wide(T(sum));
  }
  return T(sum);
}
// Elements first, first + 1, ... of something that repeats: by the tile into device memory and out
// of it.
template <class T> class Pattern {
 public:
  template <class Of> Pattern(size_t first, size_t count, Of of)
      : count(count), tile_(std::min(count, kTile)) {
    for (size_t i = 0; i < tile_.size(); i++)
      tile_[i] = i < kPeriod ? of(first + i) : tile_[i - kPeriod];
  }
  void write(T* to) const {
    for (size_t at = 0; at < count; at += kTile)
      CUDA_CHECK(cudaMemcpy(to + at, tile_.data(), std::min(kTile, count - at) * sizeof(T),
                            cudaMemcpyHostToDevice));
  }
  void expect(const T* device, const std::string& what) const {
    std::vector<T> got(tile_.size());
    for (size_t at = 0; at < count; at += kTile) {
      const size_t bytes = std::min(kTile, count - at) * sizeof(T);
      CUDA_CHECK(cudaMemcpy(got.data(), device + at, bytes, cudaMemcpyDeviceToHost));
      for (size_t i = 0; memcmp(got.data(), tile_.data(), bytes) && i < tile_.size(); i++)
        CHECK(!memcmp(&got[i], &tile_[i], sizeof(T)), what, ": element ", at + i, " is ",
              double(got[i]), ", expected ", double(tile_[i]));
    }
  }
  size_t count;

 private:
  static constexpr size_t kTile = kPeriod * 128;
  std::vector<T> tile_;
};
template <class T> Pattern<T> values(int rank, size_t first, size_t count) {
  return Pattern<T>(first, count, [=](size_t i) { return value<T>(rank, i); });
}
// owner: whose part they are, which is added last; without one, in ascending rank
template <class T>
Pattern<T> reductions(int n, size_t first, size_t count, ncclRedOp_t op, int owner = -1) {
  return Pattern<T>(first, count, [=](size_t i) { return reduced<T>(n, i, op, (owner + 1) % n); });
}

template <class T> struct Array {  // device memory
  T* data = nullptr;
  size_t count;
  explicit Array(size_t count) : count(count) {
    CUDA_CHECK(cudaMalloc(&data, std::max<size_t>(1, count) * sizeof(T)));
    CUDA_CHECK(cudaMemset(data, 0xee, std::max<size_t>(1, count) * sizeof(T)));
  }
  explicit Array(const Pattern<T>& content) : count(content.count) {
    CUDA_CHECK(cudaMalloc(&data, std::max<size_t>(1, count) * sizeof(T)));
    content.write(data);
  }
  explicit Array(const std::vector<T>& content) : Array(content.size()) {
    CUDA_CHECK(cudaMemcpy(data, content.data(), count * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~Array() { cudaFree(data); }
  Array(const Array&) = delete;
  std::vector<T> read() const {
    std::vector<T> host(count);
    CUDA_CHECK(cudaMemcpy(host.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
  }
};

struct Case {
  ncclComm_t comm;
  int n, me;
  size_t count;
  bool in_place;
  cudaStream_t stream;
};

template <class T> std::string name_of(const char* call, const Case& c, int op = 0) {
  return sentence(call, " of ", c.count, " elements of dtype ", int(dtype_of<T>()), ", op ", op,
                  ", ", c.n, " ranks", c.in_place ? ", in place" : "");
}

template <class T> void check_all_gather(const Case& c) {
  const Array<T> send(values<T>(c.me, 0, c.count)), all(c.n * c.count);
  T* mine = all.data + c.me * c.count;
  if (c.in_place) values<T>(c.me, 0, c.count).write(mine);
  NCCL_CHECK(ncclAllGather(c.in_place ? mine : send.data, all.data, c.count, dtype_of<T>(), c.comm,
                           c.stream));
  CUDA_CHECK(cudaStreamSynchronize(c.stream));
  for (int q = 0; q < c.n; q++)
    values<T>(q, 0, c.count).expect(all.data + q * c.count, name_of<T>("all-gather", c));
}

template <class T> void check_broadcast(const Case& c) {
  const int root = (c.n - 1) / 2;
  const Array<T> send(values<T>(c.me, 0, c.count)), recv(c.count);
  T* to = c.in_place ? send.data : recv.data;
  NCCL_CHECK(ncclBroadcast(send.data, to, c.count, dtype_of<T>(), root, c.comm, c.stream));
  CUDA_CHECK(cudaStreamSynchronize(c.stream));
  values<T>(root, 0, c.count).expect(to, name_of<T>("broadcast", c));
}

template <class T> void check_reductions(const Case& c, ncclRedOp_t op) {
  const Array<T> send(values<T>(c.me, 0, c.n * c.count)), recv(c.count);
  T* to = c.in_place ? send.data : recv.data;
  NCCL_CHECK(ncclAllReduce(send.data, to, c.count, dtype_of<T>(), op, c.comm, c.stream));
  CUDA_CHECK(cudaStreamSynchronize(c.stream));
  if (c.count * sizeof(T) <= 16384) {  // small: everyone sums all of it
    reductions<T>(c.n, 0, c.count, op).expect(to, name_of<T>("all-reduce", c, op));
  } else {
    const size_t share = (c.count / c.n + 64) / 64 * 64;
    for (int q = 0; q < c.n; q++) {
      const size_t begin = std::min(c.count, q * share), end = std::min(c.count, begin + share);
      reductions<T>(c.n, begin, end - begin, op, q)
          .expect(to + begin, name_of<T>("all-reduce", c, op));
    }
  }

  values<T>(c.me, 0, c.n * c.count).write(send.data);
  to = c.in_place ? send.data + c.me * c.count : recv.data;
  NCCL_CHECK(ncclReduceScatter(send.data, to, c.count, dtype_of<T>(), op, c.comm, c.stream));
  CUDA_CHECK(cudaStreamSynchronize(c.stream));
  reductions<T>(c.n, c.me * c.count, c.count, op, c.me)
      .expect(to, name_of<T>("reduce-scatter", c, op));
}

constexpr ncclRedOp_t kOps[] = {ncclSum, ncclMax};

// Every call for one dtype; the large counts with one op each, the small ones with all.
template <class T>
int check_dtype(ncclComm_t comm, int n, const std::vector<size_t>& counts, cudaStream_t stream) {
  int cases = 0;
  for (size_t count : counts)
    for (bool in_place : {false, true}) {
      const Case c{comm, n, job().rank, count, in_place, stream};
      check_all_gather<T>(c);
      check_broadcast<T>(c);
      for (ncclRedOp_t op : kOps)
        if (count < 100 || op == (in_place ? ncclMax : ncclSum))
          check_reductions<T>(c, op), cases += 2;
      cases += 2;
    }
  return cases;
}

// Ranks leave a part of a test together, also when one of them throws; wrong programs leave
// messages that nobody receives.
struct Together {
  ~Together() {
    barrier();
    for (int found = 1; found;) {
      MPI_Message message;
      MPI_Status status;
      MPI_Improbe(MPI_ANY_SOURCE, MPI_ANY_TAG, MPI_COMM_WORLD, &found, &message, &status);
      if (!found) break;
      int bytes;
      MPI_Get_count(&status, MPI_BYTE, &bytes);
      std::vector<char> nobodys(bytes);
      MPI_Mrecv(nobodys.data(), bytes, MPI_BYTE, &message, &status);
    }
    barrier();
  }
};

template <class... T> int check_sizes(const std::vector<int>& sizes,
                                      const std::vector<size_t>& counts, bool shared,
                                      cudaStream_t stream) {
  int cases = 0;
  for (int n : sizes) {
    if (n > job().size) continue;
    const Together together;
    Comm c(n, shared);
    if (c.comm) ((cases += check_dtype<T>(c.comm, n, counts, stream)), ...);
  }
  return cases;
}

// Until this rank is seen to wait in its call, ten seconds at most.
void until_it_waits(ncclComm_t comm) {
  const std::string mine = sentence("rank ", job().rank, " waits in ");
  for (int i = 0; i < 10000; i++) {
    if (nccl_referee::where_ranks_stand(comm).find(mine) != std::string::npos) return;
    usleep(1000);
  }
}

// A number from one rank to another, for which that one waits.
int pass(int number, int from, int to) {
  constexpr int kTag = 4711;
  if (job().rank == from) MPI_Send(&number, 1, MPI_INT, to, kTag, MPI_COMM_WORLD);
  if (job().rank == to)
    MPI_Recv(&number, 1, MPI_INT, from, kTag, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
  return number;
}

void need(int ranks) {
  if (job().size < ranks) skip(sentence("needs ", ranks, " ranks (mpiexec -n ", ranks, ")"));
}

}  // namespace

// ---- results

TEST(collectives_equal_a_plain_reference_in_every_dtype_on_1_to_n_ranks) {
  const Stream s;
  const std::vector<int> sizes = {1, 2, 3, 4, 5, 6, 7, 8};
  // what training sends
  int cases =
      check_sizes<float, __nv_bfloat16>(sizes, {0, 1, 3, kCpu ? 1000003u : 10007u}, true, s.stream);
  cases += check_sizes<int32_t, double>(sizes, {0, 1, 3, kCpu ? 100003u : 10007u}, true, s.stream);
  measured(cases, " cases on rank 0, every bit equal");
}

TEST(collectives_over_mpi_messages_equal_the_same_reference) {
  const Stream s;
  const int cases =
      check_sizes<float, __nv_bfloat16>({1, 2, 3, 5, 8}, {0, 1, 3, 5000, 50021}, false, s.stream);
  measured(cases, " cases on rank 0, every bit equal");
}

TEST(collectives_in_queued_streams_equal_the_same_reference) {
  const Queued queued(7);
  const Strict strict;
  const Stream s;
  const int shared =
      check_sizes<float, __nv_bfloat16>({1, 2, 3, 8}, {0, 1, 3, 50021}, true, s.stream);
  const int messages = check_sizes<float>({2, 3}, {3, 50021}, false, s.stream);
  measured(shared + messages,
           " cases on rank 0, receive buffers filled with NaN before, send buffers checksummed");
}

namespace {
void expect_same(const std::vector<float>& got, const std::vector<float>& wanted,
                 const char* what) {
  CHECK_EQ(got.size(), wanted.size());
  for (size_t i = 0; i < got.size(); i++)
    CHECK(!memcmp(&got[i], &wanted[i], 4), what, ": element ", i, " is ", got[i], ", expected ",
          wanted[i]);
}
}  // namespace

TEST(sums_have_the_same_bits_on_every_rank_whatever_the_transport) {
  const int n = job().size, me = job().rank;
  const size_t small = 100, large = 65536 * size_t(n);
  std::vector<float> mine(large);
  std::mt19937 random(unsigned(me) + 1);
  for (float& x : mine) x = float(random()) * 1e-9f * (random() % 2 ? 1e4f : -1.0f);
  const Array<float> send(mine);
  const auto reduce_all = [&](bool shared, size_t count) {
    Array<float> recv(count);
    NCCL_CHECK(
        ncclAllReduce(send.data, recv.data, count, ncclFloat, ncclSum, world(shared), nullptr));
    CUDA_CHECK(cudaStreamSynchronize(nullptr));
    return recv.read();
  };
  for (const size_t count : {small, large}) {
    const std::vector<float> all = reduce_all(true, count);
    std::vector<float> of_first = all;
    MPI_Ibcast(of_first.data(), int(count), MPI_FLOAT, 0, MPI_COMM_WORLD, UntilDone());
    expect_same(all, of_first, "all-reduce");
    expect_same(reduce_all(false, count), all, "all-reduce over MPI");
  }
  const auto scatter = [&](bool shared) {
    Array<float> part(large / n);
    NCCL_CHECK(ncclReduceScatter(send.data, part.data, part.count, ncclFloat, ncclSum,
                                 world(shared), nullptr));
    CUDA_CHECK(cudaStreamSynchronize(nullptr));
    return part.read();
  };
  expect_same(scatter(false), scatter(true), "reduce-scatter over MPI");
  measured(large, " random floats summed six ways");
}

// ---- sends and receives

namespace {
// Everyone sends two messages of different sizes to everyone, itself included, in one group.
void exchange_with_all(ncclComm_t comm, int n, cudaStream_t stream) {
  const int me = job().rank;
  const auto count = [n](int from, int to, int k) {
    return size_t((from * n + to) % 5 * 4001 + k * 3);
  };
  std::vector<std::unique_ptr<Array<int32_t>>> sent, got;
  std::vector<Pattern<int32_t>> wanted;
  NCCL_CHECK(ncclGroupStart());
  for (int k = 0; k < 2; k++)
    for (int q = 0; q < n; q++) {
      sent.push_back(
          std::make_unique<Array<int32_t>>(values<int32_t>(me * n + q + k, 5, count(me, q, k))));
      got.push_back(std::make_unique<Array<int32_t>>(count(q, me, k)));
      wanted.push_back(values<int32_t>(q * n + me + k, 5, count(q, me, k)));
      NCCL_CHECK(ncclSend(sent.back()->data, sent.back()->count, ncclInt32, q, comm, stream));
      NCCL_CHECK(ncclRecv(got.back()->data, got.back()->count, ncclInt32, q, comm, stream));
    }
  NCCL_CHECK(ncclGroupEnd());
  CUDA_CHECK(cudaStreamSynchronize(stream));
  for (size_t i = 0; i < got.size(); i++) wanted[i].expect(got[i]->data, sentence("message ", i));
}
}  // namespace

TEST(a_group_sends_to_itself_and_to_all_in_both_directions) {
  for (bool shared : {true, false})
    for (int n = 1; n <= job().size; n += shared ? 1 : 3) {
      Comm c(n, shared);
      if (c.comm) exchange_with_all(c.comm, n, nullptr);
      const Queued queued(uint64_t(n) + 1);
      const Stream s;
      if (c.comm) exchange_with_all(c.comm, n, s.stream);
    }
  measured("two messages for each ordered pair of 1..", job().size, " ranks, both transports");
}

TEST(ungrouped_sends_and_receives_follow_a_ring) {
  need(2);
  for (bool shared : {true, false}) {
    const int n = job().size, me = job().rank, right = (me + 1) % n, left = (me + n - 1) % n;
    Array<float> token(values<float>(me, 0, 30000)), got(30000);
    const auto send = [&] {
      NCCL_CHECK(ncclSend(token.data, token.count, ncclFloat, right, world(shared), nullptr));
    };
    const auto receive = [&] {
      NCCL_CHECK(ncclRecv(got.data, got.count, ncclFloat, left, world(shared), nullptr));
    };
    if (me == 0) send(), receive();
    else receive(), send();
    CUDA_CHECK(cudaStreamSynchronize(nullptr));
    values<float>(left, 0, 30000).expect(got.data, "token");
  }
}

// ---- random programs

namespace {

// One program: a list of steps drawn from a seed, the same on every rank. A step is a group of
// collectives, or of messages, on some of the communicators; a rank runs what concerns it and
// remembers what its buffers must hold in the end.
class Program {
 public:
  // comm is null where this rank is no member
  struct Known {
    ncclComm_t comm;
    std::vector<int> ranks;
  };
  Program(const std::vector<Known>& comms, unsigned seed, cudaStream_t stream)
      : comms_(comms), random_(seed), stream_(stream) {}

  void run() {
    const int steps = 3 + draw(6);
    for (int step = 0; step < steps; step++) {
      const bool messages = draw(3) == 0;
      const int calls = messages ? 1 + draw(12) : 1 + draw(3);
      const bool grouped = calls > 1 || draw(2) || messages;
      if (grouped) NCCL_CHECK(ncclGroupStart());
      for (int i = 0; i < calls; i++) messages ? message() : collective();
      if (grouped) NCCL_CHECK(ncclGroupEnd());
    }
    CUDA_CHECK(cudaStreamSynchronize(stream_));
    for (const Result& r : results_) r.wanted.expect(r.data, "a buffer of a random program");
  }
  int calls = 0;

 private:
  int draw(int below) { return int(random_() % unsigned(below)); }
  size_t draw_count() {
    const size_t longest[] = {1, 20, 5000, 60000};
    return random_() % longest[draw(4)];
  }
  int32_t* holding(const Pattern<int32_t>& content) {
    return buffers_.emplace_back(std::make_unique<Array<int32_t>>(content))->data;
  }
  int32_t* empty(size_t count) {
    return buffers_.emplace_back(std::make_unique<Array<int32_t>>(count))->data;
  }
  int32_t* awaiting(const Pattern<int32_t>& wanted) {
    results_.push_back({empty(wanted.count), wanted});
    return results_.back().data;
  }

  void message() {
    const Known& k = comms_[draw(int(comms_.size()))];
    const int n = int(k.ranks.size()), from = draw(n), to = draw(n), tag = draw(100);
    const size_t count = draw_count();
    calls++;
    if (k.ranks[from] == job().rank)
      NCCL_CHECK(ncclSend(holding(values<int32_t>(k.ranks[from] + tag, 0, count)), count, ncclInt32,
                          to, k.comm, stream_));
    if (k.ranks[to] == job().rank)
      NCCL_CHECK(ncclRecv(awaiting(values<int32_t>(k.ranks[from] + tag, 0, count)), count,
                          ncclInt32, from, k.comm, stream_));
  }

  void collective() {
    const Known& k = comms_[draw(int(comms_.size()))];
    const int n = int(k.ranks.size()), kind = draw(4), root = draw(n);
    const size_t count = draw_count();
    const ncclRedOp_t op = kOps[draw(2)];
    calls++;
    if (!k.comm) return;
    const int me = int(std::find(k.ranks.begin(), k.ranks.end(), job().rank) - k.ranks.begin());
    int32_t* send = holding(values<int32_t>(me, 0, kind == 2 ? n * count : count));
    if (kind == 0)
      NCCL_CHECK(ncclAllReduce(send, awaiting(reductions<int32_t>(n, 0, count, op)), count,
                               ncclInt32, op, k.comm, stream_));
    if (kind == 1) {
      int32_t* all = empty(n * count);
      for (int q = 0; q < n; q++)
        results_.push_back({all + q * count, values<int32_t>(q, 0, count)});
      NCCL_CHECK(ncclAllGather(send, all, count, ncclInt32, k.comm, stream_));
    }
    if (kind == 2)
      NCCL_CHECK(ncclReduceScatter(send, awaiting(reductions<int32_t>(n, me * count, count, op)),
                                   count, ncclInt32, op, k.comm, stream_));
    if (kind == 3)
      NCCL_CHECK(ncclBroadcast(send, awaiting(values<int32_t>(root, 0, count)), count, ncclInt32,
                               root, k.comm, stream_));
  }

  const std::vector<Known>& comms_;
  std::mt19937 random_;
  cudaStream_t stream_;
  struct Result {
    int32_t* data;
    Pattern<int32_t> wanted;
  };
  std::vector<std::unique_ptr<Array<int32_t>>> buffers_;
  std::vector<Result> results_;
};

// The world and random parts of it, split from it in the same order everywhere.
std::vector<Program::Known> random_parts(unsigned seed, bool shared) {
  std::mt19937 random(seed);
  std::vector<Program::Known> known;
  for (int split = 0; split < 3; split++) {
    std::vector<int> color(job().size);
    for (int& c : color) c = split ? int(random() % 3) : 0;
    ncclComm_t mine;
    // reversed ranks
    NCCL_CHECK(ncclCommSplit(world(shared), color[job().rank], -job().rank, &mine, nullptr));
    for (int c = 0; c < 3; c++) {
      Program::Known part{color[job().rank] == c ? mine : nullptr, {}};
      for (int r = job().size - 1; r >= 0; r--)
        if (color[r] == c) part.ranks.push_back(r);
      if (!part.ranks.empty()) known.push_back(part);
    }
  }
  return known;
}

}  // namespace

TEST(two_hundred_random_programs_end_and_agree) {
  const Strict strict;
  int calls = 0;
  for (unsigned batch = 0; batch < 10; batch++) {
    const bool shared = batch % 3 != 2;
    const auto parts = random_parts(batch + 1, shared);
    for (unsigned i = 0; i < 20; i++) {
      const Queued queued(i % 2 ? batch * 20 + i : 0);
      const Stream s;
      Program program(parts, batch * 1000 + i, s.stream);
      program.run();
      calls += program.calls;
    }
    for (const auto& part : parts)
      if (part.comm) NCCL_CHECK(ncclCommDestroy(part.comm));
  }
  measured(
      calls,
      " calls in groups over random parts of the world, half of the programs in queued streams, a "
      "third over MPI");
}

// ---- wrong programs

namespace {

struct Said {
  ncclResult_t result = ncclSuccess;
  std::string sentence;
};
// The error of a call: from the call where streams run immediately, else from the
// communicator.
Said say(ncclComm_t comm, ncclResult_t result) {
  if (result != ncclSuccess) return {result, ncclGetLastError(nullptr)};
  CUDA_CHECK(cudaDeviceSynchronize());
  NCCL_CHECK(ncclCommGetAsyncError(comm, &result));
  return {result, result == ncclSuccess ? "" : ncclGetLastError(comm)};
}

// Ranks `who` must have failed with a sentence that contains every part; afterwards the
// communicator stays failed.
void must_say(const Comm& c, const Said& said, const std::vector<std::string>& parts) {
  CHECK(said.result != ncclSuccess, "nothing was reported, expected '", parts[0], "'");
  for (const std::string& part : parts)
    CHECK(said.sentence.find(part) != std::string::npos, "said '", said.sentence, "', expected '",
          part, "'");
  ncclResult_t later = ncclSuccess;
  NCCL_CHECK(ncclCommGetAsyncError(c.comm, &later));
  CHECK(later != ncclSuccess, "the communicator forgot its error");
  Array<float> x(4);
  CHECK(ncclAllReduce(x.data, x.data, 4, ncclFloat, ncclSum, c.comm, nullptr) != ncclSuccess,
        "a later call was accepted");
}

// Runs a wrong program of the first two ranks on both transports and checks what both say.
void both_say(const std::function<ncclResult_t(const Comm&, float*)>& program,
              const std::vector<std::string>& parts, double watch = 5) {
  need(2);
  const Watch shorter(watch);
  for (bool shared : {true, false}) {
    const Together together;
    Comm c(2, shared);
    Array<float> x(100000);
    if (c.comm) must_say(c, say(c.comm, program(c, x.data)), parts);
  }
}

ncclResult_t all_reduce(const Comm& c, float* x, size_t count, ncclDataType_t dtype = ncclFloat,
                        ncclRedOp_t op = ncclSum) {
  return ncclAllReduce(x, x, count, dtype, op, c.comm, nullptr);
}

}  // namespace

TEST(another_count_is_reported_with_both_calls) {
  both_say([](const Comm& c, float* x) { return all_reduce(c, x, c.rank ? 1000 : 999); },
           {"rank 1 called all_reduce #1 (1000 f32 sum), "
            "rank 0 called all_reduce #1 (999 f32 sum) on "});
}
TEST(another_dtype_is_reported_with_both_calls) {
  both_say([](const Comm& c,
              float* x) { return all_reduce(c, x, 50, c.rank ? ncclFloat : ncclInt32); },
           {"rank 1 called all_reduce #1 (50 f32 sum), rank 0 called all_reduce #1 (50 i32 sum)"});
}
TEST(another_reduction_is_reported_with_both_calls) {
  both_say(
      [](const Comm& c, float* x) {
        return all_reduce(c, x, 50000, ncclFloat, c.rank ? ncclMax : ncclSum);
      },
      {"rank 1 called all_reduce #1 (50000 f32 max), rank 0 called all_reduce #1 (50000 f32 sum)"});
}
TEST(another_root_is_reported_with_both_calls) {
  both_say(
      [](const Comm& c, float* x) {
        return ncclBroadcast(x, x, 10, ncclFloat, c.rank, c.comm, nullptr);
      },
      {"rank 1 called broadcast #1 (10 f32 from rank 1), rank 0 called broadcast #1 (10 f32 from "
       "rank 0)"});
}
TEST(another_order_is_reported_with_both_calls) {
  both_say(
      [](const Comm& c, float* x) {
        NCCL_CHECK(all_reduce(c, x, 7));
        if (c.rank == 0) return ncclAllGather(x, x + 500, 500, ncclFloat, c.comm, nullptr);
        return all_reduce(c, x, 1000);
      },
      {"rank 1 called all_reduce #2 (1000 f32 sum), rank 0 called all_gather #2 (500 f32)"});
}
TEST(another_group_is_reported_with_both_calls) {
  both_say(
      [](const Comm& c, float* x) {
        if (c.rank == 0) return all_reduce(c, x, 10);
        NCCL_CHECK(ncclGroupStart());
        NCCL_CHECK(all_reduce(c, x, 10));
        NCCL_CHECK(all_reduce(c, x + 10, 10));
        return ncclGroupEnd();
      },
      {"rank 1 called all_reduce #1 (10 f32 sum) as collective 1 of 2 in its group, rank 0 called "
       "all_reduce #1 (10 f32 sum) on"});
}
TEST(a_split_against_a_collective_is_reported_with_both_calls) {
  both_say(
      [](const Comm& c, float* x) {
        ncclComm_t part;
        return c.rank ? ncclCommSplit(c.comm, 0, 0, &part, nullptr) : all_reduce(c, x, 3);
      },
      {"rank 1 called split #1, rank 0 called all_reduce #1 (3 f32 sum)"});
}
TEST(a_message_of_another_count_is_reported_with_both_calls) {
  both_say(
      [](const Comm& c, float* x) {
        return c.rank ? ncclSend(x, 100, ncclFloat, 0, c.comm, nullptr)
                      : ncclRecv(x, 50, ncclFloat, 1, c.comm, nullptr);
      },
      {"rank 1 called send #1 to rank 0 (100 f32), rank 0 called recv #1 from rank 1 (50 f32)"});
}
TEST(sends_that_face_each_other_outside_a_group_are_found_as_a_deadlock) {
  both_say(
      [](const Comm& c, float* x) {
        const ncclResult_t sent = ncclSend(x, 10, ncclFloat, 1 - c.rank, c.comm, nullptr);
        return sent != ncclSuccess ? sent
                                   : ncclRecv(x + 10, 10, ncclFloat, 1 - c.rank, c.comm, nullptr);
      },
      {"deadlock: rank ", "waits in send #1 to rank "}, 0.5);
}
TEST(a_message_in_another_order_than_a_collective_is_found_as_a_deadlock) {
  both_say(
      [](const Comm& c, float* x) {
        if (c.rank == 0) return ncclSend(x, 10, ncclFloat, 1, c.comm, nullptr);
        return all_reduce(c, x, 10);
      },
      {"deadlock: rank "}, 0.5);
}

TEST(a_missing_rank_is_found_and_the_report_says_where_everyone_stands) {
  need(3);
  const Together together;
  const Watch usual(60);  // until all are here, and again at the end
  Comm c(3);
  Array<float> x(64);
  if (c.comm) {
    nccl_referee::name(c.comm, "fsdp");
    NCCL_CHECK(all_reduce(c, x.data, 7));
  }
  barrier();  // who comes late to what is right must not be missed
  nccl_referee::watch(0.6);
  if (c.rank == 0 || c.rank == 1)
    must_say(
        c, say(c.comm, ncclAllGather(x.data, x.data + 8, 8, ncclFloat, c.comm, nullptr)),
        {"deadlock: rank ", "waits in all_gather #2 (8 f32) on communicator 'fsdp' of ranks 0,1,2",
         "rank 2 has completed all_reduce #1 (7 f32 sum) on communicator 'fsdp' of ranks 0,1,2 and "
         "called nothing since"});
  if (c.comm) measured(nccl_referee::where_ranks_stand(c.comm));
}

TEST(a_stopped_rank_is_named) {
  need(2);
  const Together together;
  const Watch usual(60);  // until all are here, and again at the end
  Comm c(2);
  Array<float> x(64);
  if (c.comm) NCCL_CHECK(all_reduce(c, x.data, 7));
  nccl_referee::watch(0.6);
  const int stopped = pass(getpid(), 1, 0);
  if (c.rank == 1) raise(SIGSTOP);
  if (c.rank == 0) {
    const struct Resumes {
      int pid;
      ~Resumes() { kill(pid, SIGCONT); }
    } resumes{stopped};
    const auto stands = [&] {
      return read_file(sentence("/proc/", stopped, "/stat")).find(") T ") != std::string::npos;
    };
    for (int i = 0; i < 10000 && !stands(); i++) usleep(1000);
    const double start = MPI_Wtime();
    const Said said = say(c.comm, all_reduce(c, x.data, 8));
    const double took = MPI_Wtime() - start;
    must_say(c, said,
             {"rank 1 has completed all_reduce #1 (7 f32 sum)", "(its process is stopped)"});
    measured("after ", took, " s with a watch of 0.6 s");
  }
}

TEST(a_rank_that_is_missing_at_the_start_is_named) {
  need(2);
  const Together together;
  const Watch shorter(0.6);
  ncclUniqueId id;
  if (!job().rank) NCCL_CHECK(ncclGetUniqueId(&id));
  MPI_Ibcast(&id, sizeof id, MPI_BYTE, 0, MPI_COMM_WORLD, UntilDone());
  ncclComm_t comm;
  if (job().rank == 0) {
    const ncclResult_t result = ncclCommInitRank(&comm, job().size, id, 0);
    const Said said{result, ncclGetLastError(nullptr)};
    CHECK(said.sentence.find(sentence("rank 0 made the id and misses number ", job().size - 1)) !=
                  std::string::npos ||
              said.sentence.find("misses number 1 2") != std::string::npos,
          "said '", said.sentence, "'");
  }
}

TEST(buffers_that_overlap_by_another_offset_than_in_place_are_refused) {
  need(2);
  struct Wrong {
    const char* what;
    std::function<ncclResult_t(const Comm&, float*)> call;
  };
  const Wrong wrongs[] = {
      {"send and receive buffers overlap",
       [](const Comm& c, float* x) {
         return ncclAllReduce(x, x + 1, 10, ncclFloat, ncclSum, c.comm, nullptr);
       }},
      {"send and receive buffers overlap",
       [](const Comm& c, float* x) {
         return ncclAllGather(x + 1, x, 10, ncclFloat, c.comm, nullptr);
       }},
      {"send and receive buffers overlap",
       [](const Comm& c, float* x) {
         return ncclReduceScatter(x, x + 10 * (1 - c.rank), 10, ncclFloat, ncclSum, c.comm,
                                  nullptr);
       }},
      {"its receive buffer overlaps with the send buffer of send #",
       [](const Comm& c, float* x) {
         NCCL_CHECK(ncclGroupStart());
         NCCL_CHECK(ncclSend(x, 10, ncclFloat, 1 - c.rank, c.comm, nullptr));
         NCCL_CHECK(ncclRecv(x + 9, 10, ncclFloat, 1 - c.rank, c.comm, nullptr));
         return ncclGroupEnd();
       }},
      {"its receive buffer overlaps with the receive buffer of recv #",
       [](const Comm& c, float* x) {
         NCCL_CHECK(ncclGroupStart());
         NCCL_CHECK(ncclRecv(x, 10, ncclFloat, 1 - c.rank, c.comm, nullptr));
         NCCL_CHECK(ncclRecv(x, 10, ncclFloat, 1 - c.rank, c.comm, nullptr));
         return ncclGroupEnd();
       }}};
  for (const Wrong& wrong : wrongs) {
    const Together together;
    Comm c(2);
    Array<float> x(100);
    if (c.comm) must_say(c, say(c.comm, wrong.call(c, x.data)), {"rank ", wrong.what});
  }
}

TEST(host_memory_null_buffers_and_bad_ranks_are_refused) {
  std::vector<float> host(8);
  Array<float> x(8);
  const auto refused = [&](const std::function<ncclResult_t(ncclComm_t)>& call,
                           const std::string& part) {
    Comm c(1);
    if (c.comm) must_say(c, say(c.comm, call(c.comm)), {part});
  };
  if (kCpu)
    refused(
        [&](ncclComm_t c) {
          return ncclAllReduce(host.data(), x.data, 8, ncclFloat, ncclSum, c, nullptr);
        },
        "is host memory");
  refused(
      [&](ncclComm_t c) {
        return ncclAllReduce(x.data, nullptr, 8, ncclFloat, ncclSum, c, nullptr);
      },
      "receive buffer is null");
  refused([&](ncclComm_t c) { return ncclBroadcast(x.data, x.data, 8, ncclFloat, 1, c, nullptr); },
          "there is no rank 1 among its 1");
  refused([&](ncclComm_t c) { return ncclSend(x.data, 8, ncclFloat, -1, c, nullptr); },
          "there is no rank -1 among its 1");
  CHECK_EQ(ncclAllReduce(x.data, x.data, 8, ncclFloat, ncclSum, nullptr, nullptr),
           ncclInvalidArgument);
  refused(
      [&](ncclComm_t c) {
        const ncclDataType_t half = ncclDataType_t(6);
        return ncclAllReduce(x.data, x.data, 8, half, ncclSum, c, nullptr);
      },
      "does not know dtype 6");
  refused(
      [&](ncclComm_t c) {
        const ncclRedOp_t min = ncclRedOp_t(3);
        return ncclAllReduce(x.data, x.data, 8, ncclFloat, min, c, nullptr);
      },
      "does not know reduction 3");
  CHECK_EQ(ncclGroupEnd(), ncclInvalidUsage);
  CHECK_EQ(std::string(ncclGetErrorString(ncclInvalidUsage)), "invalid usage");
}

TEST(buffers_that_are_not_within_one_block_odd_addresses_and_dead_streams_are_refused) {
  if (!kCpu) skip("the CPU knows where its device memory lies");
  Array<float> x(8);
  cudaStream_t dead;
  CUDA_CHECK(cudaStreamCreate(&dead));
  CUDA_CHECK(cudaStreamDestroy(dead));
  const auto refused = [&](size_t skipped, size_t count, cudaStream_t stream,
                           const std::string& part) {
    Comm c(1);
    char* const from = reinterpret_cast<char*>(x.data) + skipped;
    if (c.comm)
      must_say(c, say(c.comm, ncclAllReduce(from, from, count, ncclFloat, ncclSum, c.comm, stream)),
               {part});
  };
  refused(0, 9, nullptr, "the send buffer of 36 bytes does not lie in one block");
  refused(4, 8, nullptr, "does not lie in one block");
  refused(2, 7, nullptr, "the send buffer does not begin at an element");
  refused(0, 8, dead, "its stream was destroyed");
}

TEST(a_negative_color_is_refused) {
  Comm c(1);
  ncclComm_t part;
  if (c.comm)
    must_say(c, say(c.comm, ncclCommSplit(c.comm, -2, 0, &part, nullptr)), {"a color of -2"});
}

TEST(two_ranks_on_one_gpu_are_refused_with_what_to_do) {
  if (!kCpu) skip("with COMM=mpi ranks share a GPU");
  need(2);
  const Together together;
  const int mine = job().local_rank % device_count();
  CUDA_CHECK(cudaSetDevice(0));
  ncclUniqueId id;
  if (!job().rank) NCCL_CHECK(ncclGetUniqueId(&id));
  MPI_Ibcast(&id, sizeof id, MPI_BYTE, 0, MPI_COMM_WORLD, UntilDone());
  ncclComm_t comm;
  const ncclResult_t result = ncclCommInitRank(&comm, job().size, id, job().rank);
  const std::string said = nccl_error(result);
  CUDA_CHECK(cudaSetDevice(mine));
  CHECK_EQ(result, ncclInvalidUsage);
  for (const char* part : {"Duplicate GPU detected: rank ", " are both on device 0",
                           "NCCL gives each rank a GPU of its own: start fewer ranks"})
    CHECK(said.find(part) != std::string::npos, "said '", said, "'");
}

TEST(a_failure_in_a_queued_stream_is_kept_and_told_to_the_peers) {
  if (!kCpu) skip("streams are not queued on this backend");
  need(3);
  const Together together;
  const Queued queued(3);
  const Watch shorter(5);
  Comm c(3);
  Array<float> x(64);
  const Stream s;
  if (c.comm) {
    // accepted: it is only queued
    NCCL_CHECK(
        ncclAllReduce(x.data, x.data, c.rank == 2 ? 9 : 10, ncclFloat, ncclSum, c.comm, s.stream));
    s.wait();
    must_say(c, say(c.comm, ncclSuccess), {"rank 2 called all_reduce #1 (9 f32 sum), rank "});
  }
}

// ---- the tests' mode

TEST(a_writer_that_does_not_wait_is_caught_by_the_checksum) {
  if (!kCpu) skip("send buffers are checksummed on the CPU");
  need(2);
  const Together together;
  const Queued queued(5);
  const Strict strict;
  Comm c(2);
  if (c.comm) {
    const Stream s;
    Array<float> send(values<float>(0, 0, 20000)), recv(20000);
    if (c.rank == 1) pass(0, 0, 1);  // so that rank 0 writes while its all-reduce waits
    NCCL_CHECK(
        ncclAllReduce(send.data, recv.data, send.count, ncclFloat, ncclSum, c.comm, s.stream));
    if (c.rank == 0) {
      until_it_waits(c.comm);
      send.data[7] = 1234;
      pass(0, 0, 1);
    }
    s.wait();
    if (c.rank == 0)
      must_say(c, say(c.comm, ncclSuccess),
               {"rank 0: all_reduce #1 (20000 f32 sum)", "send buffer changed", "without waiting"});
  }
}

TEST(a_reader_that_does_not_wait_finds_nan) {
  if (!kCpu) skip("device memory is read by the host");
  need(2);
  const Together together;
  const Queued queued(6);
  const Strict strict;
  Comm c(2);
  if (c.comm) {
    const Stream s;
    Array<float> send(values<float>(c.rank, 0, 20000)), recv(std::vector<float>(20000, 1.0f));
    if (c.rank == 1) pass(0, 0, 1);
    NCCL_CHECK(
        ncclAllReduce(send.data, recv.data, send.count, ncclFloat, ncclSum, c.comm, s.stream));
    if (c.rank == 0) {
      until_it_waits(c.comm);
      const std::vector<float> early(recv.data, recv.data + recv.count);
      pass(0, 0, 1);
      for (const float x : early)
        CHECK(std::isnan(x), "a receive buffer holds ", x, " before its call is done");
    }
    s.wait();
    reductions<float>(2, 0, 20000, ncclSum).expect(recv.data, "all-reduce");
  }
}

// ---- order, waiting, counts

TEST(calls_on_two_streams_run_in_the_order_of_issue) {
  const Queued queued(9);
  const Stream a, b;
  Array<int32_t> x(values<int32_t>(job().rank, 0, 5000));
  std::vector<std::unique_ptr<Array<int32_t>>> got;
  for (int i = 0; i < 20; i++) {
    got.push_back(std::make_unique<Array<int32_t>>(5000));
    NCCL_CHECK(ncclAllReduce(x.data, got.back()->data, 5000, ncclInt32, ncclSum, world(),
                             (i + job().rank) % 3 ? a.stream : b.stream));
  }
  a.wait(), b.wait();
  for (const auto& g : got)
    reductions<int32_t>(job().size, 0, 5000, ncclSum).expect(g->data, "all-reduce");
}

TEST(a_waiting_rank_leaves_its_core_to_others) {
  need(2);
  for (bool shared : {true, false}) {
    const Together together;
    Comm c(2, shared);
    if (c.comm) {
      Array<float> x(1000);
      if (c.rank == 1) usleep(1000000);
      rusage before, after;
      getrusage(RUSAGE_SELF, &before);
      const double start = MPI_Wtime();
      NCCL_CHECK(all_reduce(c, x.data, 1000));
      const double waited = std::max(MPI_Wtime() - start, 1.0);  // longer, if rank 1 comes late
      getrusage(RUSAGE_SELF, &after);
      const auto seconds = [](const timeval& t) {
        return double(t.tv_sec) + 1e-6 * double(t.tv_usec);
      };
      const double used = seconds(after.ru_utime) + seconds(after.ru_stime) -
                          seconds(before.ru_utime) - seconds(before.ru_stime);
      CHECK_LE(used, 0.3 * waited, "seconds that it used and waited");
      if (c.rank == 0) measured(shared ? "shared memory " : ", MPI ", used, " s of processor time");
    }
  }
  measured(" in a wait of 1 s");
}

TEST(the_stand_in_counts_the_bytes_of_the_formulas) {
  using nccl_referee::traffic;
  for (bool shared : {true, false}) {
    const int n = job().size;
    Comm c(n, shared);
    const int64_t each = 4, count = 12000;
    Array<float> x(size_t(n * count)), y(size_t(n * count));
    NCCL_CHECK(ncclAllReduce(x.data, y.data, count, ncclFloat, ncclSum, c.comm, nullptr));
    NCCL_CHECK(ncclAllGather(x.data, y.data, count, ncclFloat, c.comm, nullptr));
    NCCL_CHECK(ncclReduceScatter(x.data, y.data, count, ncclFloat, ncclSum, c.comm, nullptr));
    NCCL_CHECK(ncclGroupStart());
    NCCL_CHECK(ncclSend(x.data, count, ncclFloat, (c.rank + 1) % n, c.comm, nullptr));
    NCCL_CHECK(ncclRecv(y.data, count, ncclFloat, (c.rank + n - 1) % n, c.comm, nullptr));
    NCCL_CHECK(ncclGroupEnd());
    CUDA_CHECK(cudaStreamSynchronize(nullptr));
    // n times what a rank sends in an all-gather
    const int64_t slices = (n - 1) * n * count * each;
    CHECK_EQ(traffic(c.comm, Call::all_gather).numerator, slices);
    CHECK_EQ(traffic(c.comm, Call::all_gather).copied * n, slices);
    CHECK_EQ(traffic(c.comm, Call::reduce_scatter).numerator, slices);
    CHECK_EQ(traffic(c.comm, Call::reduce_scatter).copied * n, slices);
    CHECK_EQ(traffic(c.comm, Call::all_reduce).numerator, 2 * (n - 1) * count * each);
    CHECK_EQ(traffic(c.comm, Call::send).numerator, n * count * each);
    CHECK_EQ(traffic(c.comm, Call::recv).copied, n > 1 ? count * each : 0);
    CHECK_EQ(traffic(c.comm, Call::send).calls, 1);
    CHECK_EQ(traffic(c.comm, Call::all_reduce).n, n);
    // What all ranks read in an all-reduce adds up to what all send.
    int64_t copied = traffic(c.comm, Call::all_reduce).copied, sum = 0;
    MPI_Iallreduce(&copied, &sum, 1, MPI_INT64_T, MPI_SUM, MPI_COMM_WORLD, UntilDone());
    CHECK_EQ(sum, 2 * (n - 1) * count * each);
  }
  measured("all-gather, reduce-scatter, all-reduce, send, exactly");
}

// ---- communicators

TEST(split_orders_by_key_and_leaves_out_those_without_a_color) {
  const int n = job().size, me = job().rank;
  ncclComm_t part;
  NCCL_CHECK(ncclCommSplit(world(), me == n - 1 && n > 1 ? NCCL_SPLIT_NOCOLOR : me % 2, -me, &part,
                           nullptr));
  if (me == n - 1 && n > 1) {
    CHECK(part == nullptr);
    return;
  }
  std::vector<float> ranks;  // of those with my color, the last first
  for (int q = n > 1 ? n - 2 : 0; q >= 0; q--)
    if (q % 2 == me % 2) ranks.push_back(float(q));
  const Array<float> mine(std::vector<float>{float(me)}), all(ranks.size());
  NCCL_CHECK(ncclAllGather(mine.data, all.data, 1, ncclFloat, part, nullptr));
  CUDA_CHECK(cudaStreamSynchronize(nullptr));
  CHECK(all.read() == ranks);
  NCCL_CHECK(ncclCommDestroy(part));
  CHECK_EQ(ncclCommDestroy(part), ncclInvalidArgument);
}

int main(int argc, char** argv) { return run_mpi_tests(argc, argv); }
