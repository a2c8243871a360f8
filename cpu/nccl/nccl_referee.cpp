// nccl_referee.cpp: what the NCCL stand-in compares and says: records of the two sides, overlaps of
// buffers, the watch, checksums.
//
// idea      whatever would hang or corrupt a cluster ends here with one sentence that names the
//           ranks (of MPI_COMM_WORLD) and the calls
// watch     a rank that waits longer than the watch allows reports where every rank of the
//           communicator stands: its last call on any communicator, whether it completed, and
//           whether its process still runs. These records lie in memory that outlives the process.
// test      tests/test_nccl.cpp
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <fstream>

#include "nccl_internal.h"

namespace nccl {

// ---- settings

namespace {
double seconds_from_environment() {
  const char* text = getenv("THREEFOLD_TIMEOUT");
  const double seconds = text ? atof(text) : 0;
  return seconds > 0 ? seconds : 60;
}
std::atomic<double> watch_setting{0};  // 0: the environment's, read when it is first needed
std::atomic<bool> strict_setting{getenv("THREEFOLD_REFEREE") && atoi(getenv("THREEFOLD_REFEREE"))};
}  // namespace
bool is_strict() { return strict_setting; }
double watch_seconds() {
  static const double from_environment = seconds_from_environment();
  return watch_setting > 0 ? watch_setting.load() : from_environment;
}

// ---- words

size_t size_of(int dtype) {
  switch (dtype) {
    case ncclBfloat16: return 2;
    case ncclInt32:
    case ncclFloat32: return 4;
    case ncclFloat64: return 8;
    default: return 0;
  }
}
namespace {
const char* call_names[] = {"no call",   "all_reduce", "all_gather", "reduce_scatter",
                            "broadcast", "send",       "recv",       "split"};
const char* name_of(int dtype) {
  return dtype == ncclInt32     ? "i32"
         : dtype == ncclFloat32 ? "f32"
         : dtype == ncclFloat64 ? "f64"
                                : "bf16";
}

std::string words(const Record& r, int peer_world) {
  std::string s = sentence(call_names[int(r.call)], " #", r.number);
  if (r.call == Call::split) return s;
  if (r.call == Call::send) s += sentence(" to rank ", peer_world);
  if (r.call == Call::recv) s += sentence(" from rank ", peer_world);
  s += sentence(" (", r.count, " ", name_of(r.dtype));
  if (r.call == Call::all_reduce || r.call == Call::reduce_scatter)
    s += r.op == ncclMax ? " max" : " sum";
  if (r.call == Call::broadcast) s += sentence(" from rank ", peer_world);
  s += ")";
  if (r.group_size > 1)
    s += sentence(" as collective ", r.group_index + 1, " of ", r.group_size, " in its group");
  return s;
}
}  // namespace

std::string words(const ncclComm& comm, const Record& r) {
  return words(r, r.peer >= 0 && r.peer < comm.size ? comm.world(r.peer) : r.peer);
}

std::string describe(const ncclComm& comm) {
  std::string ranks;
  for (int q = 0; q < comm.size; q++) {
    if (comm.size > 8 && q == 6) ranks += ",...";
    if (comm.size <= 8 || q < 6 || q == comm.size - 1)
      ranks += sentence(q ? "," : "", comm.world(q));
  }
  if (comm.name == "world") return "communicator 'world'";
  if (comm.name.empty()) return "the communicator of ranks " + ranks;
  return sentence("communicator '", comm.name, "' of ranks ", ranks);
}

// ---- before a call is issued

namespace {
template <class... Parts>
[[noreturn]] void refuse(ncclResult_t code, const Op& op, const Parts&... why) {
  fail(code, "rank ", op.comm->world(op.comm->rank), ": ", words(*op.comm, op.record), " on ",
       op.comm->description, ": ", why...);
}
}  // namespace

void check_arguments(const Op& op) {
  const Record& r = op.record;
  if (r.peer < -1 || r.peer >= op.comm->size ||
      (r.peer < 0 && (!op.collective() || r.call == Call::broadcast)))
    refuse(ncclInvalidArgument, op, "there is no rank ", r.peer, " among its ", op.comm->size);
  const auto check_buffer = [&](const char* p, size_t bytes, const char* which) {
    if (!bytes) return;
    if (!p) refuse(ncclInvalidArgument, op, "the ", which, " buffer is null");
    if (reinterpret_cast<uintptr_t>(p) % size_of(r.dtype))
      refuse(ncclInvalidArgument, op, "the ", which, " buffer does not begin at an element");
#if defined(CPU_FAST) || defined(CPU_FAITHFUL)
    const cpu::Arena& arena = cpu::arena();
    if (p < arena.base || p + bytes > arena.base + arena.size)
      refuse(ncclInvalidArgument, op, "the ", which,
             " buffer is host memory; NCCL moves device memory");
    if (!cpu::in_one_block(p, bytes))
      refuse(ncclInvalidArgument, op, "the ", which, " buffer of ", bytes,
             " bytes does not lie in one block of device memory that is in use");
#endif
  };
#if defined(CPU_FAST) || defined(CPU_FAITHFUL)
  if (!cpu::is_stream(op.stream)) refuse(ncclInvalidArgument, op, "its stream was destroyed");
#endif
  check_buffer(op.user_send, op.send_bytes, "send");
  check_buffer(op.user_recv, op.recv_bytes, "receive");
}

namespace {
bool overlap(const char* a, size_t a_bytes, const char* b, size_t b_bytes) {
  return a_bytes && b_bytes && std::less<>{}(a, b + b_bytes) && std::less<>{}(b, a + a_bytes);
}
// The one offset at which send and receive buffer may lie upon each other.
bool exactly_in_place(const Op& op) {
  const size_t rank = size_t(op.comm->rank);
  if (op.record.call == Call::all_gather)
    return op.user_send == op.user_recv + rank * op.send_bytes;
  if (op.record.call == Call::reduce_scatter)
    return op.user_recv == op.user_send + rank * op.recv_bytes;
  return op.collective() && op.user_send == op.user_recv;
}
}  // namespace

void check_overlaps(const std::vector<Op>& ops) {
  for (const Op& op : ops) {
    if (overlap(op.user_send, op.send_bytes, op.user_recv, op.recv_bytes) && !exactly_in_place(op))
      refuse(ncclInvalidUsage, op,
             "its send and receive buffers overlap by other than the in-place offset (the receive "
             "buffer starts ",
             op.user_recv - op.user_send, " bytes after the send buffer)");
    for (const Op& other : ops) {  // the calls of a group have no order among them
      if (&other == &op) continue;
      const bool both_receive =
          overlap(op.user_recv, op.recv_bytes, other.user_recv, other.recv_bytes);
      if (both_receive || overlap(op.user_recv, op.recv_bytes, other.user_send, other.send_bytes))
        refuse(ncclInvalidUsage, op, "its receive buffer overlaps with the ",
               both_receive ? "receive" : "send", " buffer of ", words(*other.comm, other.record),
               " in the same group");
    }
  }
}

// ---- when the other side's record is there

void compare(const Op& op, int q, const Record& theirs) {
  const Record& mine = op.record;
  const bool pair = !op.collective();
  const bool same =
      mine.number == theirs.number && mine.count == theirs.count && mine.dtype == theirs.dtype &&
      (pair || (mine.call == theirs.call && mine.op == theirs.op && mine.peer == theirs.peer &&
                mine.group_index == theirs.group_index && mine.group_size == theirs.group_size));
  if (same) return;
  const auto says = [&](int rank, const Record& r) {
    return sentence("rank ", op.comm->world(rank), " called ", words(*op.comm, r));
  };
  std::string higher = says(q, theirs), lower = says(op.comm->rank, mine);
  if (q < op.comm->rank) std::swap(higher, lower);
  fail(ncclInvalidUsage, higher, ", ", lower, " on ", op.comm->description);
}

// ---- the tests' mode: a reader or writer that does not wait for the communication stream shows

namespace {
struct Bytes {
  const char* data;
  size_t bytes;
};
// Of the send buffer, the parts that the call itself leaves alone.
std::vector<Bytes> kept_parts(const Op& op) {
  const size_t slice = op.recv_bytes, before = size_t(op.comm->rank) * slice;
  if (!overlap(op.user_send, op.send_bytes, op.user_recv, op.recv_bytes) ||
      op.record.call == Call::all_gather || op.record.call == Call::broadcast)
    return {{op.user_send, op.send_bytes}};
  if (op.record.call == Call::reduce_scatter)
    return {{op.user_send, before},
            {op.user_send + before + slice, op.send_bytes - before - slice}};
  return {};
}
uint64_t checksum(const Op& op) {
  uint64_t sum = 14695981039346656037u;
  for (const Bytes& part : kept_parts(op))
    for (size_t i = 0; i < part.bytes; i += 8) {
      uint64_t word = 0;
      memcpy(&word, part.data + i, std::min<size_t>(8, part.bytes - i));
      sum = (sum ^ word) * 1099511628211u;
    }
  return sum;
}
}  // namespace

void fill_and_sum(Op& op) {
  const bool in_place = overlap(op.user_send, op.send_bytes, op.user_recv, op.recv_bytes);
  const auto fill = [&](size_t begin, size_t end) {
    if (end <= begin) return;
    if constexpr (kCuda) cudaMemsetAsync(op.user_recv + begin, 0xff, end - begin, op.stream);
    else memset(op.user_recv + begin, 0xff, end - begin);
  };
  if (!in_place) {
    fill(0, op.recv_bytes);
  } else if (op.record.call == Call::all_gather) {
    const size_t before = size_t(op.comm->rank) * op.send_bytes;
    fill(0, before);
    fill(before + op.send_bytes, op.recv_bytes);
  }
  if (!kCuda) op.checksum = checksum(op);
}

void check_sum(const Op& op) {
  if (kCuda || op.checksum == checksum(op)) return;
  refuse(ncclInvalidUsage, op,
         "the send buffer changed before the call was complete: something writes to it without "
         "waiting for the communication stream");
}

// ---- bytes

void count_traffic(Op& op) {
  ncclComm& comm = *op.comm;
  const int64_t n = comm.size, bytes = int64_t(op.record.count * size_of(op.record.dtype));
  int64_t numerator = 0;
  switch (op.record.call) {
    case Call::all_reduce: numerator = 2 * (n - 1) * bytes; break;
    case Call::all_gather:
    case Call::reduce_scatter: numerator = (n - 1) * n * bytes; break;
    case Call::broadcast:
    case Call::send: numerator = n * bytes; break;
    default: break;
  }
  std::lock_guard lock(comm.mutex);
  nccl_referee::Traffic& t = comm.traffic[int(op.record.call)];
  t.calls++, t.numerator += numerator, t.copied += op.copied, t.n = comm.size;
}

// ---- the watch

namespace {
char process_state(int pid) {  // R, S, D run or wait; T is stopped; Z and X have ended
  std::ifstream stat(sentence("/proc/", pid, "/stat"));
  std::string line;
  if (!std::getline(stat, line)) return 'X';
  const size_t name_end = line.rfind(')');
  return name_end == std::string::npos || name_end + 2 >= line.size() ? 'X' : line[name_end + 2];
}

std::string stand_of(const ncclComm& comm, int q) {
  const Member& m = comm.members[q];
  const Status* status = status_of(m);
  if (!status) {
    const Record last = comm.link->last_heard(q);
    return sentence("rank ", m.world,
                    last.call == Call::none ? " was not heard on it" : " was last heard in ",
                    last.call == Call::none ? "" : words(comm, last));
  }
  std::string s = sentence("rank ", m.world);
  const uint32_t state = status->state;
  const Record r = status->record;
  if (state == 0) s += " has made no call";
  else s += state == 1 ? " waits in " : state == 2 ? " has completed " : " has failed in ";
  if (state) s += sentence(words(r, status->peer_world), " on ", status->comm);
  if (state == 1 && status->calls_in_task > 1)
    s += sentence(", one of ", status->calls_in_task, " calls in its group");
  if (state >= 2) s += " and called nothing since";
  const char process = m.pid == getpid() ? 'R' : process_state(m.pid);
  if (process == 'T' || process == 't') s += " (its process is stopped)";
  if (process == 'Z' || process == 'X') s += " (its process has ended)";
  return s;
}

std::string where_all_stand(const ncclComm& comm) {
  std::string s;
  for (int q = 0; q < comm.size; q++) s += sentence(q ? "; " : "", stand_of(comm, q));
  return s;
}

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Throws if the wait that began at `since` should end: given up here or by a peer, a peer's process
// gone, the watch run out.
void look_around(Task& task, const std::function<bool()>& ready, double since, double* next_look) {
  const auto relay = [](int world, const std::string& why) {
    fail(ncclRemoteError, why.find(" gave up: ") == std::string::npos
                              ? sentence("rank ", world, " gave up: ", why)
                              : why);
  };
  for (const auto& comm : task.comms) {
    for (int q = 0; q < comm->size; q++)
      if (const std::string why = q == comm->rank ? "" : comm->link->peer_gave_up(q);
          !why.empty()) {
        if (ready()) return;  // a mismatch that I can see myself has the better sentence
        relay(comm->world(q), why);
      }
  }
  const double time = now();
  if (time < *next_look) return;
  *next_look = time + std::min(0.5, watch_seconds() / 4);
  for (const auto& comm : task.comms) {
    for (const Member& m : comm->members) {
      const char process = m.rank == comm->rank || !status_of(m) ? 'R' : process_state(m.pid);
      if (process == 'Z' || process == 'X')
        fail(ncclRemoteError, "rank ", m.world, "'s process has ended while others wait on ",
             comm->description, ". ", where_all_stand(*comm));
    }
    if (time - since > watch_seconds())
      fail(ncclRemoteError, "deadlock: rank ", comm->world(comm->rank), " has waited for ",
           watch_seconds(), " s on ", comm->description, ". ", where_all_stand(*comm));
  }
}
}  // namespace

// Spins a little where every rank has a core of its own, yields a few times, then sleeps: what we
// wait for may need our core. Who yields to a computation comes back milliseconds later, who sleeps
// comes back immediately: so a yield that took long was the last.
void wait_until(Task& task, const std::function<bool()>& ready) {
  bool messages = false;  // MPI has no doorbell
  for (const auto& comm : task.comms) messages |= !comm->shares;
  const int spins = ranks_here <= cores() ? 1000 : 0, yields = messages ? 2000 : 20;
  const double yields_end = now() + 3e-4;
  double since = 0, next_look = 0, seen = 0;
  for (int turn = 0; !ready(); turn++) {
    if (turn < spins) {
#ifdef __x86_64__
      __builtin_ia32_pause();
#endif
    } else if (turn < spins + yields && now() < yields_end) {
      sched_yield();
    } else {
      const double time = now();
      if (since > 0 && time - seen > 1) since += time - seen;  // this process did not run
      seen = time;
      if (since == 0) since = time, next_look = since + std::min(0.5, watch_seconds() / 4);
      if (messages) usleep(50);
      else sleep_until_rung(ready);
      look_around(task, ready, since, &next_look);
    }
  }
}

}  // namespace nccl

// ---- for programs

namespace nccl_referee {

Traffic traffic(ncclComm_t comm, Call call) {
  std::lock_guard lock(comm->mutex);
  Traffic t = comm->traffic[int(call)];
  t.n = comm->size;
  return t;
}
void name(ncclComm_t comm, const char* name) {
  comm->name = name;
  comm->description = nccl::describe(*comm);
}
void watch(double seconds) { nccl::watch_setting = seconds; }
void strict(bool on) { nccl::strict_setting = on; }
std::string where_ranks_stand(ncclComm_t comm) { return nccl::where_all_stand(*comm); }

}  // namespace nccl_referee
