// fsdp.cpp: each rank of an axis owns 1/n of every unit, and gathers the rest while it computes.
//
//              shards_    shards_      held between steps,           also held while
//   mode       parameters gradients    W weights, G gradients        a unit is in use
//   DDP        no         no           W, G, moments                (the axis has 1 rank)
//   ZeRO-1     no         no           W, G, 1/n of the moments
//   ZeRO-2     no         yes          W, 1/n of G and the moments   its whole gradient
//   ZeRO-3     yes        yes          1/n of W, G and the moments   and its whole weights
//
// traffic   P a unit's elements, m micro-batches, in units of (n-1)/n P per rank and step; gathers
//           in the compute dtype, scatters in f32:
//                            all-gather   reduce-scatter
//             ZeRO-1              1             1
//             ZeRO-2              1             m
//             ZeRO-3             2 m            m         (without reshard: 1 all-gather)
//           each axis of copies: one all-reduce of the gradient's shard per unit and step
// memory    bytes per parameter in f32, ZeRO-1: 8 + 8/n, ZeRO-2: 4 + 12/n, ZeRO-3: 16/n; and the
//           whole buffers in use
// not here  offloading to the host; gradients in bf16 on the wire
// test      tests/test_fsdp.cpp
#include "fsdp.h"

#include <algorithm>

// ---- a use: what surrounds a piece of the model, forward and backward

// The tape is played from its end: what is pushed first runs last.
//   pushed     after_backward · entries of f: f1 f2 f3 · before_backward
//   backward   before_backward · f3 f2 f1 · after_backward
Var Fsdp::run(Tape& tape, int use, const std::function<Var()>& f) {
  tape.push([this, &tape, use] { after_backward(tape, use); });
  before_forward(use);
  Var y = f();
  after_forward(tape, use);
  tape.push([this, &tape, use] { before_backward(tape, use); });
  return y;
}

void Fsdp::before_forward(int use) {
  unshard(use, +1);
  recorder.enter("forward", uses_[use].name);
}

void Fsdp::after_forward(const Tape& tape, int use) {
  const bool backward_is_next =
      tape.recording() && uses_[use].backward_reads == BackwardReads::values_kept;
  if (!backward_is_next) reshard_after_use(use);
}

void Fsdp::before_backward(Tape& tape, int use) {
  if (uses_[use].backward_reads != BackwardReads::nothing) unshard(use, -1);
  enter_backward("backward", use);
  if (tape.deferred)  // zero bubble: see the end of this file
    tape.deferred->push_back([this, use] { enter_backward("weight gradient", use); });
}

void Fsdp::after_backward(Tape& tape, int use) {
  // Runs now or, under zero bubble, after this use's weight gradients. These are made of inputs and
  // of outputs' gradients, so the weights themselves are freed now all the same.
  tape.run_or_defer([this, use] { reduce_gradients(use); });
  reshard_after_use(use);
}

// ---- set-up: parameters are born as shards

// Where each parameter starts in the flat unit, and where that ends: the same on all tp ranks, even
// where their slices differ in size. So what all tp ranks hold whole has the same owner in each of
// their FSDP groups, and gets the same bits, since the order in which a ring adds depends on the
// owner. (NCCL must order the rings of these groups alike: docs/tensor_parallel.md.)
static std::vector<int64_t> offsets_in_unit(const std::vector<Param*>& params, int64_t shards) {
  std::vector<int64_t> offsets;
  int64_t end = 0;
  for (const Param* p : params) {
    offsets.push_back(round_up(end, 128));  // at least 256 bytes in every dtype
    end = offsets.back() + std::max(elements(p->local_shape()), p->largest_slice);
  }
  offsets.push_back(round_up(end, 16 * shards));
  return offsets;
}

int64_t padded_unit(const std::vector<Param*>& params, int64_t shards) {
  return offsets_in_unit(params, shards).back();
}

std::map<int, std::vector<Param*>> units_of(const std::vector<Param*>& params) {
  std::map<int, std::vector<Param*>> units;
  for (Param* p : params) units[p->unit].push_back(p);
  return units;
}

// Calls work(param, first element of it that is in this rank's shard, how many, where in the shard)
// for each parameter that the shard touches.
template <class Unit, class Work> static void for_pieces(const Unit& u, Work work) {
  for (size_t i = 0; i < u.params.size(); i++) {
    const int64_t first = std::max(u.begin, u.offsets[i]);
    const int64_t last = std::min(u.begin + u.shard_size, u.offsets[i] + u.params[i]->numel());
    if (first < last) work(*u.params[i], first - u.offsets[i], last - first, first - u.begin);
  }
}

Fsdp::Fsdp(const Axis& axis, const std::vector<Axis>& copies, Dtype dtype,
           const FsdpOptions& options)
    : axis_(axis), copies_(copies), dtype_(dtype), options_(options) {}

void Fsdp::Unit::bind(Tensor Param::*what, const Tensor& buffer) {
  for (size_t i = 0; i < params.size(); i++)
    params[i]->*what =
        buffer.empty() ? Tensor() : buffer.view(offsets[i], params[i]->local_shape());
}

void Fsdp::Unit::begin_gradients() {
  for (size_t i = 0; i < params.size(); i++) {
    params[i]->fresh = true;
    const int64_t end = offsets[i] + elements(params[i]->local_shape());
    fill(whole_grad.view(end, {offsets[i + 1] - end}), 0);  // no writer clears the padding
  }
}

void Fsdp::add_units(const std::vector<Param*>& all, uint64_t seed, std::string (*name)(int unit)) {
  const Dtype master = master_dtype(dtype_);
  for (const auto& [number, params] : units_of(all)) {
    Unit& u = units_[number];
    u.name = name(number);
    u.params = params;
    u.offsets = offsets_in_unit(params, axis_.size);
    u.padded = u.offsets.back();
    u.shard_size = u.padded / axis_.size;
    u.begin = axis_.rank * u.shard_size;

    if (shards_parameters()) {
      u.shard = Tensor({u.shard_size}, dtype_, Memory::parameters);
    } else {
      u.whole = Tensor({u.padded}, dtype_, Memory::parameters);
      u.shard = u.shard_of(u.whole);
    }
    if (dtype_ != master) u.master = Tensor({u.shard_size}, master, Memory::optimizer);
    const Tensor& born = u.master.empty() ? u.shard : u.master;
    fill(born, 0);  // the padding stays 0
    for_pieces(u, [&](Param& p, int64_t first, int64_t count, int64_t at) {
      p.initialise(born.view(at, {count}), seed, first);
    });
    if (!u.master.empty()) cast(u.shard, u.master);

    if (shards_gradients()) {
      u.shard_grad = Tensor({u.shard_size}, master, Memory::gradients);
    } else {
      u.whole_grad = Tensor({u.padded}, master, Memory::gradients);
      u.shard_grad = u.shard_of(u.whole_grad);
      u.bind(&Param::grad, u.whole_grad);
    }

    u.m = Tensor({u.shard_size}, master, Memory::optimizer);
    u.v = Tensor({u.shard_size}, master, Memory::optimizer);
    fill(u.m, 0);
    fill(u.v, 0);
  }
}

int Fsdp::add_use(const std::vector<Param*>& params, BackwardReads backward_reads, int chunk,
                  const std::string& name) {
  Use& use = uses_.emplace_back(Use{name, {}, backward_reads, chunk});
  for (const auto& [number, of_unit] : units_of(params)) {
    use.units.push_back(&units_.at(number));
    use.units.back()->uses_per_microbatch++;
  }
  return uses_.size() - 1;
}

std::vector<ParamShard> Fsdp::param_shards() const {
  std::vector<ParamShard> shards;
  for (const auto& [number, u] : units_)
    for_pieces(u, [&, &u = u](Param& p, int64_t first, int64_t count, int64_t at) {
      const auto piece = [&](const Tensor& x) { return x.view(at, {count}); };
      const bool same = u.master.empty();  // the weights that compute are the master weights
      shards.push_back({piece(same ? u.shard : u.master), same ? Tensor() : piece(u.shard),
                        piece(u.shard_grad), piece(u.m), piece(u.v), &p, first});
    });
  return shards;
}

// ---- parameters: unshard and reshard

// Unshards a use's units, and starts the gathers of the next `prefetch` uses in this direction. In
// the backward those of blocks alone: the embedding needs no values, and the head's are kept.
void Fsdp::unshard(int use, int direction) {
  for (Unit* u : uses_[use].units) start_unshard(*u);
  for (int k = 1; k <= options_.prefetch; k++) {
    const int next = use + k * direction;
    if (next < 0 || next >= int(uses_.size()) || uses_[next].chunk != uses_[use].chunk) break;
    if (direction < 0 && uses_[next].backward_reads != BackwardReads::values) continue;
    for (Unit* u : uses_[next].units) start_unshard(*u);
  }
  for (Unit* u : uses_[use].units) finish_unshard(*u);
}

void Fsdp::start_unshard(Unit& u) {
  if (u.gathered) return;
  u.gathered = true;
  if (u.whole.empty()) u.whole = Tensor({u.padded}, dtype_, Memory::gather);
  if (axis_.size == 1) return;
  recorder.enter("gather", u.name);
  // kernels that used this memory before must have finished, and the optimizer must have written
  // the shard that is sent
  communicate_after_compute();
  const Timed timed;
  ledger.enter(axis_, Collective::all_gather, u.whole.bytes());
  NCCL_CHECK(ncclAllGather(u.shard.raw(), u.whole.raw(), u.shard_size, nccl_type(dtype_),
                           axis_.comm, device().communication));
  u.arrived.record(device().communication);
}

void Fsdp::finish_unshard(Unit& u) {
  // every rank's shard must have arrived
  if (axis_.size > 1) u.arrived.make_wait(device().compute);
  u.bind(&Param::value, u.whole);
}

void Fsdp::reshard_after_use(int use) {
  if (!reshards()) return;
  for (Unit* u : uses_[use].units) reshard(*u);
}

void Fsdp::reshard(Unit& u) {
  if (!u.gathered) return;
  u.gathered = false;
  if (!shards_parameters()) return;  // the buffer stays; the other ranks' parts of it are old
  ASSERT(!u.params[0]->value.empty(), u.name, " was gathered, and nothing waited for it");
  recorder.resharded(u.name);
  u.bind(&Param::value, {});
  // returned to the pool in the order of the compute stream, after the last kernel that reads it
  u.whole = Tensor();
}

// ---- gradients: a whole buffer that the backward adds to, then this rank's shard of the sum. The
// first writer of a fresh one overwrites it; only those of an embedding, which scatters rows, and
// those that zero bubble left without a writer are cleared.

void Fsdp::enter_backward(const char* pass, int use) {
  // A sum of the micro-batch before may still use this buffer. Sums that were queued before it end
  // before it, so that finishing these costs no wait of their own.
  for (Unit* u : uses_[use].units)
    while (std::ranges::count(in_flight_, u)) finish_reduce();
  recorder.enter(pass, uses_[use].name);
  for (Unit* u : uses_[use].units) {
    if (!u->whole_grad.empty()) continue;
    u->whole_grad = Tensor({u->padded}, master_dtype(dtype_), Memory::gather);
    u->bind(&Param::grad, u->whole_grad);
    u->begin_gradients();
  }
}

// This use's part of its units' gradients has been computed.
void Fsdp::reduce_gradients(int use) {
  for (Unit* u : uses_[use].units) {
    if (++u->uses_done < u->uses_per_microbatch) continue;  // another use will add to this gradient
    u->uses_done = 0;
    u->gradients_done++;
    // Whole gradients add up over the step: their sum comes after its last micro-batch or, later
    // still, in finish_backward.
    if (!shards_gradients() && (sums_at_end || u->gradients_done < microbatches_)) continue;
    start_reduce(*u);
  }
}

// A unit's gradient, of one micro-batch or of the step, is complete on this rank.
void Fsdp::start_reduce(Unit& u) {
  recorder.enter("complete", u.name);
  for (Param* p : u.params) p->clear_if_fresh();  // zero bubble may leave some without a writer
  if (complete_gradients) complete_gradients(u.params);
  communicate_after_compute();  // the gradients must have been computed
  if (axis_.size > 1) {
    // In place: the sum is written over this rank's part of what it sends. Without sharded
    // gradients that part is shard_grad itself; with them finish_reduce adds it to shard_grad.
    const Tensor mine = u.shard_of(u.whole_grad);
    // A sum, not a mean: the loss is divided by all tokens of the step, on all ranks (trainer.h).
    const Timed timed;
    ledger.enter(axis_, Collective::reduce_scatter, u.whole_grad.bytes());
    NCCL_CHECK(ncclReduceScatter(u.whole_grad.raw(), mine.raw(), u.shard_size,
                                 nccl_type(mine.dtype()), ncclSum, axis_.comm,
                                 device().communication));
  }
  if (!shards_gradients()) sum_over_copies(u);
  u.reduced.record(device().communication);
  in_flight_.push_back(&u);
  // Sharded gradients: one may travel while the next is computed, so no more than two are whole.
  // Those that stay whole may all travel until the step's end.
  size_t may_travel = shards_gradients() ? 1 : units_.size();
  if (options_.prefetch == 0) may_travel = 0;
  while (in_flight_.size() > may_travel) finish_reduce();
}

void Fsdp::finish_reduce() {
  Unit& u = *in_flight_.front();
  in_flight_.pop_front();
  recorder.enter("sum", u.name);
  u.reduced.make_wait(device().compute);  // the sum must have arrived
  if (!shards_gradients()) return;
  const Tensor mine = u.shard_of(u.whole_grad);
  // gradients_done is as start_reduce left it: in its next micro-batch the unit finishes this sum,
  // in enter_backward, before it counts
  if (u.gradients_done == 1) copy(u.shard_grad, mine);
  else add(u.shard_grad, u.shard_grad, mine);
  u.whole_grad = Tensor();
  u.bind(&Param::grad, {});
  if (u.gradients_done == microbatches_) {
    communicate_after_compute();  // this rank's shard must be complete
    sum_over_copies(u);
  }
}

// Once a step, on this rank's shard of the complete sum.
void Fsdp::sum_over_copies(Unit& u) {
  for (const Axis& copies : copies_) {
    if (copies.size == 1) continue;
    const Timed timed;
    ledger.enter(copies, Collective::all_reduce, u.shard_grad.bytes());
    NCCL_CHECK(ncclAllReduce(u.shard_grad.raw(), u.shard_grad.raw(), u.shard_size,
                             nccl_type(u.shard_grad.dtype()), ncclSum, copies.comm,
                             device().communication));
  }
}

// ---- a step

void Fsdp::begin_step(int microbatches) {
  microbatches_ = microbatches;
  for (auto& [number, u] : units_) {
    u.gradients_done = 0;
    if (!shards_gradients()) u.begin_gradients();
  }
  if (!gathers_at_begin || reshards() || options_.prefetch == 0) return;
  for (const Use& use : uses_)  // in the order of their first uses; see fsdp.h
    for (Unit* u : use.units) start_unshard(*u);
}

void Fsdp::finish_backward() {
  for (auto& [number, u] : units_) {
    ASSERT(u.gradients_done == microbatches_ && u.uses_done == 0, u.name, " is left unfinished");
    if (sums_at_end && !shards_gradients()) start_reduce(u);
  }
  while (!in_flight_.empty()) finish_reduce();
  compute_after_communication();  // the optimizer reads what the last collectives wrote
}

void Fsdp::end_step() {
  for (auto& [number, u] : units_) reshard(u);
}

// ---- together with the other strategies
//
// zero bubble   A pipeline may put weight gradients off (Tape::run_or_defer). Of a use whose
//               input gradients are b and whose weight gradients are w,
//                 now        enter_backward · b3 b2 b1 · reshard_after_use
//                 put off    enter_backward · w3 w2 w1 · reduce_gradients
//               So a unit's reduce-scatter is queued after its weight gradients. In between, that
//               of an earlier micro-batch may have freed the whole gradient, and the second
//               enter_backward allocates it again. Gradients that are not put off (of layernorms)
//               may all be in the earlier buffer; in this one they are still fresh, and
//               start_reduce clears them.
// sequence parallelism   leaves gradients that are partial sums over the tp axis, and
// tied weights           leave two gradients of one parameter on one rank: complete_gradients adds
//                        both up before they leave the rank.
