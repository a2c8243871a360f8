// nccl.cpp: NCCL's API for ranks without NCCL: calls become tasks in the order of the stream, and the collectives are written on a Link.
//
// idea      a call is checked, numbered and put into its stream; there it meets its peers, moves data and is done. The protocol stands in
//           nccl_internal.h. Streams that run at once return the error from the call itself; others keep it for ncclCommGetAsyncError.
// CUDA      without -DCPU_FAST or -DCPU_FAITHFUL device memory is copied to pinned host memory before, and back after, in the stream
// test      tests/test_nccl.cpp, tests/bench_nccl.cpp
#include <nccl.h>
#include <sched.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <unordered_map>
#include <utility>

#include "nccl_internal.h"

namespace nccl {

// ---- threads: only where ranks leave cores free

std::atomic<int> ranks_here{1};

int cores() {
  static const int count = [] {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) ? 1 : CPU_COUNT(&set);
  }();
  return count;
}

namespace {

// part(begin, end) over [0, count), multiples of 64.
template <class Part> void in_parts(size_t count, size_t bytes_each, const Part& part) {
  const size_t threads = count * bytes_each < (1 << 20) ? 1 : std::max(1, cores() / ranks_here);
  if (threads == 1) return part(0, count);
  const size_t share = (count / threads + 64) / 64 * 64;
#pragma omp parallel for num_threads(threads)
  for (size_t t = 0; t < threads; t++) part(std::min(count, t * share), std::min(count, (t + 1) * share));
}

}  // namespace

void copy(char* to, const char* from, size_t bytes) {
  if (to != from && bytes) in_parts(bytes, 1, [=](size_t begin, size_t end) { memcpy(to + begin, from + begin, end - begin); });
}

// ---- sums, in ascending rank

namespace {

struct Bf16 { uint16_t bits; };
inline float widen(Bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T> T widen(T x) { return x; }
template <class T> T narrow(T x) { return x; }
template <class T> requires std::is_same_v<T, Bf16> Bf16 narrow(float x) {  // to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  return {uint16_t(nan ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

struct Sum {
  template <class T> T operator()(T a, T b) const {
    if constexpr (std::is_integral_v<T>) return T(std::make_unsigned_t<T>(a) + std::make_unsigned_t<T>(b));  // wraps
    else return a + b;
  }
};
struct Prod {
  template <class T> T operator()(T a, T b) const {
    if constexpr (std::is_integral_v<T>) return T(std::make_unsigned_t<T>(a) * std::make_unsigned_t<T>(b));
    else return a * b;
  }
};
struct Max { template <class T> T operator()(T a, T b) const { return a < b ? b : a; } };
struct Min { template <class T> T operator()(T a, T b) const { return b < a ? b : a; } };

// to[i] = from[0][i] op from[1][i] op ...; `to` may be one of `from`.
template <class T, class Fold> void fold(char* to, const std::vector<const char*>& from, size_t count, Fold op, int divide_by) {
  using Wide = decltype(widen(T{}));
  in_parts(count, sizeof(T) * from.size(), [&](size_t begin, size_t end) {
    constexpr size_t kBlock = 1024;
    alignas(64) Wide sum[kBlock];
    for (; begin < end; begin += kBlock) {
      const size_t m = std::min(kBlock, end - begin);
      const T* first = reinterpret_cast<const T*>(from[0]) + begin;
#pragma omp simd
      for (size_t i = 0; i < m; i++) sum[i] = widen(first[i]);
      for (size_t q = 1; q < from.size(); q++) {
        const T* x = reinterpret_cast<const T*>(from[q]) + begin;
#pragma omp simd
        for (size_t i = 0; i < m; i++) sum[i] = op(sum[i], Wide(widen(x[i])));
      }
      if (divide_by > 1)
        for (size_t i = 0; i < m; i++) sum[i] = Wide(sum[i] / Wide(divide_by));
      T* out = reinterpret_cast<T*>(to) + begin;
#pragma omp simd
      for (size_t i = 0; i < m; i++) out[i] = narrow<T>(sum[i]);
    }
  });
}

template <class T> void fold(char* to, const std::vector<const char*>& from, size_t count, int op) {
  switch (op) {
    case ncclProd: return fold<T>(to, from, count, Prod{}, 1);
    case ncclMax: return fold<T>(to, from, count, Max{}, 1);
    case ncclMin: return fold<T>(to, from, count, Min{}, 1);
    default: return fold<T>(to, from, count, Sum{}, op == ncclAvg ? int(from.size()) : 1);
  }
}

void reduce(const Op& call, char* to, const std::vector<const char*>& from, size_t count) {
  const int op = call.record.op;
  switch (call.record.dtype) {
    case ncclInt8: return fold<int8_t>(to, from, count, op);
    case ncclUint8: return fold<uint8_t>(to, from, count, op);
    case ncclInt32: return fold<int32_t>(to, from, count, op);
    case ncclUint32: return fold<uint32_t>(to, from, count, op);
    case ncclInt64: return fold<int64_t>(to, from, count, op);
    case ncclUint64: return fold<uint64_t>(to, from, count, op);
    case ncclFloat32: return fold<float>(to, from, count, op);
    case ncclFloat64: return fold<double>(to, from, count, op);
    case ncclBfloat16: return fold<Bf16>(to, from, count, op);
  }
}

// ---- the collectives

struct Bytes { size_t begin, bytes; };  // of a send buffer

// The peers of `op`, beginning after this rank, so that not all read from the same one first.
template <class Visit> void for_peers(const Op& op, Visit visit) {
  for (int i = 1; i < op.comm->size; i++) visit((op.comm->rank + i) % op.comm->size);
}

// Everyone's record is there and agrees with mine.
void meet(Task& task, Op& op) {
  op.comm->link->announce(op);
  std::vector<bool> met(size_t(op.comm->size));
  met[op.comm->rank] = true;
  wait_until(task, [&] {
    bool all = true;
    for (int q = 0; q < op.comm->size; q++) {
      if (met[q]) continue;
      if (const Record* theirs = op.comm->link->heard(op, q)) compare(op, q, *theirs), met[q] = true;
      else all = false;
    }
    return all;
  });
}

void finish_phase(Task& task, Op& op) {
  op.comm->link->arrive(op);
  wait_until(task, [&] { return op.comm->link->released(op); });
  op.phase++;
}

// Everyone's `bytes` at `offset` of its send buffer, in ascending rank; where[q] is what rank q wants of mine.
std::vector<const char*> gather_sources(Task& task, Op& op, size_t offset, size_t bytes, const std::function<Bytes(int)>& where) {
  Link& link = *op.comm->link;
  std::vector<const char*> from(size_t(op.comm->size));
  from[op.comm->rank] = op.send + offset;
  for_peers(op, [&](int q) {
    const Bytes theirs = where(q);
    if (theirs.bytes) link.offer(op, q, op.send + theirs.begin, theirs.bytes);
    if (bytes) from[q] = link.fetch(op, q, Side::send, offset, bytes, nullptr);
  });
  wait_until(task, [&] { return link.fetched(op); });
  return from;
}

void all_gather(Task& task, Op& op) {
  const size_t slice = op.send_bytes;
  for_peers(op, [&](int q) {
    op.comm->link->offer(op, q, op.send, slice);
    op.comm->link->fetch(op, q, Side::send, 0, slice, op.recv + size_t(q) * slice);
  });
  copy(op.recv + size_t(op.comm->rank) * slice, op.send, slice);
  wait_until(task, [&] { return op.comm->link->fetched(op); });
  finish_phase(task, op);
}

void reduce_scatter(Task& task, Op& op) {
  const size_t slice = op.recv_bytes;
  const auto from = gather_sources(task, op, size_t(op.comm->rank) * slice, slice, [&](int q) { return Bytes{size_t(q) * slice, slice}; });
  reduce(op, op.recv, from, op.record.count);
  finish_phase(task, op);
}

// Small: everyone sums everything. Large: rank q sums part q, then all gather the parts.
void all_reduce(Task& task, Op& op) {
  const size_t each = size_of(op.record.dtype), count = op.record.count, n = size_t(op.comm->size);
  const size_t share = op.record.inlined ? count : (count / n + 64) / 64 * 64;
  const auto part = [&](int q) {
    const size_t begin = op.record.inlined ? 0 : std::min(count, size_t(q) * share);
    return Bytes{begin * each, (std::min(count, begin + share) - begin) * each};
  };
  const Bytes mine = part(op.comm->rank);
  const auto from = gather_sources(task, op, mine.begin, mine.bytes, part);
  reduce(op, op.recv + mine.begin, from, mine.bytes / each);
  if (op.record.inlined) return finish_phase(task, op);
  finish_phase(task, op);
  for_peers(op, [&](int q) {
    const Bytes theirs = part(q);
    if (mine.bytes) op.comm->link->offer(op, q, op.recv + mine.begin, mine.bytes);
    if (theirs.bytes) op.comm->link->fetch(op, q, Side::recv, theirs.begin, theirs.bytes, op.recv + theirs.begin);
  });
  wait_until(task, [&] { return op.comm->link->fetched(op); });
  finish_phase(task, op);
}

void broadcast(Task& task, Op& op) {
  const size_t bytes = op.recv_bytes;
  const bool root = op.comm->rank == op.record.peer;
  if (!root) op.comm->link->fetch(op, op.record.peer, Side::send, 0, bytes, op.recv);
  else for_peers(op, [&](int q) { op.comm->link->offer(op, q, op.send, bytes); });
  if (root) copy(op.recv, op.send, bytes);
  wait_until(task, [&] { return op.comm->link->fetched(op); });
  finish_phase(task, op);
}

void reduce_to_root(Task& task, Op& op) {
  const size_t bytes = op.send_bytes;
  if (op.comm->rank == op.record.peer) {
    const auto from = gather_sources(task, op, 0, bytes, [](int) { return Bytes{0, 0}; });
    reduce(op, op.recv, from, op.record.count);
  } else {
    op.comm->link->offer(op, op.record.peer, op.send, bytes);
  }
  finish_phase(task, op);
}

void run_collective(Task& task, Op& op) {
  meet(task, op);
  if (op.record.count == 0) return finish_phase(task, op);
  switch (op.record.call) {
    case Call::all_gather: case Call::split: return all_gather(task, op);
    case Call::reduce_scatter: return reduce_scatter(task, op);
    case Call::all_reduce: return all_reduce(task, op);
    case Call::broadcast: return broadcast(task, op);
    default: return reduce_to_root(task, op);
  }
}

// ---- sends and receives: all of a group make progress together

// True when it is complete. Calls of one pair and direction follow one another.
bool advance(Op& op) {
  ncclComm& comm = *op.comm;
  const int q = op.record.peer;
  const bool sends = op.record.call == Call::send;
  if (op.stage == 0) {
    if (op.record.number != (sends ? comm.sent : comm.received)[q] + 1) return false;
    comm.link->announce(op);
    op.stage = 1;
  }
  if (op.stage == 1) {
    const Record* theirs = comm.link->heard(op, q);
    if (!theirs) return false;
    compare(op, q, *theirs);
    if (sends) comm.link->offer(op, q, op.send, op.send_bytes);
    else comm.link->fetch(op, q, Side::send, 0, op.recv_bytes, op.recv);
    op.stage = 2;
  }
  if (op.stage == 2) {
    if (!comm.link->fetched(op)) return false;
    if (!sends) comm.link->arrive(op);
    op.stage = 3;
  }
  if (op.stage == 3) {
    if (!comm.link->released(op)) return false;
    (sends ? comm.sent : comm.received)[q]++;
    op.stage = 4;
  }
  return true;
}

// ---- a task, when its stream has come to it

std::mutex order_mutex;  // which task runs: one at a time, in the order of issue
std::condition_variable order_changed;
uint64_t running_ticket = 1, next_ticket = 1;

void show_status(const Task& task, const Op& op, uint32_t state) {
  Status& status = my_status();
  status.record = op.record;
  status.calls_in_task = int(task.ops.size());
  status.peer_world = op.record.peer >= 0 ? op.comm->world(op.record.peer) : -1;
  snprintf(status.comm, sizeof status.comm, "%s", op.comm->description.c_str());
  status.state.store(state, std::memory_order_release);
}

void complete(Task& task, Op& op) {
  if (op.staged_recv && !kCuda) copy(op.user_recv, op.staged_recv, op.recv_bytes);
  if (is_strict() && op.checksum) check_sum(op);
  count_traffic(op);
  show_status(task, op, 2);
}

void require_healthy(ncclComm& comm) {
  if (comm.error == ncclSuccess) return;
  std::lock_guard lock(comm.mutex);
  fail(comm.error, comm.why);
}

void run_calls(Task& task) {
  for (const auto& comm : task.comms) require_healthy(*comm);
  for (Op& op : task.ops) {
    if (kCuda || !op.comm->link->needs_staging(op)) continue;
    op.send = op.staged_send = take_block(op.send_bytes);
    op.recv = op.staged_recv = take_block(op.recv_bytes);
    copy(op.staged_send, op.user_send, op.send_bytes);
  }
  std::vector<Op*> pairs;
  for (Op& op : task.ops) {
    if (!op.collective()) {
      pairs.push_back(&op);
      continue;
    }
    show_status(task, op, 1);
    run_collective(task, op);
    complete(task, op);
  }
  if (!pairs.empty()) show_status(task, *pairs[0], 1);
  wait_until(task, [&] {
    const size_t before = pairs.size();
    std::erase_if(pairs, [&](Op* op) {
      const bool done = advance(*op);
      if (done) complete(task, *op);
      return done;
    });
    if (!pairs.empty() && pairs.size() < before) show_status(task, *pairs[0], 1);
    return pairs.empty();
  });
}

void set_failed(ncclComm& comm, const Failure& failure) {
  {
    std::lock_guard lock(comm.mutex);
    if (comm.error != ncclSuccess) return;
    comm.why = failure.sentence;
    comm.error = failure.code;
  }
  if (comm.link) comm.link->give_up(failure.sentence);
}

// Messages that are still under way keep their buffers for ever.
void abandon(Task& task) {
  static auto* kept = new std::vector<Op>;
  for (Op& op : task.ops) {
    for (auto& [q, letter] : op.letters)
      if (!letter.here && letter.request != MPI_REQUEST_NULL) MPI_Cancel(&letter.request), MPI_Request_free(&letter.request);
    if (op.comm->shares) continue;
    kept->push_back(std::move(op));
    op = Op{};
  }
}

void run(Task& task) {
  {
    std::unique_lock lock(order_mutex);
    order_changed.wait(lock, [&] { return running_ticket == task.ticket; });
  }
  try {
    run_calls(task);
  } catch (const Failure& failure) {
    task.result = failure.code;
    set_last_error(failure.sentence);
    for (const auto& comm : task.comms) set_failed(*comm, failure);
    abandon(task);
  }
  for (Op& op : task.ops)
    if (!kCuda && op.staged_send) give_block(op.staged_send, op.send_bytes), give_block(op.staged_recv, op.recv_bytes);
  for (const auto& comm : task.comms) {
    std::lock_guard lock(comm->mutex);
    comm->pending--;
    comm->idle.notify_all();
  }
  {
    std::lock_guard lock(order_mutex);
    running_ticket++;
  }
  order_changed.notify_all();
}

// ---- into the stream

void cuda_check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) fail(ncclUnhandledCudaError, what, ": ", cudaGetErrorString(status));
}

#if defined(CPU_FAST) || defined(CPU_FAITHFUL)
void put_into_stream(const std::shared_ptr<Task>& task) {
  const cudaStream_t stream = task->ops[0].stream;
  if (is_strict())
    cpu::submit(stream, [task] { for (Op& op : task->ops) fill_and_sum(op); });
  cpu::submit(stream, [task] { run(*task); });
}
#else
// Host functions of two streams may share a thread, so a second stream has to wait until the first is empty.
void put_into_stream(const std::shared_ptr<Task>& task) {
  static cudaStream_t last = task->ops[0].stream;
  const cudaStream_t stream = task->ops[0].stream;
  if (stream != last) cuda_check(cudaStreamSynchronize(last), "cudaStreamSynchronize");
  last = stream;
  for (Op& op : task->ops) {
    op.stream = stream;
    if (is_strict()) fill_and_sum(op);
    op.send = op.staged_send = take_block(op.send_bytes);
    op.recv = op.staged_recv = take_block(op.recv_bytes);
    if (op.send_bytes)
      cuda_check(cudaMemcpyAsync(op.staged_send, op.user_send, op.send_bytes, cudaMemcpyDeviceToHost, stream), "cudaMemcpyAsync");
  }
  struct Kept { std::shared_ptr<Task> task; };
  const auto start = [](void* kept) { run(*static_cast<Kept*>(kept)->task); };
  const auto end = [](void* kept) {
    for (Op& op : static_cast<Kept*>(kept)->task->ops)
      if (op.staged_send) give_block(op.staged_send, op.send_bytes), give_block(op.staged_recv, op.recv_bytes);
    delete static_cast<Kept*>(kept);
  };
  Kept* kept = new Kept{task};
  struct Back { char *to, *from; size_t bytes; };
  std::vector<Back> backs;
  for (const Op& op : task->ops) backs.push_back({op.user_recv, op.staged_recv, op.recv_bytes});
  cuda_check(cudaLaunchHostFunc(stream, start, kept), "cudaLaunchHostFunc");
  for (const Back& b : backs)
    if (b.bytes) cuda_check(cudaMemcpyAsync(b.to, b.from, b.bytes, cudaMemcpyHostToDevice, stream), "cudaMemcpyAsync");
  cuda_check(cudaLaunchHostFunc(stream, end, kept), "cudaLaunchHostFunc");
}
#endif

// All streams of a group wait for its first one and the other way round.
void join_streams(const std::vector<cudaStream_t>& streams, bool before) {
  for (cudaStream_t stream : streams) {
    if (stream == streams[0]) continue;
    cudaEvent_t event;
    cuda_check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
    cuda_check(cudaEventRecord(event, before ? stream : streams[0]), "cudaEventRecord");
    cuda_check(cudaStreamWaitEvent(before ? streams[0] : stream, event, 0), "cudaStreamWaitEvent");
    cuda_check(cudaEventDestroy(event), "cudaEventDestroy");
  }
}

std::mutex issue_mutex;  // numbers, tickets and places in streams are given out together

void number_calls(Task& task) {
  for (Op& op : task.ops) {
    ncclComm& comm = *op.comm;
    if (std::find(task.comms.begin(), task.comms.end(), op.comm) == task.comms.end()) task.comms.push_back(op.comm);
    Record& r = op.record;
    if (!op.collective()) {
      r.number = ++(r.call == Call::send ? comm.sends : comm.receives)[r.peer];
      continue;
    }
    r.number = ++comm.collectives;
    r.group_size = 0;
    for (const Op& other : task.ops) {
      if (other.comm != op.comm || !other.collective()) continue;
      if (&other == &op) r.group_index = r.group_size;
      r.group_size++;
    }
  }
  for (const auto& comm : task.comms) {
    std::lock_guard lock(comm->mutex);
    comm->pending++;
  }
  std::lock_guard lock(order_mutex);
  task.ticket = next_ticket++;
}

// `at_once`: in the calling thread, whatever the streams do.
ncclResult_t issue(std::vector<Op> ops, bool at_once = false) {
  std::vector<cudaStream_t> streams;
  for (const Op& op : ops) {
    require_healthy(*op.comm);
    streams.push_back(op.stream);
  }
  try {
    if (!at_once) check_overlaps(ops);
  } catch (const Failure& failure) {  // nothing of the group is issued: its peers must not wait
    for (const Op& op : ops) set_failed(*op.comm, failure);
    throw;
  }
  const auto task = std::make_shared<Task>();
  task->ops = std::move(ops);
  std::lock_guard lock(issue_mutex);
  number_calls(*task);
  if (at_once) return run(*task), task->result;
  join_streams(streams, true);
  put_into_stream(task);
  join_streams(streams, false);
#if defined(CPU_FAST) || defined(CPU_FAITHFUL)
  if (!cpu::streams_are_queued) return task->result;
#endif
  return ncclSuccess;
}

// ---- from the API's arguments to a call

std::mutex live_mutex;
std::unordered_map<const ncclComm*, std::shared_ptr<ncclComm>>& live() {
  static auto* live = new std::unordered_map<const ncclComm*, std::shared_ptr<ncclComm>>;
  return *live;
}
std::shared_ptr<ncclComm> find(const ncclComm* comm) {
  std::lock_guard lock(live_mutex);
  const auto found = live().find(comm);
  if (found == live().end()) fail(ncclInvalidArgument, comm ? "the communicator was destroyed or never made" : "the communicator is null");
  return found->second;
}
ncclComm* keep(const std::shared_ptr<ncclComm>& comm) {
  std::lock_guard lock(live_mutex);
  live()[comm.get()] = comm;
  return comm.get();
}

thread_local struct { int depth = 0; std::vector<Op> ops; ncclResult_t result = ncclSuccess; } group;

std::mutex last_error_mutex;
std::string last_error;

// Every entry: a Failure becomes its code, its sentence is kept, and the communicator that it concerns gives up, so that peers do not wait.
template <class Body> ncclResult_t enter(const Body& body, const std::shared_ptr<ncclComm>* concerned = nullptr) {
  try {
    return body();
  } catch (const Failure& failure) {
    set_last_error(failure.sentence);
    if (concerned && *concerned) set_failed(**concerned, failure);
    if (group.depth) group.result = failure.code;
    return failure.code;
  }
}

struct Arguments { Call call; const void* send; void* recv; size_t count; int dtype, op, peer; ncclComm_t comm; cudaStream_t stream; };

Op make_op(const Arguments& a, const std::shared_ptr<ncclComm>& comm) {
  const size_t each = size_of(a.dtype), n = size_t(comm->size), bytes = a.count * each;
  if (!each) fail(ncclInvalidArgument, "this NCCL stand-in does not know dtype ", a.dtype);
  if (a.count >> 44) fail(ncclInvalidArgument, "a count of ", a.count, " elements");
  Op op;
  op.record.call = a.call, op.record.dtype = a.dtype, op.record.op = a.op, op.record.peer = a.peer, op.record.count = a.count;
  op.comm = comm, op.stream = a.stream;
  op.send = op.user_send = static_cast<const char*>(a.send), op.recv = op.user_recv = static_cast<char*>(a.recv);
  op.send_bytes = op.recv_bytes = bytes;
  size_t payload = bytes;  // the longest send buffer of any rank
  switch (a.call) {
    case Call::all_gather: case Call::split: op.recv_bytes = n * bytes; break;
    case Call::reduce_scatter: op.send_bytes = payload = n * bytes; break;
    case Call::broadcast: if (comm->rank != a.peer) op.send_bytes = 0; break;
    case Call::reduce: if (comm->rank != a.peer) op.recv_bytes = 0; break;
    case Call::send: op.recv_bytes = 0; break;
    case Call::recv: op.send_bytes = 0; break;
    default: break;
  }
  op.record.inlined = op.collective() && payload <= kInline;
  return op;
}

ncclResult_t call(const Arguments& a) {
  std::shared_ptr<ncclComm> comm;
  return enter([&] {
    comm = find(a.comm);
    Op op = make_op(a, comm);
    check_arguments(op);
    if (!group.depth) {
      std::vector<Op> ops;
      ops.push_back(std::move(op));
      return issue(std::move(ops));
    }
    group.ops.push_back(std::move(op));
    return ncclSuccess;
  }, &comm);
}

// ---- splitting: a collective of the parent like any other

struct Choice { int32_t color, key; uint32_t id; uint64_t desk; };

std::shared_ptr<ncclComm> split(const std::shared_ptr<ncclComm>& parent, int color, int key) {
  if (!group.ops.empty()) fail(ncclInvalidUsage, "ncclCommSplit inside a group that has calls in it");
  Choice mine{color, key, next_id(), new_desk(parent->size)};
  std::vector<Choice> all(parent->size);
  std::vector<Op> ops;
  ops.push_back(make_op({Call::split, &mine, all.data(), sizeof mine, ncclInt8, 0, -1, parent.get(), nullptr}, parent));
  const ncclResult_t result = issue(std::move(ops), true);
  if (result != ncclSuccess) require_healthy(*parent);
  if (color == NCCL_SPLIT_NOCOLOR) return nullptr;
  std::vector<int> chosen;
  for (int q = 0; q < parent->size; q++)
    if (all[q].color == color) chosen.push_back(q);
  std::stable_sort(chosen.begin(), chosen.end(), [&](int a, int b) { return all[a].key < all[b].key; });
  auto child = std::make_shared<ncclComm>();
  child->size = int(chosen.size());
  child->may_share = parent->may_share;
  for (int r = 0; r < child->size; r++) {
    const int q = chosen[r];
    child->members.push_back(parent->members[q]);
    child->members[r].rank = r;
    child->members[r].desk = all[q].desk;
    child->id = std::max(child->id, all[q].id);
    if (q == parent->rank) child->rank = r;
  }
  open_link(*child);
  return child;
}

void check_config(const ncclConfig_t* config) {
  if (config && config->magic != 0xcafebeef) fail(ncclInvalidArgument, "the ncclConfig_t does not begin as NCCL_CONFIG_INITIALIZER");
}

void flush(ncclComm& comm) {
  std::unique_lock lock(comm.mutex);
  comm.idle.wait(lock, [&] { return comm.pending == 0; });
}

void forget(const ncclComm* comm) {
  std::lock_guard lock(live_mutex);
  live().erase(comm);
}

}  // namespace

void set_last_error(const std::string& text) {
  std::lock_guard lock(last_error_mutex);
  last_error = text;
}

}  // namespace nccl

// ---- NCCL's functions

using namespace nccl;

ncclResult_t ncclGetVersion(int* version) { return *version = NCCL_VERSION_CODE, ncclSuccess; }

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  return enter([&] { return make_id(id), ncclSuccess; });
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int nranks, ncclUniqueId id, int rank, ncclConfig_t* config) {
  return enter([&] {
    check_config(config);
    if (nranks < 1 || rank < 0 || rank >= nranks) fail(ncclInvalidArgument, "ncclCommInitRank: rank ", rank, " of ", nranks);
    *comm = keep(meet_by_id(nranks, id, rank));
    return ncclSuccess;
  });
}

ncclResult_t ncclCommInitRank(ncclComm_t* comm, int nranks, ncclUniqueId id, int rank) {
  return ncclCommInitRankConfig(comm, nranks, id, rank, nullptr);
}

ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t* newcomm, ncclConfig_t* config) {
  std::shared_ptr<ncclComm> parent;
  return enter([&] {
    check_config(config);
    parent = find(comm);
    const auto child = split(parent, color, key);
    *newcomm = child ? keep(child) : nullptr;
    return ncclSuccess;
  }, &parent);
}

ncclResult_t ncclCommFinalize(ncclComm_t comm) {
  return enter([&] { return flush(*find(comm)), ncclSuccess; });
}

ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  return enter([&] { return flush(*find(comm)), forget(comm), ncclSuccess; });
}

ncclResult_t ncclCommAbort(ncclComm_t comm) {
  return enter([&] {
    const auto live = find(comm);
    live->aborted = true;
    set_failed(*live, {ncclInternalError, sentence("rank ", live->world(live->rank), " aborted ", live->description)});
    return forget(comm), ncclSuccess;
  });
}

ncclResult_t ncclCommCount(const ncclComm_t comm, int* count) {
  return enter([&] { return *count = find(comm)->size, ncclSuccess; });
}
ncclResult_t ncclCommUserRank(const ncclComm_t comm, int* rank) {
  return enter([&] { return *rank = find(comm)->rank, ncclSuccess; });
}
ncclResult_t ncclCommCuDevice(const ncclComm_t comm, int* device) {
  return enter([&] { return *device = find(comm)->device, ncclSuccess; });
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error) {
  return enter([&] { return *error = find(comm)->error, ncclSuccess; });
}

const char* ncclGetErrorString(ncclResult_t result) {
  static const char* texts[] = {"no error", "unhandled cuda error", "unhandled system error", "internal error", "invalid argument",
                                "invalid usage", "remote process exited or there was a network error", "NCCL operation in progress"};
  return result >= 0 && result < ncclNumResults ? texts[result] : "unknown result code";
}

const char* ncclGetLastError(ncclComm_t comm) {
  static thread_local std::string text;
  text.clear();
  if (comm) enter([&] {
    const auto live = find(comm);
    std::lock_guard lock(live->mutex);
    return text = live->why, ncclSuccess;
  });
  std::lock_guard lock(last_error_mutex);
  if (text.empty()) text = last_error;
  return text.c_str();
}

ncclResult_t ncclAllReduce(const void* send, void* recv, size_t count, ncclDataType_t dtype, ncclRedOp_t op, ncclComm_t comm, cudaStream_t s) {
  return call({Call::all_reduce, send, recv, count, dtype, op, -1, comm, s});
}
ncclResult_t ncclAllGather(const void* send, void* recv, size_t count, ncclDataType_t dtype, ncclComm_t comm, cudaStream_t s) {
  return call({Call::all_gather, send, recv, count, dtype, 0, -1, comm, s});
}
ncclResult_t ncclReduceScatter(const void* send, void* recv, size_t count, ncclDataType_t dtype, ncclRedOp_t op, ncclComm_t comm,
                               cudaStream_t s) {
  return call({Call::reduce_scatter, send, recv, count, dtype, op, -1, comm, s});
}
ncclResult_t ncclBroadcast(const void* send, void* recv, size_t count, ncclDataType_t dtype, int root, ncclComm_t comm, cudaStream_t s) {
  return call({Call::broadcast, send, recv, count, dtype, 0, root, comm, s});
}
ncclResult_t ncclReduce(const void* send, void* recv, size_t count, ncclDataType_t dtype, ncclRedOp_t op, int root, ncclComm_t comm,
                        cudaStream_t s) {
  return call({Call::reduce, send, recv, count, dtype, op, root, comm, s});
}
ncclResult_t ncclSend(const void* send, size_t count, ncclDataType_t dtype, int peer, ncclComm_t comm, cudaStream_t s) {
  return call({Call::send, send, nullptr, count, dtype, 0, peer, comm, s});
}
ncclResult_t ncclRecv(void* recv, size_t count, ncclDataType_t dtype, int peer, ncclComm_t comm, cudaStream_t s) {
  return call({Call::recv, nullptr, recv, count, dtype, 0, peer, comm, s});
}

ncclResult_t ncclGroupStart() { return group.depth++, ncclSuccess; }

ncclResult_t ncclGroupEnd() {
  if (!group.depth) return set_last_error("ncclGroupEnd without ncclGroupStart"), ncclInvalidUsage;
  if (--group.depth) return group.result;
  std::vector<Op> ops = std::exchange(group.ops, {});
  const ncclResult_t result = std::exchange(group.result, ncclSuccess);
  if (result != ncclSuccess || ops.empty()) {
    // One refused call ends its whole group: nothing of it is issued, and peers of the others hear why.
    for (const Op& op : ops) set_failed(*op.comm, {result, last_error});
    return result;
  }
  return enter([&] { return issue(std::move(ops)); });
}
