// nccl.cpp: NCCL's API for ranks without NCCL: a call is checked, numbered and put into its stream
// as a task.
//
// idea      when its stream has come to a task, it meets its peers, moves data and is done: the
//           protocol stands in nccl_internal.h. Streams that run immediately return the error from
//           the call itself; others keep it for ncclCommGetAsyncError.
// CUDA      without -DCPU_FAST or -DCPU_FAITHFUL device memory is copied to pinned host memory
//           before, and back after, in the stream
// test      tests/test_nccl.cpp, tests/bench_nccl.cpp
#include <nccl.h>

#include <algorithm>
#include <unordered_map>
#include <utility>

#include "nccl_internal.h"

namespace nccl {

namespace {

// ---- a task, when its stream has come to it

// which task runs: one at a time, in the order of issue, also while the program exits
std::mutex order_mutex;
auto& order_changed = *new std::condition_variable;
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
      if (!letter.here && letter.request != MPI_REQUEST_NULL)
        MPI_Cancel(&letter.request), MPI_Request_free(&letter.request);
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
  const auto failed = [&](const Failure& failure) {
    task.result = failure.code;
    my_status().state = 3;
    set_last_error(failure.sentence);
    for (const auto& comm : task.comms) set_failed(*comm, failure);
    abandon(task);
  };
  try {
    run_calls(task);
  } catch (const Failure& failure) {
    failed(failure);
  } catch (const std::exception& e) {
    failed({ncclSystemError, e.what()});
  }
  for (Op& op : task.ops)
    if (!kCuda && op.staged_send)
      give_block(op.staged_send, op.send_bytes), give_block(op.staged_recv, op.recv_bytes);
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
    cpu::submit(stream, [task] {
      for (Op& op : task->ops) fill_and_sum(op);
    });
  cpu::submit(stream, [task] { run(*task); });
}
#else
// Host functions of two streams may share a thread, so a second stream has to wait until the first
// has done its tasks: for an event, which outlives its stream.
void put_into_stream(const std::shared_ptr<Task>& task) {
  static cudaEvent_t done = nullptr;
  static cudaStream_t last = nullptr;
  const cudaStream_t stream = task->ops[0].stream;
  if (!done) cuda_check(cudaEventCreateWithFlags(&done, cudaEventDisableTiming), "cudaEventCreate");
  else if (stream != last) cuda_check(cudaEventSynchronize(done), "cudaEventSynchronize");
  last = stream;
  for (Op& op : task->ops) {
    op.stream = stream;
    if (is_strict()) fill_and_sum(op);
    op.send = op.staged_send = take_block(op.send_bytes);
    op.recv = op.staged_recv = take_block(op.recv_bytes);
    if (op.send_bytes)
      cuda_check(cudaMemcpyAsync(op.staged_send, op.user_send, op.send_bytes,
                                 cudaMemcpyDeviceToHost, stream),
                 "cudaMemcpyAsync");
  }
  struct Kept {
    std::shared_ptr<Task> task;
  };
  const auto start = [](void* kept) { run(*static_cast<Kept*>(kept)->task); };
  const auto end = [](void* kept) {
    for (Op& op : static_cast<Kept*>(kept)->task->ops)
      if (op.staged_send)
        give_block(op.staged_send, op.send_bytes), give_block(op.staged_recv, op.recv_bytes);
    delete static_cast<Kept*>(kept);
  };
  Kept* kept = new Kept{task};
  struct Back {
    char *to, *from;
    size_t bytes;
  };
  std::vector<Back> backs;
  for (const Op& op : task->ops) backs.push_back({op.user_recv, op.staged_recv, op.recv_bytes});
  cuda_check(cudaLaunchHostFunc(stream, start, kept), "cudaLaunchHostFunc");
  for (const Back& b : backs)
    if (b.bytes)
      cuda_check(cudaMemcpyAsync(b.to, b.from, b.bytes, cudaMemcpyHostToDevice, stream),
                 "cudaMemcpyAsync");
  cuda_check(cudaLaunchHostFunc(stream, end, kept), "cudaLaunchHostFunc");
  cuda_check(cudaEventRecord(done, stream), "cudaEventRecord");
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
    if (std::find(task.comms.begin(), task.comms.end(), op.comm) == task.comms.end())
      task.comms.push_back(op.comm);
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
  if (found == live().end())
    fail(ncclInvalidArgument,
         comm ? "the communicator was destroyed or never made" : "the communicator is null");
  return found->second;
}
ncclComm* keep(const std::shared_ptr<ncclComm>& comm) {
  std::lock_guard lock(live_mutex);
  live()[comm.get()] = comm;
  return comm.get();
}

thread_local struct {
  int depth = 0;
  std::vector<Op> ops;
  ncclResult_t result = ncclSuccess;
} group;

std::mutex last_error_mutex;
auto& last_error = *new std::string;  // streams may outlast static destructors

// Every entry: a Failure becomes its code, its sentence is kept, and the communicator that it
// concerns gives up, so that peers do not wait.
template <class Body>
ncclResult_t enter(const Body& body, const std::shared_ptr<ncclComm>* concerned = nullptr) {
  try {
    return body();
  } catch (const Failure& failure) {
    set_last_error(failure.sentence);
    if (concerned && *concerned) set_failed(**concerned, failure);
    if (group.depth) group.result = failure.code;
    return failure.code;
  }
}

struct Arguments {
  Call call;
  const void* send;
  void* recv;
  size_t count;
  int dtype, op, peer;
  ncclComm_t comm;
  cudaStream_t stream;
};

Op make_op(const Arguments& a, const std::shared_ptr<ncclComm>& comm) {
  const size_t each = size_of(a.dtype), n = size_t(comm->size), bytes = a.count * each;
  if (!each) fail(ncclInvalidArgument, "this NCCL stand-in does not know dtype ", a.dtype);
  if (a.op != ncclSum && a.op != ncclMax)
    fail(ncclInvalidArgument, "this NCCL stand-in does not know reduction ", a.op);
  if (a.count >> 44) fail(ncclInvalidArgument, "a count of ", a.count, " elements");
  Op op;
  op.record.call = a.call, op.record.dtype = a.dtype, op.record.op = a.op, op.record.peer = a.peer,
  op.record.count = a.count;
  op.comm = comm, op.stream = a.stream;
  op.send = op.user_send = static_cast<const char*>(a.send),
  op.recv = op.user_recv = static_cast<char*>(a.recv);
  op.send_bytes = op.recv_bytes = bytes;
  size_t payload = bytes;  // the longest send buffer of any rank
  switch (a.call) {
    case Call::all_gather:
    case Call::split: op.recv_bytes = n * bytes; break;
    case Call::reduce_scatter: op.send_bytes = payload = n * bytes; break;
    case Call::broadcast:
      if (comm->rank != a.peer) op.send_bytes = 0;
      break;
    case Call::send: op.recv_bytes = 0; break;
    case Call::recv: op.send_bytes = 0; break;
    default: break;
  }
  op.record.inlined = op.collective() && payload <= kInline;
  return op;
}

ncclResult_t call(const Arguments& a) {
  std::shared_ptr<ncclComm> comm;
  return enter(
      [&] {
        comm = find(a.comm);
        Op op = make_op(a, comm);
        check_arguments(op);
        group.ops.push_back(std::move(op));
        return group.depth ? ncclSuccess : issue(std::exchange(group.ops, {}));
      },
      &comm);
}

// ---- splitting: a collective of the parent like any other

struct Choice {
  int32_t color, key;
  uint32_t id;
  uint64_t desk;
};

std::shared_ptr<ncclComm> split(const std::shared_ptr<ncclComm>& parent, int color, int key) {
  if (!group.ops.empty())
    fail(ncclInvalidUsage, "ncclCommSplit inside a group that has calls in it");
  if (color < 0 && color != NCCL_SPLIT_NOCOLOR)
    fail(ncclInvalidArgument, "ncclCommSplit: a color of ", color);
  Choice mine{color, key, next_id(), new_desk(parent->size)};
  std::vector<Choice> all(parent->size);
  std::vector<Op> ops;
  ops.push_back(make_op({Call::split, &mine, all.data(), sizeof mine / 4, ncclInt32, 0, -1,
                         parent.get(), nullptr},
                        parent));
  const ncclResult_t result = issue(std::move(ops), true);
  if (result != ncclSuccess) require_healthy(*parent);
  if (color == NCCL_SPLIT_NOCOLOR) return nullptr;
  std::vector<int> chosen;
  for (int q = 0; q < parent->size; q++)
    if (all[q].color == color) chosen.push_back(q);
  std::stable_sort(chosen.begin(), chosen.end(),
                   [&](int a, int b) { return all[a].key < all[b].key; });
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

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  return enter([&] { return make_id(id), ncclSuccess; });
}

ncclResult_t ncclCommInitRank(ncclComm_t* comm, int nranks, ncclUniqueId id, int rank) {
  return enter([&] {
    if (nranks < 1 || rank < 0 || rank >= nranks)
      fail(ncclInvalidArgument, "ncclCommInitRank: rank ", rank, " of ", nranks);
    *comm = keep(meet_by_id(nranks, id, rank));
    return ncclSuccess;
  });
}

ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t* newcomm,
                           ncclConfig_t*) {
  std::shared_ptr<ncclComm> parent;
  return enter(
      [&] {
        parent = find(comm);
        const auto child = split(parent, color, key);
        *newcomm = child ? keep(child) : nullptr;
        return ncclSuccess;
      },
      &parent);
}

ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  return enter([&] { return flush(*find(comm)), forget(comm), ncclSuccess; });
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error) {
  return enter([&] { return *error = find(comm)->error, ncclSuccess; });
}

const char* ncclGetErrorString(ncclResult_t result) {
  static const char* texts[] = {"no error",
                                "unhandled cuda error",
                                "unhandled system error",
                                "internal error",
                                "invalid argument",
                                "invalid usage",
                                "remote process exited or there was a network error",
                                "NCCL operation in progress"};
  return result >= 0 && result < ncclNumResults ? texts[result] : "unknown result code";
}

const char* ncclGetLastError(ncclComm_t comm) {
  static thread_local std::string text;
  text.clear();
  if (comm)
    enter([&] {
      const auto live = find(comm);
      std::lock_guard lock(live->mutex);
      return text = live->why, ncclSuccess;
    });
  std::lock_guard lock(last_error_mutex);
  if (text.empty()) text = last_error;
  return text.c_str();
}

ncclResult_t ncclAllReduce(const void* send, void* recv, size_t count, ncclDataType_t dtype,
                           ncclRedOp_t op, ncclComm_t comm, cudaStream_t s) {
  return call({Call::all_reduce, send, recv, count, dtype, op, -1, comm, s});
}
ncclResult_t ncclAllGather(const void* send, void* recv, size_t count, ncclDataType_t dtype,
                           ncclComm_t comm, cudaStream_t s) {
  return call({Call::all_gather, send, recv, count, dtype, 0, -1, comm, s});
}
ncclResult_t ncclReduceScatter(const void* send, void* recv, size_t count, ncclDataType_t dtype,
                               ncclRedOp_t op, ncclComm_t comm, cudaStream_t s) {
  return call({Call::reduce_scatter, send, recv, count, dtype, op, -1, comm, s});
}
ncclResult_t ncclBroadcast(const void* send, void* recv, size_t count, ncclDataType_t dtype,
                           int root, ncclComm_t comm, cudaStream_t s) {
  return call({Call::broadcast, send, recv, count, dtype, 0, root, comm, s});
}
ncclResult_t ncclSend(const void* send, size_t count, ncclDataType_t dtype, int peer,
                      ncclComm_t comm, cudaStream_t s) {
  return call({Call::send, send, nullptr, count, dtype, 0, peer, comm, s});
}
ncclResult_t ncclRecv(void* recv, size_t count, ncclDataType_t dtype, int peer, ncclComm_t comm,
                      cudaStream_t s) {
  return call({Call::recv, nullptr, recv, count, dtype, 0, peer, comm, s});
}

ncclResult_t ncclGroupStart() { return group.depth++, ncclSuccess; }

ncclResult_t ncclGroupEnd() {
  if (!group.depth) return set_last_error("ncclGroupEnd without ncclGroupStart"), ncclInvalidUsage;
  if (--group.depth) return group.result;
  std::vector<Op> ops = std::exchange(group.ops, {});
  const ncclResult_t result = std::exchange(group.result, ncclSuccess);
  if (result != ncclSuccess || ops.empty()) {
    // One refused call ends its whole group: nothing of it is issued, and peers of the others hear
    // why.
    for (const Op& op : ops) set_failed(*op.comm, {result, ncclGetLastError(nullptr)});
    return result;
  }
  return enter([&] { return issue(std::move(ops)); });
}
