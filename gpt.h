// gpt.h: GPT-2, written once. Pre-layernorm blocks, learned positions, tanh GELU, the head tied to
// the token embedding.
// idea      the model is a list of parts: the embedding, the blocks, the head. Each says which
//           parameters it has and what its backward needs of them, and Gpt::run runs it. It is
//           written once on tensor_parallel's layers and context_parallel's attention, which on one
//           rank are plain ones. Training, sampling, theory and the other strategies go through the
//           list.
// not here  dropout; terms of the loss that a part of the model adds
// source    Radford et al., "Language models are unsupervised multitask learners", 2019; initial
//           values as in its released code: normal(0, 0.02), positions 0.01; the two projections
//           into the residual stream scaled by 1/sqrt(2 layers), as that paper is usually read
// test      tests/test_golden.cpp (PyTorch), tests/test_autograd.cpp (finite differences)
#pragma once
#include <span>

#include "context_parallel.h"
#include "tensor_parallel.h"

struct ModelSize {
  int64_t layers = 0, width = 0, heads = 0, context = 0, vocab = 0;
  // Of other models, for the planner: heads of keys and values (0: as many as heads; others are in
  // SizedGpt of theory.h alone) and the width between the two products of an MLP (0: 4 width).
  int64_t kv_heads = 0, feed_forward = 0;
  int64_t kv() const { return kv_heads ? kv_heads : heads; }
  int64_t hidden() const { return feed_forward ? feed_forward : 4 * width; }
};
struct GptConfig : ModelSize {
  Dtype dtype = Dtype::f32;
  AttentionKind attention = AttentionKind::flash;
  bool recompute = false;  // keep only each block's input; run its forward again in the backward
  bool sequence_parallel = false;
};

// ---- the parts

struct ModelPart {
  enum Kind { embedding, block, head } kind;
  std::vector<Param*> params;    // the token embedding is in two lists: embedding and head are tied
  BackwardReads backward_reads;  // of them
  int64_t layer = -1;            // of a block
};
// parts that follow each other: what a pipeline cuts the model into
using ModelPiece = std::span<const ModelPart>;
inline bool has_embedding(ModelPiece piece) { return piece.front().kind == ModelPart::embedding; }
inline bool has_head(ModelPiece piece) { return piece.back().kind == ModelPart::head; }
// each parameter of the pieces once, in order
std::vector<Param*> params_of(const std::vector<ModelPiece>& pieces);
// FSDP's units: the token embedding, which is tied; the rest of both ends; each block
enum { kTied, kEnds, kFirstBlock };
std::string name_of_unit(int unit);
std::string name_of(const ModelPart& part);

// ---- the model

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
  explicit Gpt(const GptConfig& config, const Axis& tp = {}, const Axis& cp = {});
  Gpt(const Gpt&) = delete;

  ModelPiece parts() const { return parts_; }
  // The model cut into pieces, one for each position (0: the first layers). Position i is on stage
  // stages[i], and all stages have about equal work. Or so many stages of one piece each.
  std::vector<ModelPiece> pieces(const std::vector<int>& stages) const;
  std::vector<ModelPiece> pieces(int stages) const;
  std::vector<Param*> params() const { return params_of({parts_}); }
  Param& tied() { return wte; }  // by both ends

  // The embedding makes x (R,C) from tokens, a block x from x, the head logits from x: (R, this
  // rank's part of V, padded), or with tokens.last_rows (B,V). `attend`: another attention for a
  // block, from qkv (R, 3 x this rank's heads x D) to (R, this rank's heads x D); the generator
  // attends to a cache. It must see the same keys: nothing of ContextParallel is asked then.
  using Attend = std::function<Var(Tape& tape, int64_t layer, const Var& qkv)>;
  Var run(Tape& tape, const ModelPart& part, const Var& x, const Tokens& tokens,
          const Attend& attend = {});

  const GptConfig config;
  TensorParallel tp;
  ContextParallel cp;

 private:
  Var next_logits(Tape& tape, const Var& x, const Tokens& tokens);
  Param wte, wpe, ln_f_weight, ln_f_bias;
  std::vector<Block> blocks_;
  std::vector<ModelPart> parts_;
};

// ---- sizes

// Which layers each position has, at least one. The head counts as head_in_layers layers of the
// last position. Each further layer goes to the stage with least work and, of its positions, to the
// one with least.
std::vector<Range> split_layers(int64_t layers, double head_in_layers,
                                const std::vector<int>& stages);
int64_t parameter_count(const GptConfig& config);
// Floating-point operations of a training step per token: 6 for each weight that multiplies (2
// forward, 4 backward), and those of attention (Chowdhery et al., "PaLM", 2022, appendix B; the
// causal mask halves the scores).
double flops_per_token(const GptConfig& config);
