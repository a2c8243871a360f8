// theory/pipeline.cpp: what a pipeline sends: an activation to the next position, its gradient to
// the one before, for each micro-batch, where those are on another stage; and the tied embedding's
// gradient once a step.
#include "theory/theory.h"

void TheoryOfRank::add_pipeline() {
  for (int c = 0; c < schedule.chunks; c++) {
    const int position = schedule.position(pp.rank, c);
    for (const int neighbour : {position - 1, position + 1})
      if (neighbour >= 0 && neighbour < schedule.positions() &&
          schedule.stage_of(neighbour) != pp.rank)
        enter(pp, Collective::send, Traffic::training, m, activation);
  }
  // embedding and head are on two ranks: each sends its shard of the unit that both have
  if (has_embedding(pieces[0]) == has_head(pieces.back())) return;
  const int64_t P = padded_unit(units_of(params_of(pieces))[kTied], shards.size);
  enter(pp, Collective::send, Traffic::embedding, 1, P / shards.size * g);
}
