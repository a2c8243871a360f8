// test_decode.cpp: the kernels that make text one token at a time, against plain loops in double
// precision and against the training kernels.
//
// measure   largest difference / largest magnitude in the reference
// bounds    u = 2^-53 (f64), 2^-24 (f32). A sum of n products of random signs: u (8 + 2 sqrt(n));
//           attention: as in test_attention.cpp. bf16 sums in f32 and rounds the result to 8 bits:
//           2^-8 more.
#include "kernels/kernels.h"
#include "tests/tensors.h"

namespace {

using Values = std::vector<double>;

double bound(Dtype dtype, double n) {
  return (dtype == Dtype::f64 ? std::ldexp(1.0, -53) : std::ldexp(1.0, -24)) *
             (8 + 2 * std::sqrt(n)) +
         (dtype == Dtype::bf16 ? std::ldexp(1.0, -8) : 0);
}

Values product(const Values& x, const Values& w, int64_t m, int64_t K, int64_t N, bool transposed) {
  Values y(size_t(m * N));
  for (int64_t r = 0; r < m; r++)
    for (int64_t n = 0; n < N; n++)
      for (int64_t k = 0; k < K; k++)
        y[size_t(r * N + n)] +=
            x[size_t(r * K + k)] * w[size_t(transposed ? n * K + k : k * N + n)];
  return y;
}

// One new token a sequence: cache (B,2,H,S,D) is read up to lengths[b] and written there.
struct Decoded {
  Values out, cache;
  double largest_score = 0;
};
Decoded decode(const Values& cache, const Values& qkv, const std::vector<int>& lengths, int64_t H,
               int64_t S, int64_t D) {
  const int64_t B = int64_t(lengths.size());
  Decoded r{Values(size_t(B * H * D)), cache, 0};
  for (int64_t b = 0; b < B; b++)
    for (int64_t h = 0; h < H; h++) {
      const auto key = [&](int64_t part, int64_t t, int64_t d) {
        return size_t((((b * 2 + part) * H + h) * S + t) * D + d);
      };
      const auto now = [&](int64_t part, int64_t d) {
        return qkv[size_t(((b * 3 + part) * H + h) * D + d)];
      };
      const int64_t T = lengths[size_t(b)];
      for (int64_t d = 0; d < D; d++)
        r.cache[key(0, T, d)] = now(1, d), r.cache[key(1, T, d)] = now(2, d);
      Values p(size_t(T + 1));
      double most = -1e300, sum = 0;
      for (int64_t t = 0; t <= T; t++) {
        for (int64_t d = 0; d < D; d++)
          p[size_t(t)] += now(0, d) * r.cache[key(0, t, d)] / std::sqrt(double(D));
        most = std::max(most, p[size_t(t)]);
        r.largest_score = std::max(r.largest_score, std::abs(p[size_t(t)]));
      }
      for (double& x : p) sum += x = std::exp(x - most);
      for (int64_t t = 0; t <= T; t++)
        for (int64_t d = 0; d < D; d++)
          r.out[size_t((b * H + h) * D + d)] += p[size_t(t)] / sum * r.cache[key(1, t, d)];
    }
  return r;
}

Tensor integers(const std::vector<int>& v) {
  const Tensor t({int64_t(v.size())}, Dtype::i32, Memory::data);
  upload(t, v.data());
  return t;
}

#ifdef CPU_FAST
constexpr int64_t kLarge = 1000;
#else
constexpr int64_t kLarge = 260;  // fibers, or a PTX runner
#endif
const Dtype kDtypes[] = {Dtype::f32, Dtype::f64, Dtype::bf16};

}  // namespace

TEST(a_few_rows_times_a_matrix_equal_plain_sums) {
  double worst = 0;
  int cases = 0;
  for (const Dtype dtype : kDtypes)
    for (const bool transposed : {false, true})
      for (const auto& [K, N] : {std::pair<int64_t, int64_t>{1, 1},
                                 {1, 33},
                                 {33, 1},
                                 {31, 64},
                                 {64, 31},
                                 {128, 96},
                                 {100, 100},
                                 {33, kLarge},
                                 {kLarge, 40},
                                 {257, 1032}})
        for (int64_t m : {1, 2, 3, 5, 8}) {
          if (m > 2 && K * N > 20000) continue;
          const unsigned seed = unsigned(cases);
          const int64_t odd = cases % 2, w_odd = cases / 2 % 2;  // both may begin anywhere
          const Tensor x = random_tensor({odd + m * K}, dtype, seed).view(odd, {m, K}),
                       w = random_tensor({w_odd + K * N}, dtype, seed + 1)
                               .view(w_odd, transposed ? Shape{N, K} : Shape{K, N});
          const Dtype result = transposed && m % 2 ? master_dtype(dtype) : dtype;
          const Tensor y({m, N}, result, Memory::data);
          const Values got = in_every_order([&] {
            fill(y, kNaN);
            matvec(y, x, w, transposed);
            return download(y);
          });
          const double d = relative_difference(got, product(download(x), download(w), m, K, N,
                                                            transposed)),
                       most = bound(result, double(K));
          CHECK_LE(d, most, name_of(dtype), " to ", name_of(result), ", ", m, " rows, (", K, ", ",
                   N, ")", transposed ? " transposed" : "");
          worst = std::max(worst, d / most);
          cases++;
        }
  measured(cases, " cases, at most ", worst, " of the bound");
}

TEST(a_new_token_attends_to_the_cache_and_joins_it) {
  double worst = 0;
  int cases = 0;
  for (const Dtype dtype : kDtypes)
    for (const int64_t D : {1, 16, 33, 64, 128, 256})
      for (const std::vector<int>& lengths : {std::vector<int>{0}, {1, 0, 5}, {31, 200}}) {
        const int64_t B = int64_t(lengths.size()), H = 3, S = 201;
        const unsigned seed = unsigned(cases);
        const Tensor cache = random_tensor({B, 2, H, S, D}, dtype, seed),
                     qkv = random_tensor({B, 3 * H * D}, dtype, seed + 1),
                     out({B, H * D}, dtype, Memory::data);
        const Values before = download(cache);
        const Decoded expected = decode(before, download(qkv), lengths, H, S, D);
        Values after;
        const Values got = in_every_order([&] {
          copy(cache, tensor_of(before, cache.shape(), dtype));
          fill(out, kNaN);
          attention_decode(out, cache, qkv, integers(lengths), H);
          after = download(cache);
          return download(out);
        });
        CHECK(after == expected.cache,
              "the cache is not what it was, with the new token at its place");
        const double d = relative_difference(got, expected.out),
                     most = bound(dtype, double(D) * 16);
        CHECK_LE(d, most, name_of(dtype), " D ", D, " lengths from ", lengths[0]);
        worst = std::max(worst, d / most);
        cases++;
      }
  measured(cases, " cases, at most ", worst, " of the bound");
}

// exp overflows f32 at 89; a score is a sum of D products, and its rounding a relative error of its
// probability: see test_attention.cpp.
TEST(scores_of_hundreds_overflow_nothing) {
  double worst = 0, least_score = INFINITY;
  for (const Dtype dtype : kDtypes) {
    const int64_t H = 2, S = 101, D = 64;
    const Tensor cache = random_tensor({2, 2, H, S, D}, dtype, 1, 10),
                 qkv = random_tensor({2, 3 * H * D}, dtype, 2, 10),
                 out({2, H * D}, dtype, Memory::data);
    const Decoded expected = decode(download(cache), download(qkv), {3, 100}, H, S, D);
    attention_decode(out, cache, qkv, integers({3, 100}), H);
    const double d = relative_difference(download(out), expected.out),
                 score = expected.largest_score, most = bound(dtype, double(D) * score * score);
    CHECK_LE(d, most, name_of(dtype));
    worst = std::max(worst, d / most), least_score = std::min(least_score, score);
  }
  CHECK_LE(200, least_score);
  measured("scores up to ", least_score, ": at most ", worst, " of the bound");
}

TEST(too_wide_heads_are_refused_and_nothing_takes_no_time) {
  const Tensor cache({1, 2, 1, 4, 257}, Dtype::f32, Memory::data),
      qkv({1, 3 * 257}, Dtype::f32, Memory::data), none({0, 257}, Dtype::f32, Memory::data);
  CHECK_SAYS(attention_decode(qkv, cache, qkv, integers({0}), 1), "at most 256 channels, not 257");
  fill(cache, 7);
  append_to_cache(cache, none, 0, 0, 1);
  attention_decode(none, Tensor({0, 2, 1, 4, 16}, Dtype::f32, Memory::data), none, integers({}), 1);
  merge_attention(none, Tensor({1, 1, 0}, Dtype::f32, Memory::data), none,
                  Tensor({1, 1, 0}, Dtype::f32, Memory::data));
  CHECK(download(cache) == Values(size_t(cache.numel()), 7.0));
}

TEST(a_prompt_in_the_cache_and_one_more_token_equal_attention_over_all) {
  double worst = 0;
  for (const Dtype dtype : {Dtype::f32, Dtype::f64}) {
    const int64_t T = 37, H = 2, D = 24, S = 50, row = 3 * H * D;
    const Tensor all = random_tensor({T, row}, dtype, 5), out({T, H * D}, dtype, Memory::data),
                 p({1, H, T, T}, dtype, Memory::data);
    attention_plain_forward(out, {}, p, whole_sequences(all, 1, T, H));
    const Values whole = download(out), expected(whole.end() - H * D, whole.end());
    const Tensor cache({2, 2, H, S, D}, dtype, Memory::data), one({2, H * D}, dtype, Memory::data),
        two({2, row}, dtype, Memory::data);
    fill(cache, kNaN);
    // in two pieces, for the second sequence
    append_to_cache(cache, all.view(0, {20, row}), 1, 0, H);
    append_to_cache(cache, all.view(20 * row, {T - 1 - 20, row}), 1, 20, H);
    fill(two, 1);
    copy(two.view(row, {row}), all.view((T - 1) * row, {row}));
    attention_decode(one, cache, two, integers({0, int(T - 1)}), H);
    const Values got = download(one);
    const double d = relative_difference({got.end() - H * D, got.end()}, expected),
                 most = bound(dtype, double(D) * 16);
    CHECK_LE(d, most, name_of(dtype));
    // the first sequence has only its new token
    for (int64_t i = 0; i < H * D; i++) CHECK_EQ(got[size_t(i)], 1.0);
    worst = std::max(worst, d / most);
  }
  measured("at most ", worst, " of the bound");
}

TEST(embeddings_at_given_positions_are_those_rows) {
  for (const Dtype dtype : kDtypes)
    for (const int64_t C : {1, 33, 64}) {
      const Tensor wte = random_tensor({9, C}, dtype, 1), wpe = random_tensor({20, C}, dtype, 2),
                   x({4, C}, dtype, Memory::data);
      const std::vector<int> tokens = {8, -1, 0, 3}, positions = {19, 4, 0, 7};
      const Values got = in_every_order([&] {
        fill(x, kNaN);
        embedding_forward(x, integers(tokens), wte, wpe, 1, integers(positions));
        return download(x);
      });
      const Values a = download(wte), b = download(wpe);
      for (size_t r = 0; r < 4; r++)
        for (size_t c = 0; c < size_t(C); c++) {
          const double sum = tokens[r] < 0 ? 0
                                           : a[size_t(tokens[r]) * size_t(C) + c] +
                                                 b[size_t(positions[r]) * size_t(C) + c];
          CHECK_LE(std::abs(got[r * size_t(C) + c] - sum),
                   (std::abs(sum) + 1e-30) * bound(dtype, 0), name_of(dtype), " row ", r);
        }
    }
  measured(9, " cases");
}

int main(int argc, char** argv) {
  const int status = run_tests(argc, argv);
  close_device();
  return status;
}
