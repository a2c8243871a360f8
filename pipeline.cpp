// pipeline.cpp: the executor of pipeline schedules. See pipeline.h for the idea and schedule.h for the schedules.
//
//   stage 0   F0 F1 F2 F3          B0    B1 ...        1f1b, 4 stages: a stage warms up with one forward for each stage behind it, then
//   stage 1      F0 F1 F2       B0 F3 B1 ...           one backward makes room for one forward
//   stage 2         F0 F1    B0 F2 B1 F3 ...
//   stage 3            F0 B0 F1 B1 F2 ...
//
// traffic   an activation forward and its gradient backward at each of the pV - 1 cuts: 2 m (pV - 1) sends in all of S*C elements (S: rows
//           that a rank holds); the tied embedding's gradient once a step between first and last stage
// memory    weights, gradients and optimizer state of this stage's layers; activations of as many micro-batches as the schedule keeps alive
// bubble    how long a stage idles: schedule.h has the formulas, report.cpp prints them beside what this executor measured
// overlap   an exchange waits for what it sends and for room for what it receives, not for all that was computed before it; a computation
//           waits for what it needs
// not here  stages on different numbers of ranks, activations kept on the host
// test      tests/test_pipeline.cpp
#include "pipeline.h"

#include <algorithm>
#include <cmath>
#include <ctime>

// ---- the executor

static double processor_seconds() {  // of all threads of this process
  timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return double(t.tv_sec) + double(t.tv_nsec) * 1e-9;
}

void Pipeline::run(const Shape& shape, Dtype dtype, const Compute& compute) {
  const std::vector<Action>& actions = schedule_.ranks[mesh_.pp.rank];
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
    if (!device().is_gpu) synchronize();  // where streams run by themselves this action's work would count for a later one
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
    switch (a.kind) {
      case Action::forward:
        if (!is_first(a.chunk)) live.in.value = arrived(Transfer::activation, a.microbatch, a.chunk);
        live.bytes = (live.in.value.empty() ? 0 : live.in.value.bytes()) - held;
        measured(i, [&] { live.out = compute(live.tape, a.chunk, live.in, a.microbatch); });
        live.bytes += held - (live.out.value.empty() ? 0 : live.out.value.bytes());  // what was made, and what came, less what is passed on
        live.in.value = Tensor();  // whoever needs it for the backward has it
        count_live(lives);
        if (!is_last(a.chunk)) post(Transfer::activation, a.microbatch, a.chunk, std::move(live.out.value));
        break;
      case Action::backward:
      case Action::input_gradient:
        if (a.kind == Action::input_gradient) live.tape.deferred = &live.later;
        if (!is_last(a.chunk)) *live.out.grad = arrived(Transfer::gradient, a.microbatch, a.chunk);
        measured(i, [&] { live.tape.backward(); });
        if (!is_first(a.chunk)) post(Transfer::gradient, a.microbatch, a.chunk, take(live.in.grad));
        if (a.kind == Action::backward) lives.erase({a.microbatch, a.chunk});
        break;
      default:  // weight_gradient
        measured(i, [&] {
          for (; !live.later.empty(); live.later.pop_front()) live.later.front()();
        });
        lives.erase({a.microbatch, a.chunk});
    }
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
  const int p = schedule_.stages, s = mesh_.pp.rank;
  for (int m = 0; m < microbatches; m++)
    for (int chunk = 0; chunk < schedule_.chunks; chunk++) {
      Var x;
      if (!is_first(chunk)) {
        room_.push_back(Tensor(shape, dtype, Memory::activations));
        free_.record(device().compute);
        exchange({{false, Transfer::activation, (s + p - 1) % p, m, chunk}});
        x.value = arrived(Transfer::activation, m, chunk);
      }
      Tape tape(false);
      const Var y = compute(tape, chunk, x, m);
      if (is_last(chunk)) continue;
      post(Transfer::activation, m, chunk, y.value);
      exchange({{true, Transfer::activation, (s + 1) % p, m, chunk}});
    }
  release_sent(exchanges_);
}

// ---- between stages: all transfers of one exchange are one NCCL group, so that two that face each other do not wait for each other

void Pipeline::exchange(const std::vector<Transfer>& transfers) {
  const auto event = std::make_shared<Event>();
  exchanges_++;
  bool receives = false;
  for (const Transfer& t : transfers) {
    if (t.send) outbox_.at({t.payload, t.microbatch, t.chunk}).event->make_wait(mesh_.stream);  // what is sent must have been computed
    else receives = true;
  }
  if (receives) free_.make_wait(mesh_.stream);  // whoever used this memory before must be done with it

  NCCL_CHECK(ncclGroupStart());
  for (const Transfer& t : transfers) {
    const Key key = {t.payload, t.microbatch, t.chunk};
    if (t.send) {
      const Tensor x = outbox_.at(key).x;
      ledger.send(mesh_.pp, x.bytes());
      NCCL_CHECK(ncclSend(x.raw(), size_t(x.numel()), nccl_type(x.dtype()), t.peer, mesh_.pp.comm, mesh_.stream));
      outbox_.erase(key);
      sent_.push_back({x, event, exchanges_});
    } else {
      const Tensor x = std::move(room_.front());
      room_.pop_front();
      NCCL_CHECK(ncclRecv(x.raw(), size_t(x.numel()), nccl_type(x.dtype()), t.peer, mesh_.pp.comm, mesh_.stream));
      inbox_[key] = {x, event, exchanges_};
    }
  }
  NCCL_CHECK(ncclGroupEnd());
  event->record(mesh_.stream);
  if (sent_.size() > 4) release_sent(sent_[sent_.size() - 5].exchange);  // a stage that runs ahead keeps four parcels at most
}

// Room for what the next exchange from action `i` on receives, now, so that it waits for nothing that is computed from here on.
void Pipeline::prepare_room(size_t i, const Shape& shape, Dtype dtype) {
  const std::vector<Action>& actions = schedule_.ranks[mesh_.pp.rank];
  while (i < actions.size() && actions[i].kind != Action::exchange) i++;
  if (i == actions.size()) return;
  for (const Transfer& t : actions[i].transfers)
    if (!t.send) room_.push_back(Tensor(shape, dtype, Memory::activations));
  free_.record(device().compute);
}

void Pipeline::post(Transfer::Payload payload, int microbatch, int chunk, Tensor x) {
  const auto event = std::make_shared<Event>();
  event->record(device().compute);
  if (schedule_.stages > 1) outbox_[{payload, microbatch, chunk}] = {std::move(x), event};
  else inbox_[{payload, microbatch, payload == Transfer::activation ? chunk + 1 : chunk - 1}] = {std::move(x), event};  // handed on in memory
}

Tensor Pipeline::arrived(Transfer::Payload payload, int microbatch, int chunk) {
  const auto found = inbox_.find({payload, microbatch, chunk});
  ASSERT(found != inbox_.end(), "micro-batch ", microbatch, " of chunk ", chunk, " was not received before it was needed");
  const Parcel parcel = std::move(found->second);
  inbox_.erase(found);
  parcel.event->make_wait(device().compute);  // it must have arrived
  while (!sent_.empty() && sent_.front().exchange <= parcel.exchange) sent_.pop_front();  // one queue: these left before
  return parcel.x;
}

// The compute stream waits until everything up to that exchange has left; then the memory can be used again.
void Pipeline::release_sent(int exchange) {
  while (!sent_.empty() && sent_.front().exchange <= exchange) {
    sent_.front().event->make_wait(device().compute);
    sent_.pop_front();
  }
}

// ---- once a step

void Pipeline::sum_tied(const Tensor& gradient) {
  const int last = mesh_.pp.size - 1;
  if (mesh_.pp.size == 1 || (mesh_.pp.rank != 0 && mesh_.pp.rank != last)) return;
  const Purpose purpose(Traffic::embedding);
  const int peer = last - mesh_.pp.rank;
  const Tensor other(gradient.shape(), gradient.dtype(), Memory::workspace);
  make_wait(mesh_.stream, device().compute);  // the gradient must be complete
  ledger.send(mesh_.pp, gradient.bytes());
  NCCL_CHECK(ncclGroupStart());
  NCCL_CHECK(ncclSend(gradient.raw(), size_t(gradient.numel()), nccl_type(gradient.dtype()), peer, mesh_.pp.comm, mesh_.stream));
  NCCL_CHECK(ncclRecv(other.raw(), size_t(other.numel()), nccl_type(other.dtype()), peer, mesh_.pp.comm, mesh_.stream));
  NCCL_CHECK(ncclGroupEnd());
  make_wait(device().compute, mesh_.stream);  // the other stage's part must have arrived
  add(gradient, gradient, other);             // a + b here, b + a there: the same bits
}

// ---- who owns which layers

std::vector<Range> split_layers(int64_t layers, double head, int positions) {
  REQUIRE(layers >= positions, layers, " layers cannot be cut into ", positions, " pieces (stages x chunks): each needs a layer");
  const double each = (double(layers) + head) / positions;
  std::vector<Range> ranges;
  int64_t end = 0;
  for (int v = 0; v < positions; v++) {
    const int64_t begin = end, later = positions - 1 - v;
    end = v + 1 == positions ? layers : std::clamp(int64_t(std::llround(each * (v + 1))), begin + 1, layers - later);
    ranges.push_back({begin, end});
  }
  return ranges;
}
