// tensor_parallel.h: tensor parallelism. Every weight matrix is split over the ranks of the tp
// axis, and each rank computes its part of each layer.
//
// idea      A column-parallel layer splits a weight by its outputs, a row-parallel one by its
//           inputs. In this order the activation between the two never leaves its rank, and only
//           the second one's results, partial sums, are added up over the ranks.
// sequence parallelism   Between such pairs the rows (tokens) of the activations are split over the
//           ranks, too: each has a share of them. Every sum becomes a reduce-scatter, and every use
//           of all rows an all-gather.
// use       TensorParallel tp(axis, sequence_parallel);
//           Param w = tp.split(p, 1, heads);         // set-up: what this rank owns
//           Var h = tp.column_linear(tape, x, R, w);         // a pair of layers
//           Var y = tp.row_linear(tape, gelu(tape, h, &b), R, w2);
//           tp.sum_partial_gradients(params);    // before gradients leave the rank
// source    Shoeybi et al., "Megatron-LM: Training multi-billion parameter language models using
//           model parallelism", 2019, section 3; Korthikanti et al., "Reducing activation
//           recomputation in large transformer models", MLSys 2023, section 4.2 (sequence)
// test      tests/test_tensor_parallel.cpp
#pragma once
#include "autograd.h"
#include "comm.h"

class TensorParallel {
 public:
  TensorParallel(const Axis& axis, bool sequence_parallel)
      : axis_(axis), splits_rows_(sequence_parallel && axis.size > 1) {}

  // ---- who owns what. Nothing has to divide: parts differ by one.
  Range part(int64_t n) const { return part_of(axis_.rank, n); }
  Range part_of(int64_t rank, int64_t n) const {
    return {n * rank / axis_.size, n * (rank + 1) / axis_.size};
  }
  // Rows that a part takes in memory: as many on every rank, and padded so that each row of logits
  // begins at an aligned address, as fast products need. Products make logits of the padding, too;
  // the loss sets their gradient to 0.
  int64_t padded_part(int64_t n) const {
    const int64_t most = ceil_div(n, axis_.size);
    return round_up(most, most < 1024 ? 8 : 128);
  }
  // p, whose dim number `dim` is cut into so many equal parts, of which a rank owns some
  Param split(Param p, int dim, int64_t parts) const;
  // p, of which every rank owns all; only rank 0's copy counts in the gradient's norm
  Param whole(Param p) const;
  // the same for what sees only this rank's share of the rows: its gradient is a partial sum
  Param whole_with_partial_gradient(Param p) const;

  // The rows that an activation of width C holds here: all of them or, under sequence parallelism,
  // this rank's share, ceil(rows / n) of them. The last shares end in padding: numbers without
  // meaning (biases are added there), whose gradients are 0.
  int64_t rows_here(int64_t rows) const { return splits_rows_ ? ceil_div(rows, axis_.size) : rows; }

  // ---- layers on the tape, for R = B*T rows of a micro-batch. x and the results of embedding
  // and row_linear hold rows_here(R) rows of width C. What column_linear and head return holds all
  // R rows of this rank's part of the width, which head pads.
  Var embedding(Tape& tape, const Tokens& tokens, Param& wte, Param& wpe);
  // Biases are left to the op that reads the result, as in linear(): a row-parallel layer's is
  // added once, after the sum.
  Var column_linear(Tape& tape, const Var& x, int64_t R, Param& w);
  Var row_linear(Tape& tape, const Var& x, int64_t R, Param& w);
  // logits of this rank's part of the vocabulary
  Var head(Tape& tape, const Var& x, int64_t R, Param& wte);
  // total (1) f64 += scale * the sum of all rows' losses, on every rank
  void cross_entropy(Tape& tape, Var logits, const Tensor& targets, int64_t vocab, double scale,
                     const Tensor& total);

  // ---- a step
  void sum_partial_gradients(const std::vector<Param*>& params);  // on the communication stream

  // ---- sampling
  // the last row of x as a batch of one row, distributed as layers expect it
  Tensor last_row(const Tensor& x, int64_t R);
  // logits (R,V) in the master dtype, so that nearly equal ones stay apart; whole on every rank
  Tensor next_logits(const Tensor& x, int64_t R, const Param& wte, int64_t vocab);

 private:
  void all_gather(const Tensor& mine, const Tensor& all);
  void all_reduce(const Tensor& x, ncclRedOp_t op = ncclSum);
  // This and start_sum are each the other's backward, Megatron-LM's conjugate operators: f and g of
  // the paper of 2019 (identity, all-reduce) or, under sequence parallelism, g and g-bar of that of
  // 2023 (all-gather, reduce-scatter).
  Tensor start_gather(const Tensor& x, int64_t R);
  Tensor gather(const Tensor& x, int64_t R);
  Tensor start_sum(const Tensor& partial);
  Tensor for_partial_sums(int64_t R, int64_t width, Dtype dtype) const;
  Var column(Tape& tape, const Var& x, int64_t R, Param& w, bool transposed, Traffic serves);

  Axis axis_;
  bool splits_rows_;  // sequence parallelism
};
