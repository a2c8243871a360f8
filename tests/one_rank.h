// one_rank.h: the whole model on one rank without any strategy: what every layout is compared with.
#pragma once
#include "gpt.h"
#include "optimizer.h"

class WholeGpt : public Gpt {
 public:
  WholeGpt(const GptConfig& g, uint64_t seed) : Gpt(g) {
    for (Param* p : params()) {
      p->value = Tensor(p->shape, g.dtype, Memory::parameters);
      p->grad = Tensor(p->shape, master_dtype(g.dtype), Memory::gradients);
      if (p->tied) p->tied_grad = Tensor(p->shape, p->grad.dtype(), Memory::gradients);
      p->initialise(p->value, seed, 0);
    }
    zero_gradients();
  }

  void zero_gradients() {
    for (Param* p : params()) fill(p->grad, 0);
    fill(wte.tied_grad, 0);
  }
  // total (1) f64 += scale * sum of the losses of one micro-batch; the tape can then run backward
  void loss(Tape& tape, const Tokens& tokens, double scale, const Tensor& total) {
    Var x = embed(tape, tokens);
    for (int64_t l = 0; l < config.layers; l++) x = block(tape, l, x, tokens.B, tokens.T);
    cross_entropy(tape, logits(tape, x, tokens.B * tokens.T), tokens.targets, scale, total);
  }
  // once a step: the head's gradient of wte joins the embedding's
  void finish_gradients() { add(wte.grad, wte.grad, wte.tied_grad); }

  Optimizer optimizer(double clip, double weight_decay) {  // each parameter one shard
    std::vector<Shard> shards;
    for (Param* p : params()) {
      const auto zeros = [&] {
        Tensor t(p->shape, p->grad.dtype(), Memory::optimizer);
        fill(t, 0);
        return t;
      };
      Shard s{.weights = p->value,
              .compute = {},
              .gradient = p->grad,
              .m = zeros(),
              .v = zeros(),
              .param = p};
      if (p->value.dtype() != p->grad.dtype()) {
        s.weights = zeros(), s.compute = p->value;
        cast(s.weights, p->value);
      }
      shards.push_back(std::move(s));
    }
    return Optimizer(std::move(shards), int64_t(params().size()), clip, weight_decay);
  }
};
