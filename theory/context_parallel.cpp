// theory/context_parallel.cpp: what context parallelism sends: keys and values go round the ring,
// and in the backward their gradients behind them.
#include "theory/theory.h"

void TheoryOfRank::add_context_parallel() {
  const int64_t T = config.context;
  if (!gpt.cp.splits(T)) return;
  for (int rank = 0; rank < cp.size; rank++) {
    const int64_t elements =
        2 * B * gpt.cp.part_of(rank, T).rows() * kv * D;  // of its keys and values
    const auto send = [&](Traffic purpose, int64_t times, int64_t bytes) {
      enter(cp, Collective::send, purpose, times * m * blocks(), bytes);
    };
    // all but the next rank's, which go no further: forward and backward
    if (rank != (cp.rank + 1) % cp.size) {
      send(Traffic::training, 2, elements * e);
      send(Traffic::recompute, config.recompute, elements * e);
    }
    if (rank != cp.rank) send(Traffic::training, 1, elements * g);  // all but its own
  }
}
