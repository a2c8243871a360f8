// pipeline.h: Pipeline parallelism: the layers are cut into stages, one a rank of the pp axis, and
// micro-batches flow through them.
//
// idea      what a stage does, and in which order, is a value: a Schedule (schedule.h). The
//           executor is a loop with one switch over its actions. Every micro-batch has a tape of
//           its own on every chunk, which lives from its forward to its backward.
// source    see schedule.h for the schedules
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

  Pipeline(Mesh& mesh, Schedule schedule) : mesh_(mesh), schedule_(std::move(schedule)) {
    for (int v = 1; v < schedule_.positions(); v++)
      REQUIRE(schedule_.stage_of(v) != schedule_.stage_of(v - 1), schedule_.row->name,
              " hands over within a stage, which this executor does not do yet");
  }
  const Schedule& schedule() const { return schedule_; }
  int position(int chunk) const { return schedule_.position(mesh_["pp"].rank, chunk); }
  bool is_first(int chunk) const { return position(chunk) == 0; }
  bool is_last(int chunk) const { return position(chunk) + 1 == schedule_.positions(); }

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
  struct Live {  // a micro-batch on a chunk
    Tape tape;
    Var in, out;
    // its weight gradients, where the schedule puts them off
    std::deque<std::function<void()>> later;
    int64_t bytes = 0;  // activations that its tape keeps
  };
  // computed, left or arrived when the event is reached
  struct Parcel {
    Tensor x;
    std::shared_ptr<Event> event;
    int exchange = 0;
  };
  // by micro-batch and chunk; a map: tapes hold references to themselves
  using Lives = std::map<std::pair<int, int>, Live>;
  void count_live(const Lives& lives);
  void exchange(const std::vector<Transfer>& transfers);
  void prepare_room(size_t action, const Shape& shape, Dtype dtype);
  void post(const Transfer& transfer, Tensor x);
  Tensor arrived(const Transfer& transfer);
  void release_sent(int exchange);

  Mesh& mesh_;
  Schedule schedule_;
  std::map<Transfer, Parcel> outbox_, inbox_;
  // on their way; dropped once the compute stream knows that they have left
  std::deque<Parcel> sent_;
  std::deque<Tensor> room_;  // for what the next exchange receives
  Event free_;               // the room is free
  int exchanges_ = 0;
  std::vector<double> milliseconds_;  // of each action, in processor time
  std::map<size_t, TimedWork> work_;  // of each computation
  int64_t most_live_ = 0, most_live_bytes_ = 0;
};
