// attention.cuh: which keys a query sees (all forms of attention), and what both forms of flash
// attention (attention_flash.cu, attention_mma.cu) know of their tensors.
#pragma once
#include <algorithm>

#include "kernels/common.cuh"

namespace flash {

// Row i of sequence b begins at data + (b * rows + i) * ld, its heads D elements apart.
template <class T> struct Rows {
  T* data;
  int64_t ld;
  int rows;
};
// The same to write: of T, or with `wide` of what sums run in, and then with `add` to what is there
struct Results {
  void* data;
  int64_t ld;
  int rows;
  bool wide, add;
  int64_t first = 0;  // element where a head's rows begin
};

template <class T> struct Inputs { Rows<const T> q, k, v; };
struct Gradients {
  Results q, k, v;
};

// Positions of a tensor's rows in the sequence, ascending: row i < cut has i + low, the others
// i + high.
struct Places {
  int rows, cut, low, high;
  __device__ int position(int row) const { return row + (row < cut ? low : high); }
  // how many rows, the first ones, have a position before this one
  __device__ int before(int position) const {
    const int in_low = position - low < cut ? position - low : cut,
              in_all = position - high < rows ? position - high : rows;
    return in_all > in_low ? in_all : in_low > 0 ? in_low : 0;
  }
};

// A block's head and tile are found in blockIdx.x alone, since gridDim.y, of which there are 65535,
// could count neither. Blocks begin in the order of their numbers, and those with the longest walks
// are the first tiles; so tile 0 of all heads comes first, then tile 1 of all, and no long walk
// begins when the others end. This order is kept within groups of heads: keys and values of a whole
// micro-batch would not stay in the L2 cache until the next tile reads them again.
struct Sizes {
  int H = 0, D = 0;
  bool packs = false;  // rows begin at multiples of 16 bytes
  Places queries, keys;
  unsigned heads = 0, group_heads = 0, tiles = 0;  // of all sequences; of a group; of a head
  unsigned blocks() const { return heads * tiles; }
  __device__ unsigned first_head() const {  // of this block's group
    return blockIdx.x / (group_heads * tiles) * group_heads;
  }
  __device__ unsigned heads_here() const {  // in it: the last group may have fewer
    return first_head() + group_heads < heads ? group_heads : heads - first_head();
  }
  __device__ unsigned block_of_group() const { return blockIdx.x - first_head() * tiles; }
  __device__ unsigned tile() const { return block_of_group() / heads_here(); }
  __device__ unsigned head() const { return first_head() + block_of_group() % heads_here(); }
  // This block's head of a tensor; and the first of its rows in (B,H,queries)
  template <class T> __device__ Rows<T> of_head(Rows<T> x) const {
    x.data += int64_t(head() / H) * x.rows * x.ld + int64_t(head() % H) * D;
    return x;
  }
  __device__ Results of_head(Results x) const {
    x.first = int64_t(head() / H) * x.rows * x.ld + int64_t(head() % H) * D;
    return x;
  }
  __device__ int64_t statistics() const { return int64_t(head()) * queries.rows; }
  // Since positions ascend, a query sees the first so many keys, and the queries that see a key are
  // those from this one on.
  __device__ int seen_by(int query) const { return keys.before(queries.position(query) + 1); }
  // How many keys a tile of queries sees, which begins at `first`: as many as its last query.
  __device__ int seen_by_tile(int first, int tile) const {
    return seen_by((first + tile < queries.rows ? first + tile : queries.rows) - 1);
  }
  __device__ int first_seeing(int key) const { return queries.before(keys.position(key)); }
};

inline Places places_of(const Positions& p) {
  ASSERT(p.high.size() == 0 || p.high.begin >= p.low.end, "pieces of a sequence must ascend");
  const int rows = int(p.rows()), cut = int(p.low.size());
  return {rows, p.high.size() ? cut : rows, int(p.low.begin),
          int(p.high.size() ? p.high.begin - cut : p.low.begin)};
}

// A tensor (B,rows,parts,H,D), and how to find its parts
struct Parts {
  const Tensor& tensor;
  int64_t rows, H, D, parts = 0;
  Parts(const Tensor& x, int64_t B, const Places& of, const Sizes& n)
      : tensor(x), rows(of.rows), H(n.H), D(n.D) {
    if (x.numel()) parts = x.numel() / (B * rows * H * D);
    ASSERT(x.numel() == B * rows * parts * H * D, to_string(x.shape()), " with B = ", B,
           ", T = ", rows, ", H = ", H, ", D = ", D);
  }
  int64_t ld() const { return parts * H * D; }  // elements from one row to the next
  // where the part of sequence b begins
  void* begin(int64_t part, int64_t b = 0) const {
    return static_cast<char*>(tensor.raw()) +
           (b * rows * ld() + part * H * D) * size_of(tensor.dtype());
  }
};

// The floating-point operations of one of attention's products, over the pairs that are seen; out
// (B,queries,H,D)
inline double flops_of_product(const Tensor& out, const AttentionInputs& in) {
  int64_t pairs = 0;
  for (int64_t row = 0; row < in.queries.rows(); row++)
    for (const Range& piece : {in.keys.low, in.keys.high})
      pairs += std::clamp<int64_t>(in.queries[row] + 1 - piece.begin, 0, piece.size());
  return 2.0 * pairs * out.numel() / std::max<int64_t>(in.queries.rows(), 1);
}

// Arguments of attention in tensor cores (attention_mma.cu). It takes bf16 with `packs`, which a D
// of whole packs has.
using Bf16Rows = Rows<const __nv_bfloat16>;
void mma_forward(Sizes n, Results out, float* lse, Inputs<__nv_bfloat16> in);
void mma_backward(Sizes n, Gradients d, Bf16Rows dout, const float* lse, const float* delta,
                  Inputs<__nv_bfloat16> in);

}  // namespace flash
