// kernels.h: every kernel of Threefold as one host function: shapes, what it reads and writes, what
// it sums and in which order.
//
// legend    that of tensor.h; `=` writes, `+=` adds to what is there
// types     activations and weights are T in {f32, bf16, f64}; sums run in acc(T) = f64 for f64,
//           else f32; gradients of parameters, statistics of rows and losses are acc(T)
// order     no float atomics: in one build, shapes, dtypes and alignment alone decide the order of
//           every sum of our own kernels (in embedding_backward tokens, too), so results have the
//           same bits for any number of threads. cuBLAS and oneDNN have orders of their own.
// one source, three ways to run it: docs/kernels.md
// test      tests/test_kernels.cpp, tests/test_matmul.cpp, tests/test_attention.cpp
#pragma once
#include <cstddef>

#include "tensor.h"

// ---- matmul.cu

enum class MatmulBackend { cublas, own };
extern MatmulBackend matmul_backend;  // --matmul; cublas unless said otherwise

struct Matrix {  // a row-major matrix inside a tensor, or `batch` of them `stride` elements apart
  void* data;
  int64_t ld;               // elements from one row to the next
  bool transposed = false;  // use it as its transpose
  int64_t stride = 0;       // elements from one matrix of the batch to the next
};
// c (m,n) = alpha a (m,k) b (k,n), for each of `batch`; with `add` c += that, else c is not read
// and may be uninitialised. a and b are of dtype `in`, c of dtype `out`: equal, or in = bf16 and
// out = f32. Sums in acc(in), except that where c is bf16 cuBLAS may cut a long one into parts and
// add these in bf16, and with `add` round the product before it is added.
void matmul(Dtype in, Dtype out, int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, Matrix c,
            double alpha = 1, bool add = false, int64_t batch = 1);

// ---- matvec.cu   a few rows times a whole matrix: bound by reading the weights once

constexpr int64_t kMatvecRows = 8;
// y (m,N) = x (m,K) w, w (K,N) or, transposed, (N,K); m at most kMatvecRows. All of one dtype, or y
// of a transposed product in acc; sums in acc
void matvec(const Tensor& y, const Tensor& x, const Tensor& w, bool transposed);
// dbias (N) += column sums of dy (R,N): ones times dy. Without `add`, `=`: dbias is not read.
void bias_backward(const Tensor& dbias, const Tensor& dy, bool add = true);

// ---- layernorm.cu   eps = 1e-5

// y (R,C) = (x - mean) * rstd * gain (C) + bias (C);  mean, rstd (R) are saved for the backward
void layernorm_forward(const Tensor& y, const Tensor& mean, const Tensor& rstd, const Tensor& x,
                       const Tensor& gain, const Tensor& bias);
// sum (R,C) = x (R,C) + (h (R,C) + h_bias (C)), y = layernorm(sum): neither the residual add nor
// the bias of what made h costs a pass of its own. sum, h and h_bias may be empty, all of them:
// y = layernorm(x)
void add_layernorm_forward(const Tensor& sum, const Tensor& y, const Tensor& mean,
                           const Tensor& rstd, const Tensor& x, const Tensor& h,
                           const Tensor& h_bias, const Tensor& gain, const Tensor& bias);
// dx (R,C) = residual + d layernorm / dx;  dgain, dbias (C) +=
// residual (R,C) may be empty (0); dx may be residual or dy (in place); `add`: see bias_backward
void layernorm_backward(const Tensor& dx, const Tensor& dgain, const Tensor& dbias,
                        const Tensor& dy, const Tensor& residual, const Tensor& x,
                        const Tensor& mean, const Tensor& rstd, const Tensor& gain,
                        bool add = true);

// ---- elementwise.cu

// A bias (N) is added to every row of (R,N); an empty one is none.
void add_bias(const Tensor& y, const Tensor& bias);  // y += bias
// y = gelu(x + bias), tanh form (GPT-2)
void gelu_forward(const Tensor& y, const Tensor& x, const Tensor& bias = {});
// dx = dy * gelu'(x + bias); dx may be dy
void gelu_backward(const Tensor& dx, const Tensor& dy, const Tensor& x, const Tensor& bias = {});
// y = a + (b + bias); y may be a or b
void add(const Tensor& y, const Tensor& a, const Tensor& b, const Tensor& bias = {});

// ---- embedding.cu

// Where rows stand in a sequence: in one piece of it, or in two, the earlier one first.
struct Positions {
  Range low, high{};
  int64_t rows() const { return low.size() + high.size(); }
  int64_t operator[](int64_t row) const {
    return row < low.size() ? low.begin + row : high.begin + row - low.size();
  }
};
// x (R,C) = wte (V,C)[tokens (R)] + wpe (T,C)[row % T, or positions (R)]; rows whose token is -1
// (another rank's) are 0
void embedding_forward(const Tensor& x, const Tensor& tokens, const Tensor& wte, const Tensor& wpe,
                       int64_t T, const Tensor& positions = {});
// dwte (V,C) += rows of dx (R,C) with that token, dwpe (T,C) += rows of dx at that position, all of
// them. The rows of each sequence stand at `places` (with R < T those at the first R positions).
// `order` lists the rows that have a token, sorted by it (stable), so that a token's rows lie
// beside each other and nothing needs an atomic: see sort_rows.
void embedding_backward(const Tensor& dwte, const Tensor& dwpe, const Tensor& dx,
                        const Tensor& tokens, const Tensor& order, const Positions& places);
// on the host: numbers of the rows with a token, in its order, stable
std::vector<int> sort_rows(const std::vector<int>& tokens);

// ---- attention_plain.cu, attention_flash.cu
// Causal attention; scale 1/sqrt(D). Queries may come from one tensor, keys and values from
// another. A query sees the keys whose position is not after its own: all, some or none of them;
// where there are queries there is a key.
struct AttentionInputs {
  Tensor q;   // (B,Tq,H,D), or the first part of (B,Tq,3,H,D)
  Tensor kv;  // (B,Tk,2,H,D), or the last two parts of (B,Tk,3,H,D)
  int64_t B, H;
  Positions queries, keys;  // of Tq and Tk rows
};
// qkv (B,T,3,H,D): all tokens of whole sequences
inline AttentionInputs whole_sequences(const Tensor& qkv, int64_t B, int64_t T, int64_t H) {
  return {qkv, qkv, B, H, {{0, T}}, {{0, T}}};
}

// out (B,Tq,H,D) of q's dtype or acc; lse (B,H,Tq) acc: the logarithm of each row's sum of
// exponentials, which the backward needs, and who merges results over several sets of keys. A row
// that sees no key has out 0 and as lse the lowest number there is.

// plain: batched matrix products and a softmax kernel; probabilities (B,H,Tq,Tk) of q's dtype, to
// which scores are rounded, too. In bf16 the flash form is more exact: its scores are acc, and of
// probabilities and gradients of scores tensor cores round what they multiply. Probabilities, where
// nobody keeps them, or lse may be empty.
void attention_plain_forward(const Tensor& out, const Tensor& lse, const Tensor& probabilities,
                             const AttentionInputs& in);
// as the flash form's; `probabilities` that are empty are computed again, from lse
void attention_plain_backward(const Tensor& dq, const Tensor& dkv, const Tensor& dout,
                              const Tensor& delta, const Tensor& lse, const Tensor& probabilities,
                              const AttentionInputs& in, bool add_dq = false);
// flash: tiles of scores never leave the chip (Dao et al., "FlashAttention", 2022, algorithms 1 and
// 4)
void attention_flash_forward(const Tensor& out, const Tensor& lse, const AttentionInputs& in);
// dq as q may be, and dkv as kv, of their dtype or acc: written, or with `add_dq` a dq of acc added
// to what is there. delta and lse may be of out merged from this and other keys: then this is these
// keys' part of dq, and all that these queries give to dk and dv.
void attention_flash_backward(const Tensor& dq, const Tensor& dkv, const Tensor& dout,
                              const Tensor& delta, const Tensor& lse, const AttentionInputs& in,
                              bool add_dq = false);
// Before either: delta (B,H,Tq) acc = the sum over d of dout * out, both (B,Tq,H,D). It is the mean
// of dout's products with the values, by their probabilities, which the softmax's backward takes
// off each of these products.
void attention_delta(const Tensor& delta, const Tensor& dout, const Tensor& out);

// ---- attention_merge.cu   attention over several sets of keys, one after the other

// out (B,T,H,D) and lse (B,H,T), both acc, of some keys become those of these and other keys, whose
// are part and part_lse; at least one of a row's two sets has a key that it sees
void merge_attention(const Tensor& out, const Tensor& lse, const Tensor& part,
                     const Tensor& part_lse);
// columns to_first .. of every row of `to` = as many columns from_first .. of `from`, which is of
// the same dtype or acc
void copy_columns(const Tensor& to, int64_t to_first, const Tensor& from, int64_t from_first,
                  int64_t columns);

// ---- attention_decode.cu   one new token a sequence, over the keys and values of all before it

// cache (B,2,H,S,D): position lengths[b] of sequence b = key and value of qkv (B,3,H,D); then
// out (B,H,D) = softmax(q k^T / sqrt(D)) v over positions 0 .. lengths[b]. lengths (B) i32, from 0
// to S - 1: nobody checks.
void attention_decode(const Tensor& out, const Tensor& cache, const Tensor& qkv,
                      const Tensor& lengths, int64_t H);
// cache (B,2,H,S,D), sequence b, positions first .. first+T-1 = keys and values of qkv (T,3,H,D):
// after a prefill
void append_to_cache(const Tensor& cache, const Tensor& qkv, int64_t b, int64_t first, int64_t H);

// ---- cross_entropy.cu

// losses (R) = -log softmax(logits (R,V))[targets (R)] * scale; with `gradient`, logits become
// their own gradient, (softmax - onehot) * scale. Rows of logits may be longer than V: what stands
// after column V is not read, and its gradient is 0. Targets are from 0 to V - 1: nobody checks.
void cross_entropy(const Tensor& losses, const Tensor& logits, const Tensor& targets, int64_t V,
                   double scale, bool gradient);
// The same where this rank holds V of the vocabulary's columns, in three steps; a target of -1 is
// another rank's. parts (3,R) acc = each row's maximum m, sum of exp(x - m), target's logit or 0.
// `logits` then serve the third step only.
void softmax_parts(const Tensor& parts, const Tensor& logits, const Tensor& targets, int64_t V);
// after the maxima of all ranks were combined to top (R): the sums in parts become sums of exp(x -
// top)
void softmax_rescale(const Tensor& parts, const Tensor& top);
// after sums and target logits in parts were added up over the ranks: as cross_entropy
void cross_entropy_parts(const Tensor& losses, const Tensor& logits, const Tensor& targets,
                         int64_t V, const Tensor& top, const Tensor& parts, double scale,
                         bool gradient);

// ---- adamw.cu
// Loshchilov and Hutter, "Decoupled weight decay regularization", 2019, algorithm 2; but decay is
// multiplied by the learning rate, as PyTorch has it

// A line of the optimizer's table: neighbouring elements of one parameter, which a block updates.
struct UpdatePiece {
  void *weights, *m, *v, *gradient;  // of acc dtype, at multiples of 16 bytes
  void* compute;                     // receives the new weights in its own dtype; may be null
  int size, id;                      // elements; the parameter's number
  bool decay;
  // how many pieces from this one on are of its parameter; 0 where it is not the first of them, or
  // where the parameter does not count in the norm
  int counted_pieces;
};
constexpr int kPieceSize = 1 << 14;  // elements, at most
struct UpdateTable {
  Tensor pieces;               // (n, sizeof(UpdatePiece) / 4) i32, on the device
  Dtype compute = Dtype::f32;  // of what computes: bf16, or acc
  int64_t elements = 0;
  int64_t size() const { return pieces.dim(0); }
  const UpdatePiece* data() const { return static_cast<const UpdatePiece*>(pieces.raw()); }
};
// step counts from 1
struct AdamW {
  double lr, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0;
  int64_t step = 1;
};
// Updates every piece of the table. clip (1) f64 is a factor on the gradients, read on the device
// (1 when nothing is clipped).
void adamw(const UpdateTable& table, const Tensor& clip, const AdamW& options);

// ---- sums.cu   in f64, fixed order

void add_sum(const Tensor& total, const Tensor& x);  // total (1) f64 += sum of x (R)
// squares (parameters) f64: element `id` = sum of squares of the parameter's gradient (or weights,
// m or v: which pointer of a piece), if it has counted pieces here, else 0
void sum_of_squares(const Tensor& squares, const UpdateTable& table,
                    size_t of = offsetof(UpdatePiece, gradient));
// norm (1) f64 = sqrt(sum of squares (n), first to last); clip (1) f64 = min(1, limit / norm), or 1
// when limit is 0. Of a norm that is no number clip is 1, of an infinite one 0: the trainer stops.
void norm_and_clip(const Tensor& norm, const Tensor& clip, const Tensor& squares, double limit);

// ---- fill_random.cu

// Initial weights. Element i of the *global* parameter depends on (seed, parameter, i) alone, so
// that every layout starts from the same bits: Philox-4x32-10 (Salmon et al., "Parallel random
// numbers: as easy as 1, 2, 3", SC 2011) yields 128 bits, and the sum of their eight 16-bit halves,
// centred and scaled to the deviation, is close to normal (Irwin-Hall, tails end at 4.9
// deviations). The sum is an integer and one product rounds it to f32, so the bits are the same on
// every machine, too. x is the elements of this rank's slice, in order, from `first` on.
void fill_random(const Tensor& x, uint64_t seed, uint32_t parameter, float deviation,
                 const Slice& slice, int64_t first = 0);
