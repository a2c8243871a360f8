// theory/activations.cpp: what the parts of the model keep for their backwards.
#include "theory/theory.h"

// Bytes, of a micro-batch: `activation` of width C, of the rows that this rank has; `whole` of all
// rows; `by_columns` of a block's tensors that tp splits, of all rows (queries, keys, values and
// what attention makes of them; before and after gelu); `statistics` of a layernorm's mean and
// reciprocal deviation.
Kept TheoryOfRank::kept(const ModelPart& part) const {
  if (part.kind == ModelPart::embedding) return {0, 0};  // tokens alone, which are no activations
  const int64_t statistics = 2 * S * g;
  if (part.kind == ModelPart::head) {  // x, layernorm, logits
    const int64_t logits = R * V * e;
    return {2 * activation + statistics + logits, whole + logits};
  }
  const int64_t by_columns = 2 * R * ((heads + kv) * D + F) * e;
  // probabilities, or one number a row
  const bool keeps_probabilities =
      config.attention == AttentionKind::plain && !gpt.cp.splits(config.context);
  const int64_t scores = R * heads * (keeps_probabilities ? config.context * e : g);
  // x, the sum and two layernorms. Put off: inputs of products, and whole gradients of their
  // outputs; with sequence parallelism biases after sums keep shares of these, too.
  return {4 * activation + 2 * statistics + by_columns + scores,
          4 * whole + 2 * by_rows * activation + by_columns};
}

Kept TheoryOfRank::kept_of(ModelPiece piece) const {
  Kept all{0, 0};
  for (const ModelPart& part : piece) {
    const auto [forward, input_gradient] = kept(part);
    const bool again = config.recompute && part.kind == ModelPart::block;
    all.forward += again ? activation : forward;  // x alone
    all.input_gradient += input_gradient;
  }
  return all;
}

int64_t TheoryOfRank::recomputed() const {
  return config.recompute ? kept(gpt.parts()[1]).forward - activation : 0;  // a block's
}

void TheoryOfRank::add_activations() {
  std::vector<Kept> chunks;
  for (const ModelPiece& piece : pieces) chunks.push_back(kept_of(piece));
  sum.activations = peak_live(schedule, pp.rank, chunks);
  sum.recomputed = recomputed();
}
