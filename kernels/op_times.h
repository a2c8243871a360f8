// op_times.h: how long each of a step's ops takes on its stream, for profiles, traces and metrics.
//
// use       Each function that launches kernels says so in its first line,
//           `OP("add", bytes_of(y, a, b));`, and each block of collectives,
//           `const Timed timed;` (comm.h).
// idea      Where these are timed, they have an event before and one after them. An op inside
//           another is a part of that one.
// test      tests/test_trainer.cpp
#pragma once
#include <atomic>
#include <deque>

#include "tensor.h"

struct Work {
  std::string name;
  // Lower bounds: bytes that are read and written in memory, or sent to other ranks, and the
  // floating-point operations of products.
  double bytes = 0, flops = 0;
};
template <class... T> double bytes_of(const T&... x) { return (x.bytes() + ...); }

class OpTimes {  // of what has been timed since start()
 public:
  enum What { nothing, collectives, everything };
  struct Op : TimedWork {
    Work work;
    bool collective;
  };
  void start(What what);
  void stop() { what_ = nothing; }
  bool times(What what) const { return what_ >= what && !open_; }
  void begin(cudaStream_t stream, bool collective, Work work);
  void end(cudaStream_t stream);
  Op* open() const { return what_ == everything ? open_ : nullptr; }
  // Calls visit(op) for each; the host has waited for their streams.
  template <class Visit> void each(Visit visit) const {
    for (size_t i = 0; i < count_; i++) visit(ops_[i]);
  }
  void clear() { ops_.clear(); }   // their events belong to the device
  std::atomic<int64_t> begun = 0;  // timed or not: the host gets on

 private:
  What what_ = nothing;
  Op* open_ = nullptr;
  size_t count_ = 0;
  std::deque<Op> ops_;  // their events are used again
};
extern OpTimes op_times;

class TimedOp {
 public:
  template <class Describe> explicit TimedOp(Describe describe) {
    op_times.begun++;
    if (timed_) op_times.begin(device().compute, false, describe());
  }
  ~TimedOp() {
    if (timed_) op_times.end(device().compute);
  }
  TimedOp(const TimedOp&) = delete;

 private:
  const bool timed_ = op_times.times(OpTimes::everything);
};
#define OP(...) const TimedOp timed_op_([&] { return Work{__VA_ARGS__}; })
