// pipeline.h: Pipeline parallelism: the layers are cut into stages, one a rank of the pp axis, and
// micro-batches flow through them.
//
// idea      What a stage does, and in which order, is a value: a Schedule (schedule.h). The
//           executor is a loop with one switch over its actions. Every micro-batch has a tape of
//           its own on every chunk, which lives from its forward to its backward.
// source    schedule.h names those of the schedules.
// test      tests/test_pipeline.cpp
#pragma once
#include <deque>
#include <map>
#include <memory>

#include "autograd.h"
#include "comm.h"
#include "schedule.h"

class Pipeline {
 public:
  // One chunk of the model on one micro-batch: takes the activation of the position before (at the
  // first position: nothing) and returns its own (at the last: nothing; the loss has been added
  // up).
  using Compute = std::function<Var(Tape& tape, int chunk, const Var& x, int microbatch)>;

  Pipeline(const Axis& axis, cudaStream_t communication, Schedule schedule)
      : axis_(axis), stream_(communication), schedule_(std::move(schedule)) {}
  const Schedule& schedule() const { return schedule_; }

  // A step: the whole schedule, forward and backward. Activations between stages have this shape
  // and dtype.
  void run(const Shape& shape, Dtype dtype, const Compute& compute);
  // Forward only, one micro-batch after the other: evaluation and sampling.
  void forward(const Shape& shape, Dtype dtype, int microbatches, const Compute& compute);
  // The token embedding's gradient, on the first and the last stage where these are two: one has
  // the embedding's part, the other the head's, and both get the sum.
  void sum_tied(const Tensor& gradient);

  // the next run: without a GPU every computation then waits for its end, and nothing overlaps
  bool timed = false;
  // Of the last timed run: how long each computation of this stage took by itself (on a GPU by
  // events, else in processor time: ranks may share cores), 0 for exchanges. Waits for the device.
  std::vector<double> milliseconds() const;
  // Of the last run: the most that its tapes kept for backwards at once.
  int64_t most_live() const { return most_live_; }  // micro-batches, each on each chunk
  int64_t most_live_bytes() const { return most_live_bytes_; }

 private:
  // A micro-batch on a chunk, from its forward to the end of its backward.
  struct Live {
    Tape tape;
    Var in, out;
    // its weight gradients, where the schedule puts them off
    std::deque<std::function<void()>> later;
    int64_t bytes = 0;  // activations that its tape keeps
  };
  // by micro-batch and chunk; a map: tapes hold references to themselves
  using Lives = std::map<std::pair<int, int>, Live>;
  // An activation or a gradient that is computed, has come or has left when the event is reached.
  struct Parcel {
    Tensor x;
    std::shared_ptr<Event> event;
    int exchange = 0;  // that moves it, from 1 on
  };
  void execute(const std::vector<Action>& actions, const Shape& shape, Dtype dtype,
               const std::function<Tensor(size_t action, Tensor x)>& compute);
  void prepare_room(const std::vector<Transfer>& transfers, const Shape& shape, Dtype dtype);
  void put_in_outbox(const Transfer& transfer, Tensor x);
  void exchange(const std::vector<Transfer>& transfers);
  Tensor receive(const Transfer& transfer);
  void release_sent(int exchange);
  void measure(size_t action, const std::function<void()>& work);
  void count_live(const Lives& lives);

  const Axis axis_;
  cudaStream_t stream_;  // of communication
  Schedule schedule_;
  std::map<Transfer, Parcel> outbox_, inbox_;
  Event room_is_free_;  // whoever used the memory of the next receives before is done with it
  int exchanges_ = 0;
  std::vector<double> milliseconds_;  // of each action, in processor time
  std::map<size_t, TimedWork> work_;  // of each computation
  int64_t most_live_ = 0, most_live_bytes_ = 0;
};
