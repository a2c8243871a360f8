// gpt.cpp: the model. Its forward is Gpt::run; its backward is nowhere, the tape writes it.
#include "gpt.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

// ---- parameters

static Param make(std::string name, Shape shape, float deviation, float constant = 0) {
  Param p;
  p.name = std::move(name);
  p.slice = {1, shape[0], elements(shape) / shape[0], 0, shape[0]};
  p.decay = shape.size() > 1 && deviation > 0;  // a matrix: c_attn's bias, of (3,C), starts at 0
  p.shape = std::move(shape);
  p.deviation = deviation;
  p.constant = constant;
  return p;
}

static Block make_block(const GptConfig& g, const TensorParallel& tp, int64_t layer) {
  const int64_t C = g.width;
  const float usual = 0.02f, residual = 0.02f / std::sqrt(2.0f * g.layers);
  const std::string h = "h." + std::to_string(layer) + ".";
  const int64_t F = g.hidden();
  // Layernorms, and biases that are added after a sum, are whole on each rank, which under
  // sequence parallelism sees only its own rows; all others are split by columns or by rows.
  const auto on_all = [&](const char* name, float value) {
    return tp.whole_with_partial_gradient(make(h + name, {C}, 0, value));
  };
  const auto split = [&](const char* name, Shape shape, float deviation, int dim, int64_t parts) {
    return tp.split(make(h + name, std::move(shape), deviation), dim, parts);
  };
  return {
      .ln_1_weight = on_all("ln_1.weight", 1),
      .ln_1_bias = on_all("ln_1.bias", 0),
      .c_attn_weight = split("attn.c_attn.weight", {C, 3, C}, usual, 2, g.heads),
      .c_attn_bias = split("attn.c_attn.bias", {3, C}, 0, 1, g.heads),
      .attn_c_proj_weight = split("attn.c_proj.weight", {C, C}, residual, 0, g.heads),
      .attn_c_proj_bias = on_all("attn.c_proj.bias", 0),
      .ln_2_weight = on_all("ln_2.weight", 1),
      .ln_2_bias = on_all("ln_2.bias", 0),
      .c_fc_weight = split("mlp.c_fc.weight", {C, F}, usual, 1, F),
      .c_fc_bias = split("mlp.c_fc.bias", {F}, 0, 0, F),
      .mlp_c_proj_weight = split("mlp.c_proj.weight", {F, C}, residual, 0, F),
      .mlp_c_proj_bias = on_all("mlp.c_proj.bias", 0),
  };
}

std::vector<Param*> Block::params() {
  return {&ln_1_weight,        &ln_1_bias,        &c_attn_weight,     &c_attn_bias,
          &attn_c_proj_weight, &attn_c_proj_bias, &ln_2_weight,       &ln_2_bias,
          &c_fc_weight,        &c_fc_bias,        &mlp_c_proj_weight, &mlp_c_proj_bias};
}

Gpt::Gpt(const GptConfig& g, const Axis& axis, const Axis& cp)
    : config(g), tp(axis, g.sequence_parallel), cp(cp) {
  ASSERT(g.width % g.heads == 0 && axis.size <= g.heads && axis.size <= g.vocab);
  wte = tp.split(make("wte.weight", {g.vocab, g.width}, 0.02f), 0, g.vocab);
  wte.padding = tp.padded_part(g.vocab) - tp.part(g.vocab).size();
  wpe = tp.whole(make("wpe.weight", {g.context, g.width}, 0.01f));
  for (int64_t l = 0; l < g.layers; l++) blocks_.push_back(make_block(g, tp, l));
  ln_f_weight = tp.whole_with_partial_gradient(make("ln_f.weight", {g.width}, 0, 1));
  ln_f_bias = tp.whole_with_partial_gradient(make("ln_f.bias", {g.width}, 0));

  parts_.push_back({ModelPart::embedding, {&wte, &wpe}, BackwardReads::nothing});
  for (int64_t l = 0; l < g.layers; l++)
    parts_.push_back({ModelPart::block, blocks_[l].params(), BackwardReads::values, l});
  parts_.push_back({ModelPart::head, {&ln_f_weight, &ln_f_bias, &wte}, BackwardReads::values_kept});

  // All ranks declare all parameters in the same order, whichever they hold: initial values and the
  // squares of the norm go by the number.
  uint32_t id = 0;
  for (Param* p : params()) p->id = id++;
  for (const ModelPart& part : parts_)
    for (Param* p : part.params)
      p->unit = part.kind == ModelPart::block ? kFirstBlock + int(part.layer) : kEnds;
  wte.unit = kTied;
}

// ---- the forward

// The head for each sequence's last row alone: what the next token is picked from.
Var Gpt::next_logits(Tape& tape, const Var& x, const Tokens& tokens) {
  ASSERT(tokens.B == 1 || tokens.T == 1);
  const Var last = tokens.T == 1 ? x : Var{tp.last_row(x.value, tokens.rows())},
            normed = layernorm(tape, last, ln_f_weight, ln_f_bias);
  return Var{tp.next_logits(normed.value, tokens.B, wte, config.vocab)};
}

Var Gpt::run(Tape& tape, const ModelPart& part, const Var& x, const Tokens& tokens,
             const Attend& attend) {
  ASSERT(config.kv() == config.heads && config.hidden() == 4 * config.width);
  ASSERT(tokens.T <= config.context);
  const int64_t B = tokens.B, T = tokens.T, R = tokens.rows(), H = tp.part(config.heads).size();
  if (part.kind == ModelPart::embedding) return tp.embedding(tape, tokens, wte, wpe);

  if (part.kind == ModelPart::head)
    return tokens.last_rows ? next_logits(tape, x, tokens)
                            : tp.head(tape, layernorm(tape, x, ln_f_weight, ln_f_bias), R, wte);

  Block& b = blocks_[part.layer];
  const auto block = [=, this, &b, layer = part.layer](Tape& tape, const Var& x) {
    // With recompute a block runs twice: in the forward unrecorded, in the backward recorded. What
    // the second run sends has an entry of its own in the ledger.
    const bool again = config.recompute && tape.recording();
    const Purpose purpose(again ? Traffic::recompute : Traffic::training);
    const Var normed = layernorm(tape, x, b.ln_1_weight, b.ln_1_bias);
    const Var qkv =
        add_bias(tape, tp.column_linear(tape, normed, R, b.c_attn_weight), b.c_attn_bias);
    const Var heads =
        attend ? attend(tape, layer, qkv) : cp.attention(tape, qkv, B, T, H, config.attention);
    const Var attended = tp.row_linear(tape, heads, R, b.attn_c_proj_weight);
    const auto [sum, normed_2] =
        add_layernorm(tape, x, attended, b.attn_c_proj_bias, b.ln_2_weight, b.ln_2_bias);
    const Var hidden = gelu(tape, tp.column_linear(tape, normed_2, R, b.c_fc_weight), &b.c_fc_bias);
    const Var mlp = tp.row_linear(tape, hidden, R, b.mlp_c_proj_weight);
    return add(tape, sum, mlp, &b.mlp_c_proj_bias);
  };
  return config.recompute ? recompute(tape, x, block) : block(tape, x);
}

// ---- lists of parts

std::string name_of_unit(int unit) {
  if (unit == kTied) return "token embedding";
  if (unit == kEnds) return "positions and last layernorm";
  return sentence("block ", unit - kFirstBlock);
}

std::string name_of(const ModelPart& part) {
  if (part.kind == ModelPart::block) return name_of_unit(kFirstBlock + part.layer);
  return part.kind == ModelPart::head ? "head" : "embedding";
}

std::vector<Param*> params_of(const std::vector<ModelPiece>& pieces) {
  std::vector<Param*> all;
  std::set<Param*> known;
  for (const ModelPiece& piece : pieces)
    for (const ModelPart& part : piece)
      for (Param* p : part.params)
        if (known.insert(p).second) all.push_back(p);
  return all;
}

std::vector<Range> split_layers(int64_t layers, double head_in_layers,
                                const std::vector<int>& stages) {
  const int64_t positions = std::ssize(stages);
  REQUIRE(layers >= positions, layers, " layers cannot be cut into ", positions,
          " pieces (stages x chunks): each needs a layer");
  std::vector<double> work(positions, 1), of_stage(positions);  // in layers
  work.back() += head_in_layers;
  for (int i = 0; i < positions; i++) of_stage[stages[i]] += work[i];
  for (int64_t left = layers - positions; left > 0; left--) {
    int least = 0;
    for (int i = 1; i < positions; i++)
      if (std::pair(of_stage[stages[i]], work[i]) < std::pair(of_stage[stages[least]], work[least]))
        least = i;
    work[least]++;
    of_stage[stages[least]]++;
  }
  std::vector<Range> ranges;
  int64_t end = 0;
  for (int i = 0; i < positions; i++) {
    const int64_t begin = end;
    end = i < positions - 1 ? begin + int64_t(work[i]) : layers;
    ranges.push_back({begin, end});
  }
  return ranges;
}

// that multiply: 12 C C in GPT-2
static double weights_of_layer(const GptConfig& g) {
  const double C = g.width;
  return C * (2 * C + 2 * C * g.kv() / g.heads + 2.0 * g.hidden());
}

std::vector<ModelPiece> Gpt::pieces(int stages) const {
  std::vector<int> each(stages);
  std::iota(each.begin(), each.end(), 0);
  return pieces(each);
}

std::vector<ModelPiece> Gpt::pieces(const std::vector<int>& stages) const {
  // For how many layers the head counts: for a token it costs 6 V C operations, and a layer
  // 6 (12 C C + C T), its attention included (flops_per_token).
  const double C = config.width,
               head_in_layers = config.vocab * C / (weights_of_layer(config) + C * config.context);
  std::vector<ModelPiece> all;
  for (const Range& r : split_layers(config.layers, head_in_layers, stages)) {
    // Part 0 is the embedding, so layer l is part l + 1. The embedding goes with the first layer,
    // the head with the last.
    const bool first = r.begin == 0, last = r.end == config.layers;
    all.push_back(parts().subspan(first ? 0 : r.begin + 1, r.size() + first + last));
  }
  return all;
}

// ---- sizes

int64_t parameter_count(const GptConfig& g) {
  const int64_t C = g.width, F = g.hidden(), kv = C / g.heads * g.kv();
  const int64_t layer = (C + 1) * (C + 2 * kv) + (C + 1) * C + (C + 1) * F + (F + 1) * C + 4 * C;
  return (g.vocab + g.context) * C + g.layers * layer + 2 * C;
}

double flops_per_token(const GptConfig& g) {
  const double C = g.width, multiplying = g.layers * weights_of_layer(g) + g.vocab * C;
  // attention: 2 products, 2 flops, T/2 keys, x3 with the backward
  return 6 * multiplying + 6 * g.layers * C * g.context;
}
