// theory/activations.cpp: what the parts of the model keep for their backwards.
#include "theory/theory.h"

// Slice: an activation of width C, of the rows that this rank has; whole: of all rows. By columns:
// of all rows, of this rank's part of the width.
Kept TheoryOfRank::kept(const ModelPart& part) const {
  const GptConfig& c = config;
  const int64_t share = activation,
                statistics = 2 * S * g;  // of a layernorm's rows: mean, reciprocal deviation
  if (part.kind == ModelPart::embedding) return {0, 0};  // tokens alone, which are no activations
  if (part.kind == ModelPart::head) {                    // x, layernorm, logits
    const int64_t logits = R * V * e;
    return {2 * share + statistics + logits, whole + logits};
  }
  // queries, keys, values and what attention makes of them; before and after gelu
  const int64_t by_columns = 2 * R * ((heads + kv) * D + F) * e;
  // probabilities, or one number a row
  const bool keeps_probabilities = c.attention == AttentionKind::plain && !gpt.cp.splits(c.context);
  const int64_t attention = R * heads * (keeps_probabilities ? c.context * e : g);
  // x, the sum and two layernorms; with recompute x alone. Put off: inputs of products, and whole
  // gradients of their outputs; with sequence parallelism biases after sums keep shares of these,
  // too.
  return {c.recompute ? share : 4 * share + 2 * statistics + by_columns + attention,
          4 * whole + 2 * by_rows * share + by_columns};
}

Kept TheoryOfRank::kept_of(ModelPiece piece) const {
  Kept sum{0, 0};
  for (const ModelPart& part : piece) {
    sum.forward += kept(part).forward;
    sum.input_gradient += kept(part).input_gradient;
  }
  return sum;
}

void TheoryOfRank::add_activations() {
  std::vector<Kept> chunks;
  for (const ModelPiece& piece : pieces) chunks.push_back(kept_of(piece));
  sum.activations = peak_live(schedule, pp.rank, chunks);
}
