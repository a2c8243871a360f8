// theory/tensor_parallel.cpp: what tensor parallelism sends. A matrix that is split by its inputs
// makes partial sums in the forward, one that is split by its outputs in the backward: one sum
// each. By rows (sequence parallelism) a sum is a reduce-scatter, and where whole rows are used
// again, in the other direction, there is an all-gather.
#include "theory/theory.h"

SplitMatrices split_matrices(const ModelPart& part) {
  SplitMatrices count;
  for (const Param* p : part.params) {
    const bool is_split = p->slice.end - p->slice.begin < p->slice.split;
    if (!p->decay || !is_split) continue;  // a vector, or on every rank
    // x w has the first dim of w as inputs, the head's x w^T as outputs
    const bool by_inputs = (p->slice.outer == 1) != (part.kind == ModelPart::head);
    (by_inputs ? count.by_inputs : count.by_outputs)++;
  }
  return count;
}

void TheoryOfRank::add_tensor_parallel() {
  const auto sums = [&](Traffic purpose, int64_t calls) {
    enter(tp, by_rows ? Collective::reduce_scatter : Collective::all_reduce, purpose, calls, whole);
  };
  const auto gathers = [&](Traffic purpose, int64_t calls) {
    if (by_rows) enter(tp, Collective::all_gather, purpose, calls, whole);
  };
  const auto all_reduce = [&](Traffic purpose, int64_t calls, int64_t bytes) {
    enter(tp, Collective::all_reduce, purpose, calls, bytes);
  };
  for (const ModelPiece& piece : pieces)
    for (const ModelPart& part : piece) {
      const bool is_block = part.kind == ModelPart::block;
      const Traffic purpose = is_block ? Traffic::training : Traffic::embedding;
      const auto [by_inputs, by_outputs] = split_matrices(part);
      sums(purpose, m * (by_inputs + by_outputs));
      gathers(purpose, m * (by_inputs + by_outputs));
      gathers(Traffic::gathered_again, m * by_outputs);  // of shares that were saved as inputs
      if (is_block && config.recompute) {                // the forward once more
        sums(Traffic::recompute, m * by_inputs);
        gathers(Traffic::recompute, m * by_outputs);
      }
      for (const Param* p : part.params)
        if (p->partial)  // a rank's gradient is of its rows: summed before it leaves the rank
          all_reduce(Traffic::partial_gradients, shards_gradients ? m : 1, p->numel() * g);
      if (part.kind != ModelPart::head) continue;
      all_reduce(Traffic::loss, m, R * g);      // maxima
      all_reduce(Traffic::loss, m, 2 * R * g);  // sums of exponentials, targets' logits
    }
}
