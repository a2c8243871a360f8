// matmul.cu: c (m,n) = or += alpha a (m,k) b (k,n), by cuBLAS or by two kernels of our own.
//
// idea      a block owns a tile of c and walks along k: it brings a slice (k-tile) of a's rows and
//           of b's columns to shared memory and multiplies them there, so that each number from
//           memory is used a hundred times. f32 and f64 multiply in registers (block_product.cuh),
//           bf16 in tensor cores. While a slice is multiplied, the loads of the next one are under
//           way.
// cost      2 m n k operations; a is read n / 128 times, b m / 128 times (f64: 64)
// order     own: each element of c is summed over k from first to last by one thread (bf16 on a
//           GPU: by one warp)
// measured  f32, the three products of a GPT-2 layer (R = 1024, C = 768, 4C = 3072) on two CPU
//           cores: own is half to two thirds of oneDNN's best. The rest: oneDNN packs a and b once,
//           own packs its slices again in every block; and oneDNN's innermost loop is assembly.
// not here  split k (thin c leaves a GPU idle), TMA and wgmma (what cuBLAS gains on Hopper),
//           epilogues with bias or gelu
// test      tests/test_matmul.cpp
#include <climits>

#include <block_product.cuh>
#ifndef CPU_FAST  // one thread is no warp: there, bf16 is widened to f32 and takes the first kernel
#include "kernels/mma.cuh"
#endif

MatmulBackend matmul_backend = MatmulBackend::cublas;

namespace {

// ---- what kernels see of a matrix

// a or b as `extent` vectors of length k: rows of a, columns of b
template <class T> struct Operand {
  const T* data;
  int64_t ld, stride;
  bool along_k;  // memory runs along k (a, and b transposed), else across the vectors
  bool packs;    // runs of memory begin at multiples of 16 bytes
};

template <class U> struct Result {
  U* data;
  int64_t ld, stride;
  bool packs;
  bool add;  // c += alpha a b
};

template <class T> bool aligned(const Matrix& x) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.ld * sizeof(T) % 16 == 0 &&
         x.stride * sizeof(T) % 16 == 0;
}
template <class T> Operand<T> rows_of(const Matrix& a) {
  return {static_cast<const T*>(a.data), a.ld, a.stride, !a.transposed, aligned<T>(a)};
}
template <class T> Operand<T> columns_of(const Matrix& b) {
  return {static_cast<const T*>(b.data), b.ld, b.stride, b.transposed, aligned<T>(b)};
}

// The slice of an operand that one block needs at a time: kX vectors by kK of their elements, in
// runs of 16 bytes that the threads share. `fetch` starts the loads into registers,
// `put_transposed` uses them later.
template <class T, int kX, int kK> struct Slice16 {
  static constexpr int kRun = 16 / int(sizeof(T)), kRuns = kX * kK / kRun / kProductThreads;

  const T* data;
  int64_t ld;
  // what there is from this slice's first vector on, and of k; beyond, zeros are put
  int extent, depth;
  bool along_k, packs;
  Pack<T, kRun> held[kRuns];

  __device__ Slice16(const Operand<T>& of, int first, int extent, int depth)
      : data(of.data + int64_t(blockIdx.z) * of.stride + first * (of.along_k ? of.ld : 1)),
        ld(of.ld),
        extent(extent - first),
        depth(depth),
        along_k(of.along_k),
        packs(of.packs) {}

  __device__ __forceinline__ void fetch(int k0) {
    UNROLL for (int r = 0; r < kRuns; r++) held[r] = read(r, k0);
  }
  // tile[k * tile_ld + x] = element k of vector x
  template <class A> __device__ __forceinline__ void put_transposed(A* tile, int tile_ld) const {
    UNROLL for (int r = 0; r < kRuns; r++) {
      A* at = tile + k_of(r) * tile_ld + x_of(r);
      for (int e = 0; e < kRun; e++) at[along_k ? e * tile_ld : e] = load(held[r][e]);
    }
  }

 private:
  __device__ static int index(int run) { return int(threadIdx.x) + run * kProductThreads; }
  __device__ int x_of(int run) const {
    return along_k ? index(run) / (kK / kRun) : index(run) % (kX / kRun) * kRun;
  }
  __device__ int k_of(int run) const {
    return along_k ? index(run) % (kK / kRun) * kRun : index(run) / (kX / kRun);
  }
  __device__ const T* at(int run, int k0) const {
    return data + (along_k ? x_of(run) * ld + k_of(run) + k0 : (k_of(run) + k0) * ld + x_of(run));
  }
  __device__ int inside(int run, int k0) const {  // elements of the run that exist, if positive
    const int x = x_of(run), k = k_of(run) + k0;
    return along_k ? (x < extent ? depth - k : 0) : (k < depth ? extent - x : 0);
  }
  __device__ __forceinline__ Pack<T, kRun> read(int run, int k0) const {
    return load_run<kRun>(at(run, k0), inside(run, k0), packs);
  }
};

// c[i][j...] = alpha * sum + c * add, for kRun sums side by side
template <int kRun, class U, class A>
__device__ __forceinline__ void write_sums(const Result<U>& c, int64_t i, int j, int n,
                                           const A* sum, A alpha) {
  U* p = c.data + int64_t(blockIdx.z) * c.stride + i * c.ld + j;
  write_run<kRun>(p, n - j, c.packs,
                  [=, add = c.add](int e) { return alpha * sum[e] + (add ? load(p[e]) : A(0)); });
}

// ---- in registers

template <class A> struct Tiles {                           // A what sums run in
  static constexpr int kI = 512 / int(sizeof(A)), kJ = kI;  // of c
  static constexpr int kK = kSliceDepth;                    // of a slice
  static constexpr int kLd = kI + kPad * 16 / int(sizeof(A));
};

// c (m,n) = alpha a b + c * add, batch blockIdx.z; a block owns a tile; reads a n / kJ and b m / kI
// times, writes c once; any m, n, k
template <class T, class U> __global__ void __launch_bounds__(256, 2)
    matmul_simt(Operand<T> a, Operand<T> b, Result<U> c, int m, int n, int k, acc_t<T> alpha) {
  using A = acc_t<T>;
  using S = Tiles<A>;
  // two buffers of slices of a and b, as [k][x]: one barrier a slice is enough
  __shared__ alignas(64) A tiles[2][2][S::kK * S::kLd];
  const int i0 = blockIdx.y * S::kI, j0 = blockIdx.x * S::kJ;
  Slice16<T, S::kI, S::kK> from_a(a, i0, m, k);
  Slice16<T, S::kJ, S::kK> from_b(b, j0, n, k);
  BlockProduct<A, S::kI, S::kJ> product;
  product.clear();

  from_a.fetch(0);
  from_b.fetch(0);
  for (int k0 = 0; k0 < k; k0 += S::kK) {
    A *tile_a = tiles[k0 / S::kK % 2][0], *tile_b = tiles[k0 / S::kK % 2][1];
    from_a.put_transposed(tile_a, S::kLd);
    from_b.put_transposed(tile_b, S::kLd);
    // the slices are complete; the other buffer was last read before the previous iteration's
    // barrier
    __syncthreads();
    from_a.fetch(k0 + S::kK);
    from_b.fetch(k0 + S::kK);
    product.template add<false>(tile_a, S::kLd, tile_b, S::kLd, S::kK);
  }

  product.for_each_run([&](int i, int j, const A* sum) {
    if (i0 + i < m)
      write_sums<BlockProduct<A, S::kI, S::kJ>::kColumnRun>(c, i0 + i, j0 + j, n, sum, alpha);
  });
}

template <class T, class U> void launch_simt(int64_t m, int64_t n, int64_t k, Operand<T> a,
                                             Operand<T> b, Result<U> c, double alpha,
                                             int64_t batch) {
  using S = Tiles<acc_t<T>>;
  const dim3 grid(ceil_div(n, S::kJ), ceil_div(m, S::kI), batch);
  matmul_simt<T, U>
      <<<grid, kProductThreads, 0, device().compute>>>(a, b, c, m, n, k, acc_t<T>(alpha));
  LAUNCHED();
}

// ---- in tensor cores: bf16, on a GPU and in FAITHFUL

#ifndef CPU_FAST
constexpr int kX = 128, kK = 32;  // a slice: kX vectors by kK of their elements
constexpr int kBuffers = 4;       // of slices: one is multiplied, three on their way (stages)
constexpr int kSlice = kX * kK;
constexpr int kTensorBytes = kBuffers * 2 * kSlice * 2;
// Rows of tiles of c in a band, which blocks take column by column: what runs at a time then
// shares rows of a and columns of b in the second-level cache; along a wide c, each row would read
// all of b again. (A threadblock swizzle.)
constexpr int kBand = 8;

// Where a run of eight elements lies in a slice, whose vectors run along k or not. Runs that
// ldmatrix reads together, of eight vectors or at eight k, lie in different banks (a swizzle).
template <bool kAlongK> __device__ __forceinline__ int place(int x, int k) {
  return kAlongK ? x * kK + (k / 8 ^ x / 2 % 4) * 8 : k * kX + (x / 8 ^ k % 8) * 8;
}

// Brings one slice of an operand after the other. kPacks: runs begin at multiples of 16 bytes, and
// are copied while the thread goes on.
template <bool kAlongK, bool kPacks> struct Slices {
  static constexpr int kRuns = kSlice / 8 / kProductThreads;
  const bf16* from[kRuns];
  int64_t step;
  int to[kRuns];
  int inside[kRuns], inside_last[kRuns];  // elements of the run that exist; of the last slice's

  __device__ Slices(const Operand<bf16>& of, int first, int extent, int depth)
      : step(kAlongK ? kK : kK * of.ld) {
    const auto clamp = [](int n) { return n < 0 ? 0 : n < 8 ? n : 8; };
    UNROLL for (int r = 0; r < kRuns; r++) {
      const int i = threadIdx.x + r * kProductThreads,
                x = kAlongK ? i / (kK / 8) : i % (kX / 8) * 8,
                k = kAlongK ? i % (kK / 8) * 8 : i / (kX / 8);
      from[r] = of.data + blockIdx.z * of.stride +
                (kAlongK ? (first + x) * of.ld + k : k * of.ld + first + x);
      to[r] = place<kAlongK>(x, k);
      const int across = extent - first - x, along = (depth - 1) % kK + 1 - k;
      inside[r] = kAlongK ? (across > 0 ? 8 : 0) : clamp(across);
      inside_last[r] = across > 0 && along > 0 ? clamp(kAlongK ? along : across) : 0;
    }
  }
  __device__ __forceinline__ void copy_next(bf16* slice, bool last) {
    UNROLL for (int r = 0; r < kRuns; r++) {
      const int n = last ? inside_last[r] : inside[r];
      if constexpr (kPacks) copy_async<16>(slice + to[r], from[r], n * 2);
      else store_pack<8>(slice + to[r], load_run<8>(from[r], n, false));
      from[r] += step;
    }
  }
};

// c (m,n) = alpha a b + c * add, batch blockIdx.z; a block owns 128 x 128 of c, each of its 8 warps
// 64 x 32 as 4 strips. Reads a n / 128 and b m / 128 times; any m, n, k. kARuns, kBRuns: they run
// along k; kBytes of shared memory: for tests/sass.sh, which reads it in the name
template <class U, bool kARuns, bool kBRuns, bool kPacks, int kBytes>
__global__ void __launch_bounds__(kProductThreads, 2)
    matmul_tensor(Operand<bf16> a, Operand<bf16> b, Result<U> c, int m, int n, int k, float alpha) {
  extern __shared__ __align__(128) char shared[];
  bf16* slices = reinterpret_cast<bf16*>(shared);
  const int band = kBand * gridDim.x, id = blockIdx.y * gridDim.x + blockIdx.x,
            top = id / band * kBand, rest = gridDim.y - top, rows = rest < kBand ? rest : kBand,
            i0 = (top + id % band % rows) * kX, j0 = id % band / rows * kX,
            warp = threadIdx.x / kWarp, wi = warp / 4 * 64, wj = warp % 4 * 32,
            count = (k + kK - 1) / kK;
  Slices<kARuns, kPacks> from_a(a, i0, m, k);
  Slices<kBRuns, kPacks> from_b(b, j0, n, k);
  const auto copy_next = [&](int i, int buffer) {
    if (i < count) {
      bf16* slice = slices + buffer * 2 * kSlice;
      from_a.copy_next(slice, i == count - 1);
      from_b.copy_next(slice + kSlice, i == count - 1);
    }
    close_copies();
  };
  Strip<32> sum[4];
  UNROLL for (int i = 0; i < 4; i++) clear(sum[i]);

  for (int i = 0; i < kBuffers - 1; i++) copy_next(i, i);
  for (int first = 0; first < count; first += kBuffers) {
    UNROLL for (int buffer = 0; buffer < kBuffers; buffer++) {
      const int i = first + buffer;
      if (i >= count) break;
      wait_for_copies<kBuffers - 2>();
      // everyone's part of this slice has arrived, and nobody reads the one before it any more
      __syncthreads();
      copy_next(i + kBuffers - 1, (buffer + kBuffers - 1) % kBuffers);
      const bf16 *slice_a = slices + buffer * 2 * kSlice, *slice_b = slice_a + kSlice;
      UNROLL for (int kk = 0; kk < kK; kk += 16) {
        Right right[2];
        UNROLL for (int j = 0; j < 2; j++) right[j] = load_right<kBRuns>(
            [&](int x, int k) { return slice_b + place<kBRuns>(wj + j * 16 + x, kk + k); });
        UNROLL for (int s = 0; s < 4; s++) {
          const Left left = load_left<kARuns>(
              [&](int x, int k) { return slice_a + place<kARuns>(wi + s * 16 + x, kk + k); });
          UNROLL for (int j = 0; j < 2; j++) add(sum[s], j * 16, left, right[j]);
        }
      }
    }
  }

  UNROLL for (int s = 0; s < 4; s++) UNROLL for (int j = 0; j < 4; j++)
      UNROLL for (int e = 0; e < 4; e += 2) {
    const int row = i0 + wi + s * 16 + strip_row(e), column = j0 + wj + strip_column(j, 0);
    if (row < m) write_sums<2>(c, row, column, n, &sum[s].v[j][e], alpha);
  }
}

template <class U, bool kPacks> void launch_tensor(int64_t m, int64_t n, int64_t k, Operand<bf16> a,
                                                   Operand<bf16> b, Result<U> c, double alpha,
                                                   int64_t batch) {
  const dim3 grid(ceil_div(n, kX), ceil_div(m, kX), batch);
  const auto kernel = a.along_k   ? b.along_k ? matmul_tensor<U, true, true, kPacks, kTensorBytes>
                                              : matmul_tensor<U, true, false, kPacks, kTensorBytes>
                        : b.along_k ? matmul_tensor<U, false, true, kPacks, kTensorBytes>
                                  : matmul_tensor<U, false, false, kPacks, kTensorBytes>;
  allow_shared(kernel, kTensorBytes);
  kernel<<<grid, kProductThreads, kTensorBytes, device().compute>>>(a, b, c, m, n, k, float(alpha));
  LAUNCHED();
}
#endif

template <class T, class U> void own_matmul(int64_t m, int64_t n, int64_t k, const Matrix& a,
                                            const Matrix& b, const Matrix& c, double alpha,
                                            bool add, int64_t batch) {
  const Result<U> to{static_cast<U*>(c.data), c.ld, c.stride, aligned<U>(c), add};
#ifndef CPU_FAST
  if constexpr (std::is_same_v<T, bf16>) {
    const Operand<T> rows = rows_of<T>(a), columns = columns_of<T>(b);
    const auto launch =
        rows.packs && columns.packs ? launch_tensor<U, true> : launch_tensor<U, false>;
    launch(m, n, k, rows, columns, to, alpha, batch);
  } else
#endif
    launch_simt<T, U>(m, n, k, rows_of<T>(a), columns_of<T>(b), to, alpha, batch);
}

// ---- by cuBLAS

cudaDataType_t type_of(Dtype dtype) {
  return dtype == Dtype::f64 ? CUDA_R_64F : dtype == Dtype::f32 ? CUDA_R_32F : CUDA_R_16BF;
}

// cuBLAS counts in columns: to it our matrices are their transposes, and c^T = b^T a^T.
// CUBLAS_COMPUTE_32F allows no TF32.
void cublas_matmul(Dtype in, Dtype out, int64_t m, int64_t n, int64_t k, const Matrix& a,
                   const Matrix& b, const Matrix& c, double alpha, bool add, int64_t batch) {
  const bool f64 = in == Dtype::f64;
  const double beta = add;
  const float alpha32 = float(alpha), beta32 = add;
  const void *alpha_ = f64 ? static_cast<const void*>(&alpha) : &alpha32,
             *beta_ = f64 ? static_cast<const void*>(&beta) : &beta32;
  const auto op = [](const Matrix& x) { return x.transposed ? CUBLAS_OP_T : CUBLAS_OP_N; };
  const cublasComputeType_t compute = f64 ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F;
  const cudaDataType_t from = type_of(in), to = type_of(out);
  if (batch == 1)
    CUBLAS_CHECK(cublasGemmEx(device().blas, op(b), op(a), n, m, k, alpha_, b.data, from, b.ld,
                              a.data, from, a.ld, beta_, c.data, to, c.ld, compute,
                              CUBLAS_GEMM_DEFAULT));
  else
    CUBLAS_CHECK(cublasGemmStridedBatchedEx(device().blas, op(b), op(a), n, m, k, alpha_, b.data,
                                            from, b.ld, b.stride, a.data, from, a.ld, a.stride,
                                            beta_, c.data, to, c.ld, c.stride, batch, compute,
                                            CUBLAS_GEMM_DEFAULT));
}

}  // namespace

// ---- the one entry

void matmul(Dtype in, Dtype out, int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, Matrix c,
            double alpha, bool add, int64_t batch) {
  OP(sentence("matmul ", m, " x ", n, " x ", k), 0, 2.0 * double(m * n) * double(k * batch));
  ASSERT(in != Dtype::i32 && (in == out || (in == Dtype::bf16 && out == Dtype::f32)), name_of(in),
         " to ", name_of(out));
  ASSERT(m >= 0 && n >= 0 && k >= 0 && batch >= 0 && m <= INT_MAX && n <= INT_MAX && k <= INT_MAX,
         m, " x ", n, " x ", k, " x ", batch);
  ASSERT(a.ld >= (a.transposed ? m : k) && b.ld >= (b.transposed ? k : n) && c.ld >= n &&
             !c.transposed,
         "ld ", a.ld, ", ", b.ld, ", ", c.ld);
  ASSERT(a.ld <= INT_MAX && b.ld <= INT_MAX && c.ld <= INT_MAX);
  if (m == 0 || n == 0 || batch == 0) return;
  if (matmul_backend == MatmulBackend::cublas)
    return cublas_matmul(in, out, m, n, k, a, b, c, alpha, add, batch);
  REQUIRE(batch < 65536 && m <= 65535 * 64, "--matmul own multiplies at most 65535 matrices of ",
          65535 * 64, " rows, not ", batch, " of ", m,
          ": give --matmul cublas or a smaller --microbatch");
  DISPATCH(in, out == in ? own_matmul<T, T>(m, n, k, a, b, c, alpha, add, batch)
                         : own_matmul<T, acc_t<T>>(m, n, k, a, b, c, alpha, add, batch));
}
