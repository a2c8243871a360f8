// gpt.h: GPT-2, written once. Pre-layernorm blocks, learned positions, tanh GELU, the head tied to
// the token embedding.
// idea      the model is a list of Params and three functions: embed, block, logits, written once
//           on tensor_parallel's layers; on one rank these are plain layers. Training, evaluation,
//           sampling and the other strategies call the three in their own way.
// source    Radford et al., "Language models are unsupervised multitask learners", 2019; initial
//           values as in its released code: normal(0, 0.02), positions 0.01, the two projections
//           into the residual stream scaled by 1/sqrt(2 layers)
// test      tests/test_golden.cpp (PyTorch), tests/test_autograd.cpp (finite differences)
#pragma once
#include "tensor_parallel.h"

struct ModelSize {
  int64_t layers = 0, width = 0, heads = 0, context = 0, vocab = 0;
};
struct GptConfig : ModelSize {
  Dtype dtype = Dtype::f32;
  AttentionKind attention = AttentionKind::flash;
  bool recompute = false;  // keep only each block's input; run its forward again in the backward
  bool sequence_parallel = false;
};

struct Block {  // names as in GPT-2: h.<layer>.<name>
  Param ln_1_weight, ln_1_bias;
  Param c_attn_weight, c_attn_bias;  // (C,3,C), (3,C)
  Param attn_c_proj_weight, attn_c_proj_bias;
  Param ln_2_weight, ln_2_bias;
  Param c_fc_weight, c_fc_bias;  // (C,4C), (4C)
  Param mlp_c_proj_weight, mlp_c_proj_bias;
  std::vector<Param*> params();
};

class Gpt {
 public:
  // Declares the parameters, this tp rank's part of each; FSDP gives them memory. Without an axis:
  // all of each, on one rank.
  explicit Gpt(const GptConfig& config, const Axis& tp = {}, cudaStream_t communication = nullptr);
  Gpt(const Gpt&) = delete;

  Var embed(Tape& tape, const Tokens& tokens);                               // (R,C)
  Var block(Tape& tape, int64_t layer, const Var& x, int64_t B, int64_t T);  // (R,C)
  // The same with another attention: from (R, 3 x this rank's heads x D) to (R, this rank's heads x
  // D). generate.cpp attends to a cache.
  using Attend = std::function<Var(Tape& tape, const Var& qkv)>;
  Var block(Tape& tape, int64_t layer, const Var& x, int64_t rows, const Attend& attend);
  // (R, this rank's part of V)
  Var logits(Tape& tape, const Var& x, int64_t rows);

  std::vector<Param*> params();  // in a fixed order; wte once

  const GptConfig config;
  TensorParallel tp;
  Param wte, wpe, ln_f_weight, ln_f_bias;
  std::vector<Block> blocks;
};

int64_t parameter_count(const GptConfig& config);
// Products of a training step per token, forward and backward: 6 per weight that multiplies, and
// the causal attention's (Chowdhery et al., "PaLM", 2022, appendix B, with half the scores for the
// causal mask). Counted in floating-point operations.
double flops_per_token(const GptConfig& config);
// what the head costs, in blocks: to cut the model into stages of equal work
double head_in_layers(const GptConfig& config);
