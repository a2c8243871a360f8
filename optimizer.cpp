// optimizer.cpp: see optimizer.h.
#include "optimizer.h"

#include <algorithm>
#include <cmath>

Optimizer::Optimizer(std::vector<Shard> shards, int64_t parameters, double clip,
                     double weight_decay, Sum sum)
    : shards_(std::move(shards)), clip_(clip), weight_decay_(weight_decay), sum_(std::move(sum)) {
  squares_ = Tensor({parameters}, Dtype::f64, Memory::workspace);
  norm_ = Tensor({1}, Dtype::f64, Memory::workspace);
  clip_factor_ = Tensor({1}, Dtype::f64, Memory::workspace);
}

void Optimizer::measure() {
  fill(squares_, 0);
  for (const Shard& s : shards_)
    if (s.param->counted) sum_of_squares(squares_, s.param->id, s.gradient);
  if (sum_) sum_(squares_);
  norm_and_clip(norm_, clip_factor_, squares_, clip_);
}

void Optimizer::step(double lr) {
  measure();
  AdamW options;
  options.lr = lr;
  options.step = ++steps_;
  for (Shard& s : shards_) {
    options.weight_decay = s.param->decay ? weight_decay_ : 0;
    adamw(s.weights, s.compute, s.m, s.v, s.gradient, clip_factor_, options);
  }
}

bool Optimizer::finite() const {
  fill(squares_, 0);
  for (const Shard& s : shards_)
    for (const Tensor& x : {s.weights, s.m, s.v}) sum_of_squares(squares_, s.param->id, x);
  const std::vector<double> squares = download(squares_);
  return std::all_of(squares.begin(), squares.end(), [](double s) { return std::isfinite(s); });
}

double learning_rate(int64_t step, int64_t steps, int64_t warmup, double lr, double min_lr) {
  if (step <= warmup) return lr * step / warmup;
  const double progress = steps > warmup ? double(step - warmup) / (steps - warmup) : 1;
  return min_lr + 0.5 * (lr - min_lr) * (1 + std::cos(M_PI * progress));
}
