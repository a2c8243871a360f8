// optimizer.cpp: see optimizer.h.
#include "optimizer.h"

#include <algorithm>
#include <cmath>

UpdateTable update_table(const std::vector<ParamShard>& shards) {
  std::vector<UpdatePiece> pieces;
  UpdateTable table;
  for (const ParamShard& s : shards) {
    const int64_t n = s.weights.numel(), count = ceil_div(n, kPieceSize);
    const Dtype compute = (s.compute.empty() ? s.weights : s.compute).dtype();
    ASSERT(pieces.empty() || compute == table.compute, "shards of two dtypes");
    table.elements += n;
    table.compute = compute;
    for (const Tensor* x : {&s.m, &s.v, &s.gradient})
      ASSERT(x->numel() == n && x->dtype() == s.weights.dtype());
    for (int64_t i = 0; i < count; i++) {
      const int64_t first = i * kPieceSize, size = std::min<int64_t>(n - first, kPieceSize);
      const auto at = [&](const Tensor& x) {
        void* const address = x.empty() ? nullptr : x.view(first, {size}).raw();
        ASSERT(uintptr_t(address) % 16 == 0);
        return address;
      };
      // the first says how many pieces it has in the norm; 0: not the first, or not counted
      const bool counts = i == 0 && s.param->counted;
      pieces.push_back({at(s.weights), at(s.m), at(s.v), at(s.gradient), at(s.compute), int(size),
                        int(s.param->id), s.param->decay, counts ? int(count) : 0});
    }
  }
  table.pieces =
      Tensor({int64_t(pieces.size()), sizeof(UpdatePiece) / 4}, Dtype::i32, Memory::workspace);
  upload(table.pieces, pieces.data());
  return table;
}

Optimizer::Optimizer(std::vector<ParamShard> shards, int64_t parameters, double clip,
                     double weight_decay, Sum sum)
    : shards_(std::move(shards)),
      table_(update_table(shards_)),
      clip_(clip),
      weight_decay_(weight_decay),
      sum_(std::move(sum)) {
  for (const ParamShard& s : shards_)
    ASSERT(s.param->id < parameters, s.param->name, " is number ", s.param->id);
  squares_ = Tensor({parameters}, Dtype::f64, Memory::workspace);
  norm_ = Tensor({1}, Dtype::f64, Memory::workspace);
  clip_factor_ = Tensor({1}, Dtype::f64, Memory::workspace);
}

void Optimizer::measure_norm() {
  sum_of_squares(squares_, table_);
  if (sum_) sum_(squares_);
  norm_and_clip(norm_, clip_factor_, squares_, clip_);
}

void Optimizer::step(double lr) {
  measure_norm();
  adamw(table_, clip_factor_, {.lr = lr, .weight_decay = weight_decay_, .step = ++steps_});
}

bool Optimizer::finite() const {
  for (const size_t of :
       {offsetof(UpdatePiece, weights), offsetof(UpdatePiece, m), offsetof(UpdatePiece, v)}) {
    sum_of_squares(squares_, table_, of);
    for (double square : download(squares_))
      if (!std::isfinite(square)) return false;
  }
  return true;
}

double learning_rate(int64_t step, int64_t steps, int64_t warmup, double lr, double min_lr) {
  if (step <= warmup) return lr * step / warmup;
  const double progress = steps > warmup ? double(step - warmup) / (steps - warmup) : 1;
  return min_lr + 0.5 * (lr - min_lr) * (1 + std::cos(M_PI * progress));
}
