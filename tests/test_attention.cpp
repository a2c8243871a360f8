// test_attention.cpp: plain and flash attention, forward and backward, against the formulas in
// double precision, and against each other.
//
// Bounds, of the largest element of each output; u = 2^-24 (f32), 2^-53 (f64), 2^-8 (bf16).
//   A score is a sum of D products; its rounding, about u sqrt(D) |score|, is a relative error of
//   its probability, so the bound grows with the largest score. Sums over T keys add u sqrt(T).
//   Gradients are longer sums of such probabilities, but errors of different signs meet in them: u
//   (8 + 2 sqrt(D) |score| + 2 sqrt(T)) holds for all. bf16: sums run in f32 and do not count, but
//   what is stored is rounded (plain: scores, probabilities and their gradients; flash: out, which
//   enters delta): u (1 + |score| / 2).
#include "kernels/kernels.h"
#include "tests/tensors.h"

using Values = std::vector<double>;

struct Case {
  Dtype dtype;
  int64_t B, T, H, D;
  double deviation = 1;  // of q, k, v
};

struct Attention {
  Values out, lse, probabilities, dqkv;
  double largest_score = 0;
};

// ---- the formulas, in double

static Attention reference(const Case& c, const Values& qkv, const Values& dout) {
  const auto [B, T, H, D] = std::array{c.B, c.T, c.H, c.D};
  Attention r{Values(B * T * H * D), Values(B * H * T), Values(B * H * T * T), Values(qkv.size())};
  const auto at = [&](int64_t b, int64_t t, int part, int64_t h) {
    return ((b * T + t) * 3 + part) * H * D + h * D;
  };
  Values p(T), dp(T);
  for (int64_t b = 0; b < B; b++)
    for (int64_t h = 0; h < H; h++)
      for (int64_t t = 0; t < T; t++) {
        const double *q = &qkv[at(b, t, 0, h)], *dy = &dout[((b * T + t) * H + h) * D],
                     scale = 1 / std::sqrt(double(D));
        double most = -1e300, sum = 0, row = 0;
        for (int64_t i = 0; i <= t; i++) {
          p[i] = 0;
          for (int64_t d = 0; d < D; d++) p[i] += q[d] * qkv[at(b, i, 1, h) + d] * scale;
          most = std::max(most, p[i]);
          r.largest_score = std::max(r.largest_score, std::abs(p[i]));
        }
        for (int64_t i = 0; i <= t; i++) sum += p[i] = std::exp(p[i] - most);
        r.lse[(b * H + h) * T + t] = most + std::log(sum);
        for (int64_t i = 0; i <= t; i++) {
          r.probabilities[((b * H + h) * T + t) * T + i] = p[i] /= sum;
          dp[i] = 0;
          for (int64_t d = 0; d < D; d++) {
            r.out[((b * T + t) * H + h) * D + d] += p[i] * qkv[at(b, i, 2, h) + d];
            r.dqkv[at(b, i, 2, h) + d] += p[i] * dy[d];
            dp[i] += dy[d] * qkv[at(b, i, 2, h) + d];
          }
          row += p[i] * dp[i];
        }
        for (int64_t i = 0; i <= t; i++)
          for (int64_t d = 0; d < D; d++) {
            const double ds = p[i] * (dp[i] - row) * scale;
            r.dqkv[at(b, t, 0, h) + d] += ds * qkv[at(b, i, 1, h) + d];
            r.dqkv[at(b, i, 1, h) + d] += ds * q[d];
          }
      }
  return r;
}

// ---- ours

struct Inputs {
  Tensor qkv, dout;
  explicit Inputs(const Case& c)
      : qkv(random_tensor({c.B, c.T, 3, c.H, c.D}, c.dtype, 1, c.deviation)),
        dout(random_tensor({c.B, c.T, c.H, c.D}, c.dtype, 2)) {}
};

static Tensor unwritten(Shape shape, Dtype dtype) {
  return tensor_of(Values(elements(shape), kNaN), shape, dtype);
}

// Runs in every order of threads; results of one. (Not where oneDNN stands in for cuBLAS: its bits
// depend on the number of threads.)
static Attention run(const Case& c, const Inputs& in, bool flash) {
  const Shape out_shape{c.B, c.T, c.H, c.D},
      kept_shape = flash ? Shape{c.B, c.H, c.T} : Shape{c.B, c.H, c.T, c.T};
  const auto once = [&] {
    const Tensor out = unwritten(out_shape, c.dtype), dqkv = unwritten(in.qkv.shape(), c.dtype);
    const Tensor kept = unwritten(kept_shape, flash ? master_dtype(c.dtype) : c.dtype);
    if (flash) {
      attention_flash_forward(out, kept, in.qkv, c.B, c.T, c.H);
      attention_flash_backward(dqkv, in.dout, out, kept, in.qkv, c.B, c.T, c.H);
    } else {
      attention_plain_forward(out, kept, in.qkv, c.B, c.T, c.H);
      attention_plain_backward(dqkv, in.dout, kept, in.qkv, c.B, c.T, c.H);
    }
    Values together;
    for (const Tensor& t : {out, kept, dqkv})
      for (double v : download(t)) together.push_back(v);
    return together;
  };
#ifdef CPU_FAST
  const Values all = flash || matmul_backend == MatmulBackend::own ? in_every_order(once) : once();
#else
  const Values all = in_every_order(once);
#endif
  const auto out_end = all.begin() + elements(out_shape), kept_end = out_end + elements(kept_shape);
  Attention a;
  a.out.assign(all.begin(), out_end);
  (flash ? a.lse : a.probabilities).assign(out_end, kept_end);
  a.dqkv.assign(kept_end, all.end());
  return a;
}

struct Worst {
  double forward = 0, backward = 0;  // errors as parts of their bounds
};

static void check(const Case& c, bool flash, Worst& worst) {
  const Inputs in(c);
  const Attention expected = reference(c, download(in.qkv), download(in.dout)),
                  got = run(c, in, flash);
  const double score = expected.largest_score;
  const double u = c.dtype == Dtype::f64 ? 0x1p-53 : 0x1p-24;
  const double bound =
      c.dtype == Dtype::bf16
          ? 0x1p-8 * (1 + score / 2)
          : u * (8 + 2 * std::sqrt(double(c.D)) * score + 2 * std::sqrt(double(c.T)));
  const auto within = [&](const char* what, const Values& a, const Values& b, double& part) {
    const double d = relative_difference(a, b);
    CHECK_LE(d, bound, what, " of ", flash ? "flash " : "plain ", name_of(c.dtype), ", B = ", c.B,
             ", T = ", c.T, ", H = ", c.H, ", D = ", c.D);
    part = std::max(part, d / bound);
  };
  within("out", got.out, expected.out, worst.forward);
  if (flash) within("lse", got.lse, expected.lse, worst.forward);
  else within("probabilities", got.probabilities, expected.probabilities, worst.forward);
  within("dqkv", got.dqkv, expected.dqkv, worst.backward);
}

static void sweep(Dtype dtype, bool flash) {
#if defined(CPU_FAST) || defined(CPU_FAITHFUL)
  const std::vector<int64_t> lengths{1, 7, 33, 64, 100}, widths{1, 31, 32, 64};
#else  // fewer, so that a PTX runner without a GPU is done in a minute
  const std::vector<int64_t> lengths{1, 33, 100}, widths{1, 31, 64};
#endif
  Worst worst;
  int cases = 0;
  for (int64_t T : lengths)
    for (int64_t D : widths) {
      const int64_t B = 1 + cases % 2, H = 1 + cases / 2 % 3;
      check({dtype, B, T, H, D}, flash, worst);
      cases++;
    }
  for (int64_t D : {8, 24, 80, 128}) check({dtype, 1, 40, 2, D}, flash, worst), cases++;
  measured(cases, " shapes, largest error ", worst.forward, " (forward), ", worst.backward,
           " (backward) of the bound");
}

TEST(plain_f32_equals_double) { sweep(Dtype::f32, false); }
TEST(plain_f64_equals_double) { sweep(Dtype::f64, false); }
TEST(plain_bf16_equals_double) { sweep(Dtype::bf16, false); }
TEST(flash_f32_equals_double) { sweep(Dtype::f32, true); }
TEST(flash_f64_equals_double) { sweep(Dtype::f64, true); }
TEST(flash_bf16_equals_double) { sweep(Dtype::bf16, true); }

TEST(plain_with_own_matmul_equals_double) {
  matmul_backend = MatmulBackend::own;
  Worst worst;
  for (Dtype dtype : {Dtype::f32, Dtype::f64, Dtype::bf16})
    for (int64_t D : {31, 32}) check({dtype, 2, 33, 2, D}, false, worst);
  matmul_backend = MatmulBackend::cublas;
  measured("6 shapes, largest error ", worst.forward, " (forward), ", worst.backward,
           " (backward) of the bound");
}

// exp overflows f32 at 89: scores of several hundred need the row's largest to be taken off first.
TEST(scores_of_hundreds_overflow_nothing) {
  Worst worst;
  for (bool flash : {false, true})
    for (Dtype dtype : {Dtype::f32, Dtype::f64}) check({dtype, 1, 70, 1, 32, 10}, flash, worst);
  const Case c{Dtype::f32, 1, 70, 1, 32, 10};
  const Inputs in(c);
  const double score = reference(c, download(in.qkv), download(in.dout)).largest_score;
  CHECK_LE(200, score);
  measured("largest score ", score, ", largest error ", worst.forward, " (forward), ",
           worst.backward, " (backward) of the bound");
}

TEST(flash_equals_plain) {
  double worst = 0;
  for (auto [T, D] : {std::pair<int64_t, int64_t>{100, 64}, {65, 31}, {128, 48}}) {
    const Case c{Dtype::f64, 2, T, 2, D};
    const Inputs in(c);
    const Attention plain = run(c, in, false), flash = run(c, in, true);
    worst = std::max({worst, relative_difference(flash.out, plain.out),
                      relative_difference(flash.dqkv, plain.dqkv)});
  }
  CHECK_LE(worst, 1e-13);  // a thousand roundings
  measured("f64, max|d| / max = ", worst);
}

TEST(a_query_sees_no_later_key) {
  const Case c{Dtype::f32, 1, 80, 2, 16};
  const Inputs in(c);
  Values changed = download(in.qkv);
  for (int64_t t = 70; t < 80; t++)
    for (int64_t i = 0; i < 3 * c.H * c.D; i++) changed[t * 3 * c.H * c.D + i] += 5;
  Inputs other = in;
  other.qkv = tensor_of(changed, in.qkv.shape(), c.dtype);
  for (bool flash : {false, true}) {
    const Attention a = run(c, in, flash), b = run(c, other, flash);
    for (int64_t i = 0; i < 70 * c.H * c.D; i++)
      CHECK(a.out[i] == b.out[i], "row ", i / (c.H * c.D), " of out saw a change in row 70");
    CHECK(a.out != b.out);
  }
  measured("70 of 80 rows keep their bits when the others change, plain and flash");
}

TEST(wrong_arguments_are_refused) {
  const Tensor qkv({1, 4, 3, 1, 160}, Dtype::f32, Memory::data),
      out({1, 4, 1, 160}, Dtype::f32, Memory::data), lse({1, 1, 4}, Dtype::f32, Memory::data);
  CHECK_SAYS(attention_flash_forward(out, lse, qkv, 1, 4, 1), "128");
  CHECK_SAYS(attention_flash_forward(out, lse, qkv, 1, 5, 1), "T = 5");
  CHECK_SAYS(attention_plain_forward(out, lse, qkv, 1, 4, 1), "(1, 1, 4)");
  measured("D over 128, shapes that disagree");
}

int main(int argc, char** argv) {
  const int status = run_tests(argc, argv);
  close_device();
  return status;
}
