// fill_random.cu: initial weights.
// idea      kernels.h: the value of an element depends on its number in the whole parameter alone,
//           so a rank makes its own and asks nobody
// cost      the bytes of x
// test      tests/test_tensor.cpp
#include "kernels/tiles.cuh"
#include "support/philox.h"

namespace {

constexpr int kThreads = block_threads(256);

// x (n), the elements of (outer, end - begin, inner) from `start` on: element g of the whole
// parameter has the value that (seed, parameter, g) gives
template <class T> __global__ void __launch_bounds__(256)
    random_kernel(T* __restrict__ x, uint64_t seed, uint32_t parameter, float scale, Slice s,
                  int64_t start, int64_t n) {
  const int64_t width = (s.end - s.begin) * s.inner;
  for_tile<kThreads, 1>(n, [=](int64_t i, auto) {
    const int64_t own = start + i,
                  g = own / width * s.split * s.inner + s.begin * s.inner + own % width;
    const Philox4 r = philox(g, g >> 32, parameter, 0, seed, seed >> 32);
    int sum = 0;
    for (int k = 0; k < 4; k++) sum += int(r.v[k] & 0xffff) + int(r.v[k] >> 16);
    // eight halves of mean 0xffff / 2
    x[i] = store<T>(static_cast<acc_t<T>>(float(sum - 4 * 0xffff) * scale));
  });
}

}  // namespace

void fill_random(const Tensor& x, uint64_t seed, uint32_t parameter, float deviation,
                 const Slice& slice, int64_t first) {
  OP("fill_random", bytes_of(x));
  const int64_t n = x.numel();
  ASSERT(first + n <= slice.outer * (slice.end - slice.begin) * slice.inner);
  if (!n) return;
  // the deviation of a sum of eight uniform 16-bit integers
  const float scale = deviation / sqrtf(8 * 65536.0f * 65536.0f / 12);
  DISPATCH(x.dtype(), random_kernel<T><<<tiles(n), kThreads, 0, device().compute>>>(
                          x.data<T>(), seed, parameter, scale, slice, first, n));
}
