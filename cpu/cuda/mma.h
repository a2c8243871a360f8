// mma.h: tensor cores (nvcuda::wmma, 16 x 16 x 16, bf16 with float sums) for the FAITHFUL form.
//
// Elements of a fragment are spread over the lanes of a warp as on sm_80, so a kernel that scales
// its accumulators element by element, or wrongly takes them for a matrix, behaves as on the GPU.
// Misaligned pointers and leading dims are reported.
// test      tests/test_cpu.cpp
#pragma once
#include <cuda_bf16.h>

#ifndef CPU_FAITHFUL
#error "tensor cores have no FAST form: leave such kernels out with #ifndef CPU_FAST"
#endif

namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int m, int n, int k, class T, class Layout = void> struct fragment {
  static_assert(m == 16 && n == 16 && k == 16, "this stand-in has one shape");
  enum : int { num_elements = 8 };
  T x[num_elements];
};
template <class T, class Layout = void> using Accumulator =
    fragment<accumulator, 16, 16, 16, T, Layout>;
template <class Layout> using A = fragment<matrix_a, 16, 16, 16, __nv_bfloat16, Layout>;
template <class Layout> using B = fragment<matrix_b, 16, 16, 16, __nv_bfloat16, Layout>;

namespace detail {
using cpu::Site;

// Where element e of this lane's fragment lies in the 16 x 16 matrix; of b, in its transpose.
inline int row(int e) { return cpu::lane_index() / 4 + 8 * (e / 2 % 2); }
inline int column(int e) { return cpu::lane_index() % 4 * 2 + e % 2 + 8 * (e / 4); }

struct TensorCore {
  float a[16][16], b_transposed[16][16];
};
inline TensorCore tensor_core[32];  // one for each warp of a block

template <class T> void check(const T* p, unsigned ld, Site site) {
  if (reinterpret_cast<uintptr_t>(p) % 32)
    cpu::report("a matrix that is not aligned to 32 bytes", site);
  if (ld * sizeof(T) % 16) cpu::report("a leading dim that is not a multiple of 16 bytes", site);
  cpu::exchange_in_warp(~0u, 0, site);
}
template <class T, class From>
void load(T* x, const From* p, unsigned ld, bool by_rows, Site site) {
  check(p, ld, site);
  for (int e = 0; e < 8; e++)
    x[e] = by_rows ? p[row(e) * ld + column(e)] : p[column(e) * ld + row(e)];
}
}  // namespace detail

template <class Layout>
void load_matrix_sync(A<Layout>& a, const __nv_bfloat16* p, unsigned ld, CPU_PLACE) {
  detail::load(a.x, p, ld, std::is_same_v<Layout, row_major>, {"load_matrix_sync", file, line});
}
template <class Layout>
void load_matrix_sync(B<Layout>& b, const __nv_bfloat16* p, unsigned ld, CPU_PLACE) {
  detail::load(b.x, p, ld, std::is_same_v<Layout, col_major>, {"load_matrix_sync", file, line});
}
inline void load_matrix_sync(Accumulator<float>& c, const float* p, unsigned ld, layout_t layout,
                             CPU_PLACE) {
  detail::load(c.x, p, ld, layout == mem_row_major, {"load_matrix_sync", file, line});
}
inline void store_matrix_sync(float* p, const Accumulator<float>& c, unsigned ld, layout_t layout,
                              CPU_PLACE) {
  detail::check(p, ld, {"store_matrix_sync", file, line});
  for (int e = 0; e < 8; e++) {
    const int i = detail::row(e), j = detail::column(e);
    p[layout == mem_row_major ? i * ld + j : j * ld + i] = c.x[e];
  }
}
template <class Use, class T, class Layout, class Value>
void fill_fragment(fragment<Use, 16, 16, 16, T, Layout>& f, const Value& value) {
  for (T& x : f.x) x = T(value);
}

// d = a b + c; d may be c
template <class LayoutA, class LayoutB> void mma_sync(Accumulator<float>& d, const A<LayoutA>& a,
                                                      const B<LayoutB>& b,
                                                      const Accumulator<float>& c, CPU_PLACE) {
  auto& [rows, columns] = detail::tensor_core[cpu::warp_index()];
  for (int e = 0; e < 8; e++) {
    rows[detail::row(e)][detail::column(e)] = float(a.x[e]);
    columns[detail::row(e)][detail::column(e)] = float(b.x[e]);
  }
  cpu::exchange_in_warp(~0u, 0, {"mma_sync", file, line});  // all lanes have put their elements
  for (int e = 0; e < 8; e++) {
    float sum = c.x[e];
    for (int k = 0; k < 16; k++) sum += rows[detail::row(e)][k] * columns[detail::column(e)][k];
    d.x[e] = sum;
  }
  cpu::exchange_in_warp(~0u, 0, {"mma_sync", file, line});  // all have read them
}

}  // namespace nvcuda::wmma
