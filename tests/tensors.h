// tensors.h: what tests of kernels share: rounding, random tensors, the distance between two
// results, every order of threads.
#pragma once
#include <algorithm>
#include <limits>
#include <random>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "tensor.h"
#include "tests/test.h"

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// x rounded to the nearest value of `dtype`, ties to even; to bf16 through f32, as the kernels do
inline double rounded(double x, Dtype dtype) {
  if (dtype == Dtype::f64 || dtype == Dtype::i32) return x;
  const float f = float(x);
  if (dtype == Dtype::f32) return f;
  uint32_t bits;
  memcpy(&bits, &f, 4);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  float b;
  memcpy(&b, &bits, 4);
  return b;
}

// rounded to dtype
inline Tensor tensor_of(const std::vector<double>& values, Shape shape, Dtype dtype) {
  Tensor wide(shape, Dtype::f64, Memory::data), t(shape, dtype, Memory::data);
  upload(wide, values.data());
  cast(t, wide);
  return t;
}

inline Tensor random_tensor(Shape shape, Dtype dtype, unsigned seed, double deviation = 1) {
  std::mt19937 bits(seed);
  std::normal_distribution<double> normal(0, deviation);
  std::vector<double> values(elements(shape));
  for (double& v : values) v = normal(bits);
  return tensor_of(values, shape, dtype);
}

// The largest difference over the largest magnitude of `expected`; infinite where something is NaN.
inline double relative_difference(const std::vector<double>& got,
                                  const std::vector<double>& expected) {
  CHECK_EQ(got.size(), expected.size());
  double difference = 0, magnitude = 0;
  for (size_t i = 0; i < got.size(); i++) {
    difference = worst_of(difference, std::abs(got[i] - expected[i]));
    magnitude = std::max(magnitude, std::abs(expected[i]));
  }
  return difference == 0 ? 0 : difference / magnitude;
}

// FAITHFUL: the body runs with threads in forward, reverse and two random orders, and returns the
// same bits in each. FAST: with one and with two OpenMP threads. On a GPU: twice. `body` returns
// downloaded results.
template <class Body> std::vector<double> in_every_order(Body body) {
  std::vector<std::vector<double>> results;
#if defined(CPU_FAITHFUL)
  for (auto [order, seed] : {std::pair(cpu::Order::forward, 1),
                             {cpu::Order::reverse, 1},
                             {cpu::Order::random, 1},
                             {cpu::Order::random, 2}}) {
    cpu::run_in_order(order, seed);
    results.push_back(body());
  }
  cpu::run_in_order(cpu::Order::forward);
#elif defined(CPU_FAST)
  const int threads = omp_get_max_threads();
  // a launch gets a team of threads only when it has run a few times
  for (int n : {1, 2, 2, 2, 2}) {
    omp_set_num_threads(n);
    results.push_back(body());
  }
  omp_set_num_threads(threads);
#else
  for (int i = 0; i < 2; i++) results.push_back(body());
#endif
  for (const auto& r : results)
    for (size_t i = 0; i < r.size(); i++)
      CHECK(!memcmp(&r[i], &results[0][i], sizeof(double)), "element ", i, " is ", r[i],
            " in one order of threads and ", results[0][i], " in another");
  return results[0];
}
