// gpt.cpp: the model. Its forward is the code below `the three parts`; its backward is nowhere, the
// tape writes it.
#include "gpt.h"

#include <cmath>

// ---- parameters

static Param make(std::string name, Shape shape, float std, float mean = 0) {
  Param p;
  p.name = std::move(name);
  p.slice = {1, shape[0], elements(shape) / shape[0], 0, shape[0]};
  p.decay = shape.size() > 1 && std > 0;
  p.shape = std::move(shape);
  p.std = std, p.mean = mean;
  return p;
}

static Block make_block(const GptConfig& g, const TensorParallel& tp, int64_t layer) {
  const int64_t C = g.width;
  const float std = 0.02f, residual_std = 0.02f / std::sqrt(2.0f * g.layers);
  const std::string h = "h." + std::to_string(layer) + ".";
  const Range heads = tp.part(g.heads), hidden = tp.part(4 * C);
  const Range channels{heads.begin * (C / g.heads), heads.end * (C / g.heads)};  // whole heads
  Block b;
  b.ln_1_weight = tp.replicate(make(h + "ln_1.weight", {C}, 0, 1), true);
  b.ln_1_bias = tp.replicate(make(h + "ln_1.bias", {C}, 0), true);
  // columns
  b.c_attn_weight = tp.split(make(h + "attn.c_attn.weight", {C, 3, C}, std), 2, channels);
  b.c_attn_bias = tp.split(make(h + "attn.c_attn.bias", {3, C}, 0), 1, channels);
  // rows
  b.attn_c_proj_weight =
      tp.split(make(h + "attn.c_proj.weight", {C, C}, residual_std), 0, channels);
  b.attn_c_proj_bias = tp.replicate(make(h + "attn.c_proj.bias", {C}, 0), true);
  b.ln_2_weight = tp.replicate(make(h + "ln_2.weight", {C}, 0, 1), true);
  b.ln_2_bias = tp.replicate(make(h + "ln_2.bias", {C}, 0), true);
  b.c_fc_weight = tp.split(make(h + "mlp.c_fc.weight", {C, 4 * C}, std), 1, hidden);  // columns
  b.c_fc_bias = tp.split(make(h + "mlp.c_fc.bias", {4 * C}, 0), 0, hidden);
  // rows
  b.mlp_c_proj_weight =
      tp.split(make(h + "mlp.c_proj.weight", {4 * C, C}, residual_std), 0, hidden);
  b.mlp_c_proj_bias = tp.replicate(make(h + "mlp.c_proj.bias", {C}, 0), true);
  return b;
}

std::vector<Param*> Block::params() {
  return {&ln_1_weight,        &ln_1_bias,        &c_attn_weight,     &c_attn_bias,
          &attn_c_proj_weight, &attn_c_proj_bias, &ln_2_weight,       &ln_2_bias,
          &c_fc_weight,        &c_fc_bias,        &mlp_c_proj_weight, &mlp_c_proj_bias};
}

std::vector<Param*> Gpt::params() {
  std::vector<Param*> all = {&wte, &wpe};
  for (Block& b : blocks)
    for (Param* p : b.params()) all.push_back(p);
  all.push_back(&ln_f_weight);
  all.push_back(&ln_f_bias);
  return all;
}

Gpt::Gpt(const GptConfig& g, const Axis& axis, cudaStream_t communication)
    : config(g), tp(axis, communication, g.sequence_parallel) {
  ASSERT(g.width % g.heads == 0 && axis.size <= g.heads && axis.size <= g.vocab);
  wte = tp.split(make("wte.weight", {g.vocab, g.width}, 0.02f), 0, tp.part(g.vocab));
  wte.tied = true;
  wpe = tp.replicate(make("wpe.weight", {g.context, g.width}, 0.01f), false);
  for (int64_t l = 0; l < g.layers; l++) blocks.push_back(make_block(g, tp, l));
  ln_f_weight = tp.replicate(make("ln_f.weight", {g.width}, 0, 1), true);
  ln_f_bias = tp.replicate(make("ln_f.bias", {g.width}, 0), true);
  uint32_t id = 0;
  for (Param* p : params()) p->id = id++;
}

// ---- the three parts

Var Gpt::embed(Tape& tape, const Tokens& tokens) { return tp.embedding(tape, tokens, wte, wpe); }

Var Gpt::block(Tape& tape, int64_t layer, const Var& x, int64_t B, int64_t T) {
  return block(tape, layer, x, B * T, [this, B, T](Tape& tape, const Var& qkv) {
    return attention(tape, qkv, B, T, tp.part(config.heads).size(), config.attention);
  });
}

Var Gpt::block(Tape& tape, int64_t layer, const Var& x, int64_t R, const Attend& attend) {
  Block& b = blocks[layer];
  const auto run = [this, &b, R, attend](Tape& tape, const Var& x) {
    const Var normed = layernorm(tape, x, b.ln_1_weight, b.ln_1_bias);
    const Var qkv = tp.column_linear(tape, normed, R, b.c_attn_weight, b.c_attn_bias);
    const Var heads = attend(tape, qkv);
    const Var attended = tp.row_linear(tape, heads, R, b.attn_c_proj_weight, b.attn_c_proj_bias);
    const auto [sum, normed_2] = add_layernorm(tape, x, attended, b.ln_2_weight, b.ln_2_bias);
    const Var hidden = gelu(tape, tp.column_linear(tape, normed_2, R, b.c_fc_weight, b.c_fc_bias));
    const Var mlp = tp.row_linear(tape, hidden, R, b.mlp_c_proj_weight, b.mlp_c_proj_bias);
    return add(tape, sum, mlp);
  };
  return config.recompute ? checkpoint(tape, x, run) : run(tape, x);
}

Var Gpt::logits(Tape& tape, const Var& x, int64_t rows) {
  return tp.head(tape, layernorm(tape, x, ln_f_weight, ln_f_bias), rows, wte);
}

// ---- sizes

int64_t parameter_count(const GptConfig& g) {
  const int64_t C = g.width;
  return (g.vocab + g.context) * C + g.layers * (12 * C * C + 13 * C) + 2 * C;
}

double flops_per_token(const GptConfig& g) {
  const double C = g.width, multiplying = g.layers * 12 * C * C + g.vocab * C;
  // attention: 2 products, 2 flops, T/2 keys, x3 with the backward
  return 6 * multiplying + 6 * g.layers * C * g.context;
}

double head_in_layers(const GptConfig& g) {
  const double C = g.width;
  // a block's attention: 6 C T of 6 (12 C C + C T), above
  return g.vocab * C / (12 * C * C + C * g.context);
}
