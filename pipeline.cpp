// pipeline.cpp: the executor of pipeline schedules. See pipeline.h for the idea and schedule.h for
// the schedules.
//
//   stage 0   F0 F1 F2 F3          B0    B1 ...        1f1b, 4 stages: a stage warms up with one forward for each stage behind it, then
//   stage 1      F0 F1 F2       B0 F3 B1 ...           one backward makes room for one forward
//   stage 2         F0 F1    B0 F2 B1 F3 ...
//   stage 3            F0 B0 F1 B1 F2 ...
//
// traffic   an activation forward and its gradient backward at each of the pV - 1 cuts: 2 m (pV -
//           1) sends in all of S*C elements (S: rows that a rank holds); the tied embedding's
//           gradient once a step between first and last stage
// memory    weights, gradients and optimizer state of this stage's layers; activations of as many
//           micro-batches as the schedule keeps alive
// bubble    how long a stage idles: schedule.h has the formulas, report.cpp prints them beside what
//           this executor measured
// overlap   an exchange waits for what it sends and for room for what it receives, not for all that
//           was computed before it; a computation waits for what it needs
// not here  stages on different numbers of ranks, activations kept on the host
// test      tests/test_pipeline.cpp
#include "pipeline.h"

#include <algorithm>
#include <ctime>

// ---- the executor

static double processor_seconds() {  // of all threads of this process
  timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return double(t.tv_sec) + double(t.tv_nsec) * 1e-9;
}

void Pipeline::run(const Shape& shape, Dtype dtype, const Compute& compute) {
  const std::vector<Action>& actions = schedule_.actions[mesh_["pp"].rank];
  Lives lives;
  if (timed) milliseconds_.assign(actions.size(), 0);
  most_live_ = most_live_bytes_ = 0;
  const int64_t& held = device().memory.now[int(Memory::activations)];
  const auto measured = [this](size_t i, auto&& work) {
    if (!timed) return work();
    const double begin = processor_seconds();
    work_[i].begin.record(device().compute);
    work();
    work_[i].end.record(device().compute);
    // where streams run by themselves this action's work would count for a later one
    if (!device().is_gpu) synchronize();
    milliseconds_[i] = (processor_seconds() - begin) * 1e3;
  };
  prepare_room(0, shape, dtype);
  for (size_t i = 0; i < actions.size(); i++) {
    const Action& a = actions[i];
    if (a.kind == Action::exchange) {
      exchange(a.transfers);
      prepare_room(i + 1, shape, dtype);
      continue;
    }
    Live& live = lives[{a.microbatch, a.chunk}];
    const auto input = transfer_of(schedule_, mesh_["pp"].rank, a, false),
               output = transfer_of(schedule_, mesh_["pp"].rank, a, true);
    switch (a.kind) {
      case Action::forward:
        if (input) live.in.value = arrived(*input);
        live.bytes = (input ? live.in.value.bytes() : 0) - held;
        measured(i, [&] { live.out = compute(live.tape, a.chunk, live.in, a.microbatch); });
        // what was made, and what came, less what is passed on
        live.bytes += held - (output ? live.out.value.bytes() : 0);
        live.in.value = Tensor();  // whoever needs it for the backward has it
        count_live(lives);
        if (output) post(*output, std::move(live.out.value));
        break;
      case Action::backward:
      case Action::input_gradient:
        if (a.kind == Action::input_gradient) live.tape.deferred = &live.later;
        if (input) *live.out.grad = arrived(*input);
        measured(i, [&] { live.tape.backward(); });
        if (output) post(*output, take(live.in.grad));
        break;
      default:  // weight_gradient
        measured(i, [&] {
          for (; !live.later.empty(); live.later.pop_front()) live.later.front()();
        });
    }
    if (a.kind == Action::backward || a.kind == Action::weight_gradient)
      lives.erase({a.microbatch, a.chunk});
  }
  release_sent(exchanges_);
}

std::vector<double> Pipeline::milliseconds() const {
  std::vector<double> ms = milliseconds_;
  synchronize();
  if (device().is_gpu)
    for (const auto& [action, work] : work_) ms[action] = work.seconds() * 1e3;
  return ms;
}

void Pipeline::count_live(const Lives& lives) {
  int64_t bytes = 0;
  for (const auto& [where, live] : lives) bytes += live.bytes;
  most_live_ = std::max(most_live_, int64_t(lives.size()));
  most_live_bytes_ = std::max(most_live_bytes_, bytes);
}

void Pipeline::forward(const Shape& shape, Dtype dtype, int microbatches, const Compute& compute) {
  for (int m = 0; m < microbatches; m++)
    for (int chunk = 0; chunk < schedule_.chunks; chunk++) {
      const Action a{Action::forward, m, chunk};
      Var x;
      if (const auto input = transfer_of(schedule_, mesh_["pp"].rank, a, false)) {
        room_.push_back(Tensor(shape, dtype, Memory::activations));
        free_.record(device().compute);
        exchange({*input});
        x.value = arrived(*input);
      }
      Tape tape(false);
      const Var y = compute(tape, chunk, x, m);
      if (const auto output = transfer_of(schedule_, mesh_["pp"].rank, a, true)) {
        post(*output, y.value);
        exchange({*output});
      }
    }
  release_sent(exchanges_);
}

// ---- between stages: all transfers of one exchange are one NCCL group, so that two that face each other do not wait for each other

void Pipeline::exchange(const std::vector<Transfer>& transfers) {
  const auto event = std::make_shared<Event>();
  exchanges_++;
  for (const Transfer& t : transfers)
    // what is sent must have been computed
    if (t.send) outbox_.at(t).event->make_wait(mesh_.stream);
    // whoever used this memory before must be done with it
    else free_.make_wait(mesh_.stream);

  const Timed timed(mesh_.stream);
  NCCL_CHECK(ncclGroupStart());
  for (const Transfer& t : transfers) {
    if (t.send) {
      const Tensor x = outbox_.extract(t).mapped().x;
      ledger.send(mesh_["pp"], x.bytes());
      NCCL_CHECK(ncclSend(x.raw(), size_t(x.numel()), nccl_type(x.dtype()), t.peer,
                          mesh_["pp"].comm, mesh_.stream));
      sent_.push_back({x, event, exchanges_});
    } else {
      const Tensor x = std::move(room_.front());
      room_.pop_front();
      NCCL_CHECK(ncclRecv(x.raw(), size_t(x.numel()), nccl_type(x.dtype()), t.peer,
                          mesh_["pp"].comm, mesh_.stream));
      inbox_[t] = {x, event, exchanges_};
    }
  }
  NCCL_CHECK(ncclGroupEnd());
  event->record(mesh_.stream);
  // a stage that runs ahead keeps four parcels at most
  if (sent_.size() > 4) release_sent(sent_[sent_.size() - 5].exchange);
}

// Room for what the next exchange from action `i` on receives, now, so that it waits for nothing
// that is computed from here on.
void Pipeline::prepare_room(size_t i, const Shape& shape, Dtype dtype) {
  const std::vector<Action>& actions = schedule_.actions[mesh_["pp"].rank];
  while (i < actions.size() && actions[i].kind != Action::exchange) i++;
  if (i == actions.size()) return;
  for (const Transfer& t : actions[i].transfers)
    if (!t.send) room_.push_back(Tensor(shape, dtype, Memory::activations));
  free_.record(device().compute);
}

void Pipeline::post(const Transfer& transfer, Tensor x) {
  const auto event = std::make_shared<Event>();
  event->record(device().compute);
  outbox_[transfer] = {std::move(x), event};
}

Tensor Pipeline::arrived(const Transfer& transfer) {
  const auto parcel = inbox_.extract(transfer);
  ASSERT(parcel, to_string(Action{Action::exchange, -1, -1, {transfer}}),
         " did not come before it was needed");
  const auto& [x, event, exchange] = parcel.mapped();
  event->make_wait(device().compute);  // it must have arrived
  // one queue: these left before
  while (!sent_.empty() && sent_.front().exchange <= exchange) sent_.pop_front();
  return x;
}

// The compute stream waits until everything up to that exchange has left; then the memory can be
// used again.
void Pipeline::release_sent(int exchange) {
  while (!sent_.empty() && sent_.front().exchange <= exchange) {
    sent_.front().event->make_wait(device().compute);
    sent_.pop_front();
  }
}

// ---- once a step

void Pipeline::sum_tied(const Tensor& gradient) {
  const int last = mesh_["pp"].size - 1;
  const Purpose purpose(Traffic::embedding);
  const int peer = last - mesh_["pp"].rank;
  const Tensor other(gradient.shape(), gradient.dtype(), Memory::workspace);
  make_wait(mesh_.stream, device().compute);  // the gradient must be complete
  const Timed timed(mesh_.stream);
  ledger.send(mesh_["pp"], gradient.bytes());
  NCCL_CHECK(ncclGroupStart());
  NCCL_CHECK(ncclSend(gradient.raw(), size_t(gradient.numel()), nccl_type(gradient.dtype()), peer,
                      mesh_["pp"].comm, mesh_.stream));
  NCCL_CHECK(ncclRecv(other.raw(), size_t(other.numel()), nccl_type(other.dtype()), peer,
                      mesh_["pp"].comm, mesh_.stream));
  NCCL_CHECK(ncclGroupEnd());
  make_wait(device().compute, mesh_.stream);  // the other stage's part must have arrived
  add(gradient, gradient, other);             // a + b here, b + a there: the same bits
}
