// theory/inference.cpp: what decoding sends. Tensor parallelism sums a row a sequence behind every
// matrix that is split by its inputs, and gathers the logits; a pipeline sends the row on.
#include "theory/theory.h"

int64_t decoding_bytes(const GptConfig& config, const Layout& layout, int pp_rank,
                       int64_t sequences, int64_t steps) {
  const int64_t n = layout["tp"], compute = int64_t(size_of(config.dtype));
  const Gpt gpt(config, Mesh(layout)["tp"]);
  const ModelPiece piece = gpt.pieces(int(layout["pp"]))[size_t(pp_rank)];
  const int64_t activation = sequences * config.width * compute,
                logits = sequences * ((config.vocab + n - 1) / n) * compute;
  int64_t sums = 0;
  for (const ModelPart& part : piece) sums += split_matrices(part).by_inputs;
  int64_t bytes = 2 * (n - 1) * activation * sums * steps / n;
  if (has_head(piece)) bytes += (n - 1) * logits * steps;
  else bytes += activation * steps;
  if (layout["pp"] > 1) bytes += sequences * 4 * steps;  // the tokens that were picked
  return bytes;
}
