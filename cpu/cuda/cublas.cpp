// cublas.cpp: the matrix products of cublas_v2.h on the CPU.
//
// idea      f32 by oneDNN. bf16 by oneDNN where the CPU has instructions for it, else widened to
//           f32 and rounded once at the end. f64, which oneDNN lacks, by packed tiles: each element
//           of c is summed in one order, whatever the number of threads and the shape of the rest.
//           Batches: a product a thread.
// order     oneDNN's last bits may change with the number of threads; f64's do not
// builds    against cublas_v2.h beside this file, and against NVIDIA's, where streams are taken to
//           be synchronous
// not here  complex numbers, integers, f16, f8; alpha and beta on the device
// test      tests/test_cpu.cpp
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <omp.h>
#include <oneapi/dnnl/dnnl.h>
#include <oneapi/dnnl/dnnl.hpp>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "host.h"

struct cublasContext {
  cudaStream_t stream = nullptr;
};

namespace {

using bf16 = __nv_bfloat16;
// multiply-adds: below this a product is done before a team of threads has woken
constexpr int64_t kWorthThreads = 1 << 15;

// c (m,n) = alpha * op(a) (m,k) op(b) (k,n) + beta * c, column-major, `batch` of them
struct Product {
  bool transpose_a, transpose_b;
  int64_t m, n, k;
  double alpha, beta;
  const void *a, *b;
  void* c;
  int64_t lda, ldb, ldc, stride_a, stride_b, stride_c;
  cudaDataType in, out;
  int64_t batch;
};

// Scratch memory of this thread; `slot` tells apart what is needed at the same time.
template <class T> T* scratch(int slot, int64_t count) {
  struct Free {
    void operator()(void* p) const { free(p); }
  };
  static thread_local std::unique_ptr<void, Free> memory[3];
  static thread_local int64_t held[3];
  const int64_t bytes = (count * int64_t(sizeof(T)) + 4095) / 4096 * 4096;
  if (bytes > held[slot]) {
    memory[slot].reset(cpu::host_memory(size_t(bytes)));
    held[slot] = bytes;
  }
  return static_cast<T*>(memory[slot].get());
}

// ---- f32

bool product_f32(const Product& p, const float* a, int64_t lda, const float* b, int64_t ldb,
                 float beta, float* c, int64_t ldc) {
  // oneDNN is row-major: c^T = op(b)^T op(a)^T, and the transpose of a column-major matrix is a
  // row-major one
  const auto letter = [](bool transpose) { return transpose ? 'T' : 'N'; };
  return dnnl_sgemm(letter(p.transpose_b), letter(p.transpose_a), p.n, p.m, p.k, float(p.alpha), b,
                    ldb, a, lda, beta, c, ldc) == dnnl_success;
}

// ---- bf16

// to (rows,columns), dense, from columns `ld` apart
void widen(float* to, const bf16* from, int64_t rows, int64_t columns, int64_t ld) {
#pragma omp parallel for schedule(static) if (rows * columns > 1 << 16)
  for (int64_t j = 0; j < columns; j++)
    for (int64_t i = 0; i < rows; i++) to[j * rows + i] = float(from[j * ld + i]);
}

// CPUs with instructions for products of bf16 (AVX-512 BF16; those with AMX have them, too).
bool cpu_has_bf16() {
#ifdef __x86_64__
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has;
#else
  return false;
#endif
}

// The whole batch by oneDNN's matmul, row-major as above. False: oneDNN does not want it.
bool products_by_matmul(const Product& p, dnnl::memory::data_type in, dnnl::memory::data_type out) {
  using namespace dnnl;
  try {
    static thread_local engine cpu_engine(engine::kind::cpu, 0);
    static thread_local dnnl::stream cpu_stream(cpu_engine);
    const auto strides = [](int64_t batch, int64_t ld, bool transpose) {
      return transpose ? memory::dims{batch, 1, ld} : memory::dims{batch, ld, 1};
    };
    // A single product has no stride, and oneDNN takes its slowest path where a batch's is 0: any
    // other number serves.
    const auto apart = [&](int64_t stride, int64_t ld, int64_t columns) {
      return p.batch > 1 ? stride : ld * columns;
    };
    const memory::desc b({p.batch, p.n, p.k}, in,
                         strides(apart(p.stride_b, p.ldb, p.transpose_b ? p.k : p.n), p.ldb,
                                 p.transpose_b));
    const memory::desc a({p.batch, p.k, p.m}, in,
                         strides(apart(p.stride_a, p.lda, p.transpose_a ? p.m : p.k), p.lda,
                                 p.transpose_a));
    const memory::desc c({p.batch, p.n, p.m}, out,
                         strides(apart(p.stride_c, p.ldc, p.n), p.ldc, false));
    post_ops after;
    primitive_attr attributes;
#if DNNL_VERSION_MAJOR >= 3
    if (p.alpha != 1) after.append_eltwise(algorithm::eltwise_linear, float(p.alpha), 0);
    if (p.beta != 0) after.append_sum(float(p.beta));
    attributes.set_post_ops(after);
    const matmul::primitive_desc description(cpu_engine, b, a, c, attributes);
#else
    if (p.alpha != 1) after.append_eltwise(1, algorithm::eltwise_linear, float(p.alpha), 0);
    if (p.beta != 0) after.append_sum(float(p.beta));
    attributes.set_post_ops(after);
    const matmul::primitive_desc description(matmul::desc(b, a, c), attributes, cpu_engine);
#endif
    matmul(description)
        .execute(cpu_stream, {{DNNL_ARG_SRC, memory(b, cpu_engine, const_cast<void*>(p.b))},
                              {DNNL_ARG_WEIGHTS, memory(a, cpu_engine, const_cast<void*>(p.a))},
                              {DNNL_ARG_DST, memory(c, cpu_engine, p.c)}});
    cpu_stream.wait();
    return true;
  } catch (const dnnl::error&) {
    return false;
  }
}

bool product_bf16_widened(const Product& p) {
  const int64_t rows_a = p.transpose_a ? p.k : p.m, rows_b = p.transpose_b ? p.n : p.k;
  float* a = scratch<float>(0, p.m * p.k);
  float* b = scratch<float>(1, p.k * p.n);
  widen(a, static_cast<const bf16*>(p.a), rows_a, p.m * p.k / rows_a, p.lda);
  widen(b, static_cast<const bf16*>(p.b), rows_b, p.k * p.n / rows_b, p.ldb);
  if (p.out == CUDA_R_32F)
    return product_f32(p, a, rows_a, b, rows_b, float(p.beta), static_cast<float*>(p.c), p.ldc);

  float* c = scratch<float>(2, p.m * p.n);
  bf16* out = static_cast<bf16*>(p.c);
  if (p.beta != 0) widen(c, out, p.m, p.n, p.ldc);
  if (!product_f32(p, a, rows_a, b, rows_b, float(p.beta), c, p.m)) return false;
#pragma omp parallel for schedule(static) if (p.m * p.n > 1 << 16)
  for (int64_t j = 0; j < p.n; j++)
    for (int64_t i = 0; i < p.m; i++) out[j * p.ldc + i] = bf16(c[j * p.m + i]);
  return true;
}

// ---- f64
// c is cut into tiles of kRows x kColumns that stay in registers; a and b are packed into panels of
// that width, padded with zeros.

constexpr int64_t kLanes = 4, kRows = 2 * kLanes, kColumns = 6;
constexpr int64_t kDepth = 256;  // panels of this much of k stay in the caches
constexpr int64_t kBlockRows = 96, kBlockColumns = 768;  // of c, for one packed piece of a and b
using Vector = double __attribute__((vector_size(kLanes * sizeof(double))));

// Panels of `width` rows of op(x) (rows,depth), each stored depth-first
template <int64_t width> void pack(double* to, const double* x, int64_t stride_row,
                                   int64_t stride_depth, int64_t rows, int64_t depth) {
  for (int64_t first = 0; first < rows; first += width) {
    const double* from = x + first * stride_row;
    const int64_t here = std::min(width, rows - first);
    for (int64_t l = 0; l < depth; l++, to += width, from += stride_depth) {
      if (here == width)
        for (int64_t i = 0; i < width; i++) to[i] = from[i * stride_row];
      else
        for (int64_t i = 0; i < width; i++) to[i] = i < here ? from[i * stride_row] : 0;
    }
  }
}

// c (rows,columns) = alpha * panel a * panel b + beta * c
void tile(const double* a, const double* b, int64_t depth, double alpha, double beta, double* c,
          int64_t ldc, int64_t rows, int64_t columns) {
  Vector upper[kColumns] = {}, lower[kColumns] = {};  // registers
  for (int64_t l = 0; l < depth; l++, a += kRows, b += kColumns) {
    const Vector a0 = *reinterpret_cast<const Vector*>(a),
                 a1 = *reinterpret_cast<const Vector*>(a + kLanes);
#pragma GCC unroll 6
    for (int64_t j = 0; j < kColumns; j++) {
      upper[j] += a0 * b[j];
      lower[j] += a1 * b[j];
    }
  }
  for (int64_t j = 0; j < columns; j++)
    for (int64_t i = 0; i < rows; i++) {
      double& to = c[j * ldc + i];
      const double sum = i < kLanes ? upper[j][i] : lower[j][i - kLanes];
      to = beta == 0 ? alpha * sum : alpha * sum + beta * to;
    }
}

// Rows [i0, i1) and columns [j0, j1) of c.
void product_f64(const Product& p, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  const double *a = static_cast<const double*>(p.a), *b = static_cast<const double*>(p.b);
  double* c = static_cast<double*>(p.c);
  const int64_t a_row = p.transpose_a ? p.lda : 1, a_depth = p.transpose_a ? 1 : p.lda;
  const int64_t b_column = p.transpose_b ? 1 : p.ldb, b_depth = p.transpose_b ? p.ldb : 1;
  double* packed_a = scratch<double>(0, kBlockRows * kDepth);
  double* packed_b = scratch<double>(1, kBlockColumns * kDepth);
  for (int64_t j = j0; j < j1; j += kBlockColumns)
    for (int64_t l = 0; l < p.k; l += kDepth) {
      const int64_t columns = std::min(kBlockColumns, j1 - j), depth = std::min(kDepth, p.k - l);
      pack<kColumns>(packed_b, b + j * b_column + l * b_depth, b_column, b_depth, columns, depth);
      for (int64_t i = i0; i < i1; i += kBlockRows) {
        const int64_t rows = std::min(kBlockRows, i1 - i);
        pack<kRows>(packed_a, a + i * a_row + l * a_depth, a_row, a_depth, rows, depth);
        for (int64_t jj = 0; jj < columns; jj += kColumns)
          for (int64_t ii = 0; ii < rows; ii += kRows)
            tile(packed_a + ii * depth, packed_b + jj * depth, depth, p.alpha, l == 0 ? p.beta : 1,
                 c + (j + jj) * p.ldc + i + ii, p.ldc, std::min(kRows, rows - ii),
                 std::min(kColumns, columns - jj));
      }
    }
}

// The longer side of c is divided between the threads, at multiples of a tile.
bool product_f64(const Product& p, bool parallel) {
  const bool by_rows = p.m > p.n;
  const int64_t step = by_rows ? kRows : kColumns,
                steps = ((by_rows ? p.m : p.n) + step - 1) / step;
#pragma omp parallel if (parallel && p.m * p.n * p.k > kWorthThreads)
  {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const int64_t begin = steps * thread / threads * step,
                  end = steps * (thread + 1) / threads * step;
    if (by_rows) product_f64(p, begin, std::min(end, p.m), 0, p.n);
    else product_f64(p, 0, p.m, begin, std::min(end, p.n));
  }
  return true;
}

// ---- one product, a batch, cuBLAS's entry points

// k = 0: c = beta * c
template <class T> void scale(const Product& p) {
  T* c = static_cast<T*>(p.c);
  for (int64_t j = 0; j < p.n; j++)
    for (int64_t i = 0; i < p.m; i++)
      c[j * p.ldc + i] = T(p.beta == 0 ? 0 : p.beta * double(c[j * p.ldc + i]));
}

bool product(const Product& p, bool parallel) {
  if (p.k == 0) {
    if (p.out == CUDA_R_64F) scale<double>(p);
    else if (p.out == CUDA_R_32F) scale<float>(p);
    else scale<bf16>(p);
    return true;
  }
  if (p.in == CUDA_R_64F) return product_f64(p, parallel);
  if (p.in == CUDA_R_16BF) return product_bf16_widened(p);
  return product_f32(p, static_cast<const float*>(p.a), p.lda, static_cast<const float*>(p.b),
                     p.ldb, float(p.beta), static_cast<float*>(p.c), p.ldc);
}

int64_t bytes_of(cudaDataType type) { return type == CUDA_R_64F ? 8 : type == CUDA_R_32F ? 4 : 2; }

bool products(const Product& all) {
  cpu::settle_team();
  static const bool exact = dnnl_set_default_fpmath_mode(dnnl_fpmath_mode_strict) == dnnl_success;
  if (!exact) return false;
  // oneDNN 3.7.2 gets a strided vector wrong
  const bool strided = all.n == 1 && all.transpose_b && all.ldb > 1;
  if (all.in == CUDA_R_16BF && all.k > 0 && !strided && cpu_has_bf16()) {
    const auto out =
        all.out == CUDA_R_32F ? dnnl::memory::data_type::f32 : dnnl::memory::data_type::bf16;
    if (products_by_matmul(all, dnnl::memory::data_type::bf16, out)) return true;
  }
  const auto one = [&all](int64_t index, bool parallel) {
    Product p = all;
    p.a = static_cast<const char*>(all.a) + index * all.stride_a * bytes_of(all.in);
    p.b = static_cast<const char*>(all.b) + index * all.stride_b * bytes_of(all.in);
    p.c = static_cast<char*>(all.c) + index * all.stride_c * bytes_of(all.out);
    return product(p, parallel);
  };
  bool ok = true;
  if (all.batch >= omp_get_max_threads() && all.batch > 1) {
    const bool parallel = all.batch * all.m * all.n * all.k > kWorthThreads;
#pragma omp parallel for schedule(static) reduction(&& : ok) if (parallel)
    for (int64_t i = 0; i < all.batch; i++) ok = one(i, false) && ok;
  } else {
    for (int64_t i = 0; i < all.batch; i++) ok = one(i, true) && ok;
  }
  return ok;
}

cublasStatus_t check(const Product& p, cudaDataType b_type, cublasComputeType_t compute) {
  if (p.m < 0 || p.n < 0 || p.k < 0 || p.batch < 0) return CUBLAS_STATUS_INVALID_VALUE;
  const int64_t rows_a = p.transpose_a ? p.k : p.m, rows_b = p.transpose_b ? p.n : p.k;
  if (p.lda < std::max<int64_t>(1, rows_a) || p.ldb < std::max<int64_t>(1, rows_b) ||
      p.ldc < std::max<int64_t>(1, p.m))
    return CUBLAS_STATUS_INVALID_VALUE;
  const bool f64 = compute == CUBLAS_COMPUTE_64F;
  const bool known = p.in == CUDA_R_64F    ? f64 && p.out == CUDA_R_64F
                     : p.in == CUDA_R_32F  ? !f64 && p.out == CUDA_R_32F
                     : p.in == CUDA_R_16BF ? !f64 && (p.out == CUDA_R_32F || p.out == CUDA_R_16BF)
                                           : false;
  if (p.k == 0 && p.out == CUDA_R_16BF && p.beta != 0 && p.beta != 1)  // scale() lacks it
    return CUBLAS_STATUS_NOT_SUPPORTED;
  return known && b_type == p.in ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}

}  // namespace

cublasStatus_t cublasCreate(cublasHandle_t* handle) {
  return *handle = new cublasContext, CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasDestroy(cublasHandle_t handle) { return delete handle, CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetStream(cublasHandle_t handle, cudaStream_t stream) {
  return handle->stream = stream, CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t op_a,
                                          cublasOperation_t op_b, int m, int n, int k,
                                          const void* alpha, const void* a, cudaDataType a_type,
                                          int lda, long long stride_a, const void* b,
                                          cudaDataType b_type, int ldb, long long stride_b,
                                          const void* beta, void* c, cudaDataType c_type, int ldc,
                                          long long stride_c, int batch,
                                          cublasComputeType_t compute, cublasGemmAlgo_t) {
  const auto number = [&](const void* x) {
    return a_type == CUDA_R_64F ? *static_cast<const double*>(x) : *static_cast<const float*>(x);
  };
  const Product p{op_a != CUBLAS_OP_N,
                  op_b != CUBLAS_OP_N,
                  m,
                  n,
                  k,
                  number(alpha),
                  number(beta),
                  a,
                  b,
                  c,
                  lda,
                  ldb,
                  ldc,
                  stride_a,
                  stride_b,
                  stride_c,
                  a_type,
                  c_type,
                  batch};
  if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
  const cublasStatus_t status = check(p, b_type, compute);
  if (status != CUBLAS_STATUS_SUCCESS || m == 0 || n == 0 || batch == 0) return status;
#if defined(CPU_FAST) || defined(CPU_FAITHFUL)
  if (!cpu::is_stream(handle->stream)) return CUBLAS_STATUS_EXECUTION_FAILED;
  bool ok = true;
  if (!cpu::streams_are_queued) ok = products(p);
  else
    cpu::enqueue(handle->stream, [p] {
      if (products(p)) return;
      fputs("oneDNN has refused a product that was queued\n", stderr);
      _exit(1);
    });
  return ok ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
#else
  return products(p) ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
#endif
}

cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t op_a, cublasOperation_t op_b,
                            int m, int n, int k, const void* alpha, const void* a,
                            cudaDataType a_type, int lda, const void* b, cudaDataType b_type,
                            int ldb, const void* beta, void* c, cudaDataType c_type, int ldc,
                            cublasComputeType_t compute, cublasGemmAlgo_t algorithm) {
  return cublasGemmStridedBatchedEx(handle, op_a, op_b, m, n, k, alpha, a, a_type, lda, 0, b,
                                    b_type, ldb, 0, beta, c, c_type, ldc, 0, 1, compute, algorithm);
}
