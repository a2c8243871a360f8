// theory/activations.cpp: what the parts of the model keep for their backwards.
#include "theory/simulate.h"
#include "theory/theory.h"

// Bytes that one micro-batch leaves behind in a part. By rows: an activation of width C, of the
// slice of the rows that this rank has. By columns: one of all rows, of this rank's part of the
// width.
static int64_t kept(const TheoryOfRank& t, const ModelPart& part) {
  const GptConfig& c = t.config;
  const int64_t by_rows = t.activation,
                statistics = 2 * t.S * t.g;  // of a layernorm's rows: mean, reciprocal deviation
  if (part.kind == ModelPart::embedding) return 0;  // tokens alone, which are no activations
  if (part.kind == ModelPart::head) {               // x, layernorm, logits
    const int64_t logits = t.R * t.gpt.tp.padded_part(c.vocab) * t.e;
    return 2 * by_rows + statistics + logits;
  }
  if (c.recompute) return by_rows;  // x
  const int64_t heads = t.gpt.tp.part(c.heads).size(),
                by_columns = t.R * heads * (c.width / c.heads) * t.e,
                hidden = t.R * t.gpt.tp.part(4 * c.width).size() * t.e;
  // probabilities, or one number a row
  const bool keeps_probabilities =
      c.attention == AttentionKind::plain && !t.gpt.cp.splits(c.context);
  const int64_t attention = t.R * heads * (keeps_probabilities ? c.context * t.e : t.g);
  // x, the sum and two layernorms; queries, keys, values and what attention makes of them; before
  // and after gelu
  return 4 * by_rows + 2 * statistics + 4 * by_columns + attention + 2 * hidden;
}

void TheoryOfRank::add_activations() {
  std::vector<int64_t> bytes;  // of a micro-batch on each chunk
  for (const ModelPiece& piece : pieces) {
    bytes.push_back(0);
    for (const ModelPart& part : piece) bytes.back() += kept(*this, part);
  }
  sum.activations = peak_live(schedule, pp.rank, bytes);
}
