// pipeline.h: Pipeline parallelism: the layers are cut into stages, one a rank of the pp axis, and
// micro-batches flow through them.
//
// idea      What a stage does, and in which order, is a value: a Schedule (schedule.h). Here it is
//           executed: `execute` is the loop over the list, `perform` the switch over what is
//           computed. Every micro-batch has a tape of its own on every chunk, which lives from its
//           forward to the end of its backward. With one stage (pp = 1) the same code runs 1f1b
//           without an exchange.
// source    schedule.h names those of the schedules.
// test      tests/test_pipeline.cpp
#pragma once
#include <deque>
#include <functional>
#include <map>
#include <memory>

#include "autograd.h"
#include "comm.h"
#include "schedule.h"

class Pipeline {
 public:
  // One chunk of the model on one micro-batch: takes the activation of the position before (at the
  // first position: nothing) and returns its own (at the last: nothing; the loss has been added up,
  // or the logits taken). The last position's backward receives nothing either: cross_entropy put
  // the logits' gradient in its place during the forward, and the tape begins there.
  using Compute = std::function<Var(Tape& tape, int chunk, const Var& x, int microbatch)>;

  Pipeline(const Axis& axis, Dtype dtype, Schedule schedule)
      : axis_(axis), dtype_(dtype), schedule_(std::move(schedule)) {}
  const Schedule& schedule() const { return schedule_; }

  // A step: the whole schedule, forward and backward. Activations between stages have this shape,
  // (S, C).
  void run(const Shape& shape, const Compute& compute);
  // Evaluation and sampling: the schedule's forwards alone.
  void forward(const Shape& shape, int microbatches, const Compute& compute);
  // Once a step, after the gradients were reduced over the other axes, on the stages of the first
  // and the last piece where these are two: this rank's shard of the token embedding's gradient.
  // One has the embedding's part, the other the head's, and both get the sum. So both optimizers
  // take the same step, and the copies stay equal.
  void sum_tied(const Tensor& gradient);

  // the next run: without a GPU the host then waits for each computation, and nothing overlaps
  bool measures = false;
  // Of the last run that was measured: how long each computation of this stage took by itself. On a
  // GPU that is the time between two events, which includes waits for collectives of other axes
  // (ZeRO-3, tp, cp); else it is processor time, since ranks may share cores. Exchanges count as 0,
  // and waiting for other stages is not measured. Waits for the device.
  std::vector<double> milliseconds() const;
  // Of the last run: the most that was kept for backwards at once.
  int64_t most_live() const { return most_live_; }  // pairs of micro-batch and chunk
  int64_t most_live_bytes() const { return most_live_bytes_; }

 private:
  // A micro-batch on a chunk, from its forward to the end of its backward (split: of its weight
  // gradient).
  struct Live {
    Tape tape;
    Var in, out;
    // its weight gradients, where the schedule puts them off, and what FSDP does after them; that
    // of a linear layer keeps the layer's input and its output's gradient
    std::deque<std::function<void()>> later;
    int64_t bytes = 0;  // activations that the tape keeps, or what is put off
  };
  // An activation or a gradient between stages. event: first none (only its memory is there), then
  // the end of the computation that makes it, then the end of the exchange that moves it.
  struct Parcel {
    Tensor x;
    std::shared_ptr<Event> event;
    int64_t moved_by = 0;  // number of the exchange, from 1 on; 0: none yet
  };
  void execute(const std::vector<Action>& actions, const Shape& shape,
               const std::function<Tensor(size_t action, Tensor x)>& compute);
  Tensor perform(const Action& a, Live& live, Tensor x, const Compute& compute);
  void prepare_room(const std::vector<Transfer>& transfers, const Shape& shape, Dtype dtype);
  void hand_over(const Transfer& transfer, Tensor x);
  void exchange(const std::vector<Transfer>& transfers);
  Tensor receive(const Transfer& transfer);
  void release_sent(int64_t last);
  void measure(size_t action, const std::function<void()>& work);

  const Axis axis_;
  const Dtype dtype_;  // of activations between stages
  Schedule schedule_;
  std::map<Transfer, Parcel> outbox_, inbox_;
  // recorded when the next exchange's receive buffers were allocated: their memory's earlier users
  // are done
  Event room_is_free_;
  int64_t exchanges_ = 0;             // issued so far
  std::vector<double> milliseconds_;  // of each action, in processor time
  std::map<size_t, TimedWork> work_;  // of each computation
  int64_t most_live_ = 0, most_live_bytes_ = 0;
};
