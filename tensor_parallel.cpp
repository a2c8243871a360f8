// tensor_parallel.cpp: one layer across the ranks of the tp axis. See tensor_parallel.h for the
// idea.
//
//   half a block     x --> [ w's columns 0 ] --> gelu --> [ w's rows 0 ] --+
//   on two ranks     |                                                     +--> y    the sum is an
//                    +---> [ w's columns 1 ] --> gelu --> [ w's rows 1 ] --+         all-reduce
//
// traffic   Collectives of layers carry R*C elements of the compute dtype. A block has, for each
//           micro-batch, 2 all-reduces forward (the row-parallel results) and 2 backward (the input
//           gradients of the column-parallel layers). The embedding has 1 forward, the head 1
//           backward; the loss sends three numbers a row. Under sequence parallelism a reduce-
//           scatter and an all-gather, which together send as much, stand in place of each all-
//           reduce, and the shares that were saved are gathered again in the backward: 2 a block, 1
//           for the head.
// memory    1/n of weights, gradients and optimizer state. Activations of a block, in R*C: 4 + 12/n
//           and 1/n of the attention's own; under sequence parallelism all of it 1/n, but with
//           zero bubble: until its weight gradients are computed, a block keeps 4 + 14/n, since
//           what is put off needs rows that were gathered (and two biases their shares).
// overlap   In the backward an input gradient travels while the weight gradient's product is
//           computed; not under zero bubble, which computes that product later. One stream carries
//           all of it: a block's first sum stands behind the gather that FSDP has started ahead
//           (--prefetch), and sums of the backward stand behind its reduce-scatters, too.
// not here  overlap in the forward, where the next op needs the sum immediately
// test      tests/test_tensor_parallel.cpp
#include "tensor_parallel.h"

#include <algorithm>

// ---- communication: all of it goes on the one stream, after what was computed. It is only started
// here. Whatever is sent must be kept until the computation waits for the stream.

void TensorParallel::all_gather(const Tensor& mine, const Tensor& all) {
  communicate_after_compute();  // this rank's part must have been computed
  const Timed timed;
  ledger.enter(axis_, Collective::all_gather, all.bytes());
  NCCL_CHECK(ncclAllGather(mine.raw(), all.raw(), mine.numel(), nccl_type(all.dtype()), axis_.comm,
                           device().communication));
}

void TensorParallel::all_reduce(const Tensor& x, ncclRedOp_t op) {
  communicate_after_compute();  // x must have been computed
  const Timed timed;
  ledger.enter(axis_, Collective::all_reduce, x.bytes());
  NCCL_CHECK(ncclAllReduce(x.raw(), x.raw(), x.numel(), nccl_type(x.dtype()), op, axis_.comm,
                           device().communication));
}

// All R rows of x. Without sequence parallelism x has them: nothing is sent or waited for.
Tensor TensorParallel::start_gather(const Tensor& x, int64_t R) {
  if (!splits_rows_) return x;
  const int64_t C = x.dim(1);
  const Tensor all({rows_here(R) * axis_.size, C}, x.dtype(), Memory::activations);
  all_gather(x, all);
  return all.view(0, {R, C});  // without the padding
}

Tensor TensorParallel::gather(const Tensor& x, int64_t R) {
  const Tensor all = start_gather(x, R);
  if (splits_rows_) compute_after_communication();  // the other ranks' rows must have come
  return all;
}

// The sum over ranks: in place or, under sequence parallelism, of this rank's share of the rows.
Tensor TensorParallel::start_sum(const Tensor& partial) {
  if (!splits_rows_) {
    all_reduce(partial);
    return partial;
  }
  const Tensor sum({partial.dim(0) / axis_.size, partial.dim(1)}, partial.dtype(),
                   Memory::activations);
  communicate_after_compute();  // the partial sums must have been computed
  const Timed timed;
  ledger.enter(axis_, Collective::reduce_scatter, partial.bytes());
  NCCL_CHECK(ncclReduceScatter(partial.raw(), sum.raw(), sum.numel(), nccl_type(sum.dtype()),
                               ncclSum, axis_.comm, device().communication));
  return sum;
}

// Room for R rows and, under sequence parallelism, for padding, which is 0: NCCL has no unequal
// reduce-scatter.
Tensor TensorParallel::for_partial_sums(int64_t R, int64_t width, Dtype dtype) const {
  const int64_t padded = splits_rows_ ? rows_here(R) * axis_.size : R;
  const Tensor x({padded, width}, dtype, Memory::activations);
  if (padded > R) fill(x.view(R * width, {padded - R, width}), 0);
  return x;
}

// ---- a column-parallel layer: y (R,N) = x w, where N are this rank's columns

Var TensorParallel::column(Tape& tape, const Var& x, int64_t R, Param& w, bool transposed,
                           Traffic serves) {
  if (axis_.size == 1) return linear(tape, x, w, transposed);
  const Purpose purpose(serves);
  const Tensor matrix = as_matrix(w.value);
  Var y{Tensor({R, matrix.dim(transposed ? 0 : 1)}, x.value.dtype(), Memory::activations)};
  const Tensor all_x = gather(x.value, R);
  product(y.value, all_x, false, matrix, transposed);

  tape.push([this, &tape, R, &w, transposed, serves, x = x.value, dx = x.grad, dy_slot = y.grad] {
    const Tensor dy = take(dy_slot);
    Tensor all_x;
    {  // sequence parallelism saved a share: it is gathered again during the next product
      const Purpose purpose(Traffic::gathered_again);
      all_x = start_gather(x, R);
    }
    const Tensor partial = for_partial_sums(R, x.dim(1), x.dtype());  // of dx
    product(partial.view(0, {R, x.dim(1)}), dy, false, as_matrix(w.value), !transposed);
    if (splits_rows_) compute_after_communication();  // the product below reads all_x
    const Purpose purpose(serves);
    Tensor sum = start_sum(partial);  // it travels while the weight gradient is computed
    weight_gradient(tape, w, transposed, all_x, dy);
    compute_after_communication();  // the sum must have arrived
    accumulate(dx, std::move(sum));
  });
  return y;
}

Var TensorParallel::column_linear(Tape& tape, const Var& x, int64_t R, Param& w) {
  return column(tape, x, R, w, false, Traffic::training);
}

Var TensorParallel::head(Tape& tape, const Var& x, int64_t R, Param& wte) {
  return column(tape, x, R, wte, true, Traffic::embedding);
}

// ---- a row-parallel layer: y = sum over ranks of x w, where x (R,K) and w (K,N) have this rank's
// part of the inputs

Var TensorParallel::row_linear(Tape& tape, const Var& x, int64_t R, Param& w) {
  if (axis_.size == 1) return linear(tape, x, w);
  const int64_t N = w.value.dim(1);
  const Tensor partial = for_partial_sums(R, N, x.value.dtype());
  product(partial.view(0, {R, N}), x.value, false, w.value, false);
  Var y{start_sum(partial)};
  compute_after_communication();  // the next op reads the sum

  tape.push([this, &tape, R, &w, x = x.value, dx = x.grad, dy_slot = y.grad] {
    const Tensor all_dy = gather(take(dy_slot), R);
    Tensor d({R, x.dim(1)}, x.dtype(), Memory::activations);  // its part of the width: whole
    product(d, all_dy, false, w.value, true);
    accumulate(dx, std::move(d));
    weight_gradient(tape, w, false, x, all_dy);
  });
  return y;
}

// ---- both ends of the model: the vocabulary is split

Var TensorParallel::embedding(Tape& tape, const Tokens& tokens, Param& wte, Param& wpe) {
  if (axis_.size == 1) return ::embedding(tape, tokens, wte, wpe);
  const Purpose purpose(Traffic::embedding);
  const int64_t R = tokens.rows(), C = wte.value.dim(1);
  const Tensor partial = for_partial_sums(R, C, wte.value.dtype());
  // The token's owner writes its row of wte plus the position; the other ranks write zeros.
  embedding_forward(partial.view(0, {R, C}), tokens.inputs, wte.value, wpe.value, tokens.T,
                    tokens.position_of_row);
  Var x{start_sum(partial)};
  compute_after_communication();  // the first block reads the sum
  tape.push([this, tokens, R, &wte, &wpe, dx = x.grad] {
    const Purpose purpose(Traffic::embedding);
    // of its rows of wte; of all of wpe, on every rank
    embedding_backward(wte, wpe, gather(take(dx), R), tokens);
  });
  return x;
}

void TensorParallel::cross_entropy(Tape& tape, Var logits, const Tensor& targets, int64_t vocab,
                                   double scale, const Tensor& total) {
  if (axis_.size == 1)
    return ::cross_entropy(tape, std::move(logits), targets, vocab, scale, total);
  ASSERT(!tape.recording() || !logits.value.shared(),
         "a backward reads logits that become their gradient");
  const Purpose purpose(Traffic::loss);
  const int64_t R = targets.numel(), V = part(vocab).size();
  const Dtype acc = master_dtype(logits.value.dtype());
  const Tensor parts({3, R}, acc, Memory::activations), top({R}, acc, Memory::activations),
      losses({R}, acc, Memory::activations);
  // of each row, over this rank's columns: maximum, sum of exponentials, target's logit
  softmax_parts(parts, logits.value, targets, V);
  copy(top, parts.view(0, {R}));  // the rescaling needs this rank's maximum and that of all
  all_reduce(top, ncclMax);
  compute_after_communication();  // each row's maximum of all ranks
  softmax_rescale(parts, top);
  all_reduce(parts.view(R, {2, R}));
  compute_after_communication();  // both sums over all ranks
  cross_entropy_parts(losses, logits.value, targets, V, top, parts, scale, tape.recording());
  if (tape.recording()) *logits.grad = std::move(logits.value);  // overwritten by their gradient
  add_sum(total, losses);
}

// ---- gradients of what every rank owns

// Under sequence parallelism a layernorm, or a bias after a sum, sees this rank's rows only.
void TensorParallel::sum_partial_gradients(const std::vector<Param*>& params) {
  if (std::ranges::none_of(params, &Param::partial)) return;
  const Purpose purpose(Traffic::partial_gradients);
  communicate_after_compute();  // the gradients must have been computed
  const Timed timed;
  NCCL_CHECK(ncclGroupStart());
  for (const Param* p : params) {
    if (!p->partial) continue;
    ledger.enter(axis_, Collective::all_reduce, p->grad.bytes());
    NCCL_CHECK(ncclAllReduce(p->grad.raw(), p->grad.raw(), p->grad.numel(),
                             nccl_type(p->grad.dtype()), ncclSum, axis_.comm,
                             device().communication));
  }
  NCCL_CHECK(ncclGroupEnd());
}

// ---- who owns what

Param TensorParallel::split(Param p, int dim, int64_t parts) const {
  const int64_t each = p.shape[dim] / parts;
  const Range mine = part(parts);
  int64_t outer = 1, inner = 1;
  for (int d = 0; d < int(p.shape.size()); d++)
    if (d != dim) (d < dim ? outer : inner) *= p.shape[d];
  p.dim = dim;
  p.slice = {outer, p.shape[dim], inner, mine.begin * each, mine.end * each};
  p.largest_slice = outer * ceil_div(parts, axis_.size) * each * inner;
  return p;
}

Param TensorParallel::whole(Param p) const {
  p.counted = axis_.rank == 0;
  return p;
}

Param TensorParallel::whole_with_partial_gradient(Param p) const {
  p.partial = splits_rows_;
  return whole(std::move(p));
}

// ---- sampling

Tensor TensorParallel::last_row(const Tensor& x, int64_t R) {
  const int64_t C = x.dim(1);
  const Tensor one = gather(x, R).view((R - 1) * C, {1, C});
  // ceil(1 / n) = 1: the first rank has the row, the others padding
  if (!splits_rows_ || axis_.rank == 0) return one;
  const Tensor padding({1, C}, x.dtype(), Memory::activations);
  fill(padding, 0);
  return padding;
}

Tensor TensorParallel::next_logits(const Tensor& x, int64_t R, const Param& wte, int64_t vocab) {
  const int64_t n = axis_.size, padded = wte.value.dim(0);
  const Dtype dtype = master_dtype(x.dtype());
  const Tensor logits({R, padded}, dtype, Memory::workspace);  // of its part of the vocabulary
  product(logits, gather(x, R), false, wte.value, true);
  Tensor all = logits;
  if (n > 1) {
    all = Tensor({n, R, padded}, dtype, Memory::workspace);
    all_gather(logits, all);
    compute_after_communication();  // the other ranks' parts must have come
  }
  const Tensor whole({R, vocab}, dtype, Memory::workspace);
  for (int64_t r = 0; r < n; r++) {  // without the padding
    const Range theirs = part_of(r, vocab);
    copy_columns(whole, theirs.begin, all.view(r * logits.numel(), logits.shape()), 0,
                 theirs.size());
  }
  return whole;
}
