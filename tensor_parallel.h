// tensor_parallel.h: Tensor parallelism: every weight matrix split over the ranks of the tp axis,
// each rank computing its part of each layer.
//
// idea      a column-parallel layer splits a weight by its outputs, a row-parallel one by its
//           inputs. In this order the activation between the two never leaves its rank, and only
//           the second one's results, partial sums, are added up over the ranks.
// sequence  parallelism: between such pairs the rows (tokens) of the activations are split over the
//           ranks, too; every sum becomes a reduce-scatter, every use of whole rows an all-gather.
// source    Shoeybi et al., "Megatron-LM: Training multi-billion parameter language models using
//           model parallelism", 2019, section 3; Korthikanti et al., "Reducing activation
//           recomputation in large transformer models", MLSys 2023, section 4.2 (sequence)
// test      tests/test_tensor_parallel.cpp
#pragma once
#include "autograd.h"
#include "comm.h"

class TensorParallel {
 public:
  TensorParallel(const Axis& axis, cudaStream_t stream, bool sequence_parallel)
      : axis_(axis), stream_(stream), by_rows_(sequence_parallel && axis.size > 1) {}

  // ---- who owns what. Nothing has to divide: parts differ by one.
  Range part(int64_t n) const {
    return {n * axis_.rank / axis_.size, n * (axis_.rank + 1) / axis_.size};
  }
  // p, of whose global shape this rank owns [range) of `dim`
  Param split(Param p, int dim, Range range) const;
  // every rank owns p; by_rows: only layers on slices of rows use it
  Param replicate(Param p, bool by_rows) const;

  // of `rows` that activations hold here
  int64_t slice(int64_t rows) const {
    return by_rows_ ? (rows + axis_.size - 1) / axis_.size : rows;
  }

  // ---- layers on the tape. `rows`: R = B*T of this micro-batch. Activations of width C hold all rows or, under sequence parallelism, this
  // rank's slice of ceil(R / n) rows; the last ones end in padding, whose values mean nothing
  // (row_linear adds its bias there, too) and whose gradients are 0. Activations between column and
  // row hold all rows, a part of their width.
  Var embedding(Tape& tape, const Tokens& tokens, Param& wte, Param& wpe);
  Var column_linear(Tape& tape, const Var& x, int64_t rows, Param& w, Param& bias);
  Var row_linear(Tape& tape, const Var& x, int64_t rows, Param& w, Param& bias);
  // logits of this rank's part of the vocabulary, every row
  Var head(Tape& tape, const Var& x, int64_t rows, Param& wte);
  // total (1) f64 += scale * the sum of all rows' losses, on every rank
  void cross_entropy(Tape& tape, Var logits, const Tensor& targets, double scale,
                     const Tensor& total);

  // ---- a step
  void sum_partial_gradients(const std::vector<Param*>& params);  // on the communication stream

  // ---- sampling
  // row `row` of x as a batch of one row, distributed as layers expect it
  Tensor one_row(const Tensor& x, int64_t rows, int64_t row);
  // (m,V) from every rank's part of m rows
  Tensor whole_logits(const Tensor& logits, int64_t vocab);

 private:
  Tensor for_partial_sums(int64_t rows, int64_t width, Dtype dtype) const;
  Tensor start_gather(const Tensor& x, int64_t rows);
  Tensor start_sum(const Tensor& partial);
  void finish();
  void all_reduce(const Tensor& x, ncclRedOp_t op);
  Var column(Tape& tape, const Var& x, int64_t rows, Param& w, bool transposed, Param* bias,
             Traffic purpose);

  Axis axis_;
  cudaStream_t stream_;
  bool by_rows_;
};
