// autograd.cpp: each op, forward and backward side by side.
// idea      read any op below: the lines before `tape.push` are the forward, the closure is the
//           backward. Closures capture tensors (by counted reference) only when the backward reads
//           them, which is what decides how much memory activations take.
// cost      saved by a transformer block, in units of R*C elements: x 1, layernorm 1, qkv 3,
//           attention 1, sum 1, layernorm 1, MLP 4 + 4
// test      tests/test_autograd.cpp, tests/test_golden.cpp
#include "autograd.h"

// ---- parameters

Shape Param::local_shape() const {
  Shape local = shape;
  local[dim] = slice.end - slice.begin + padding;
  return local;
}

void Param::initialise(const Tensor& x, uint64_t seed, int64_t first) const {
  if (deviation > 0) fill_random(x, seed, id, deviation, slice, first);
  else fill(x, constant);
}

void separate_uses(Param& p) {
  p.head_use = std::make_shared<Param>();
  p.head_use->grad = Tensor(p.local_shape(), p.grad.dtype(), Memory::gradients);
  p.head_use->fresh = true;
}

void join_uses(Param& p) {
  if (!p.head_use) return;
  add(p.grad, p.grad, p.head_use->grad);
  p.head_use->fresh = true;
}

// ---- the tape

void Tape::push(std::function<void()> backward) {
  if (recording_) entries_.push_back(std::move(backward));
}

void Tape::run_or_defer(std::function<void()> work) {
  if (deferred) deferred->push_back(std::move(work));
  else work();
}

void Tape::backward() {
  while (!entries_.empty()) {
    auto entry = std::move(entries_.back());
    entries_.pop_back();
    entry();  // dropped at the end of this scope, with the activations that it alone holds
  }
}

static Tensor activation(Shape shape, Dtype dtype) {
  return Tensor(std::move(shape), dtype, Memory::activations);
}
static Tensor like(const Tensor& x) { return activation(x.shape(), x.dtype()); }
// A tensor that an op may overwrite: the gradient itself when nobody else holds it.
static Tensor writable(const Tensor& g) { return g.shared() ? like(g) : g; }

void accumulate(const std::shared_ptr<Tensor>& grad, Tensor g) {
  if (grad->empty()) {
    *grad = std::move(g);
  } else {
    // where nobody else reads: over the slot's tensor, else over g, else into a new one
    const Tensor sum = grad->shared() ? writable(g) : *grad;
    add(sum, *grad, g);
    *grad = sum;
  }
}

Tensor take(const std::shared_ptr<Tensor>& grad) {
  ASSERT(!grad->empty(), "the gradient of an output was not computed before it was needed");
  return std::move(*grad);
}

// ---- matrix products

void product(const Tensor& c, const Tensor& a, bool ta, const Tensor& b, bool tb, bool add) {
  const int64_t m = c.dim(0), n = c.dim(1), k = a.dim(!ta);
  ASSERT(a.dim(ta) == m && b.dim(tb) == k && b.dim(!tb) == n && b.dtype() == a.dtype(),
         to_string(a.shape()), " times ", to_string(b.shape()), " is not ", to_string(c.shape()));
  // few rows, as in decoding
  if (m <= kMatvecRows && !ta && !add && (tb || a.dtype() == c.dtype())) return matvec(c, a, b, tb);
  matmul(a.dtype(), c.dtype(), m, n, k, {a.raw(), a.dim(1), ta}, {b.raw(), b.dim(1), tb},
         {c.raw(), n}, 1, add);
}

Tensor as_matrix(const Tensor& w) { return w.view(0, {w.dim(0), w.numel() / w.dim(0)}); }

void weight_gradient(Tape& tape, Param& w, bool transposed, const Tensor& x, const Tensor& dy) {
  tape.run_or_defer([&w, transposed, x, dy] {
    // only the head transposes a weight; its gradient may be kept apart (separate_uses)
    Param& use = transposed && w.head_use ? *w.head_use : w;
    const Tensor dw = as_matrix(use.grad);
    const bool adds = use.begin_write();  // to what is there; else overwrites a fresh one
    if (transposed) product(dw, dy, true, x, false, adds);  // dw += dy^T x
    else product(dw, x, true, dy, false, adds);             // dw += x^T dy
  });
}

Var linear(Tape& tape, const Var& x, Param& w, bool transposed) {
  const Tensor matrix = as_matrix(w.value);
  Var y{activation({x.value.dim(0), matrix.dim(transposed ? 0 : 1)}, x.value.dtype())};
  product(y.value, x.value, false, matrix, transposed);
  tape.push([&tape, &w, transposed, x = x.value, dx = x.grad, dy_slot = y.grad] {
    const Tensor dy = take(dy_slot);
    Tensor d = like(x);
    product(d, dy, false, as_matrix(w.value), !transposed);  // dx = dy w^T, or dy w
    accumulate(dx, std::move(d));
    weight_gradient(tape, w, transposed, x, dy);
  });
  return y;
}

// ---- embedding

// One upload holds, one after the other, inputs, targets, rows sorted by input token and, where
// sequences are split over ranks, the position of each row.
Tokens::Tokens(int64_t B, int64_t T, const Positions& positions, std::vector<int> in,
               std::vector<int> out, Range vocabulary)
    : B(B), T(T), positions(positions) {
  const int64_t here = positions.rows();
  for (std::vector<int>* tokens : {&in, &out}) {
    ASSERT(tokens->empty() || int64_t(tokens->size()) == rows());
    for (int& t : *tokens)
      t = t >= vocabulary.begin && t < vocabulary.end ? t - vocabulary.begin : -1;
  }
  std::vector<int> at, all;
  if (here < T)
    for (size_t row = 0; row < in.size(); row++) at.push_back(positions[row % here]);
  const std::pair<Tensor*, std::vector<int>> parts[] = {
      {&inputs, in}, {&targets, out}, {&order, sort_rows(in)}, {&position_of_row, at}};
  for (const auto& [tensor, part] : parts) all.insert(all.end(), part.begin(), part.end());
  if (all.empty()) return;
  const Tensor whole({int64_t(all.size())}, Dtype::i32, Memory::data);
  upload(whole, all.data());
  int64_t begin = 0;
  for (const auto& [tensor, part] : parts) {
    const int64_t size = part.size();
    if (size) *tensor = whole.view(begin, {size});
    begin += size;
  }
}

Var embedding(Tape& tape, const Tokens& tokens, Param& wte, Param& wpe) {
  Var x{activation({tokens.rows(), wte.value.dim(1)}, wte.value.dtype())};
  embedding_forward(x.value, tokens.inputs, wte.value, wpe.value, tokens.T, tokens.position_of_row);
  tape.push([tokens, &wte, &wpe, dx = x.grad] { embedding_backward(wte, wpe, take(dx), tokens); });
  return x;
}

void embedding_backward(Param& wte, Param& wpe, const Tensor& dx, const Tokens& tokens) {
  for (Param* p : {&wte, &wpe}) p->clear_if_fresh();  // not every row is written
  embedding_backward(wte.grad, wpe.grad, dx, tokens.inputs, tokens.order, tokens.positions);
}

// ---- biases

static Tensor value_of(const Param* bias) { return bias ? bias->value : Tensor(); }

// The backward of a bias, from the gradient of what it was added to
static void bias_gradient(Tape& tape, Param* bias, const Tensor& dy) {
  if (bias) tape.run_or_defer([bias, dy] { bias_backward(bias->grad, dy, bias->begin_write()); });
}

Var add_bias(Tape& tape, const Var& x, Param& bias) {
  add_bias(x.value, bias.value);
  // the result is x, in place: its gradient stays where it is
  tape.push([&tape, &bias, dx = x.grad] { bias_gradient(tape, &bias, *dx); });
  return x;
}

// ---- layernorm

static Tensor row_statistics(const Tensor& x) {
  return activation({x.dim(0)}, master_dtype(x.dtype()));
}

// The backward of y = layernorm(x)
static void push_layernorm(Tape& tape, const Var& x, const Var& y, const Tensor& mean,
                           const Tensor& rstd, Param& gain, Param& bias) {
  tape.push([&gain, &bias, x = x.value, mean, rstd, dx = x.grad, dy_slot = y.grad] {
    // The gradient that x already has joins in the same pass.
    const Tensor dy = take(dy_slot), residual = std::move(*dx);
    const Tensor d = residual.empty() ? like(x) : writable(residual);
    const bool adds = gain.begin_write(), bias_adds = bias.begin_write();
    ASSERT(adds == bias_adds);
    layernorm_backward(d, gain.grad, bias.grad, dy, residual, x, mean, rstd, gain.value, adds);
    *dx = d;
  });
}

// The backward of y = a + (b + bias): a sum hands its gradient to all terms.
static void push_add(Tape& tape, const Var& a, const Var& b, Param* bias, const Var& y) {
  tape.push([&tape, bias, da = a.grad, db = b.grad, dy_slot = y.grad] {
    const Tensor dy = take(dy_slot);
    bias_gradient(tape, bias, dy);
    accumulate(da, dy);
    accumulate(db, dy);
  });
}

Var layernorm(Tape& tape, const Var& x, Param& gain, Param& bias) {
  Var y{like(x.value)};
  const Tensor mean = row_statistics(x.value), rstd = row_statistics(x.value);
  layernorm_forward(y.value, mean, rstd, x.value, gain.value, bias.value);
  push_layernorm(tape, x, y, mean, rstd, gain, bias);
  return y;
}

std::pair<Var, Var> add_layernorm(Tape& tape, const Var& x, const Var& h, Param& h_bias,
                                  Param& gain, Param& bias) {
  Var sum{like(x.value)}, y{like(x.value)};
  const Tensor mean = row_statistics(x.value), rstd = row_statistics(x.value);
  add_layernorm_forward(sum.value, y.value, mean, rstd, x.value, h.value, h_bias.value, gain.value,
                        bias.value);
  push_add(tape, x, h, &h_bias, sum);
  push_layernorm(tape, sum, y, mean, rstd, gain, bias);
  return {sum, y};
}

// ---- elementwise

Var gelu(Tape& tape, const Var& x, Param* bias) {
  Var y{like(x.value)};
  gelu_forward(y.value, x.value, value_of(bias));
  tape.push([&tape, bias, x = x.value, dx = x.grad, dy_slot = y.grad] {
    const Tensor dy = take(dy_slot);
    const Tensor d = writable(dy);
    gelu_backward(d, dy, x, value_of(bias));
    bias_gradient(tape, bias, d);
    accumulate(dx, d);
  });
  return y;
}

Var add(Tape& tape, const Var& a, const Var& b, Param* bias) {
  Var y{like(a.value)};
  add(y.value, a.value, b.value, value_of(bias));
  push_add(tape, a, b, bias, y);
  return y;
}

// ---- attention

Var attention(Tape& tape, const Var& qkv, int64_t B, int64_t T, int64_t H, AttentionKind kind) {
  const Dtype dtype = qkv.value.dtype();
  const bool plain = kind == AttentionKind::plain;
  Var y{activation({B * T, qkv.value.dim(1) / 3}, dtype)};
  // plain: probabilities; flash: the log of each row's sum of exponentials
  const Tensor saved =
      plain ? activation({B, H, T, T}, dtype) : activation({B, H, T}, master_dtype(dtype));
  const AttentionInputs in = whole_sequences(qkv.value, B, T, H);
  if (plain) attention_plain_forward(y.value, {}, saved, in);  // {}: probabilities need no lse
  else attention_flash_forward(y.value, saved, in);
  tape.push([=, out = y.value, dqkv = qkv.grad, dy = y.grad] {
    Tensor d = like(in.q);
    const Tensor dout = take(dy), delta({B, H, T}, master_dtype(dtype), Memory::workspace);
    attention_delta(delta, dout, out);
    // d (B,T,3,H,D) has the gradients of queries, and those of keys and values
    if (plain) attention_plain_backward(d, d, dout, delta, {}, saved, in);
    else attention_flash_backward(d, d, dout, delta, saved, in);
    accumulate(dqkv, std::move(d));
  });
  return y;
}

// ---- loss

void cross_entropy(Tape& tape, Var logits, const Tensor& targets, int64_t V, double scale,
                   const Tensor& total) {
  ASSERT(!tape.recording() || !logits.value.shared(),
         "a backward reads logits that become their gradient");
  const Tensor losses = row_statistics(logits.value);
  cross_entropy(losses, logits.value, targets, V, scale, tape.recording());
  // the same memory: the gradient is ready before the backward starts
  if (tape.recording()) *logits.grad = std::move(logits.value);
  add_sum(total, losses);
}

// ---- activation checkpointing

Var recompute(Tape& tape, const Var& x, const std::function<Var(Tape&, const Var&)>& f) {
  if (!tape.recording()) return f(tape, x);
  Tape forget(false);
  Var y = f(forget, x);
  // f's result may share another's slot, as add_bias's does, and here it needs its own
  y.grad = std::make_shared<Tensor>();
  tape.push([&tape, f, x = x.value, dx = x.grad, dy = y.grad] {
    Tape second;
    second.deferred = tape.deferred;
    Var leaf{x};
    Var again = f(second, leaf);
    *again.grad = take(dy);
    again.value = Tensor();  // only its gradient matters from here on
    second.backward();
    accumulate(dx, take(leaf.grad));
  });
  return y;
}
