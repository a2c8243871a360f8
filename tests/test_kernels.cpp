// test_kernels.cpp: layernorm, elementwise, embedding, cross-entropy and AdamW kernels against
// plain loops in double precision.
//
// inputs    numbers that the dtype holds exactly, so that the reference sees what the kernel sees;
//           parts of tensors at even and odd addresses, with guards before and after them that
//           must survive
// measure   largest difference / largest magnitude of that output in the reference
// bounds    f64 1e-13: some hundred roundings of 1e-16; f32 2e-6: some tens of 6e-8; bf16: the f32
//           bound plus 2^-8, the rounding of the result to 8 bits (half of the last, which is 2^-7
//           of a number just above a power of 2). Sums in f64 of any dtype: the f64 bound.
// orders    FAITHFUL: each case runs with the threads in forward, reverse and random order. FAST:
//           large cases with 1 and 2 OpenMP threads give the same bits.
#include <algorithm>
#include <cstdint>
#include <deque>
#include <map>
#include <tuple>
#ifdef CPU_FAST
#include <omp.h>
#endif

#include "optimizer.h"
#include "tests/tensors.h"

using Values = std::vector<double>;

// ---- numbers

static uint64_t state;
static uint32_t next() {  // splitmix64
  uint64_t z = state += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return uint32_t((z ^ (z >> 31)) >> 32);
}
// evenly between center - scale and center + scale
static Values numbers(int64_t n, Dtype dtype, double scale = 1, double center = 0) {
  Values v(n);
  for (double& x : v) x = rounded(center + scale * (next() / 2147483648.0 - 1), dtype);
  return v;
}
static Values tokens_below(int64_t n, int64_t V) {
  Values v(n);
  for (double& x : v) x = next() % V;
  return v;
}

// ---- arrays on the device: values between guards, at addresses that the case chooses

// Where the arrays of a case begin: all at multiples of 256 bytes; each some elements after one;
// all but one. (A kernel that looks at the alignment of all its arguments but one fails in the
// last.)
enum class Addresses { aligned, odd, one_odd };
static Addresses addresses;
static int64_t cases, arrays;  // cases so far; arrays of this case so far
static int64_t elements_behind_boundary() {
  const int64_t j = arrays++;
  return addresses == Addresses::aligned ? 0
         : addresses == Addresses::odd   ? 1 + j % 16
                                         : j == cases % 8;
}

struct Array {
  Tensor whole, tensor;
  Dtype dtype;
  static constexpr int64_t kGuard = 64;
  static constexpr double kSentinel = 77;

  Array(const Values& v, Dtype dtype) : dtype(dtype) {
    const int64_t n = int64_t(v.size()), first = kGuard + elements_behind_boundary();
    Values all(first + n + kGuard, kSentinel);
    std::copy(v.begin(), v.end(), all.begin() + first);
    whole = Tensor({int64_t(all.size())}, dtype, Memory::data);
    if (dtype == Dtype::i32) {
      const std::vector<int> ints(all.begin(), all.end());
      upload(whole, ints.data());
      synchronize();
    } else {
      const Tensor exact({int64_t(all.size())}, Dtype::f64, Memory::data);
      upload(exact, all.data());
      cast(whole, exact);
      synchronize();
    }
    tensor = whole.view(first, {n});
  }
  static Array blank(int64_t n, Dtype dtype) { return Array(Values(n, kSentinel), dtype); }
  Array& shaped(Shape shape) {
    tensor = tensor.view(0, std::move(shape));
    return *this;
  }

  operator const Tensor&() const { return tensor; }
  Values values() const {
    const Values all = download(whole);
    const int64_t n = tensor.numel(),
                  first = (static_cast<char*>(tensor.raw()) - static_cast<char*>(whole.raw())) /
                          int64_t(size_of(dtype));
    for (int64_t i = 0; i < int64_t(all.size()); i++)
      if (i < first || i >= first + n)
        CHECK_EQ(all[i], kSentinel, "element ", i - first, " of ", n, " was written");
    return Values(all.begin() + first, all.begin() + first + n);
  }
};

// ---- cases

struct Expected {
  std::string name;
  Values values;
  double bound;
};

static double bound(Dtype dtype) {
  return dtype == Dtype::f64 ? 1e-13 : dtype == Dtype::f32 ? 2e-6 : 2e-6 + std::ldexp(1, -8);
}

static std::map<std::string, double> worst;  // of this test, by dtype

static double difference(const Values& a, const Values& b) {
  CHECK_EQ(a.size(), b.size());
  double largest = 0, d = 0;
  for (size_t i = 0; i < a.size(); i++) {
    largest = std::max(largest, std::abs(b[i]));
    d = worst_of(d, std::abs(a[i] - b[i]));
  }
  return largest > 0 ? d / largest : d;
}

// `run` makes its arrays, launches and returns the outputs; it runs in every order of threads that
// this build knows.
using Outputs = std::vector<Values>;
using Run = std::function<Outputs()>;

static void compare(const std::string& what, Dtype dtype, const Outputs& outputs,
                    const std::vector<Expected>& expected) {
  CHECK_EQ(outputs.size(), expected.size(), what);
  for (size_t i = 0; i < expected.size(); i++) {
    const double d = difference(outputs[i], expected[i].values);
    CHECK_LE(d, expected[i].bound, what, ": ", expected[i].name);
    double& w = worst[name_of(dtype)];
    w = std::max(w, d);
  }
}

static Outputs run_once(const Run& run) {
  arrays = 0;
  return run();  // braces make the arrays in the order in which they are written
}

static void verify(const std::string& what, Dtype dtype, const Run& run,
                   const std::vector<Expected>& expected) {
  const std::string where = sentence(what, ", ", name_of(dtype), ", addresses ", int(addresses));
  cases++;
#ifdef CPU_FAITHFUL
  const std::pair<cpu::Order, uint64_t> orders[] = {{cpu::Order::forward, 1},
                                                    {cpu::Order::reverse, 1},
                                                    {cpu::Order::random, uint64_t(2 * cases)},
                                                    {cpu::Order::random, uint64_t(2 * cases + 1)}};
  for (const auto& [order, seed] : orders) {
    cpu::run_in_order(order, seed);
    compare(sentence(where, ", order ", int(order), " seed ", seed), dtype, run_once(run),
            expected);
  }
  cpu::run_in_order(cpu::Order::forward);
#else
  compare(where, dtype, run_once(run), expected);
#endif
}

static void report() {
  const char* comma = "";
  measured("max|d|/max|y| = ");
  for (const auto& [dtype, d] : worst) {
    char text[40];
    snprintf(text, sizeof text, "%s%s %.1e", comma, dtype.c_str(), d);
    measured(text);
    comma = ", ";
  }
}

// Calls f() for every kind of address.
template <class F> static void for_addresses(F f) {
  for (Addresses a : {Addresses::aligned, Addresses::odd, Addresses::one_odd}) {
    addresses = a;
    f();
  }
  addresses = Addresses::aligned;
}

// Calls f(dtype) for every dtype and every kind of address.
template <class F> static void for_dtypes(F f) {
  worst.clear();
  state = 1;
  for (Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f64}) for_addresses([&] { f(dtype); });
  report();
}

static const std::vector<int64_t> kWidths = {1, 31, 33, 128, 1000};

// ---- elementwise

static double gelu(double x) {
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}
static double gelu_slope(double x) {
  const double t = std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x));
  return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * std::sqrt(2 / M_PI) * (1 + 3 * 0.044715 * x * x);
}

static const std::vector<int64_t> kSizes = {1, 7, 4096, 4099, 9001};  // around a tile of 4096

TEST(add_is_the_sum) {
  for_dtypes([](Dtype dtype) {
    for (int64_t n : kSizes) {
      const Values a = numbers(n, dtype), b = numbers(n, dtype, 3);
      Values y(n);
      for (int64_t i = 0; i < n; i++) y[i] = a[i] + b[i];
      verify("add", dtype,
             [&] {
               const Array A(a, dtype), B(b, dtype), Y = Array::blank(n, dtype);
               add(Y, A, B);
               add(A, A, B);  // in place
               return Outputs{Y.values(), A.values()};
             },
             {{"y", y, bound(dtype)}, {"y in place", y, bound(dtype)}});
    }
  });
}

TEST(gelu_forward_is_the_tanh_form_and_backward_its_derivative) {
  for_dtypes([](Dtype dtype) {
    for (int64_t n : kSizes) {
      Values x = numbers(n, dtype, 6), dy = numbers(n, dtype), y(n), dx(n);
      // far out, too: exp must not overflow
      for (int64_t i = 0; i < n; i += 9) x[i] = rounded(x[i] * 20, dtype);
      for (int64_t i = 0; i < n; i++) y[i] = gelu(x[i]), dx[i] = dy[i] * gelu_slope(x[i]);
      verify("gelu", dtype,
             [&] {
               const Array X(x, dtype), DY(dy, dtype), Y = Array::blank(n, dtype),
                                                       DX = Array::blank(n, dtype);
               gelu_forward(Y, X);
               gelu_backward(DX, DY, X);
               gelu_backward(DY, DY, X);  // in place
               return Outputs{Y.values(), DX.values(), DY.values()};
             },
             {{"y", y, bound(dtype)}, {"dx", dx, bound(dtype)}, {"dx in place", dx, bound(dtype)}});
    }
  });
}

// 1 + tanh would lose them: each value by itself, not beside the largest
TEST(gelu_of_large_negative_numbers_keeps_its_digits) {
  const Values x = numbers(1000, Dtype::f32, 2, -3);
  const Array X(x, Dtype::f32), Y = Array::blank(1000, Dtype::f32);
  gelu_forward(Y, X);
  const Values y = Y.values();
  double d = 0;
  for (size_t i = 0; i < x.size(); i++) {
    const double u = std::sqrt(2 / M_PI) * (x[i] + 0.044715 * x[i] * x[i] * x[i]),
                 exact = x[i] / (1 + std::exp(-2 * u));
    d = worst_of(d, std::abs(y[i] / exact - 1));
  }
  // 2u is at most 17 there and off by a few units of 6e-8 * 17, which exp turns into a relative
  // error
  CHECK_LE(d, 5e-6);
  measured("max|d|/|y| = ", d, " for x from -5 to -1");
}

// Neither exp nor x^3 may overflow: each value by itself.
TEST(gelu_far_out_is_0_or_x_and_its_slope_0_or_1) {
  for (Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f64}) {
    Values x;
    for (double far : {10., 30., 1e9, 2e13, 1e26})
      for (double sign : {1., -1.}) x.push_back(rounded(sign * far, dtype));
    const int64_t n = int64_t(x.size());
    const Array X(x, dtype), ONES(Values(n, 1), dtype), Y = Array::blank(n, dtype),
                                                        DX = Array::blank(n, dtype);
    gelu_forward(Y, X);
    gelu_backward(DX, ONES, X);
    const Values y = Y.values(), dx = DX.values();
    for (int64_t i = 0; i < n; i++) {
      CHECK_LE(std::abs(y[i] - std::max(x[i], 0.)), x[i] > 0 ? 0 : 1e-20, name_of(dtype), " of ",
               x[i]);
      CHECK_LE(std::abs(dx[i] - (x[i] > 0)), x[i] > 0 ? 0 : 1e-20, name_of(dtype), " at ", x[i]);
    }
  }
  measured("10 numbers up to 1e26");
}

TEST(a_bias_is_added_to_every_row_alone_and_inside_gelu_and_add) {
  for_dtypes([](Dtype dtype) {
    for (int64_t R : {1, 5})
      for (int64_t N : kWidths) {
        const Values x = numbers(R * N, dtype), b = numbers(N, dtype, 3), a = numbers(R * N, dtype);
        Values y(R * N), sum(R * N), g(R * N), dg(R * N);
        for (int64_t i = 0; i < R * N; i++) {
          y[i] = x[i] + b[i % N];
          sum[i] = a[i] + y[i], g[i] = gelu(y[i]), dg[i] = a[i] * gelu_slope(y[i]);
        }
        verify(sentence("bias (", R, ", ", N, ")"), dtype,
               [&] {
                 const Array Y(x, dtype), B(b, dtype), X(x, dtype), A(a, dtype),
                     SUM = Array::blank(R * N, dtype), G = Array::blank(R * N, dtype);
                 add_bias(Y, B);
                 add(SUM, A, X, B);
                 gelu_forward(G, X, B);
                 gelu_backward(A, A, X, B);  // in place
                 return Outputs{Y.values(), SUM.values(), G.values(), A.values()};
               },
               {{"y", y, bound(dtype)},
                {"sum", sum, bound(dtype)},
                {"gelu", g, bound(dtype)},
                {"dgelu", dg, bound(dtype)}});
      }
  });
}

TEST(bias_backward_adds_the_column_sums) {
  for_dtypes([](Dtype dtype) {
    const Dtype acc = master_dtype(dtype);
    for (const auto& [R, N] : {std::pair{1, 1},
                               {1, 33},
                               {5, 31},
                               {131, 1},
                               {131, 33},
                               {70, 128},
                               {131, 1000},
                               {1100, 33},
                               {3, 2500}}) {
      const Values dy = numbers(R * N, dtype), before = numbers(N, acc, 10);
      Values db = before, terms = before, alone(size_t(N), 0.0);
      for (int64_t i = 0; i < R * N; i++) {
        db[i % N] += dy[i];
        alone[i % N] += dy[i];
        terms[i % N] += std::abs(dy[i]);
      }
      // A sum rounds as its terms are large, not as it is: where they cancel in the only column
      // there is, no larger sum beside it is the measure of the error.
      const double cancelled = N > 1 ? 1 : std::max(1.0, terms[0] / std::abs(db[0]) / 16),
                   lonely = N > 1 ? 1 : std::max(1.0, terms[0] / std::abs(alone[0]) / 16);
      verify(sentence("bias_backward (", R, ", ", N, ")"), dtype,
             [&, N = N] {
               const Array DY(dy, dtype), DB(before, acc), FRESH(Values(size_t(N), kNaN), acc);
               bias_backward(DB, DY);
               bias_backward(FRESH, DY, false);
               return Outputs{DB.values(), FRESH.values()};
             },
             {{"dbias", db, bound(acc) * cancelled}, {"fresh dbias", alone, bound(acc) * lonely}});
    }
  });
}

// ---- layernorm

struct Norm {
  Values y, mean, rstd;
};
static Norm layernorm(const Values& x, const Values& gain, const Values& bias) {
  const size_t C = gain.size(), R = x.size() / C;
  Norm n{Values(R * C), Values(R), Values(R)};
  for (size_t r = 0; r < R; r++) {
    const double* row = &x[r * C];
    double m = 0, v = 0;
    for (size_t i = 0; i < C; i++) m += row[i] / C;
    for (size_t i = 0; i < C; i++) v += (row[i] - m) * (row[i] - m) / C;
    n.mean[r] = m;
    n.rstd[r] = 1 / std::sqrt(v + 1e-5);
    for (size_t i = 0; i < C; i++) n.y[r * C + i] = (row[i] - m) * n.rstd[r] * gain[i] + bias[i];
  }
  return n;
}

TEST(layernorm_forward_normalises_each_row_and_adds_the_residual_before) {
  for_dtypes([](Dtype dtype) {
    const Dtype acc = master_dtype(dtype);
    for (const auto& [R, C] : {std::pair{5, 1},
                               {1, 31},
                               {5, 33},
                               {3, 128},
                               {5, 1000},
                               {1, 6144},
                               {1, 12288},
                               {1, 25000}}) {
      // rows of 48 KiB and more are not kept in shared memory
      const Values x = numbers(R * C, dtype, 2, 1), h = numbers(R * C, dtype),
                   h_bias = numbers(C, dtype), gain = numbers(C, dtype, 1, 1),
                   bias = numbers(C, dtype);
      Values sum(R * C);
      for (int64_t i = 0; i < R * C; i++) {
        // as the kernel rounds: the bias in the type of sums
        const double more = rounded(h[i] + h_bias[i % C], acc);
        sum[i] = rounded(rounded(x[i] + more, acc), dtype);
      }
      const Norm alone = layernorm(x, gain, bias), after = layernorm(sum, gain, bias);
      verify(sentence("layernorm (", R, ", ", C, ")"), dtype,
             [&, R = R, C = C] {
               const Array X(x, dtype), H(h, dtype), HB(h_bias, dtype), G(gain, dtype),
                   B(bias, dtype), Y = Array::blank(R * C, dtype), M = Array::blank(R, acc),
                                   S = Array::blank(R, acc), Y2 = Array::blank(R * C, dtype),
                                   M2 = Array::blank(R, acc), S2 = Array::blank(R, acc),
                                   SUM = Array::blank(R * C, dtype);
               layernorm_forward(Y, M, S, X, G, B);
               add_layernorm_forward(SUM, Y2, M2, S2, X, H, HB, G, B);
               return Outputs{Y.values(),  M.values(),  S.values(), SUM.values(),
                              Y2.values(), M2.values(), S2.values()};
             },
             {{"y", alone.y, bound(dtype)},
              {"mean", alone.mean, bound(acc)},
              {"rstd", alone.rstd, bound(acc)},
              {"sum", sum, bound(dtype)},
              {"y after add", after.y, bound(dtype)},
              {"mean after add", after.mean, bound(acc)},
              {"rstd after add", after.rstd, bound(acc)}});
    }
  });
}

// The mean of squares less the square of the mean would lose the variance. The mean is off by some
// roundings of 300, which beside the deviation of 1/sqrt(3) is the error of y.
TEST(layernorm_of_rows_far_from_0_keeps_their_deviation) {
  worst.clear();
  state = 1;
  for (Dtype dtype : {Dtype::f32, Dtype::f64})
    for_addresses([&] {
      const int64_t R = 3, C = 1000;
      const Values x = numbers(R * C, dtype, 1, 300), gain(C, 1), bias(C, 0);
      const Norm n = layernorm(x, gain, bias);
      verify("layernorm far from 0", dtype,
             [&] {
               const Array X(x, dtype), G(gain, dtype), B(bias, dtype),
                   Y = Array::blank(R * C, dtype), M = Array::blank(R, dtype),
                   S = Array::blank(R, dtype);
               layernorm_forward(Y, M, S, X, G, B);
               return Outputs{Y.values(), M.values(), S.values()};
             },
             {{"y", n.y, bound(dtype) * 300},
              {"mean", n.mean, bound(dtype)},
              {"rstd", n.rstd, bound(dtype)}});
    });
  report();
}

TEST(layernorm_backward_is_the_derivative_and_adds_to_its_parameters_gradients) {
  for_dtypes([](Dtype dtype) {
    const Dtype acc = master_dtype(dtype);
    const int64_t many = 17;  // several chunks
    for (const auto& [R, C] : {std::pair{many, int64_t(1)},
                               {1, 31},
                               {many, 33},
                               {3, 128},
                               {many, 1000},
                               {1, 6144},
#ifdef CPU_FAST
                               {9000, 8},  // more rows than the most chunks have by eights
#endif
                               {1, 7000}}) {
      // 6144: in f32 the sums take 48 KiB, what a block has without asking, and the reduction needs
      // some, too
      const Values x = numbers(R * C, dtype, 2, 1), dy = numbers(R * C, dtype),
                   more = numbers(R * C, dtype, 1, 3), gain = numbers(C, dtype, 1, 1);
      Norm n = layernorm(x, gain, gain);
      for (double& m : n.mean) m = rounded(m, acc);
      for (double& s : n.rstd) s = rounded(s, acc);
      const Values dgain_before = numbers(C, acc, 10), dbias_before = numbers(C, acc, 10);
      Values dx(R * C), dx_more(R * C), dgain = dgain_before, dbias = dbias_before,
                                        dgain_alone(size_t(C), 0.0), dbias_alone = dgain_alone;
      for (int64_t r = 0; r < R; r++) {
        double a = 0, b = 0;
        const auto xhat = [&, C = C](int64_t i) { return (x[r * C + i] - n.mean[r]) * n.rstd[r]; };
        for (int64_t i = 0; i < C; i++) {
          const double d = dy[r * C + i];
          a += gain[i] * d / C;
          b += gain[i] * d * xhat(i) / C;
          dgain[i] += d * xhat(i), dgain_alone[i] += d * xhat(i);
          dbias[i] += d, dbias_alone[i] += d;
        }
        for (int64_t i = 0; i < C; i++) {
          // of one channel: exactly, however this is compiled
          dx[r * C + i] = C == 1 ? 0 : n.rstd[r] * (gain[i] * dy[r * C + i] - a - xhat(i) * b);
          dx_more[r * C + i] = dx[r * C + i] + more[r * C + i];
        }
      }
      // C = 1: dx is 0, and the rounding of gain dy, at most 2, is multiplied by rstd = 316
      const double slack = C > 1 ? 0 : 2 * 316 * std::ldexp(1, acc == Dtype::f64 ? -53 : -24);
      // The terms of its only sum may cancel (R numbers of at most 1).
      const double lonely = C > 1 ? 1 : std::max(1.0, R / std::abs(dbias_alone[0]) / 16);
      verify(sentence("layernorm_backward (", R, ", ", C, ")"), dtype,
             [&, R = R, C = C] {
               const Array X(x, dtype), DY(dy, dtype), MORE(more, dtype), G(gain, dtype),
                   M(n.mean, acc), S(n.rstd, acc),
                   DX = Array::blank(R * C, dtype), DX2 = Array::blank(R * C, dtype),
                   DG(dgain_before, acc), DB(dbias_before, acc), DG2(dgain_before, acc),
                   DB2(dbias_before, acc), DG3(dgain_before, acc), DB3(dbias_before, acc),
                   FRESH_G(Values(size_t(C), kNaN), acc), FRESH_B(Values(size_t(C), kNaN), acc);
               layernorm_backward(DX, FRESH_G, FRESH_B, DY, Tensor(), X, M, S, G, false);
               layernorm_backward(DX, DG, DB, DY, Tensor(), X, M, S, G);
               layernorm_backward(DX2, DG2, DB2, DY, MORE, X, M, S, G);
               layernorm_backward(MORE, DG3, DB3, DY, MORE, X, M, S, G);    // dx is the residual
               layernorm_backward(DY, DG3, DB3, DY, Tensor(), X, M, S, G);  // dx is dy
               return Outputs{DX.values(),      DG.values(),     DB.values(),   DX2.values(),
                              DG2.values(),     DB2.values(),    MORE.values(), DY.values(),
                              FRESH_G.values(), FRESH_B.values()};
             },
             {{"dx", dx, bound(dtype) + slack},
              {"dgain", dgain, bound(acc)},
              {"dbias", dbias, bound(acc)},
              {"dx with residual", dx_more, bound(dtype) + slack},
              {"dgain with residual", dgain, bound(acc)},
              {"dbias with residual", dbias, bound(acc)},
              {"dx in place of the residual", dx_more, bound(dtype) + slack},
              {"dx in place of dy", dx, bound(dtype) + slack},
              {"fresh dgain", dgain_alone, bound(acc) * lonely},
              {"fresh dbias", dbias_alone, bound(acc) * lonely}});
    }
  });
}

TEST(layernorm_refuses_a_width_whose_sums_no_block_can_hold) {
  const int64_t C = 30000;
  const Tensor x({1, C}, Dtype::f32, Memory::workspace), c({C}, Dtype::f32, Memory::workspace),
      one({1}, Dtype::f32, Memory::workspace);
  CHECK_SAYS(layernorm_backward(x, c, c, x, Tensor(), x, one, one, c),
             "the layernorm of 30000 channels keeps 240000 bytes of sums in a block");
}

// ---- embedding

// A third of the tokens another rank's.
static Values partly(Values t) {
  for (size_t i = 0; i < t.size(); i += 3) t[i] = -1;
  return t;
}

// Tokens in which one stands `common` percent of the time: its run crosses many segments.
static Values text(int64_t R, int64_t V, int common) {
  Values t = tokens_below(R, V);
  for (double& x : t)
    if (int(next() % 100) < common) x = int(V / 2);
  return t;
}

TEST(embedding_forward_adds_token_and_position) {
  for_dtypes([](Dtype dtype) {
    for (int64_t C : kWidths)
      for (const auto& [V, B, T] : {std::tuple{2, 1, 1}, {257, 3, 1}, {1000, 1, 7}, {257, 2, 5}}) {
        const int64_t R = B * T;
        // a longer context is allowed
        const Values t = text(R, V, 0), wte = numbers(V * C, dtype),
                     wpe = numbers((T + 2) * C, dtype);
        Values x(R * C);
        for (int64_t i = 0; i < R * C; i++)
          x[i] = wte[int64_t(t[i / C]) * C + i % C] + wpe[i / C % T * C + i % C];
        verify(sentence("embedding_forward C ", C, " V ", V, " B ", B, " T ", T), dtype,
               [&, C = C, V = V, T = T] {
                 Array X = Array::blank(R * C, dtype), TOKENS(t, Dtype::i32), WTE(wte, dtype),
                       WPE(wpe, dtype);
                 embedding_forward(X, TOKENS, WTE.shaped({V, C}), WPE.shaped({-1 + T + 3, C}), T);
                 return Outputs{X.values()};
               },
               {{"x", x, bound(dtype)}});
        const Values some = partly(t);
        for (int64_t i = 0; i < R * C; i++)
          if (some[i / C] < 0) x[i] = 0;
        verify(sentence("embedding_forward of a part, C ", C, " V ", V, " B ", B, " T ", T), dtype,
               [&, C = C, V = V, T = T] {
                 Array X = Array::blank(R * C, dtype), TOKENS(some, Dtype::i32), WTE(wte, dtype),
                       WPE(wpe, dtype);
                 embedding_forward(X, TOKENS, WTE.shaped({V, C}), WPE.shaped({-1 + T + 3, C}), T);
                 return Outputs{X.values()};
               },
               {{"x", x, bound(dtype)}});
      }
  });
}

TEST(embedding_backward_adds_rows_by_token_and_by_position) {
  for_dtypes([](Dtype dtype) {
    const Dtype acc = master_dtype(dtype);
    struct Case {
      int64_t C, V, B, T;
    };  // a segment of the sorted rows is 8 long
    for (const auto& [part, pieces] : {std::pair{false, false}, {true, false}, {false, true}})
      for (const auto& [C, V, B, T] : {Case{1, 1, 1, 1},
                                       {33, 2, 5, 1},
                                       {128, 2, 1, 8},
                                       {1000, 1, 1, 9},
                                       {31, 1000, 1, 67},
                                       {33, 257, 3, 67},
                                       {128, 257, 3, 67},
                                       {1000, 3, 2, 70},
                                       {8, 1, 1, 192}}) {
        const int64_t R = B * T;
        const Values whole = text(R, V, V == 257 ? 60 : 0), t = part ? partly(whole) : whole,
                     dx = numbers(R * C, dtype), te = numbers(V * C, acc, 10),
                     pe = numbers((T + 3) * C, acc, 10);
        const Positions places =
            pieces ? Positions{{1, 1 + T / 2}, {T / 2 + 3, T + 3}} : Positions{{0, T}};
        Values dwte = te, dwpe = pe;
        for (int64_t i = 0; i < R * C; i++) {
          if (t[i / C] >= 0) dwte[int64_t(t[i / C]) * C + i % C] += dx[i];
          dwpe[places[i / C % T] * C + i % C] += dx[i];
        }
        const std::vector<int> order = sort_rows(std::vector<int>(t.begin(), t.end()));
        const Values sorted(order.begin(), order.end());
        verify(sentence("embedding_backward C ", C, " V ", V, " B ", B, " T ", T), dtype,
               [&, C = C, V = V, T = T] {
                 Array DX(dx, dtype), TOKENS(t, Dtype::i32), ORDER(sorted, Dtype::i32),
                     DWTE(te, acc), DWPE(pe, acc);
                 embedding_backward(DWTE.shaped({V, C}), DWPE.shaped({T + 3, C}), DX, TOKENS, ORDER,
                                    places);
                 return Outputs{DWTE.values(), DWPE.values()};
               },
               {{"dwte", dwte, bound(acc)}, {"dwpe", dwpe, bound(acc)}});
      }
  });
}

TEST(columns_are_copied_into_other_columns) {
  for_dtypes([](Dtype dtype) {
    for (const Dtype from : {dtype, master_dtype(dtype)})
      for (const int64_t columns : {1, 33, 300, 4099}) {
        const int64_t R = 5;
        const Values x = numbers(R * (columns + 3), dtype), old = numbers(R * (columns + 2), dtype);
        Values y = old;
        for (int64_t i = 0; i < R * columns; i++)
          y[i / columns * (columns + 2) + 2 + i % columns] =
              x[i / columns * (columns + 3) + 1 + i % columns];
        verify(
            sentence("copy_columns ", columns, " from ", name_of(from)), dtype,
            [&] {
              Array X(x, from), Y(old, dtype);
              copy_columns(Y.shaped({R, columns + 2}), 2, X.shaped({R, columns + 3}), 1, columns);
              return Outputs{Y.values()};
            },
            {{"y", y, 0}});
      }
  });
}

TEST(rows_are_sorted_by_token_and_keep_their_order) {
  const std::vector<int> order = sort_rows({3, 0, 3, 1, 0, 3});
  CHECK(order == (std::vector<int>{1, 4, 3, 0, 2, 5}));
  CHECK(sort_rows({}).empty());
  CHECK(sort_rows({3, -1, 0, -1}) == (std::vector<int>{2, 0}));
  measured("6 rows");
}

// ---- cross-entropy

// Rows of logits x (R,V) with padding after each, of which the kernels must know nothing: a number
// that would be every maximum, and NaN.
static Values padded(const Values& x, int64_t V, int64_t ld) {
  Values all;
  for (size_t row = 0; row < x.size(); row += size_t(V)) {
    all.insert(all.end(), x.begin() + long(row), x.begin() + long(row) + V);
    for (int64_t i = V; i < ld; i++) all.push_back(i == V ? 99 : kNaN);
  }
  return all;
}
// The rows without their padding, which the kernels must have left as it was, or cleared.
static Values unpadded(const Values& all, int64_t V, int64_t ld, bool cleared) {
  Values x;
  for (int64_t i = 0; i < int64_t(all.size()); i++)
    if (i % ld < V) x.push_back(all[size_t(i)]);
    else if (cleared) CHECK_EQ(all[size_t(i)], 0, "padding");
    else CHECK(all[size_t(i)] == 99 || std::isnan(all[size_t(i)]), "padding was written");
  return x;
}

struct Losses {
  Values losses, gradient;
};
static Losses losses_of(const Values& x, const Values& targets, double scale) {
  const int64_t R = int64_t(targets.size()), V = int64_t(x.size()) / R;
  Losses all{Values(R), Values(R * V)};
  for (int64_t r = 0; r < R; r++) {
    const double m = *std::max_element(&x[r * V], &x[r * V] + V);
    const int64_t target = int64_t(targets[r]);
    long double exact = 0;
    for (int64_t i = 0; i < V; i++) exact += std::exp(x[r * V + i] - m);
    const double sum = double(exact);
    all.losses[r] = (std::log(sum) + m - x[r * V + target]) * scale;
    for (int64_t i = 0; i < V; i++)
      all.gradient[r * V + i] = (std::exp(x[r * V + i] - m) / sum - (i == target)) * scale;
  }
  return all;
}

TEST(cross_entropy_gives_the_loss_and_turns_logits_into_their_gradient) {
  for_dtypes([](Dtype dtype) {
    const Dtype acc = master_dtype(dtype);
    for (const auto& [V, ld] : {std::pair<int64_t, int64_t>{1, 1},
                                {2, 8},
                                {257, 257},
                                {257, 264},
                                {1000, 1000},
                                {1000, 1008},
                                {4111, 4224},
                                {50257, 50304}}) {
      const int64_t R = V == 257 ? 5 : 2;
      const double scale = 1.0 / 64;
      const Values x = numbers(R * V, dtype, 6, 10), t = tokens_below(R, V);
      const auto [losses, dx] = losses_of(x, t, scale);
      const auto at_targets = [&, V = V](Values g) {  // much larger than the others: measured apart
        Values some(R);
        for (int64_t r = 0; r < R; r++) std::swap(some[r], g[r * V + int64_t(t[r])]);
        return std::pair{some, g};
      };
      const auto [dx_target, dx_others] = at_targets(dx);
      // a loss is the difference of numbers of the size of 1: where all losses are small the bound
      // is relative to 1 (times scale)
      const double largest = *std::max_element(losses.begin(), losses.end());
      const double loss_bound = bound(acc) * (largest > 0 ? std::max(1.0, scale / largest) : scale);
      verify(sentence("cross_entropy (", R, ", ", V, " of ", ld, ")"), dtype,
             [&, V = V, ld = ld] {
               const Array X(padded(x, V, ld), dtype), TARGETS(t, Dtype::i32),
                   L = Array::blank(R, acc), L2 = Array::blank(R, acc);
               cross_entropy(L, X, TARGETS, V, scale, false);
               const Values untouched = unpadded(X.values(), V, ld, false);
               cross_entropy(L2, X, TARGETS, V, scale, true);
               const auto [target, others] = at_targets(unpadded(X.values(), V, ld, true));
               return Outputs{L.values(), untouched, L2.values(), target, others};
             },
             {{"losses", losses, loss_bound},
              {"logits of evaluation", x, 0},
              {"losses with gradient", losses, loss_bound},
              {"gradient at the targets", dx_target, bound(dtype)},
              {"gradient elsewhere", dx_others, bound(dtype)}});
    }
  });
}

// Three ranks that hold unequal parts of the vocabulary: what they exchange is computed here.
// Returns losses, losses without a gradient, the gradient.
static Outputs in_parts(const Values& x, const Values& t, Dtype dtype, double scale) {
  const Dtype acc = master_dtype(dtype);
  const int64_t R = int64_t(t.size()), V = int64_t(x.size()) / R, cuts[] = {0, V / 3, V - 1, V};
  struct Rank {
    Array logits, targets, parts;
    int64_t begin, n, ld;
  };
  std::vector<Rank> ranks;
  Values top(R, -1e300), sums(2 * R, 0.0);
  for (int k = 0; k < 3; k++) {
    const int64_t begin = cuts[k], n = cuts[k + 1] - begin, ld = round_up(n, 8) + 8 * k;
    Values logits, targets;
    for (int64_t r = 0; r < R; r++) {
      logits.insert(logits.end(), &x[r * V + begin], &x[r * V + begin] + n);
      const int64_t target = int64_t(t[r]) - begin;
      targets.push_back(target >= 0 && target < n ? double(target) : -1);
    }
    Rank& rank =
        ranks.emplace_back(Rank{Array(padded(logits, n, ld), dtype), Array(targets, Dtype::i32),
                                Array::blank(3 * R, acc), begin, n, ld});
    softmax_parts(rank.parts, rank.logits, rank.targets, n);
    const Values parts = rank.parts.values();
    for (int64_t r = 0; r < R; r++) top[r] = std::max(top[r], parts[r]);
  }
  const Array TOP(top, acc);
  for (Rank& rank : ranks) {
    softmax_rescale(rank.parts, TOP);
    const Values parts = rank.parts.values();
    for (int64_t i = 0; i < 2 * R; i++) sums[i] += parts[R + i];
  }
  Values gradient(R * V), loss, without;
  for (Rank& rank : ranks) {
    Values parts = rank.parts.values();
    std::copy(sums.begin(), sums.end(), parts.begin() + R);
    const Array PARTS(parts, acc), L = Array::blank(R, acc), L2 = Array::blank(R, acc);
    cross_entropy_parts(L2, rank.logits, rank.targets, rank.n, TOP, PARTS, scale, false);
    cross_entropy_parts(L, rank.logits, rank.targets, rank.n, TOP, PARTS, scale, true);
    loss = L.values(), without = L2.values();
    const Values g = unpadded(rank.logits.values(), rank.n, rank.ld, true);
    for (int64_t i = 0; i < R * rank.n; i++)
      gradient[i / rank.n * V + rank.begin + i % rank.n] = g[i];
  }
  return Outputs{loss, without, gradient};
}

TEST(cross_entropy_in_parts_equals_the_whole) {
  for_dtypes([](Dtype dtype) {
    const Dtype acc = master_dtype(dtype);
    for (int64_t V : {3, 257, 1000, 4111}) {
      const int64_t R = 3;
      const double scale = 1.0 / 64;
      const Values x = numbers(R * V, dtype, 6, 10), t = tokens_below(R, V);
      const auto [losses, dx] = losses_of(x, t, scale);
      const double loss_bound =
          bound(acc) * std::max(1.0, scale / *std::max_element(losses.begin(), losses.end()));
      verify(sentence("cross_entropy in parts (", R, ", ", V, ")"), dtype,
             [&] { return in_parts(x, t, dtype, scale); },
             {{"losses", losses, loss_bound},
              {"losses without gradient", losses, loss_bound},
              {"gradient", dx, bound(dtype)}});
    }
  });
}

// Where the row's maximum has to be taken off: exp overflows f32 at 89, and gives nothing at -104.
TEST(cross_entropy_of_large_equal_and_infinite_logits) {
  for_dtypes([](Dtype dtype) {
    const int64_t V = 301, ld = 304;
    const double scale = 1.0 / 64;
    Values x;
    const auto row = [&](double deviation, double center) {
      const Values more = numbers(V, dtype, deviation, center);
      x.insert(x.end(), more.begin(), more.end());
    };
    row(100, 300), row(100, -300), row(0, 300), row(6, 10), row(6, 10);
#ifndef CPU_FAST  // whose kernels may take infinity for a number
    for (int64_t i = 0; i < V; i += 3) x[size_t(3 * V + i)] = -INFINITY;
    for (int64_t i = 0; i < V; i++)
      if (i != 100) x[size_t(4 * V + i)] = -INFINITY;
#endif
    const Values t = {5, 0, 100, 100, 100};
    const auto [losses, dx] = losses_of(x, t, scale);
    verify("cross_entropy", dtype,
           [&] {
             const Array X(padded(x, V, ld), dtype), TARGETS(t, Dtype::i32),
                 L = Array::blank(5, master_dtype(dtype));
             cross_entropy(L, X, TARGETS, V, scale, true);
             Outputs all = in_parts(x, t, dtype, scale);
             all.push_back(L.values());
             all.push_back(unpadded(X.values(), V, ld, true));
             return all;
           },
           {{"losses in parts", losses, bound(master_dtype(dtype))},
            {"losses without gradient", losses, bound(master_dtype(dtype))},
            {"gradient in parts", dx, bound(dtype)},
            {"losses", losses, bound(master_dtype(dtype))},
            {"gradient", dx, bound(dtype)}});
  });
}

TEST(add_sum_adds_in_f64) {
  worst.clear();
  state = 1;
  for (Dtype dtype : {Dtype::f32, Dtype::f64})
    for (int64_t n : {1, 33, 1000, 5000, (1 << 16) + 1, 3 * (1 << 16) + 17}) {  // chunks: 2^16
      const Values x = numbers(n, dtype);
      long double total = 1e6;
      for (double v : x) total += v;
      verify(sentence("add_sum ", n), dtype,
             [&] {
               const Array TOTAL({1e6}, Dtype::f64), X(x, dtype);
               add_sum(TOTAL, X);
               return Outputs{TOTAL.values()};
             },
             {{"total", {double(total)}, bound(Dtype::f64)}});
    }
  report();
}

// ---- AdamW

// A parameter's arrays, as the optimizer sees them; `compute`: i32 stands for no tensor of the
// compute dtype.
struct Updated {
  Param param;
  Array weights, m, v, gradient, compute;
  Updated(int id, bool decay, bool counted, const std::vector<Values>& start, Dtype dtype,
          Dtype compute)
      : weights(start[0], dtype),
        m(start[1], dtype),
        v(start[2], dtype),
        gradient(start[3], dtype),
        compute(Array::blank(int64_t(start[0].size()), compute)) {
    param.id = uint32_t(id), param.decay = decay, param.counted = counted;
  }
  ParamShard shard() const {
    ParamShard s;
    s.weights = weights, s.m = m, s.v = v, s.gradient = gradient, s.param = &param;
    if (compute.dtype != Dtype::i32) s.compute = compute;
    return s;
  }
};

TEST(adamw_takes_the_steps_of_the_paper) {
  worst.clear();
  state = 1;
  const std::vector<int64_t> sizes = {1, 33, kPieceSize, 1000, 2 * kPieceSize + 17};
  for (const auto& [dtype, compute] : {std::pair{Dtype::f32, Dtype::i32},
                                       {Dtype::f32, Dtype::bf16},
                                       {Dtype::f32, Dtype::f32},
                                       {Dtype::f64, Dtype::i32},
                                       {Dtype::f64, Dtype::f64}}) {
    const AdamW options{.lr = 0.01, .weight_decay = 0.1};
    const double clip = 0.37;
    const int64_t steps[] = {1, 2, 1000, (int64_t(1) << 31) + 1};
    std::vector<std::vector<Values>> start;
    std::vector<Expected> expected;
    for (size_t p = 0; p < sizes.size(); p++) {
      const int64_t n = sizes[p];
      const double decay = p % 2 ? options.weight_decay : 0;
      Values w = numbers(n, dtype), m = numbers(n, dtype, 0.1), v = numbers(n, dtype, 0.1, 0.1);
      const Values g = numbers(n, dtype, 3);
      start.push_back({w, m, v, g});
      for (int64_t step : steps)
        for (int64_t i = 0; i < n; i++) {
          m[i] = options.beta1 * m[i] + (1 - options.beta1) * g[i] * clip;
          v[i] = options.beta2 * v[i] + (1 - options.beta2) * g[i] * clip * g[i] * clip;
          const double m_hat = m[i] / (1 - std::pow(options.beta1, step)),
                       v_hat = v[i] / (1 - std::pow(options.beta2, step));
          w[i] -= options.lr * (m_hat / (std::sqrt(v_hat) + options.eps) + decay * w[i]);
        }
      const std::string of = sentence(" of ", n);
      expected.push_back({"weights" + of, w, bound(dtype)});
      expected.push_back({"m" + of, m, bound(dtype)});
      expected.push_back({"v" + of, v, bound(dtype)});
      if (compute != Dtype::i32) expected.push_back({"compute" + of, w, bound(compute)});
    }
    verify(
        sentence("adamw, compute ", compute == Dtype::i32 ? "none" : name_of(compute)),
        compute == Dtype::i32 ? dtype : compute,
        [&, dtype = dtype, compute = compute] {
          std::deque<Updated> parameters;
          std::vector<ParamShard> shards;
          for (size_t p = 0; p < sizes.size(); p++)
            shards.push_back(
                parameters.emplace_back(int(p), p % 2, true, start[p], dtype, compute).shard());
          const Array CLIP({clip}, Dtype::f64);
          const UpdateTable table = update_table(shards);
          for (int64_t step : steps) {
            AdamW now = options;
            now.step = step;
            adamw(table, CLIP, now);
          }
          Outputs outputs;
          for (const Updated& p : parameters) {
            for (const Array* x : {&p.weights, &p.m, &p.v}) outputs.push_back(x->values());
            if (compute != Dtype::i32) outputs.push_back(p.compute.values());
          }
          return outputs;
        },
        expected);
  }
  report();
}

TEST(sums_of_squares_and_the_clipping_factor_are_f64) {
  worst.clear();
  state = 1;
  for (Dtype dtype : {Dtype::f32, Dtype::f64})
    for (int64_t n : {1, 7, 1000, 3 * kPieceSize + 17, 300 * 16}) {
      const Values x = numbers(n, dtype, 3), none(size_t(n), 0), other = numbers(9, dtype);
      const auto squares = [](const Values& values) {
        long double sum = 0;  // more than 53 bits, or the reference would be the less exact one
        for (double v : values) sum += static_cast<long double>(v) * v;
        return sum;
      };
      const double norm = double(std::sqrt(squares(x) + squares(other)));
      verify(sentence("sum_of_squares ", n), dtype,
             [&] {
               const Updated last(3, true, true, {none, none, none, x}, dtype, Dtype::i32),
                   copy(1, true, false, {none, none, none, x}, dtype, Dtype::i32),
                   first(0, true, true, {other, other, other, other}, dtype, Dtype::i32);
               const Array S({7, 7, 7, 7, 7}, Dtype::f64), NORM({0}, Dtype::f64),
                   TIGHT({0}, Dtype::f64), LOOSE({0}, Dtype::f64), NONE({0}, Dtype::f64);
               sum_of_squares(S, update_table({last.shard(), copy.shard(), first.shard()}));
               norm_and_clip(NORM, LOOSE, S, 2 * norm);
               norm_and_clip(NORM, NONE, S, 0);
               norm_and_clip(NORM, TIGHT, S, 0.25 * norm);
               return Outputs{S.values(), NORM.values(), TIGHT.values(), LOOSE.values(),
                              NONE.values()};
             },
             {{"squares", {double(squares(other)), 0, 0, double(squares(x)), 0}, bound(Dtype::f64)},
              {"norm", {norm}, bound(Dtype::f64)},
              {"tight clip", {0.25}, bound(Dtype::f64)},
              {"loose clip", {1}, 0},
              {"no clip", {1}, 0}});
    }
  report();
}

#ifndef CPU_FAST  // whose compiler may take every number for finite
TEST(the_clipping_factor_of_a_norm_that_is_not_finite) {
  for (const double square : {double(INFINITY), kNaN}) {
    const Array S({1, square}, Dtype::f64), NORM({0}, Dtype::f64), CLIP({7}, Dtype::f64);
    norm_and_clip(NORM, CLIP, S, 1);
    CHECK(!std::isfinite(NORM.values()[0]));
    CHECK_EQ(CLIP.values()[0], std::isnan(square) ? 1 : 0);
  }
  measured("0 of infinity, 1 of NaN");
}
#endif

// ---- contracts

TEST(wrong_shapes_and_dtypes_are_refused) {
  const Tensor a({6}, Dtype::f32, Memory::data), b({5}, Dtype::f32, Memory::data),
      c({6}, Dtype::bf16, Memory::data), i({6}, Dtype::i32, Memory::data),
      r({2}, Dtype::f32, Memory::data), d({1}, Dtype::f64, Memory::data);
  CHECK_SAYS(add(a, a, b), "does not hold");
  CHECK_SAYS(add(a, a, c), "does not hold");
  CHECK_SAYS(add(i, i, i), "no kernel for i32");
  CHECK_SAYS(gelu_forward(a, b), "does not hold");
  CHECK_SAYS(gelu_backward(a, c, a), "does not hold");
  CHECK_SAYS(add_bias(a, b), "does not hold");
  CHECK_SAYS(bias_backward(c, c), "does not hold");  // the gradient of a bf16 bias is f32
  CHECK_SAYS(layernorm_forward(a, r, r, a, b, b), "does not hold");
  CHECK_SAYS(layernorm_backward(a, b, b, a, c, a, r, r, b), "does not hold");
  CHECK_SAYS(cross_entropy(a, a, r, 3, 1, true), "does not hold");
  CHECK_SAYS(cross_entropy(r, a, i.view(0, {2}), 4, 1, true), "does not hold");
  const Param p;
  const auto shard = [&](const Tensor& weights, const Tensor& gradient) {
    ParamShard s;
    s.weights = s.m = s.v = weights, s.gradient = gradient, s.param = &p;
    return std::vector<ParamShard>{s};
  };
  CHECK_SAYS(update_table(shard(a, b)), "does not hold");
  CHECK_SAYS(update_table(shard(a, c)), "does not hold");
  CHECK_SAYS(update_table(shard(a.view(1, {5}), b)), "does not hold");  // at an odd address
  std::vector<ParamShard> two = shard(a, a);
  two.push_back(two[0]);
  two[1].compute = c;
  CHECK_SAYS(update_table(two), "shards of two dtypes");
  measured("15 calls");
}

// ---- the same bits for any number of threads

#ifdef CPU_FAST
// Launches may use a team of threads only once they are known to take long: the fifth run decides.
static void expect_same_bits(const char* what, const Run& run) {
  Outputs one;
  for (int threads : {1, 2}) {
    omp_set_num_threads(threads);
    Outputs last;
    for (int i = 0; i < 5; i++) last = run_once(run);
    if (threads == 1) one = last;
    else CHECK(last == one, what, " has other bits with 2 threads than with 1");
  }
}

TEST(results_have_the_same_bits_with_1_and_2_threads) {
  const int saved = omp_get_max_threads();
  state = 1;
  const int64_t R = 700, C = 384, V = 300, T = 70;
  const Dtype f32 = Dtype::f32, f64 = Dtype::f64;
  const Values x = numbers(R * C, f32), dy = numbers(R * C, f32), g = numbers(C, f32),
               s = numbers(R, f32), t = text(R, V, 20), w = numbers(V * C, f32);
  const std::vector<int> order = sort_rows(std::vector<int>(t.begin(), t.end()));
  expect_same_bits("elementwise", [&] {
    const Array X(x, f32), DY(dy, f32), Y = Array::blank(R * C, f32), DX = Array::blank(R * C, f32),
                                        DB(g, f32);
    gelu_forward(Y, X), gelu_backward(DX, DY, X), bias_backward(DB, DY);
    return Outputs{Y.values(), DX.values(), DB.values()};
  });
  expect_same_bits("layernorm", [&] {
    const Array X(x, f32), DY(dy, f32), G(g, f32), Y = Array::blank(R * C, f32), M(s, f32),
                                                   S(s, f32), DX = Array::blank(R * C, f32),
                                                   DG(g, f32), DB(g, f32);
    layernorm_forward(Y, M, S, X, G, G), layernorm_backward(DX, DG, DB, DY, X, X, M, S, G);
    return Outputs{Y.values(), DX.values(), DG.values(), DB.values()};
  });
  expect_same_bits("embedding", [&] {
    Array DX(x, f32), TOKENS(t, Dtype::i32), ORDER(Values(order.begin(), order.end()), Dtype::i32),
        DWTE(w, f32), DWPE(w, f32);
    embedding_backward(DWTE.shaped({V, C}), DWPE.shaped({V, C}), DX, TOKENS, ORDER, {{0, T}});
    return Outputs{DWTE.values(), DWPE.values()};
  });
  expect_same_bits("cross_entropy", [&] {
    const Array X(x, f32), TARGETS(t, Dtype::i32), L = Array::blank(R, f32), TOTAL({0}, f64);
    cross_entropy(L, X, TARGETS, V, 1, true), add_sum(TOTAL, L);
    return Outputs{X.values(), L.values(), TOTAL.values()};
  });
  expect_same_bits("adamw", [&] {
    const Updated p(0, true, true, {x, dy, Values(R * C, 0.5), dy}, f32, Dtype::i32);
    const UpdateTable table = update_table({p.shard()});
    const Array CLIP({1}, f64), SUM({0}, f64);
    sum_of_squares(SUM, table), adamw(table, CLIP, AdamW{.lr = 0.1});
    return Outputs{p.weights.values(), SUM.values()};
  });
  omp_set_num_threads(saved);
  measured("5 groups of kernels, ", R, " rows of ", C);
}
#endif

int main(int argc, char** argv) {
  const int status = run_tests(argc, argv);
  close_device();
  return status;
}
