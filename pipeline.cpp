// pipeline.cpp: the executor of pipeline schedules. See pipeline.h for the idea and schedule.h for
// the schedules.
//
//   stage 0   F0 F1 F2 F3                   [ G0]    [ G1]    [ G2]    [ G3]
//   stage 1      F0 F1 F2             [ G0] F3 [ G1]    [ G2]    [ G3]
//   stage 2         F0 F1       [ G0] F2 [ G1] F3 [ G2]    [ G3]
//   stage 3            F0 [ G0] F1 [ G1] F2 [ G2] F3 [ G3]
//
//           1f1b, 4 stages, 4 micro-batches; F forward, G whole backward. A stage warms up with one
//           forward for each later stage, then does one forward and one backward in turn.
//
// traffic   an activation forward and its gradient backward at each cut between two stages: m sends
//           each way, of S*C elements in the compute dtype (S: rows that a rank holds); the tied
//           embedding's gradient once a step, where first and last piece of the model are on two
//           stages: from each its shard, vocabulary*C / (tp fsdp cp) elements of the master dtype;
//           the loss, a small all-reduce over all stages. The ledger enters sends at the sender
//           alone; theory/pipeline.cpp predicts all of it.
// memory    weights, gradients and optimizer state of this stage's layers; activations of as many
//           micro-batches as the schedule keeps alive; parcels: what the next exchange receives,
//           what came and was not used yet, what waits to be sent, and what at most four exchanges
//           sent
// bubble    how long a stage idles: schedule.h has the formulas. report/report.cpp prints what the
//           simulator makes of the times that this executor measured.
// overlap   A computation waits for what it needs. An exchange waits for what it sends; the memory
//           that it receives into was allocated when the exchange before it had just been issued,
//           so for that it waits only for computations from before that one. One stream carries the
//           collectives of all axes: where a collective of another axis waits, exchanges behind it
//           do, too. So Fsdp gathers and sums what it can before the first exchange and after the
//           last.
// not here  stages on different numbers of ranks, activations kept on the host; and each tp rank
//           sends all of an activation that it holds, where Megatron-LM sends 1/tp and gathers it
//           (with sequence parallelism it holds 1/tp)
// test      tests/test_pipeline.cpp
//
//   outbox_   parcels that were computed here, until the compute stream waits for their departure
//   inbox_    parcels that came, or the memory for those that the next exchange receives
//
//   the compute stream             the communication stream
//                                             the exchange before
//     prepare_room  ---- room is free ---+
//     forward                            |
//     hand_over     ---- computed -------+-->  exchange: waits for both, then sends and receives
//     more computations                              |
//     receive  <---- has come, has left -------------+
//     backward
//
//           The pool hands out memory in the order of the compute stream (Buffer in tensor.h): who
//           gets a block there may use it on the compute stream without a wait, since its earlier
//           users stand before. The communication stream is not in that order. So what it writes
//           waits for the earlier users (room is free), and what it reads is kept until the compute
//           stream waits for its departure (release_sent).
#include "pipeline.h"

#include <algorithm>
#include <ctime>

// ---- the executor

// Executes a list: an exchange moves parcels; a computation takes its input from the inbox and
// leaves its result in the outbox.
void Pipeline::execute(const std::vector<Action>& actions, const Shape& shape,
                       const std::function<Tensor(size_t action, Tensor x)>& compute) {
  // Room for what an exchange receives is taken as soon as the exchange before it was issued. Taken
  // later, it might be what the computations between them gave back, and have to wait for them.
  const auto prepare_next = [&](size_t i) {  // the first exchange from action i on
    while (i < actions.size() && actions[i].kind != Action::exchange) i++;
    if (i < actions.size()) prepare_room(actions[i].transfers, shape, dtype_);
  };
  prepare_next(0);
  for (size_t i = 0; i < actions.size(); i++) {
    const Action& a = actions[i];
    if (a.kind == Action::exchange) {
      exchange(a.transfers);
      prepare_next(i + 1);
      continue;
    }
    const auto input = input_of(schedule_, axis_.rank, a),
               output = output_of(schedule_, axis_.rank, a);
    Tensor result = compute(i, input ? receive(*input) : Tensor());
    if (output) hand_over(*output, std::move(result));
  }
  release_sent(exchanges_);
  ASSERT(inbox_.empty() && outbox_.empty(), "a parcel is left");
  recorder.microbatch = -1;
}

// What a stage computes in an action, from what came, x. Returns what is passed on.
Tensor Pipeline::perform(const Action& a, Live& live, Tensor x, const Compute& compute) {
  switch (a.kind) {
    case Action::forward:
      live.in.value = std::move(x);
      live.out = compute(live.tape, a.chunk, live.in, a.microbatch);
      live.in.value = Tensor();  // what needs it for the backward is on the tape, and holds it
      return std::move(live.out.value);
    case Action::backward:
    case Action::input_gradient:
      if (a.kind == Action::input_gradient) live.tape.deferred = &live.later;
      *live.out.grad = std::move(x);  // at the last position empty, and nothing reads it
      live.tape.backward();
      return std::move(*live.in.grad);
    case Action::weight_gradient:
      for (; !live.later.empty(); live.later.pop_front()) live.later.front()();
      break;
    case Action::exchange: break;  // execute() has done it
  }
  return {};
}

void Pipeline::run(const Shape& shape, const Compute& compute) {
  const std::vector<Action>& actions = schedule_.actions[axis_.rank];
  const int64_t& held = device().memory.now[int(Memory::activations)];  // changes as ops run
  // by micro-batch and chunk; a map, whose elements never move: closures hold references to them
  std::map<std::pair<int, int>, Live> lives;
  int64_t kept = 0;  // by all that are live
  most_live_ = most_live_bytes_ = 0;
  if (measures) milliseconds_.assign(actions.size(), 0);
  execute(actions, shape, [&](size_t i, Tensor x) {
    const Action& a = actions[i];
    Live& live = lives[{a.microbatch, a.chunk}];
    recorder.microbatch = a.microbatch;
    // What this action adds to what is kept: what is held after it, less what was held before. x
    // came from outside and may be kept, so it counts; the result is passed on, so it does not.
    const int64_t before = held - x.bytes();
    Tensor result;
    measure(i, [&] { result = perform(a, live, std::move(x), compute); });
    if (a.kind == Action::backward || a.kind == Action::weight_gradient) {
      kept -= live.bytes;
      lives.erase({a.microbatch, a.chunk});
    } else {
      const int64_t more = held - before - result.bytes();
      live.bytes += more;
      kept += more;
      most_live_ = std::max(most_live_, int64_t(lives.size()));
      most_live_bytes_ = std::max(most_live_bytes_, kept);
    }
    return result;
  });
  ASSERT(lives.empty(), "a micro-batch is left without its backward");
}

void Pipeline::forward(const Shape& shape, int microbatches, const Compute& compute) {
  const auto actions = forwards_of(schedule_, microbatches).actions[axis_.rank];
  execute(actions, shape, [&](size_t i, Tensor x) {
    Tape tape(false);
    return compute(tape, actions[i].chunk, Var{std::move(x)}, actions[i].microbatch).value;
  });
}

// ---- between stages

// Allocates what the next exchange receives. That exchange waits for what was queued on the compute
// stream up to here, which may use this memory, and not for what is computed from here on.
void Pipeline::prepare_room(const std::vector<Transfer>& transfers, const Shape& shape,
                            Dtype dtype) {
  for (const Transfer& t : transfers)
    if (t.to == axis_.rank) {
      recorder.microbatch = t.microbatch;
      inbox_[t].x = Tensor(shape, dtype, Memory::activations);
    }
  room_is_free_.record(device().compute);
}

// Where the result stays on this stage, it has come already.
void Pipeline::hand_over(const Transfer& t, Tensor x) {
  Parcel& parcel = (t.to == axis_.rank ? inbox_ : outbox_)[t];
  parcel = {std::move(x), std::make_shared<Event>()};
  parcel.event->record(device().compute);
}

// All transfers of an exchange are one NCCL group: a facing pair goes both ways at once, and cannot
// deadlock in whichever order its ends are listed (sum_tied).
void Pipeline::exchange(const std::vector<Transfer>& transfers) {
  const cudaStream_t stream = device().communication;
  for (const Transfer& t : transfers) {
    if (t.from == axis_.rank) outbox_.at(t).event->make_wait(stream);  // it must have been computed
    else room_is_free_.make_wait(stream);  // who used the memory before must be done with it
  }

  const Timed timed;
  const auto done = std::make_shared<Event>();
  exchanges_++;
  NCCL_CHECK(ncclGroupStart());
  for (const Transfer& t : transfers) {
    const bool send = t.from == axis_.rank;
    const int peer = send ? t.to : t.from;
    Parcel& parcel = (send ? outbox_ : inbox_).at(t);
    const Tensor& x = parcel.x;
    recorder.microbatch = t.microbatch;
    const auto [low, high] = std::minmax(t.from, t.to);
    recorder.travel(axis_.name, {axis_.members[low], axis_.members[high]}, send, name_of(t.payload),
                    axis_.members[peer], x.bytes());
    const ncclDataType_t type = nccl_type(x.dtype());
    if (send) {
      ledger.enter(axis_, Collective::send, x.bytes());
      NCCL_CHECK(ncclSend(x.raw(), x.numel(), type, peer, axis_.comm, stream));
    } else {
      NCCL_CHECK(ncclRecv(x.raw(), x.numel(), type, peer, axis_.comm, stream));
    }
    parcel.event = done;
    parcel.moved_by = exchanges_;
  }
  NCCL_CHECK(ncclGroupEnd());
  done->record(stream);
  // A stage that runs ahead of its peers keeps what four exchanges sent, at most (a bound, not a
  // tuned number). This wait cannot deadlock: schedules are safe when each action waits for all
  // actions before it.
  release_sent(exchanges_ - 4);
}

Tensor Pipeline::receive(const Transfer& transfer) {
  const auto parcel = inbox_.extract(transfer);
  ASSERT(parcel && parcel.mapped().event, to_string(transfer),
         " did not come before it was needed");
  const auto& [x, event, moved_by] = parcel.mapped();
  event->make_wait(device().compute);  // it must have arrived
  release_sent(moved_by);  // exchanges end in order, so everything sent up to this one has left
  return x;
}

// What exchanges up to the last of these sent goes back to the pool. The compute stream, in whose
// order memory is used again, first waits until it has left.
void Pipeline::release_sent(int64_t last) {
  std::erase_if(outbox_, [&](const auto& entry) {
    const Parcel& parcel = entry.second;
    const bool lets_go = parcel.moved_by > 0 && parcel.moved_by <= last;
    if (lets_go) parcel.event->make_wait(device().compute);
    return lets_go;
  });
}

// ---- once a step

void Pipeline::sum_tied(const Tensor& gradient) {
  const Purpose purpose(Traffic::embedding);
  recorder.enter("tied gradient");
  const int here = axis_.rank, peer = axis_.size - 1 - here;
  const Transfer mine{Transfer::gradient, here, peer, -1, -1},
      theirs{Transfer::gradient, peer, here, -1, -1};  // of no micro-batch and no chunk
  hand_over(mine, gradient);
  prepare_room({theirs}, gradient.shape(), gradient.dtype());
  exchange({mine, theirs});
  const Tensor other = receive(theirs);
  add(gradient, gradient, other);  // a + b here, b + a there: the same bits
}

// ---- what a run took and kept

void Pipeline::measure(size_t action, const std::function<void()>& work) {
  if (!measures) return work();
  const std::clock_t begin = std::clock();  // of the processors: all threads of this process
  work_[action].begin.record(device().compute);
  work();
  work_[action].end.record(device().compute);
  // queued CPU streams run behind the host: wait, or a later action is charged for this work
  if (!device().is_gpu) synchronize();
  milliseconds_[action] = double(std::clock() - begin) * 1e3 / CLOCKS_PER_SEC;
}

std::vector<double> Pipeline::milliseconds() const {
  std::vector<double> ms = milliseconds_;
  synchronize();
  if (device().is_gpu)
    for (const auto& [action, work] : work_) ms[action] = work.seconds() * 1e3;
  return ms;
}
