// context_parallel.h: context parallelism. Every sequence is split over the ranks of the cp axis,
// so that it may be longer than what one device holds.
//
// idea      Everything but attention looks at one token at a time: a rank runs it on the tokens
//           that it has. In attention a query needs the keys and values of all tokens before it.
//           They travel round the ring of ranks, one step a round, and each rank attends to what
//           is there; the results are merged by their log-sum-exp.
// zigzag    Under the causal mask a late query sees more keys than an early one. So the sequence
//           is cut into 2n pieces, and rank r has the pieces r and 2n-1-r, an early and a late
//           one: then all ranks have the same work.
// use       ContextParallel cp(axis);
//           Positions mine = cp.part(T);      // which tokens of a sequence this rank reads
//           Var heads = cp.attention(tape, qkv, B, T, H, kind);
// source    Liu et al., "Ring attention with blockwise transformers for near-infinite context",
//           2023; the causal mask's uneven work: Brandon et al., "Striped attention", 2023; the
//           zigzag: as ring-flash-attention and TransformerEngine cut a sequence, 2024; Grattafiori
//           et al., "The Llama 3 herd of models", 2024, section 3.3.2, use it with an all-gather,
//           for fewer heads of keys than of queries and for masks of documents
// test      tests/test_context_parallel.cpp
#pragma once
#include "autograd.h"
#include "comm.h"

class ContextParallel {
 public:
  explicit ContextParallel(const Axis& axis) : axis_(axis) {}

  // ---- who has what
  // Where this rank's tokens of a sequence of so many are. Nothing has to divide: pieces differ by
  // one token.
  Positions part(int64_t length) const { return part_of(axis_.rank, length); }
  Positions part_of(int rank, int64_t length) const;
  // A sequence of fewer tokens than pieces is not split: every rank has all of it, and the same
  // results.
  bool splits(int64_t length) const { return axis_.size > 1 && length >= 2 * axis_.size; }
  // Whether this rank speaks for the last token of a sequence: one rank does, and it is the last of
  // that rank's tokens.
  bool has_last(int64_t length) const {
    return splits(length) ? part(length).high.end == length : axis_.rank == 0;
  }

  // Causal attention over whole sequences of T tokens. qkv (R,3,H,D) holds the rows of this rank's
  // tokens of B sequences, as does the result (R,H,D).
  Var attention(Tape& tape, const Var& qkv, int64_t B, int64_t T, int64_t H, AttentionKind kind);

 private:
  struct Sizes;  // the sizes of an attention
  void forward(const Sizes& p, const Tensor& out, const Tensor& lse, const Tensor& qkv) const;
  void backward(const Sizes& p, const Tensor& dqkv, const Tensor& dout, const Tensor& out,
                const Tensor& lse, const Tensor& qkv) const;
  struct Shift {
    Tensor x, room;  // x goes to the next rank, and what the rank before sends fills the room
  };
  void start_exchange(const std::vector<Shift>& all) const;
  int source(int round) const { return (axis_.rank - round + axis_.size) % axis_.size; }

  Axis axis_;
};
