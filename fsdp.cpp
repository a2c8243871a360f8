// fsdp.cpp: each rank of an axis owns 1/n of every unit and borrows the rest while it
// computes.
//
// traffic   P a unit's elements, m micro-batches, in units of (n-1)/n P per rank and step; gathers
//           in the compute dtype, scatters in f32:
//                              all-gather   reduce-scatter
//             ZeRO-1               1             1          (optimizer state sharded)
//             ZeRO-2               1             m          (and gradients)
//             ZeRO-3, kept         1             m          (and parameters, gathered once a step)
//             ZeRO-3              2 m            m          (and given back after each forward)
//           each axis of copies: one all-reduce of the gradient shard a unit and step
// memory    bytes a parameter in f32, ZeRO-1: 8 + 8/n, ZeRO-2: 4 + 12/n, ZeRO-3: 16/n; and the
//           units in flight
// not here  offloading to the host; gradients in bf16 on the wire
// test      tests/test_fsdp.cpp
//
//   forward of unit u                     backward of unit u
//     start gather(u .. u+K)                start gather(u .. u-K)         those that are not on their way
//     wait for gather(u)                    wait for gather(u)
//     compute                               compute: gradients into a full buffer
//     give u back                           start reduce-scatter(u); finish that of u+1; give u
//                                           back
#include "fsdp.h"

#include <algorithm>

// ---- a use: what surrounds a piece of the model, forward and backward

Var Fsdp::run(Tape& tape, int use, const std::function<Var()>& f) {
  const Backward backward = uses_[use].backward;
  const auto each_unit = [this, use](auto&& work) {
    for (Unit* u : uses_[use].units) work(*u);
  };
  // Gathers this use's units and, ahead of need, those of the uses after it in the direction we go.
  const auto gather = [this, use, each_unit](int direction) {
    each_unit([&](Unit& u) { start_gather(u); });
    const auto in_group = [&](int next) {
      return next >= 0 && next < int(uses_.size()) && uses_[next].group == uses_[use].group;
    };
    for (int k = 1, next = use + direction; k <= options_.prefetch && in_group(next);
         k++, next += direction)
      if (direction > 0 || uses_[next].backward == Backward::gathers)
        for (Unit* u : uses_[next].units) start_gather(*u);
    each_unit([&](Unit& u) { finish_gather(u); });
  };
  const bool returns = borrows() && options_.reshard;

  // What stands on the tape before f runs in the backward after f's own entries: the gradients are
  // complete.
  tape.push([this, each_unit, returns, &tape] {
    // behind the weight gradients that it needs, should those be deferred
    tape.weight_gradient([this, each_unit] {
      each_unit([&](Unit& u) {
        if (++u.done < u.uses) return;  // another use will add to this gradient
        u.done = 0;
        u.rounds++;
        start_reduce(u);
      });
    });
    if (returns) each_unit([&](Unit& u) { give_back(u); });
  });

  gather(+1);
  Var y = f();
  if (returns && (!tape.recording() || backward != Backward::keeps))
    each_unit([&](Unit& u) { give_back(u); });

  // What stands on the tape after f runs before f's entries in the backward.
  tape.push([this, each_unit, gather, backward, &tape] {
    if (backward == Backward::gathers || backward == Backward::keeps) gather(-1);
    each_unit([&](Unit& u) { prepare_gradients(u); });
    // until the weight gradients are computed, those of an earlier micro-batch may have left with
    // the buffer
    if (tape.deferred)
      tape.weight_gradient(
          [this, each_unit] { each_unit([&](Unit& u) { prepare_gradients(u); }); });
  });
  return y;
}

// ---- parameters: gather and give back

void Fsdp::start_gather(Unit& u) {
  if (u.gathered) return;
  u.gathered = true;
  if (u.full.empty()) u.full = Tensor({u.padded}, dtype_, Memory::gather);
  if (axis_.size == 1) return;
  // whoever used this memory before must be done with it, and the optimizer with the shard
  make_wait(stream_, device().compute);
  const Timed timed(stream_);
  ledger.all_gather(axis_, u.full.bytes());
  NCCL_CHECK(
      ncclAllGather(u.own.raw(), u.full.raw(), u.shard, nccl_type(dtype_), axis_.comm, stream_));
  u.ready.record(stream_);
}

void Fsdp::finish_gather(Unit& u) {
  // this unit's parameters must have arrived
  if (axis_.size > 1) u.ready.make_wait(device().compute);
  for (size_t i = 0; i < u.params.size(); i++)
    u.params[i]->value = u.full.part(u.offsets[i], u.params[i]->local_shape());
}

void Fsdp::give_back(Unit& u) {
  if (!u.gathered) return;
  u.gathered = false;
  if (!borrows()) return;
  for (Param* p : u.params) p->value = Tensor();
  // returned to the pool in the order of the compute stream, behind the last kernel that reads it
  u.full = Tensor();
}

// ---- gradients: a full buffer while the backward fills it, then a shard

void Fsdp::prepare_gradients(Unit& u) {
  while (u.reducing) finish_reduce();  // the last micro-batch's sum still reads the buffer
  if (!u.full_grad.empty()) return;
  u.full_grad = Tensor({u.padded}, master_dtype(dtype_), Memory::gather);
  fill(u.full_grad, 0);
  point_at(u);
}

void Fsdp::point_at(Unit& u) {
  for (size_t i = 0; i < u.params.size(); i++) {
    Param& p = *u.params[i];
    p.grad = u.full_grad.empty() ? Tensor() : u.full_grad.part(u.offsets[i], p.local_shape());
  }
}

// The gradients of one micro-batch (ZeRO-2 and 3) or of the whole step are complete on this rank:
// sum them over the others.
void Fsdp::start_reduce(Unit& u) {
  const bool last = u.rounds == microbatches_;
  if (!scatters_each() && !last) return;  // they add up where they are
  if (complete_gradients) complete_gradients(u.params);
  make_wait(stream_, device().compute);  // the gradients must have been computed
  if (axis_.size > 1) {
    Tensor mine = u.full_grad.part(axis_.rank * u.shard, {u.shard});  // in place
    const Timed timed(stream_);
    ledger.reduce_scatter(axis_, u.full_grad.bytes());
    NCCL_CHECK(ncclReduceScatter(u.full_grad.raw(), mine.raw(), u.shard, nccl_type(mine.dtype()),
                                 ncclSum, axis_.comm, stream_));
  }
  if (!scatters_each()) sum_over_copies(u);
  u.reduced.record(stream_);
  u.reducing = true;
  reducing_.push_back(&u);
  // two full gradients at most: one computed, one summed
  while (int(reducing_.size()) > std::min(options_.prefetch, 1)) finish_reduce();
}

void Fsdp::finish_reduce() {
  Unit& u = *reducing_.front();
  reducing_.pop_front();
  u.reducing = false;
  u.reduced.make_wait(device().compute);  // the sum must have arrived
  if (!scatters_each()) return;
  add(u.own_grad, u.own_grad, u.full_grad.part(axis_.rank * u.shard, {u.shard}));
  u.full_grad = Tensor();
  point_at(u);
  if (u.rounds == microbatches_) {
    make_wait(stream_, device().compute);  // this rank's shard must be complete
    sum_over_copies(u);
  }
}

void Fsdp::sum_over_copies(Unit& u) {
  for (const Axis& copies : copies_) {
    if (copies.size == 1) continue;
    const Timed timed(stream_);
    ledger.all_reduce(copies, u.own_grad.bytes());
    NCCL_CHECK(ncclAllReduce(u.own_grad.raw(), u.own_grad.raw(), u.shard,
                             nccl_type(u.own_grad.dtype()), ncclSum, copies.comm, stream_));
  }
}

// ---- a step

void Fsdp::begin_step(int microbatches) {
  microbatches_ = microbatches;
  for (auto& [number, u] : units_) {
    u.gathered = axis_.size == 1;  // the optimizer has changed the shards: gather them anew
    u.rounds = 0;
    fill(scatters_each() ? u.own_grad : u.full_grad, 0);
  }
}

void Fsdp::finish_backward() {
  while (!reducing_.empty()) finish_reduce();
  make_wait(device().compute, stream_);  // the optimizer reads what the last collectives wrote
}

void Fsdp::end_step() {
  // where nothing is borrowed, this marks the other ranks' shards as old
  for (auto& [number, u] : units_) give_back(u);
}

// ---- set-up

static int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Where each parameter starts in the flat unit.
static std::vector<int64_t> offsets_in_unit(const std::vector<Param*>& params) {
  std::vector<int64_t> offsets;
  for (int64_t end = 0; const Param* p : params) {
    offsets.push_back(round_up(end, kUnitAlignment));
    end = offsets.back() + p->numel();
  }
  return offsets;
}

int64_t padded_unit(const std::vector<Param*>& params, int64_t shards) {
  return round_up(offsets_in_unit(params).back() + params.back()->numel(), 16 * shards);
}

Fsdp::Fsdp(const Axis& axis, const std::vector<Axis>& copies, cudaStream_t stream, Dtype dtype,
           const FsdpOptions& options, uint64_t seed)
    : axis_(axis),
      copies_(copies),
      stream_(stream),
      dtype_(dtype),
      options_(options),
      seed_(seed) {}

Fsdp::~Fsdp() {
  for (auto& [number, u] : units_)
    for (Param* p : u.params) p->value = p->grad = Tensor();
}

// Calls work(param, first element of it that is in the shard, how many, where in the shard) for
// each parameter that this rank's shard touches.
template <class Unit, class Work> static void for_pieces(const Unit& u, int rank, Work work) {
  const int64_t begin = rank * u.shard, end = begin + u.shard;
  for (size_t i = 0; i < u.params.size(); i++) {
    const int64_t first = std::max(begin, u.offsets[i]),
                  last = std::min(end, u.offsets[i] + u.params[i]->numel());
    if (first < last) work(*u.params[i], first - u.offsets[i], last - first, first - begin);
  }
}

std::map<int, std::vector<Param*>> units_of(const std::vector<Param*>& params) {
  std::map<int, std::vector<Param*>> units;
  for (Param* p : params) units[p->unit].push_back(p);
  return units;
}

void Fsdp::add_units(const std::vector<Param*>& all) {
  for (const auto& [number, params] : units_of(all)) {
    Unit& u = units_[number];
    u.params = params;
    u.offsets = offsets_in_unit(params);
    u.padded = padded_unit(params, axis_.size);
    u.shard = u.padded / axis_.size;

    const int64_t mine = axis_.rank * u.shard;
    if (borrows()) {
      u.own = Tensor({u.shard}, dtype_, Memory::parameters);  // no rank ever holds the whole model
    } else {
      u.full = Tensor({u.padded}, dtype_, Memory::parameters);
      u.own = u.full.part(mine, {u.shard});
    }
    const Dtype master = master_dtype(dtype_);
    if (scatters_each()) {
      u.own_grad = Tensor({u.shard}, master, Memory::gradients);
    } else {
      u.full_grad = Tensor({u.padded}, master, Memory::gradients);
      u.own_grad = u.full_grad.part(mine, {u.shard});
      point_at(u);
    }
    fill(u.own, 0);  // the padding stays 0
    for_pieces(u, axis_.rank, [&](Param& p, int64_t first, int64_t count, int64_t at) {
      p.initialise(u.own.part(at, {count}), seed_, first);
    });
    if (dtype_ != master) {
      u.master = Tensor({u.shard}, master, Memory::optimizer);
      cast(u.master, u.own);
    }
    u.m = Tensor({u.shard}, master, Memory::optimizer);
    u.v = Tensor({u.shard}, master, Memory::optimizer);
    fill(u.m, 0);
    fill(u.v, 0);
  }
}

int Fsdp::add_use(const std::vector<Param*>& params, Backward backward, int group) {
  Use& use = uses_.emplace_back(Use{{}, backward, group});
  for (const auto& [number, of_unit] : units_of(params)) {
    use.units.push_back(&units_.at(number));
    use.units.back()->uses++;
  }
  return int(uses_.size()) - 1;
}

std::vector<Shard> Fsdp::optimizer_shards() const {
  std::vector<Shard> shards;
  for (const auto& [number, u] : units_)
    for_pieces(u, axis_.rank, [&](Param& p, int64_t first, int64_t count, int64_t at) {
      const auto piece = [&](const Tensor& x) { return x.part(at, {count}); };
      const bool same = u.master.empty();  // the weights that compute are the master weights
      shards.push_back({piece(same ? u.own : u.master), same ? Tensor() : piece(u.own),
                        piece(u.own_grad), piece(u.m), piece(u.v), &p, first});
    });
  return shards;
}
