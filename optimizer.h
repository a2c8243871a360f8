// optimizer.h: AdamW over a list of shards, with the global gradient norm and clipping.
// idea      a shard is what this rank updates: its piece of a parameter (Fsdp::param_shards).
//           Master weights and moments are f32 (f64 in the tests) whatever dtype computes;
//           for f32 and f64 the master weights are the weights themselves.
// order     norm, clip factor and update stay on the device: no step waits for the host. The update
//           is one launch over a table of all shards, which is uploaded once; their memory stays
//           where it is.
// AdamW     Loshchilov and Hutter, 2019, with beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8:
//             g = clip * gradient, m = beta1 m + (1 - beta1) g, v = beta2 v + (1 - beta2) g^2,
//             w -= lr (m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + epsilon) + decay w)
//           Matrices and both embeddings decay; gains and biases do not (gpt.cpp).
// cost      memory a parameter: f32 m + v 8 bytes; bf16 m + v + master 12 bytes
// not here  updates that need whole matrices (Muon): a shard may begin and end within a row
// test      tests/test_golden.cpp (three steps against PyTorch)
#pragma once
#include "autograd.h"

struct ParamShard {
  Tensor weights;   // master dtype
  Tensor compute;   // the weights that compute, when their dtype differs; else empty
  Tensor gradient;  // master dtype
  Tensor m, v;
  // whose part it is: elements first, first + 1, ... of what this rank owns of it
  const Param* param = nullptr;
  int64_t first = 0;
};

// One line for each kPieceSize elements of each shard.
UpdateTable update_table(const std::vector<ParamShard>& shards);

class Optimizer {
 public:
  // Adds up the vector of per-parameter squares over all ranks: each has some.
  using Sum = std::function<void(const Tensor& squares)>;
  // clip: the largest global norm that an update may see; 0 for none. `parameters`: how many there
  // are in all. On one rank there is nothing to sum.
  Optimizer(std::vector<ParamShard> shards, int64_t parameters, double clip, double weight_decay,
            Sum sum = {});
  void step(double lr);
  void measure_norm();                          // alone, of the gradients that are there
  const Tensor& norm() const { return norm_; }  // (1) f64: of the last gradients, before clipping
  // whether every weight and moment that counts on this rank is a number; waits for the device
  bool finite() const;
  const std::vector<ParamShard>& shards() const { return shards_; }
  int64_t steps() const { return steps_; }
  // weights, m and v are as `steps` steps left them
  void resume_after(int64_t steps) { steps_ = steps; }

 private:
  std::vector<ParamShard> shards_;
  UpdateTable table_;                    // where they are
  Tensor squares_, norm_, clip_factor_;  // f64: (parameters), (1), (1)
  double clip_, weight_decay_;
  Sum sum_;
  int64_t steps_ = 0;
};

// Linear warm-up from 0 over `warmup` steps, then half a cosine from `lr` to `min_lr` at the last
// step, if any is left. step counts from 1.
double learning_rate(int64_t step, int64_t steps, int64_t warmup, double lr, double min_lr);
