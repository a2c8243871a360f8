// theory/activations.cpp: what the parts of the model keep for their backwards.
#include "theory/simulate.h"
#include "theory/theory.h"

// By rows: an activation of width C, of the slice of the rows that this rank has. By columns: one
// of all rows, of this rank's part of the width.
int64_t TheoryOfRank::kept(const ModelPart& part) const {
  const GptConfig& c = config;
  const int64_t by_rows = activation,
                statistics = 2 * S * g;  // of a layernorm's rows: mean, reciprocal deviation
  if (part.kind == ModelPart::embedding) return 0;  // tokens alone, which are no activations
  if (part.kind == ModelPart::head) {               // x, layernorm, logits
    const int64_t logits = R * gpt.tp.padded_part(c.vocab) * e;
    return 2 * by_rows + statistics + logits;
  }
  if (c.recompute) return by_rows;  // x
  const int64_t kv = gpt.tp.part(c.kv()).size(), heads = kv * (c.heads / c.kv()),
                of_head = R * (c.width / c.heads) * e, by_columns = 2 * (heads + kv) * of_head,
                hidden = R * gpt.tp.part(c.hidden()).size() * e;
  // probabilities, or one number a row
  const bool keeps_probabilities = c.attention == AttentionKind::plain && !gpt.cp.splits(c.context);
  const int64_t attention = R * heads * (keeps_probabilities ? c.context * e : g);
  // x, the sum and two layernorms; queries, keys, values and what attention makes of them; before
  // and after gelu
  return 4 * by_rows + 2 * statistics + by_columns + attention + 2 * hidden;
}

void TheoryOfRank::add_activations() {
  std::vector<int64_t> bytes;  // of a micro-batch on each chunk
  for (const ModelPiece& piece : pieces) {
    bytes.push_back(0);
    for (const ModelPart& part : piece) bytes.back() += kept(part);
  }
  sum.activations = peak_live(schedule, pp.rank, bytes);
}
