// one_rank.h: the whole model on one rank without any strategy: what every layout is compared with.
#pragma once
#include <algorithm>
#include <bit>

#include "gpt.h"
#include "optimizer.h"

// logits of every row, with padding
inline Var padded_logits(Gpt& gpt, Tape& tape, const Tokens& tokens) {
  Var x;
  for (const ModelPart& part : gpt.parts()) x = gpt.run(tape, part, x, tokens);
  return x;
}
inline std::vector<double> logits(Gpt& gpt, const Tokens& tokens) {
  Tape tape(false);
  const Tensor made = padded_logits(gpt, tape, tokens).value;
  const Tensor whole({made.dim(0), gpt.config.vocab}, made.dtype(), Memory::workspace);
  copy_columns(whole, 0, made, 0, gpt.config.vocab);
  return download(whole);
}

// whether all of these f32 numbers are bf16 ones
inline bool are_bf16(const std::vector<double>& values) {
  return std::ranges::all_of(values, [](double x) {
    return (std::bit_cast<uint32_t>(float(x)) & 0xffff) == 0;
  });
}

class WholeGpt : public Gpt {
 public:
  WholeGpt(const GptConfig& g, uint64_t seed) : Gpt(g), seed(seed) {
    for (Param* p : params()) {
      p->value = Tensor(p->local_shape(), g.dtype, Memory::parameters);
      p->grad = Tensor(p->local_shape(), master_dtype(g.dtype), Memory::gradients);
      fill(p->value, 0);
      p->initialise(p->own(p->value), seed, 0);
    }
    separate_uses(tied());
    zero_gradients();
  }

  void zero_gradients() {
    for (Param* p : params()) fill(p->grad, 0);
    fill(tied().head_use->grad, 0);
  }
  // total (1) f64 += scale * sum of the losses of one micro-batch; the tape can then run backward
  void loss(Tape& tape, const Tokens& tokens, double scale, const Tensor& total) {
    tp.cross_entropy(tape, padded_logits(*this, tape, tokens), tokens.targets, config.vocab, scale,
                     total);
  }
  void finish_gradients() { join_uses(tied()); }  // once a step

  Optimizer optimizer(double clip, double weight_decay) {  // each parameter one shard
    std::vector<ParamShard> shards;
    for (Param* p : params()) {
      const auto zeros = [&] {
        Tensor t(p->shape, p->grad.dtype(), Memory::optimizer);
        fill(t, 0);
        return t;
      };
      ParamShard s{.weights = p->own(p->value),
                   .compute = {},
                   .gradient = p->own(p->grad),
                   .m = zeros(),
                   .v = zeros(),
                   .param = p};
      if (p->value.dtype() != p->grad.dtype()) {
        s.compute = s.weights, s.weights = zeros();
        p->initialise(s.weights, seed, 0);
      }
      shards.push_back(std::move(s));
    }
    return Optimizer(std::move(shards), int64_t(params().size()), clip, weight_decay);
  }

  const uint64_t seed;
};
