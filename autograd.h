// autograd.h: the tape. An op computes its result now and appends the closure that will compute its
// gradient.
//
// idea      `backward` runs the closures from last to first and drops each once it has run, so that
//           activations are returned as soon as nobody needs them. There is no graph: the order of
//           the tape is a valid order.
// gradients of activations belong to a Var and are summed when it is used twice; those of
//           parameters belong to the Param and are `+=`, so that micro-batches, and a weight used
//           in two places, add up. The first writer of a fresh one overwrites it, so that it is
//           not cleared and read first; but an embedding, which writes some rows, clears it.
// in place  a bias is added to what its product wrote, and the loss turns logits into their
//           gradient: nobody else needs what was there
// not here  second derivatives
// test      tests/test_autograd.cpp (finite differences), tests/test_golden.cpp (PyTorch)
#pragma once
#include <deque>
#include <functional>
#include <string>
#include <utility>

#include "kernels/kernels.h"

// ---- parameters

// A parameter, or the slice of it that this rank owns. Closures hold Param&, never pointers into
// it: FSDP moves the data.
struct Param {
  std::string name;  // GPT-2's Hugging Face name
  Shape shape;       // global
  Tensor value;      // compute dtype, the local shape
  Tensor grad;       // master dtype
  // Fresh: what its memory holds does not count, since it was just allocated or a step begins.
  bool fresh = false;
  // keys the random generator, with the global element index, and the norm: 0, 1, ..., each once
  uint32_t id = 0;
  // initial values: normal(0, deviation), or `constant` when that is 0
  float deviation = 0, constant = 0;
  bool decay = false;  // weight decay: matrices only

  // ---- of the strategies: set by TensorParallel, by Gpt (padding, unit) and, of the tied
  // embedding, by Trainer (counted, head_use)
  // what this rank owns: [begin, end) of dim number `dim` of `shape`, seen as (outer, split, inner)
  int dim = 0;
  Slice slice;
  // rows of zeros in memory after the slice's, for fast products (TensorParallel::padded_part):
  // no elements of the parameter
  int64_t padding = 0;
  int64_t largest_slice = 0;  // where it is split: elements of the largest rank's slice
  // in this rank's part of the norm, in what it saves, and in Optimizer::finite: false where
  // another rank that holds the same values counts them
  bool counted = true;
  // each rank of the tp axis has only its rows' part of the gradient; the parts are to be summed
  bool partial = false;
  int unit = 0;  // FSDP shards the parameters of one unit together
  // Stands in the head for a tied parameter whose uses are kept apart (separate_uses): only its
  // gradient counts.
  std::shared_ptr<Param> head_use;

  // Each writer of a gradient calls this once. Whether it must add to what is there: the first one
  // overwrites a fresh gradient, which then is fresh no longer.
  bool begin_write() { return !std::exchange(fresh, false); }
  void clear_if_fresh() {
    if (!begin_write()) fill(grad, 0);
  }
  Shape local_shape() const;  // the slice's, with padding
  // elements that this rank owns, and where they are in its value or gradient: without padding
  int64_t numel() const { return slice.outer * (slice.end - slice.begin) * slice.inner; }
  Tensor own(const Tensor& x) const { return x.view(0, {numel()}); }
  // Initial values of the elements [first, first + x.numel()) of what this rank owns.
  void initialise(const Tensor& x, uint64_t seed, int64_t first) const;
};

// What the backward of a part of the model reads of its parameters.
enum class BackwardReads {
  values,       // a block's
  values_kept,  // the head's: kept whole, since its backward mostly follows its forward directly
  nothing,      // the embedding's, whose parameters only need a place for gradients
};

// A tied parameter is used at both ends of the model: by the embedding and, transposed, by the
// head. In a pipeline the two are on different ranks, each of which sums one use's gradient over
// all micro-batches. Where one rank has both uses, the head's gets a gradient of its own, so that
// the sums have the same order and the same bits.
void separate_uses(Param& p);
void join_uses(Param& p);  // once a step: the head's gradient is added, and then fresh

// ---- the tape

// An activation: its value, and where its gradient will be put. Closures capture only what they
// need of it.
struct Var {
  Tensor value;
  // empty until a consumer's backward has run
  std::shared_ptr<Tensor> grad = std::make_shared<Tensor>();
};
// g becomes, or is added to, the gradient of an activation. Never writes into memory that others
// read.
void accumulate(const std::shared_ptr<Tensor>& grad, Tensor g);
// Takes the gradient of an op's output out of its slot, which is then empty. Other slots and
// deferred work may hold the same memory: a closure writes in place only where `shared` is false.
Tensor take(const std::shared_ptr<Tensor>& grad);

class Tape {
 public:
  explicit Tape(bool recording = true) : recording_(recording) {}
  bool recording() const { return recording_; }
  void push(std::function<void()> backward);
  // Inside a backward closure: runs work now or, where there is a list, puts it there. It is what
  // the backward of earlier layers does not need: gradients of linear layers' weights and biases,
  // and what FSDP does after these. Zero-bubble pipelines fill their bubbles with it.
  void run_or_defer(std::function<void()> work);
  std::deque<std::function<void()>>* deferred = nullptr;
  // runs the closures, last to first, and empties the tape, so that a second call does nothing;
  // gradients of the outputs must have been put first
  void backward();
  size_t size() const { return entries_.size(); }

 private:
  bool recording_;
  std::vector<std::function<void()>> entries_;
};

// ---- differentiable ops; shapes in the legend of tensor.h

enum class AttentionKind { plain, flash };  // how it is computed: results differ by rounding

// Tokens of one micro-batch, on the device and sorted for the embedding's backward.
struct Tokens {
  int64_t B = 0, T = 0;    // sequences, and how long they are
  Positions positions;     // which tokens of each sequence are on this rank
  Tensor inputs, targets;  // (R) i32
  Tensor order;            // rows sorted by input token: see sort_rows
  Tensor position_of_row;  // (R) i32; empty: all tokens are here, and it is row % T
  // The head makes only what each sequence's next token is picked from: logits of its last row,
  // over the whole vocabulary, in the master dtype. Of one sequence, or of one-token sequences.
  bool last_rows = false;
  Tokens() = default;
  // In one upload. Tokens outside this rank's part of the vocabulary become -1, the others count
  // from its begin. Inputs, which the embedding reads, or targets, which the loss does, may be left
  // out.
  Tokens(int64_t B, int64_t T, const Positions& positions, std::vector<int> inputs,
         std::vector<int> targets, Range vocabulary);
  // all of their tokens
  Tokens(int64_t B, int64_t T, std::vector<int> inputs, std::vector<int> targets,
         Range vocabulary = {0, INT32_MAX})
      : Tokens(B, T, {{0, T}}, std::move(inputs), std::move(targets), vocabulary) {}
  int64_t rows() const { return B * positions.rows(); }  // R
};

// c = op(a) op(b), or with `add` c += op(a) op(b), of whole matrices: what the linear layers are
// made of. ta, tb: whether op transposes.
void product(const Tensor& c, const Tensor& a, bool ta, const Tensor& b, bool tb, bool add = false);
Tensor as_matrix(const Tensor& w);  // (K,3,C) is (K,3C)
// Adds linear()'s gradient of w (x: its input, dy: its output's gradient) to w.grad, or overwrites
// one that is fresh; now, or deferred.
void weight_gradient(Tape& tape, Param& w, bool transposed, const Tensor& x, const Tensor& dy);
// Adds embedding()'s gradients to those of wte and wpe, now; clears a fresh one first.
void embedding_backward(Param& wte, Param& wpe, const Tensor& dx, const Tokens& tokens);

Var embedding(Tape& tape, const Tokens& tokens, Param& wte, Param& wpe);
// x (R,K) w (K,N), or x w^T with w (N,K). The bias (N) is added by the op that reads the result, in
// the pass that it makes anyway: an argument of those below.
Var linear(Tape& tape, const Var& x, Param& w, bool transposed = false);
Var add_bias(Tape& tape, const Var& x, Param& bias);  // in place, where no such op follows
Var layernorm(Tape& tape, const Var& x, Param& gain, Param& bias);
// sum = x + (h + h_bias); {sum, layernorm(sum)}
std::pair<Var, Var> add_layernorm(Tape& tape, const Var& x, const Var& h, Param& h_bias,
                                  Param& gain, Param& bias);
Var gelu(Tape& tape, const Var& x, Param* bias = nullptr);               // gelu(x + bias)
Var add(Tape& tape, const Var& a, const Var& b, Param* bias = nullptr);  // a + (b + bias)
Var attention(Tape& tape, const Var& qkv, int64_t B, int64_t T, int64_t H, AttentionKind kind);
// total (1) f64 += scale * the sum of the rows' losses over their first V columns. Takes `logits`:
// when recording, they become their gradient in place.
void cross_entropy(Tape& tape, Var logits, const Tensor& targets, int64_t V, double scale,
                   const Tensor& total);
// Activation checkpointing: runs `f` without recording, keeps only x, and runs f again on a fresh
// tape when its gradient is needed (Chen et al., "Training deep nets with sublinear memory cost",
// 2016).
Var recompute(Tape& tape, const Var& x, const std::function<Var(Tape&, const Var&)>& f);
