// theory/activations.cpp: what the parts of the model keep for their backwards.
#include "theory/theory.h"

// activation: of width C, of the rows that this rank has; whole: of all rows; by columns: of all
// rows, of this rank's part of the width.
Kept TheoryOfRank::kept(const ModelPart& part) const {
  if (part.kind == ModelPart::embedding) return {0, 0};  // tokens alone, which are no activations
  if (part.kind == ModelPart::head) {                    // x, layernorm, logits
    const int64_t logits = R * V * e;
    return {2 * activation + statistics + logits, whole + logits};
  }
  // With recompute x alone. Put off: inputs of products, and whole gradients of their outputs; with
  // sequence parallelism biases after sums keep shares of these, too.
  return {config.recompute ? activation : kept_by_block(),
          4 * whole + 2 * by_rows * activation + by_columns};
}

// x, the sum and two layernorms; queries, keys, values and what attention makes of them; before and
// after gelu
int64_t TheoryOfRank::kept_by_block() const {
  // probabilities, or one number a row
  const bool keeps_probabilities =
      config.attention == AttentionKind::plain && !gpt.cp.splits(config.context);
  return 4 * activation + 2 * statistics + by_columns +
         R * heads * (keeps_probabilities ? config.context * e : g);
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
  if (config.recompute) sum.recomputed = kept_by_block() - activation;
}
