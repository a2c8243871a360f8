// tensor_parallel.cpp: one layer across the ranks of the tp axis. See tensor_parallel.h for the
// idea.
//
//   a block's half    x ──> [ w's columns 0 ] ──> gelu ──> [ w's rows 0 ] ──┐
//   on two ranks      │                                                     +──> y      sum: all-reduce of R*C elements
//                     └───> [ w's columns 1 ] ──> gelu ──> [ w's rows 1 ] ──┘
//
// traffic   per block and micro-batch, W = R*C elements of the compute dtype: 2 all-reduces of W
//           forward (the row-parallel results) and 2 backward (the input gradients of the
//           column-parallel layers); embedding 1 forward, head 1 backward; loss: three numbers a
//           row. Sequence parallelism: a reduce-scatter and an all-gather in place of each
//           all-reduce, which together send as much; and the slices of rows that were saved are
//           gathered again in the backward: 2 a block, 1 for the head.
// memory    weights, gradients and optimizer state 1/n. Activations a block, in R*C: 4 + 12/n and
//           1/n of the attention's own; with sequence parallelism all of it 1/n.
// overlap   in the backward an input gradient travels while the weight gradient's product is
//           computed
// test      tests/test_tensor_parallel.cpp
#include "tensor_parallel.h"

// ---- a column-parallel layer: y (R,N) = x w, N this rank's columns; then a row-parallel one: y = sum over ranks of x w, K this rank's inputs

Var TensorParallel::column(Tape& tape, const Var& x, int64_t R, Param& w, bool transposed,
                           Param* bias, Traffic serves) {
  const Purpose purpose(tape.replaying ? Traffic::recompute : serves);
  const Tensor matrix = as_matrix(w.value);
  Var y{Tensor({R, matrix.dim(transposed ? 0 : 1)}, x.value.dtype(), Memory::activations)};
  const Tensor rows = start_gather(x.value, R);
  if (by_rows_) finish();
  product(y.value, rows, false, matrix, transposed, 0);
  if (bias) add_bias(y.value, bias->value.view({y.value.dim(1)}));

  tape.push(
      [this, &tape, R, &w, transposed, bias, serves, x = x.value, dx = x.grad, dy_slot = y.grad] {
        const Tensor dy = take(dy_slot);
        const Tensor rows = [&] {
          const Purpose purpose(Traffic::again);
          // sequence parallelism saved a slice: gather it again, while the product below is
          // computed
          return start_gather(x, R);
        }();
        const Tensor partial = for_partial_sums(R, x.dim(1), x.dtype());
        // of dx: this rank's columns' part
        product(partial.part(0, {R, x.dim(1)}), dy, false, as_matrix(w.value), !transposed, 0);
        if (by_rows_) finish();
        const Purpose purpose(serves);
        Tensor d = start_sum(partial);
        tape.weight_gradient(
            [&w, transposed, bias, rows, dy] { weight_backward(w, transposed, bias, rows, dy); });
        finish();
        accumulate(dx, std::move(d));
      });
  return y;
}

Var TensorParallel::column_linear(Tape& tape, const Var& x, int64_t R, Param& w, Param& bias) {
  if (axis_.size == 1) return linear(tape, x, w, &bias);
  return column(tape, x, R, w, false, &bias, Traffic::training);
}

Var TensorParallel::head(Tape& tape, const Var& x, int64_t R, Param& wte) {
  if (axis_.size == 1) return linear(tape, x, wte, nullptr, true);
  return column(tape, x, R, wte, true, nullptr, Traffic::embedding);
}

Var TensorParallel::row_linear(Tape& tape, const Var& x, int64_t R, Param& w, Param& bias) {
  if (axis_.size == 1) return linear(tape, x, w, &bias);
  const Purpose purpose(tape.replaying ? Traffic::recompute : Traffic::training);
  const int64_t N = w.value.dim(1);
  const Tensor partial = for_partial_sums(R, N, x.value.dtype());
  product(partial.part(0, {R, N}), x.value, false, w.value, false, 0);
  Var y{start_sum(partial)};
  finish();
  add_bias(y.value, bias.value);  // once, after the sum

  tape.push([this, &tape, R, &w, &bias, x = x.value, dx = x.grad, dy_slot = y.grad] {
    const Purpose purpose(Traffic::training);
    const Tensor dy = take(dy_slot), rows = start_gather(dy, R);
    if (by_rows_) finish();
    Tensor d({R, x.dim(1)}, x.dtype(), Memory::activations);
    product(d, rows, false, w.value, true, 0);
    accumulate(dx, std::move(d));
    tape.weight_gradient([&w, &bias, x, dy, rows] {
      product(w.grad, x, true, rows, false, 1);
      bias_backward(bias.grad, dy);
    });
  });
  return y;
}

// ---- both ends of the model: the vocabulary is split

Var TensorParallel::embedding(Tape& tape, const Tokens& tokens, Param& wte, Param& wpe) {
  if (axis_.size == 1) return ::embedding(tape, tokens, wte, wpe);
  const Purpose purpose(Traffic::embedding);
  const int64_t R = tokens.B * tokens.T, C = wte.value.dim(1);
  const Tensor partial = for_partial_sums(R, C, wte.value.dtype());
  // A row's owner adds its position, the others 0.
  embedding_forward(partial.part(0, {R, C}), tokens.inputs, wte.value, wpe.value, tokens.T,
                    tokens.positions);
  Var x{start_sum(partial)};
  finish();
  tape.push([this, tokens, R, &wte, &wpe, dx = x.grad] {
    const Purpose purpose(Traffic::embedding);
    const Tensor slice = take(dx), rows = start_gather(slice, R);
    if (by_rows_) finish();
    // wpe's is whole on every rank
    embedding_backward(wte.grad, wpe.grad, rows, tokens.inputs, tokens.order, tokens.T);
  });
  return x;
}

void TensorParallel::cross_entropy(Tape& tape, Var logits, const Tensor& targets, double scale,
                                   const Tensor& total) {
  if (axis_.size == 1) return ::cross_entropy(tape, std::move(logits), targets, scale, total);
  const Purpose purpose(Traffic::loss);
  const int64_t R = targets.numel();
  const Dtype acc = master_dtype(logits.value.dtype());
  const Tensor parts({3, R}, acc, Memory::activations), top({R}, acc, Memory::activations),
      losses({R}, acc, Memory::activations);
  // of each row, over this rank's columns: maximum, sum of exponentials, target's logit
  softmax_parts(parts, logits.value, targets);
  copy(top, parts.part(0, {R}));
  all_reduce(top, ncclMax);
  softmax_rescale(parts, top);
  all_reduce(parts.part(R, {2, R}), ncclSum);
  cross_entropy_parts(losses, logits.value, targets, top, parts, scale, tape.recording());
  if (tape.recording()) *logits.grad = std::move(logits.value);
  add_sum(total, losses);
}

// ---- communication: on the one queue, behind what was computed; finish() lets the computation wait for it

// All rows of x: x itself or, under sequence parallelism, every rank's slice. Keep x until
// finish().
Tensor TensorParallel::start_gather(const Tensor& x, int64_t R) {
  if (!by_rows_) return x;
  const int64_t S = slice(R), C = x.dim(1);
  const Tensor rows({S * axis_.size, C}, x.dtype(), Memory::activations);
  make_wait(stream_, device().compute);  // the slice must have been computed
  const Timed timed(stream_);
  ledger.all_gather(axis_, rows.bytes());
  NCCL_CHECK(ncclAllGather(x.raw(), rows.raw(), size_t(x.numel()), nccl_type(x.dtype()), axis_.comm,
                           stream_));
  return rows.part(0, {R, C});  // without the padding
}

// The sum over ranks, every row of it in place or, under sequence parallelism, this rank's slice.
// Keep `partial` until finish().
Tensor TensorParallel::start_sum(const Tensor& partial) {
  const Tensor sum = by_rows_ ? Tensor({partial.dim(0) / axis_.size, partial.dim(1)},
                                       partial.dtype(), Memory::activations)
                              : partial;
  make_wait(stream_, device().compute);  // the partial sums must have been computed
  const Timed timed(stream_);
  if (by_rows_) {
    ledger.reduce_scatter(axis_, partial.bytes());
    NCCL_CHECK(ncclReduceScatter(partial.raw(), sum.raw(), size_t(sum.numel()),
                                 nccl_type(sum.dtype()), ncclSum, axis_.comm, stream_));
  } else {
    ledger.all_reduce(axis_, partial.bytes());
    NCCL_CHECK(ncclAllReduce(partial.raw(), sum.raw(), size_t(sum.numel()), nccl_type(sum.dtype()),
                             ncclSum, axis_.comm, stream_));
  }
  return sum;
}

void TensorParallel::finish() {
  make_wait(device().compute, stream_);  // what was sent must have arrived
}

void TensorParallel::all_reduce(const Tensor& x, ncclRedOp_t op) {
  make_wait(stream_, device().compute);  // x must have been computed
  const Timed timed(stream_);
  ledger.all_reduce(axis_, x.bytes());
  NCCL_CHECK(ncclAllReduce(x.raw(), x.raw(), size_t(x.numel()), nccl_type(x.dtype()), op,
                           axis_.comm, stream_));
  finish();
}

// Room for R rows and, under sequence parallelism, for padding, which is 0: NCCL has no unequal
// reduce-scatter.
Tensor TensorParallel::for_partial_sums(int64_t R, int64_t width, Dtype dtype) const {
  const int64_t all = by_rows_ ? slice(R) * axis_.size : R;
  const Tensor x({all, width}, dtype, Memory::activations);
  if (all > R) fill(x.part(R * width, {all - R, width}), 0);
  return x;
}

// ---- gradients of what every rank owns

// Under sequence parallelism a layernorm, or a bias after a sum, sees this rank's rows only.
void TensorParallel::sum_partial_gradients(const std::vector<Param*>& params) {
  if (!by_rows_) return;
  const Purpose purpose(Traffic::partial);
  make_wait(stream_, device().compute);  // the gradients must have been computed
  const Timed timed(stream_);
  NCCL_CHECK(ncclGroupStart());
  for (const Param* p : params) {
    if (!p->partial) continue;
    ledger.all_reduce(axis_, p->grad.bytes());
    NCCL_CHECK(ncclAllReduce(p->grad.raw(), p->grad.raw(), size_t(p->grad.numel()),
                             nccl_type(p->grad.dtype()), ncclSum, axis_.comm, stream_));
  }
  NCCL_CHECK(ncclGroupEnd());
}

// ---- who owns what

Param TensorParallel::split(Param p, int dim, Range range) const {
  int64_t outer = 1, inner = 1;
  for (int d = 0; d < int(p.shape.size()); d++)
    (d < dim ? outer : inner) *= d == dim ? 1 : p.shape[d];
  p.slice = {outer, p.shape[dim], inner, range.begin, range.end};
  return p;
}

Param TensorParallel::replicate(Param p, bool by_rows) const {
  p.counted = axis_.rank == 0;
  p.partial = by_rows && by_rows_;
  return p;
}

// ---- sampling

Tensor TensorParallel::one_row(const Tensor& x, int64_t R, int64_t row) {
  const int64_t C = x.dim(1);
  const Tensor rows = start_gather(x, R);
  if (by_rows_) finish();
  const Tensor one = rows.part(row * C, {1, C});
  // ceil(1 / n) = 1: the first rank has the row, the others padding
  if (!by_rows_ || axis_.rank == 0) return one;
  const Tensor padding({1, C}, x.dtype(), Memory::activations);
  fill(padding, 0);
  return padding;
}

Tensor TensorParallel::whole_logits(const Tensor& logits, int64_t vocab) {
  if (axis_.size == 1) return logits;
  // padded: NCCL has no unequal gather
  const int64_t m = logits.dim(0), mine = part(vocab).size(),
                S = (vocab + axis_.size - 1) / axis_.size;
  const Tensor padded({m, S}, logits.dtype(), Memory::workspace),
      all({axis_.size, m, S}, logits.dtype(), Memory::workspace);
  fill(padded, 0);
  for (int64_t row = 0; row < m; row++)
    copy(padded.part(row * S, {mine}), logits.part(row * mine, {mine}));
  make_wait(stream_, device().compute);  // the logits must have been computed
  const Timed timed(stream_);
  ledger.all_gather(axis_, all.bytes());
  NCCL_CHECK(ncclAllGather(padded.raw(), all.raw(), size_t(padded.numel()), nccl_type(all.dtype()),
                           axis_.comm, stream_));
  finish();
  const Tensor whole({m, vocab}, logits.dtype(), Memory::workspace);
  for (int64_t r = 0; r < axis_.size; r++) {
    const int64_t begin = vocab * r / axis_.size, count = vocab * (r + 1) / axis_.size - begin;
    for (int64_t row = 0; row < m; row++)
      copy(whole.part(row * vocab + begin, {count}), all.part((r * m + row) * S, {count}));
  }
  return whole;
}
