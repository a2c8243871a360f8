// fsdp.h: Fully Sharded Data Parallelism (ZeRO stages 1, 2 and 3), plain data parallelism, and the
// two combined.
//
// idea      Each rank of an axis owns 1/n of every unit (a transformer block, or the embeddings)
//           and borrows the rest while it computes. Other axes hold copies of that: gradients are
//           summed over them. With n = 1 this is plain data parallelism (DDP).
// source    Rajbhandari et al., "ZeRO: Memory optimizations toward training trillion parameter
//           models", SC 2020, sections 5 and 7; Zhao et al., "PyTorch FSDP", VLDB 2023 (units, flat
//           parameters, prefetch)
// test      tests/test_fsdp.cpp
#pragma once
#include <deque>
#include <map>

#include "autograd.h"
#include "comm.h"
#include "optimizer.h"

struct FsdpOptions {
  int zero = 3;  // 1: optimizer state is sharded; 2: and gradients; 3: and parameters
  // ZeRO-3: give parameters back after the forward and gather them again for the backward
  bool reshard = true;
  // units gathered ahead while compute goes on; above 0, one reduce-scatter is left behind, too
  int prefetch = 1;
};

class Fsdp {
 public:
  // axis: over which units are sharded. copies: axes whose ranks hold the same shard.
  Fsdp(const Axis& axis, const std::vector<Axis>& copies, cudaStream_t stream, Dtype dtype,
       const FsdpOptions& options, uint64_t seed);
  ~Fsdp();

  // ---- set-up: all units, then their uses in forward order
  // parameters of one Param::unit make a unit; allocates this rank's shards with initial values
  void add_units(const std::vector<Param*>& params);
  // A use computes with the units of these parameters. Uses of one group follow each other at once;
  // a pipeline's chunks are groups. Units are gathered ahead within a group only.
  int add_use(const std::vector<Param*>& params, Backward backward, int group = 0);
  // what this rank updates: its piece of each parameter, padding left out
  std::vector<Shard> optimizer_shards() const;

  // ---- a step
  void begin_step(int microbatches);
  // y = f(): computes with the parameters of a use's units in place, and puts what their gradients
  // need on the tape.
  Var run(Tape& tape, int use, const std::function<Var()>& f);
  // after the last micro-batch: gradients of this rank's shard are summed over all data-parallel
  // ranks
  void finish_backward();
  // Called before gradients leave this rank, if others left some of them in parts: what it queues
  // on either stream comes first.
  std::function<void(const std::vector<Param*>&)> complete_gradients;
  void end_step();  // after the optimizer: parameters that were borrowed go back
  // complete after finish_backward
  Tensor gradient_shard(int unit) { return units_.at(unit).own_grad; }
  // full gradients live only while needed: they are summed over the ranks after each micro-batch
  bool scatters_each() const { return axis_.size > 1 && options_.zero >= 2; }

 private:
  struct Unit {
    std::vector<Param*> params;
    std::vector<int64_t> offsets;  // of each parameter in the flat unit, in elements
    int64_t padded = 0;            // elements of the flat unit: n shards of `shard` elements
    int64_t shard = 0;
    // compute dtype: (padded), empty while given back; (shard), always there
    Tensor full, own;
    Tensor full_grad, own_grad;  // master dtype, likewise
    Tensor master;               // (shard) master weights when the compute dtype is bf16
    Tensor m, v;                 // (shard) Adam's moments
    // `full` holds, or will hold once `ready` is reached, every rank's shard
    bool gathered = false;
    int uses = 0;  // in the forward of a micro-batch
    // uses whose backward is done, of this micro-batch; micro-batches whose backward is done
    int done = 0, rounds = 0;
    bool reducing = false;  // a reduce-scatter of `full_grad` is on its way
    Event ready, reduced;
  };
  void start_gather(Unit& unit);
  void finish_gather(Unit& unit);
  void give_back(Unit& unit);
  void prepare_gradients(Unit& unit);
  void start_reduce(Unit& unit);
  void finish_reduce();
  void sum_over_copies(Unit& unit);
  void point_at(Unit& unit);
  // parameters live only while needed
  bool borrows() const { return axis_.size > 1 && options_.zero == 3; }

  struct Use {
    std::vector<Unit*> units;
    Backward backward;
    int group;
  };
  Axis axis_;
  std::vector<Axis> copies_;
  cudaStream_t stream_;  // the one communication queue
  Dtype dtype_;
  FsdpOptions options_;
  uint64_t seed_;
  std::map<int, Unit> units_;  // by Param::unit; a map: closures hold references
  std::vector<Use> uses_;
  std::deque<Unit*> reducing_;  // reduce-scatters on their way, oldest first
  int microbatches_ = 1;
};

// How a unit is laid out; theory/ counts with the same sizes.
std::map<int, std::vector<Param*>> units_of(const std::vector<Param*>& params);
// elements: each parameter starts at a multiple of (at least) 256 bytes in every dtype
constexpr int64_t kUnitAlignment = 128;
// elements; shards are multiples of 16 elements
int64_t padded_unit(const std::vector<Param*>& params, int64_t shards);
