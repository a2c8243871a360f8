// fsdp.h: Fully Sharded Data Parallelism (ZeRO stages 1, 2 and 3), plain data parallelism, and the
// two combined.
//
// idea      Each of the n ranks of an axis owns 1/n of every unit (a transformer block; the token
//           embedding; what is left): its shard. To compute with a unit it is unsharded:
//           all-gathered into a whole buffer, which is freed afterwards (resharded). On the
//           axes `copies` other ranks hold copies of the shards: gradients are summed over them.
//           With n = 1 this is plain data parallelism.
// use       fsdp.add_units(params, seed, name_of_unit);  // set-up: the model is born sharded.
//           // Its backward reads the parameters' values again: they are unsharded once more.
//           int use = fsdp.add_use(layer_params, BackwardReads::values, chunk, name);
//           fsdp.begin_step(microbatches);
//           Var y = fsdp.run(tape, use, [&] { return layer(tape, x); });  // for each layer,
//           tape.backward();                                              // for each micro-batch
//           fsdp.finish_backward();                           // the shards' gradients are complete
//           optimizer.step(...); fsdp.end_step();
// source    Rajbhandari et al., "ZeRO: Memory optimizations toward training trillion parameter
//           models", SC 2020, sections 5 and 7; Zhao et al., "PyTorch FSDP", VLDB 2023 (units, flat
//           parameters, prefetch)
// not here  units that are sharded over different axes, as the experts of a mixture would be
// test      tests/test_fsdp.cpp
#pragma once
#include <deque>
#include <map>

#include "autograd.h"
#include "comm.h"
#include "optimizer.h"

struct FsdpOptions {
  int zero = 3;         // 1: optimizer state is sharded; 2: and gradients; 3: and parameters
  bool reshard = true;  // ZeRO-3: after the forward, and unshard again for the backward
  int prefetch = 1;     // uses unsharded ahead; above 0 sums of gradients overlap, too
};

class Fsdp {
 public:
  // axis: over which units are sharded. copies: axes whose ranks hold the same shard.
  Fsdp(const Axis& axis, const std::vector<Axis>& copies, Dtype dtype, const FsdpOptions& options);

  // ---- set-up: all units, then their uses in forward order
  // Parameters of one Param::unit make a unit. Allocates this rank's shards with initial values.
  // Names, of units and uses, are for traces.
  void add_units(const std::vector<Param*>& params, uint64_t seed, std::string (*name)(int unit));
  // A use computes with the units of these parameters. Uses are unsharded ahead within a pipeline's
  // chunk only, whose uses run directly after each other.
  int add_use(const std::vector<Param*>& params, BackwardReads backward_reads, int chunk,
              const std::string& name);
  // What this rank updates: its piece of each parameter, padding left out.
  std::vector<ParamShard> param_shards() const;

  // ---- a step
  void begin_step(int microbatches);
  // y = f(), with the whole parameters of a use's units in place; what the backward needs goes on
  // the tape.
  Var run(Tape& tape, int use, const std::function<Var()>& f);
  void finish_backward();  // after the last micro-batch: the shards' gradients are complete
  // After an update, a load of shards or an evaluation: frees whole parameters, or marks them as
  // out of date.
  void end_step();
  // By Param::unit. After finish_backward a unit's shard_grad is this rank's part of its gradient.
  const auto& units() const { return units_; }

  // ---- the two questions that tell DDP and the ZeRO stages apart
  // Are whole parameters there only while a use needs them?
  bool shards_parameters() const { return axis_.size > 1 && options_.zero == 3; }
  // Are whole gradients there only while a use needs them, and scattered after every micro-batch?
  // If not, they add up over the step, and are scattered once at its end.
  bool shards_gradients() const { return axis_.size > 1 && options_.zero >= 2; }

  // A stage of a pipeline has one communication stream: a gather or a sum that is issued before an
  // exchange delays the stage that waits for that exchange. So units that stay whole can be
  // gathered in begin_step (not with prefetch 0), and gradients that stay whole be summed in
  // finish_backward.
  bool gathers_at_begin = false, sums_at_end = false;

  // Called before a unit's gradients leave this rank: other strategies add up what they left in
  // parts.
  std::function<void(const std::vector<Param*>&)> complete_gradients;

 private:
  struct Unit {
    std::string name;
    std::vector<Param*> params;
    std::vector<int64_t> offsets;       // of each parameter in the flat unit, and of its end
    int64_t padded = 0;                 // elements of the flat unit: n shards
    int64_t begin = 0, shard_size = 0;  // of this rank's shard in the flat unit, in elements
    // In the compute dtype. If parameters are sharded, the shard has a buffer of its own and the
    // whole is there only in use; else the whole is always there and the shard is a view of it.
    Tensor whole, shard;
    // In the master dtype (f32; f64 in the tests). If gradients are sharded, the whole is there
    // only in use; else always, and shard_grad is a view of it.
    Tensor whole_grad, shard_grad;
    Tensor master;          // master weights of the shard when the compute dtype is bf16
    Tensor m, v;            // Adam's moments of the shard
    bool gathered = false;  // `whole` is up to date, or will be once `arrived` is reached
    Event arrived, reduced;
    // When is a gradient complete? The token embedding's unit has 2 uses, at both ends of the
    // model: the head's backward makes uses_done 1, the embedding's makes it 2, uses_done starts
    // again at 0, and gradients_done is one more. (Under zbv the two may be of different
    // micro-batches; in a step there are as many sums as micro-batches, with all uses in them.)
    int uses_per_microbatch = 0, uses_done = 0, gradients_done = 0;
    // Each parameter's value or gradient becomes a view of the buffer, or empty if that is.
    void bind(Tensor Param::*what, const Tensor& buffer);
    void begin_gradients();  // the parameters' become fresh
    Tensor shard_of(const Tensor& buffer) const { return buffer.view(begin, {shard_size}); }
  };
  struct Use {
    std::string name;
    std::vector<Unit*> units;
    BackwardReads backward_reads;
    int chunk;
  };
  void before_forward(int use);
  void after_forward(const Tape& tape, int use);
  void before_backward(Tape& tape, int use);
  void after_backward(Tape& tape, int use);

  void unshard(int use, int direction);
  void start_unshard(Unit& unit);
  void finish_unshard(Unit& unit);
  bool reshards() const { return shards_parameters() && options_.reshard; }
  void reshard_after_use(int use);
  void reshard(Unit& unit);

  void enter_backward(const char* pass, int use);
  void reduce_gradients(int use);
  void start_reduce(Unit& unit);
  void finish_reduce();
  void sum_over_copies(Unit& unit);

  Axis axis_;
  std::vector<Axis> copies_;
  Dtype dtype_;
  FsdpOptions options_;
  std::map<int, Unit> units_;  // by Param::unit; a map: uses hold pointers
  std::vector<Use> uses_;
  std::deque<Unit*> in_flight_;  // whose gradients are being summed, oldest first
  int microbatches_ = 1;
};

// How a unit is laid out; theory/ counts with the same sizes.
std::map<int, std::vector<Param*>> units_of(const std::vector<Param*>& params);
// elements; shards are multiples of 16 elements
int64_t padded_unit(const std::vector<Param*>& params, int64_t shards);
