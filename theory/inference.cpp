// theory/inference.cpp: what decoding sends. Tensor parallelism sums a row a sequence after every
// matrix that is split by its inputs, and gathers the logits; a pipeline sends the row on.
#include "theory/theory.h"

int64_t decoding_bytes(const GptConfig& config, const Layout& layout, int pp_rank,
                       int64_t sequences, int64_t steps) {
  const Mesh mesh(layout);
  const Axis &tp = mesh["tp"], &pp = mesh["pp"];
  const Gpt gpt(config, tp);
  const ModelPiece piece = gpt.pieces(pp.size)[pp_rank];
  const int64_t n = tp.size, row = sequences * size_of(config.dtype),
                activation = row * config.width,
                logits = sequences * size_of(master_dtype(config.dtype)) * n *
                         gpt.tp.padded_part(config.vocab);
  Ledger sent;
  for (const ModelPart& part : piece)
    sent.enter(tp, Collective::all_reduce, activation, steps * split_matrices(part).by_inputs);
  if (has_head(piece)) sent.enter(tp, Collective::all_gather, logits, steps);
  else sent.enter(pp, Collective::send, activation, steps);
  // the tokens that were picked
  if (pp.size > 1) sent.enter(pp, Collective::broadcast, sequences * 4, steps);
  return sent.bytes();
}
