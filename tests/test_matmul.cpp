// test_matmul.cpp: both matmuls against sums in double precision: dtypes, transposes, odd sizes,
// ld, batches, alpha, adding to c.
//
// Numbers are drawn from a normal distribution, so a sum of k products has a magnitude of sqrt(k)
// and a largest element of about four times that. Rounding: k additions, each off by at most u
// times the sum so far, which grow like a random walk: about u sqrt(k) of the sum. The bound is 4 u
// sqrt(k) + 4 u of the largest element of c, u = 2^-24 (f32, and sums of bf16) or 2^-53; writing
// bf16 adds half of its last bit, 2^-8. On a GPU cuBLAS may round twice where it adds to c in bf16,
// the product and the sum (H100, cuBLAS 13.0: 1.26 times 2^-8).
#include "kernels/kernels.h"
#include "tests/tensors.h"

struct Case {
  Dtype in = Dtype::f32, out = Dtype::f32;
  int64_t m = 1, n = 1, k = 1;
  bool ta = false, tb = false;
  double alpha = 1;
  bool add = false;
  int64_t batch = 1;
  int64_t wider = 0;   // ld beyond the width
  int64_t offset = 0;  // elements from the start of the memory to the first matrix
};

static double bound(const Case& p) {
  const double u = p.in == Dtype::f64 ? 0x1p-53 : 0x1p-24;
  const bool twice = p.add && device().is_gpu && matmul_backend == MatmulBackend::cublas;
  return 4 * u * std::sqrt(double(p.k)) + 4 * u +
         (p.out == Dtype::bf16 ? twice ? 0x1p-7 : 0x1p-8 : 0);
}

struct Side {  // one matrix of a case, and the memory it lies in
  Tensor memory;
  Matrix matrix;
  std::vector<double> values;
  Side(int64_t rows, int64_t columns, bool transposed, Dtype dtype, const Case& p, unsigned seed) {
    if (transposed) std::swap(rows, columns);
    const int64_t ld = columns + p.wider, stride = rows * ld + 2 * p.wider;
    memory = random_tensor({p.offset + p.batch * stride + 1}, dtype, seed);
    values = download(memory);
    matrix = {static_cast<char*>(memory.raw()) + p.offset * size_of(dtype), ld, transposed, stride};
  }
  size_t at(const Case& p, int64_t z, int64_t i, int64_t j) const {
    return size_t(p.offset + z * matrix.stride +
                  (matrix.transposed ? j * matrix.ld + i : i * matrix.ld + j));
  }
};

// Runs the case and returns the relative difference; memory around c must keep its bits.
static double difference(const Case& p, unsigned seed = 1) {
  const Side a(p.m, p.k, p.ta, p.in, p, seed), b(p.k, p.n, p.tb, p.in, p, seed + 1);
  Side c(p.m, p.n, false, p.out, p, seed + 2);
  std::vector<double> before = c.values;
  for (int64_t z = 0; z < p.batch; z++)
    for (int64_t i = 0; i < p.m; i++)
      for (int64_t j = 0; j < p.n; j++)
        if (!p.add) before[c.at(p, z, i, j)] = kNaN;  // must not be read
  const Tensor start = tensor_of(before, c.memory.shape(), p.out);

  const auto run = [&] {
    copy(c.memory, start);
    matmul(p.in, p.out, p.m, p.n, p.k, a.matrix, b.matrix, c.matrix, p.alpha, p.add, p.batch);
    return download(c.memory);
  };
  const std::vector<double> after =
      matmul_backend == MatmulBackend::own ? in_every_order(run) : run();

  std::vector<double> got, expected, untouched = c.values, around = after;
  for (int64_t z = 0; z < p.batch; z++)
    for (int64_t i = 0; i < p.m; i++)
      for (int64_t j = 0; j < p.n; j++) {
        double sum = 0;
        for (int64_t l = 0; l < p.k; l++)
          sum += a.values[a.at(p, z, i, l)] * b.values[b.at(p, z, l, j)];
        const size_t at = c.at(p, z, i, j);
        expected.push_back(p.alpha * sum + (p.add ? c.values[at] : 0));
        got.push_back(after[at]);
        untouched[at] = around[at] = 0;
      }
  CHECK(around == untouched, "memory around c was written");
  return relative_difference(got, expected);
}

static void check(const Case& p, double& worst) {
  const double d = difference(p);
  CHECK_LE(d, bound(p), name_of(p.in), " to ", name_of(p.out), ", m = ", p.m, ", n = ", p.n,
           ", k = ", p.k, p.ta ? ", a transposed" : "", p.tb ? ", b transposed" : "",
           ", alpha = ", p.alpha, p.add ? ", added" : "", ", batch = ", p.batch, ", ld + ", p.wider,
           ", offset ", p.offset);
  worst = std::max(worst, d / bound(p));
}

using Sizes = std::vector<std::array<int64_t, 3>>;
#ifdef CPU_FAST
static Sizes sizes() {  // every combination
  Sizes all;
  for (int64_t m : {1, 31, 64, 129})
    for (int64_t n : {1, 33, 100, 129})
      for (int64_t k : {1, 31, 64, 129}) all.push_back({m, n, k});
  all.push_back({200, 300, 400});
  return all;
}
#else
static Sizes sizes() {  // each size in each place; the last has more rows than a band of tiles
  return {{1, 1, 1},     {31, 129, 33},  {33, 31, 129},  {129, 33, 31},
          {64, 100, 64}, {100, 64, 100}, {128, 128, 16}, {1100, 150, 17}};
}
#endif

static void sweep(MatmulBackend backend, Dtype in, Dtype out) {
  matmul_backend = backend;
  double worst = 0;
  int cases = 0;
  for (const auto& [m, n, k] : sizes())
    for (int t = 0; t < 4; t++, cases++) {
      const int variant = cases % 3;  // alone, added to c, scaled in a wider memory
      check({in, out, m, n, k, t / 2 == 1, t % 2 == 1, variant == 2 ? -0.5 : 1.0, variant == 1, 1,
             variant == 2 ? 8 : 0, 0},
            worst);
    }
  measured(cases, " products, largest error ", worst, " of the bound");
}

TEST(cublas_f32_equals_double) { sweep(MatmulBackend::cublas, Dtype::f32, Dtype::f32); }
TEST(cublas_f64_equals_double) { sweep(MatmulBackend::cublas, Dtype::f64, Dtype::f64); }
TEST(cublas_bf16_equals_double) { sweep(MatmulBackend::cublas, Dtype::bf16, Dtype::bf16); }
TEST(cublas_bf16_to_f32_equals_double) { sweep(MatmulBackend::cublas, Dtype::bf16, Dtype::f32); }
TEST(own_f32_equals_double) { sweep(MatmulBackend::own, Dtype::f32, Dtype::f32); }
TEST(own_f64_equals_double) { sweep(MatmulBackend::own, Dtype::f64, Dtype::f64); }
TEST(own_bf16_equals_double) { sweep(MatmulBackend::own, Dtype::bf16, Dtype::bf16); }
TEST(own_bf16_to_f32_equals_double) { sweep(MatmulBackend::own, Dtype::bf16, Dtype::f32); }

// Batches with a stride, and memory that no run of 16 bytes is aligned with
TEST(batches_and_unaligned_memory_are_right_in_both) {
  double worst = 0;
  for (MatmulBackend backend : {MatmulBackend::cublas, MatmulBackend::own}) {
    matmul_backend = backend;
    for (Dtype in : {Dtype::f32, Dtype::f64, Dtype::bf16})
      for (int t = 0; t < 4; t++) {
        check({in, in, 33, 20, 17, t / 2 == 1, t % 2 == 1, 0.25, true, 3, 8, 0}, worst);
        check({in, in, 20, 36, 40, t / 2 == 1, t % 2 == 1, 1, false, 2, 3, 1}, worst);
      }
  }
  measured("48 products, largest error ", worst, " of the bound");
}

TEST(empty_products_write_what_they_should) {
  for (MatmulBackend backend : {MatmulBackend::cublas, MatmulBackend::own}) {
    matmul_backend = backend;
    for (Dtype dtype : {Dtype::f32, Dtype::f64, Dtype::bf16}) {
      const Tensor c = tensor_of({kNaN, kNaN, kNaN, kNaN, kNaN, kNaN}, {2, 3}, dtype);
      matmul(dtype, dtype, 0, 3, 4, {c.raw(), 4}, {c.raw(), 3}, {c.raw(), 3});
      matmul(dtype, dtype, 2, 0, 4, {c.raw(), 4}, {c.raw(), 3}, {c.raw(), 3});
      CHECK(std::isnan(download(c)[0]), "no rows or no columns, and yet something was written");
      matmul(dtype, dtype, 2, 3, 0, {c.raw(), 3}, {c.raw(), 3}, {c.raw(), 3});
      CHECK(download(c) == std::vector<double>(6, 0.0), "a sum over nothing is zero");
    }
  }
  measured("m, n or k = 0");
}

TEST(wrong_arguments_are_refused) {
  const Tensor x({4, 4}, Dtype::f32, Memory::data);
  const Matrix m{x.raw(), 4};
  CHECK_SAYS(matmul(Dtype::f32, Dtype::bf16, 4, 4, 4, m, m, m), "f32 to bf16");
  CHECK_SAYS(matmul(Dtype::i32, Dtype::i32, 4, 4, 4, m, m, m), "i32");
  CHECK_SAYS(matmul(Dtype::f32, Dtype::f32, 4, 4, 5, m, m, m), "ld");
  matmul_backend = MatmulBackend::own;
  CHECK_SAYS(matmul(Dtype::f32, Dtype::f32, 1, 1, 1, m, m, m, 1, false, 65536), "not 65536 of 1");
  CHECK_SAYS(matmul(Dtype::f32, Dtype::f32, 65535 * 64 + 1, 1, 1, m, m, m), "not 1 of 4194241");
  matmul_backend = MatmulBackend::cublas;
  measured("dtypes, ld, more than a grid has");
}

int main(int argc, char** argv) {
  const int status = run_tests(argc, argv);
  close_device();
  return status;
}
