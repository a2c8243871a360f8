// nccl_collectives.cpp: what moves: the collectives, sends and receives, written on a Link, and the
// sums.
//
// idea      a collective is straight-line code: meet everyone, offer what the others need, fetch
//           what I need, sum, wait until the others have read. Sends and receives of a group
//           advance together, a step at a time.
// cost      a rank reads: all-gather and reduce-scatter (n-1) slices; all-reduce both, or n-1 whole
//           buffers when they fit into a record; broadcast W. A reduction reads each element once
//           and writes each result once.
// test      tests/test_nccl.cpp
#include <sched.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

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
  for (size_t t = 0; t < threads; t++)
    part(std::min(count, t * share), std::min(count, (t + 1) * share));
}

}  // namespace

void copy(char* to, const char* from, size_t bytes) {
  if (to != from && bytes)
    in_parts(bytes, 1,
             [=](size_t begin, size_t end) { memcpy(to + begin, from + begin, end - begin); });
}

// ---- sums, of what lies in `from`, in its order: see nccl_internal.h

namespace {

struct Bf16 {
  uint16_t bits;
};
inline float widen(Bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T> T widen(T x) { return x; }
template <class T> T narrow(T x) { return x; }
// to nearest, ties to even
template <class T>
requires std::is_same_v<T, Bf16> Bf16 narrow(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  return {uint16_t(nan ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// to[i] = from[0][i] op from[1][i] op ...; `to` may be one of `from`.
template <class T, class Fold>
void fold(char* to, const std::vector<const char*>& from, size_t count, Fold op) {
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
        for (size_t i = 0; i < m; i++) sum[i] = widen(narrow<T>(op(sum[i], Wide(widen(x[i])))));
      }
      T* out = reinterpret_cast<T*>(to) + begin;
#pragma omp simd
      for (size_t i = 0; i < m; i++) out[i] = narrow<T>(sum[i]);
    }
  });
}

template <class T>
void reduce(char* to, const std::vector<const char*>& from, size_t count, int op) {
  if (op == ncclMax) fold<T>(to, from, count, [](auto a, auto b) { return a < b ? b : a; });
  else fold<T>(to, from, count, [](auto a, auto b) { return a + b; });
}

void reduce(const Op& call, char* to, const std::vector<const char*>& from, size_t count) {
  const int op = call.record.op;
  switch (call.record.dtype) {
    case ncclInt32: return reduce<int32_t>(to, from, count, op);
    case ncclFloat32: return reduce<float>(to, from, count, op);
    case ncclFloat64: return reduce<double>(to, from, count, op);
    case ncclBfloat16: return reduce<Bf16>(to, from, count, op);
  }
}

// ---- the collectives

struct Bytes {
  size_t begin, bytes;
};  // of a send buffer

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
      if (const Record* theirs = op.comm->link->heard(op, q))
        compare(op, q, *theirs), met[q] = true;
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

// Everyone's `bytes` at `offset` of its send buffer, in ascending rank; where[q] is what rank q
// wants of mine.
std::vector<const char*> gather_sources(Task& task, Op& op, size_t offset, size_t bytes,
                                        const std::function<Bytes(int)>& where) {
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

// The order in which a ring of NCCL's adds what ends at this rank: from the next rank on, this one
// last. What is summed by other owners so differs in its last bits, here, too.
std::vector<const char*> in_ring(const Op& op, std::vector<const char*> from) {
  std::rotate(from.begin(), from.begin() + (op.comm->rank + 1) % op.comm->size, from.end());
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
  const auto from = gather_sources(task, op, size_t(op.comm->rank) * slice, slice, [&](int q) {
    return Bytes{size_t(q) * slice, slice};
  });
  reduce(op, op.recv, in_ring(op, from), op.record.count);
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
  reduce(op, op.recv + mine.begin, op.record.inlined ? from : in_ring(op, from), mine.bytes / each);
  if (op.record.inlined) return finish_phase(task, op);
  finish_phase(task, op);
  for_peers(op, [&](int q) {
    const Bytes theirs = part(q);
    if (mine.bytes) op.comm->link->offer(op, q, op.recv + mine.begin, mine.bytes);
    if (theirs.bytes)
      op.comm->link->fetch(op, q, Side::recv, theirs.begin, theirs.bytes, op.recv + theirs.begin);
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

}  // namespace

void run_collective(Task& task, Op& op) {
  meet(task, op);
  if (op.record.count == 0) return finish_phase(task, op);
  switch (op.record.call) {
    case Call::all_gather:
    case Call::split: return all_gather(task, op);
    case Call::reduce_scatter: return reduce_scatter(task, op);
    case Call::all_reduce: return all_reduce(task, op);
    default: return broadcast(task, op);
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

}  // namespace nccl
