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
  Values out, lse, probabilities, dq, dk, dv, dqkv;
  double largest_score = 0;
};

// ---- the formulas, in double

static std::vector<int64_t> places(const Positions& p) {
  std::vector<int64_t> all;
  for (const Range& piece : {p.low, p.high})
    for (int64_t t = piece.begin; t < piece.end; t++) all.push_back(t);
  return all;
}

// q (B,Tq,H,D), k and v (B,Tk,H,D), each row with its position in the sequence. lse and `delta`
// (dout times out) may come from more keys than these: then gradients are these keys' part.
static Attention reference(int64_t B, int64_t H, int64_t D, const Values& q, const Values& k,
                           const Values& v, const Values& dout, const Positions& queries,
                           const Positions& keys, const Attention* whole = nullptr) {
  const std::vector<int64_t> q_at = places(queries), k_at = places(keys);
  const int64_t Tq = int64_t(q_at.size()), Tk = int64_t(k_at.size());
  Attention r{Values(q.size()),
              Values(B * H * Tq),
              Values(B * H * Tq * Tk),
              Values(q.size()),
              Values(k.size()),
              Values(k.size()),
              {}};
  const double scale = 1 / std::sqrt(double(D));
  Values p(Tk), dp(Tk);
  for (int64_t b = 0; b < B; b++)
    for (int64_t h = 0; h < H; h++)
      for (int64_t t = 0; t < Tq; t++) {
        const int64_t row = ((b * Tq + t) * H + h) * D, statistic = (b * H + h) * Tq + t;
        const auto key = [&](int64_t i) { return ((b * Tk + i) * H + h) * D; };
        int64_t seen = 0;
        while (seen < Tk && k_at[seen] <= q_at[t]) seen++;
        double most = -1e300, sum = 0;
        for (int64_t i = 0; i < seen; i++) {
          p[i] = 0;
          for (int64_t d = 0; d < D; d++) p[i] += q[row + d] * k[key(i) + d] * scale;
          most = std::max(most, p[i]);
          r.largest_score = std::max(r.largest_score, std::abs(p[i]));
        }
        for (int64_t i = 0; i < seen; i++) sum += std::exp(p[i] - most);
        r.lse[statistic] = seen ? most + std::log(sum) : -std::numeric_limits<double>::infinity();
        for (int64_t i = 0; i < seen; i++) {
          p[i] = std::exp(p[i] - r.lse[statistic]);
          for (int64_t d = 0; d < D; d++) r.out[row + d] += p[i] * v[key(i) + d];
        }
        const Attention& all = whole ? *whole : r;
        double delta = 0;
        for (int64_t d = 0; d < D; d++) delta += dout[row + d] * all.out[row + d];
        for (int64_t i = 0; i < seen; i++) {
          p[i] *= std::exp(r.lse[statistic] - all.lse[statistic]);
          r.probabilities[statistic * Tk + i] = p[i];
          dp[i] = 0;
          for (int64_t d = 0; d < D; d++) {
            r.dv[key(i) + d] += p[i] * dout[row + d];
            dp[i] += dout[row + d] * v[key(i) + d];
          }
          const double ds = p[i] * (dp[i] - delta) * scale;
          for (int64_t d = 0; d < D; d++) {
            r.dq[row + d] += ds * k[key(i) + d];
            r.dk[key(i) + d] += ds * q[row + d];
          }
        }
      }
  return r;
}

// Part `part` of a tensor (R,parts,H,D), and the tensor of its parts
static Values part_of(const Values& x, int64_t parts, int64_t part, int64_t width) {
  Values y;
  for (size_t row = 0; row < x.size(); row += size_t(parts * width))
    y.insert(y.end(), &x[row + size_t(part * width)], &x[row] + (part + 1) * width);
  return y;
}
static Values packed(const std::vector<Values>& parts, int64_t width) {
  Values x;
  for (size_t row = 0; row < parts[0].size(); row += size_t(width))
    for (const Values& p : parts) x.insert(x.end(), &p[row], &p[row] + width);
  return x;
}

static Attention reference(const Case& c, const Values& qkv, const Values& dout) {
  const int64_t C = c.H * c.D;
  Attention r = reference(c.B, c.H, c.D, part_of(qkv, 3, 0, C), part_of(qkv, 3, 1, C),
                          part_of(qkv, 3, 2, C), dout, {{0, c.T}}, {{0, c.T}});
  r.dqkv = packed({r.dq, r.dk, r.dv}, C);
  return r;
}

// ---- ours

static Tensor unwritten(Shape shape, Dtype dtype) {
  return tensor_of(Values(elements(shape), kNaN), shape, dtype);
}
static Tensor delta_of(const Tensor& dout, const Tensor& out, int64_t B, int64_t T, int64_t H) {
  const Tensor delta = unwritten({B, H, T}, master_dtype(out.dtype()));
  attention_delta(delta, dout, out);
  return delta;
}

struct Inputs {
  Tensor qkv, dout;
  explicit Inputs(const Case& c)
      : qkv(random_tensor({c.B, c.T, 3, c.H, c.D}, c.dtype, 1, c.deviation)),
        dout(random_tensor({c.B, c.T, c.H, c.D}, c.dtype, 2)) {}
};

// Runs in every order of threads; results of one. (Not where oneDNN stands in for cuBLAS: its bits
// depend on the number of threads.)
static Attention run(const Case& c, const Inputs& in, bool flash) {
  const Shape out_shape{c.B, c.T, c.H, c.D},
      kept_shape = flash ? Shape{c.B, c.H, c.T} : Shape{c.B, c.H, c.T, c.T};
  const auto once = [&] {
    const Tensor out = unwritten(out_shape, c.dtype), dqkv = unwritten(in.qkv.shape(), c.dtype);
    const Tensor kept = unwritten(kept_shape, flash ? master_dtype(c.dtype) : c.dtype);
    const AttentionInputs all = whole_sequences(in.qkv, c.B, c.T, c.H);
    if (flash) {
      attention_flash_forward(out, kept, all);
      const Tensor delta = delta_of(in.dout, out, c.B, c.T, c.H);
      attention_flash_backward(dqkv, dqkv, in.dout, delta, kept, all);
    } else {
      attention_plain_forward(out, {}, kept, all);
      const Tensor delta = delta_of(in.dout, out, c.B, c.T, c.H);
      attention_plain_backward(dqkv, dqkv, in.dout, delta, {}, kept, all);
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

// More heads than the blocks of one group walk over (attention.cuh), and a last group of fewer.
TEST(every_head_of_many_gets_its_tiles) {
  Worst worst;
  for (Dtype dtype : {Dtype::f32, Dtype::f64, Dtype::bf16})
    check({dtype, 5, 70, 7, 8}, true, worst);
  measured("35 heads, largest error ", worst.forward, " (forward), ", worst.backward,
           " (backward) of the bound");
}

TEST(keys_that_no_query_sees_get_no_gradient) {
  for (const Dtype dtype : {Dtype::f32, Dtype::bf16})
    for (const bool flash : {true, false}) {
      const Tensor none({1, 0, 2, 8}, dtype, Memory::workspace),
          statistics({1, 2, 0}, master_dtype(dtype), Memory::workspace),
          kv = random_tensor({1, 5, 2, 2, 8}, dtype, 1), dkv = unwritten(kv.shape(), dtype);
      const AttentionInputs in{none, kv, 1, 2, {}, {{0, 5}}};
      attention_delta(statistics, none, none);
      if (flash) attention_flash_backward(none, dkv, none, statistics, statistics, in);
      else attention_plain_backward(none, dkv, none, statistics, statistics, {}, in);
      CHECK(download(dkv) == Values(dkv.numel()));
    }
}

static double largest_difference(const Values& a, const Values& b) {
  double most = 0;
  for (size_t i = 0; i < a.size(); i++) most = worst_of(most, std::abs(a[i] - b[i]));
  return most;
}
// of the whole: the root of the sum of squares
static double distance(const Values& a, const Values& b) {
  double d = 0, norm = 0;
  for (size_t i = 0; i < a.size(); i++) d += (a[i] - b[i]) * (a[i] - b[i]), norm += b[i] * b[i];
  return d == 0 ? 0 : std::sqrt(d / norm);
}

// Tensor cores round probabilities and their gradients to bf16 on the way. Widths of 1 and 31 take
// the form in registers: their rows begin at no multiple of 16 bytes.
TEST(flash_bf16_is_close_at_every_width_and_length) {
  double out = 0, gradients = 0, lse = 0;
  int cases = 0;
  for (int64_t D : {16, 32, 64, 128, 8, 24, 80, 31})
    for (int64_t T : {1, 15, 16, 17, 63, 64, 65, 150, 257}) {
      const Case c{Dtype::bf16, 1 + cases % 2 * (T < 20), T, 1 + cases % 2, D};
      const Inputs in(c);
      const Attention expected = reference(c, download(in.qkv), download(in.dout)),
                      got = run(c, in, true);
      const auto where = sentence("T = ", T, ", D = ", D, ", B = ", c.B, ", H = ", c.H);
      out = std::max(out, relative_difference(got.out, expected.out));
      lse = std::max(lse, largest_difference(got.lse, expected.lse));
      gradients = std::max({gradients, relative_difference(got.dqkv, expected.dqkv),
                            distance(got.dqkv, expected.dqkv)});
      CHECK_LE(out, 4e-3, where);
      CHECK_LE(gradients, 5e-3, where);
      CHECK_LE(lse, 1e-5, where);
      cases++;
    }
  measured(cases, " shapes, out off by ", out, ", gradients by ", gradients, ", lse by ", lse);
}

// Queries and keys from different tensors, as ranks of a ring have them: rows of two pieces of the
// sequence against rows of two others. What all keys give together is merged here and must be what
// one call over all keys gives.
static void check_pieces(bool flash, Dtype dtype, int64_t T, int64_t D, const Positions& queries,
                         const std::vector<Positions>& sets, double& worst) {
  const int64_t B = 2, H = 2, C = H * D, Tq = queries.rows();
  const Tensor q = random_tensor({B, Tq, H, D}, dtype, 1),
               dout = random_tensor({B, Tq, H, D}, dtype, 2);
  const Dtype acc = master_dtype(dtype);
  const auto forward = [=](const Tensor& o, const Tensor& lse, const Tensor& q, const Tensor& kv,
                           const Positions& keys) {
    const Tensor p = unwritten({B, H, Tq, keys.rows()}, dtype);
    const AttentionInputs in{q, kv, B, H, queries, keys};
    if (flash) attention_flash_forward(o, lse, in);
    else attention_plain_forward(o, lse, p, in);
  };
  const auto backward = [=](const Tensor& dq, const Tensor& dkv, const Tensor& dout,
                            const Tensor& o, const Tensor& lse, const Tensor& q, const Tensor& kv,
                            const Positions& keys, bool add_dq) {
    const AttentionInputs in{q, kv, B, H, queries, keys};
    const Tensor delta = delta_of(dout, o, B, Tq, H);
    if (flash) attention_flash_backward(dq, dkv, dout, delta, lse, in, add_dq);
    else attention_plain_backward(dq, dkv, dout, delta, lse, {}, in, add_dq);
  };
  // (not where oneDNN stands in for cuBLAS: its bits depend on the number of threads)
  const auto run = [=](auto once) {
#ifdef CPU_FAST
    if (!flash) return once();
#endif
    return in_every_order(once);
  };
  struct Set {
    Positions at;
    Tensor kv;
    Values k, v;
  };
  std::vector<Set> rounds;
  const Tensor all = random_tensor({B, T, 2, H, D}, dtype, 3);
  const Values all_kv = download(all);
  for (const Positions& at : sets) {
    Values kv;
    for (int64_t b = 0; b < B; b++)
      for (int64_t t : places(at)) {
        const double* row = &all_kv[size_t((b * T + t) * 2 * C)];
        kv.insert(kv.end(), row, row + 2 * C);
      }
    rounds.push_back({at, tensor_of(kv, {B, at.rows(), 2, H, D}, dtype), part_of(kv, 2, 0, C),
                      part_of(kv, 2, 1, C)});
  }
  const Values q_values = download(q), dy_values = download(dout);
  const Attention whole = reference(B, H, D, q_values, part_of(all_kv, 2, 0, C),
                                    part_of(all_kv, 2, 1, C), dy_values, queries, {{0, T}});
  // plain attention rounds scores to bf16, too
  const double bound = dtype == Dtype::f64   ? 1e-13
                       : dtype == Dtype::f32 ? 1e-5
                       : flash               ? 5e-3
                                             : 0x1p-8 * (1 + whole.largest_score / 2);

  // forward: each round, and what they give together
  const auto close = [&](const char* what, const Values& a, const Values& b) {
    const double d = relative_difference(a, b);
    CHECK_LE(d, bound, what, ", ", name_of(dtype), ", T = ", T, ", D = ", D);
    worst = std::max(worst, d / bound);
  };
  const Tensor out = unwritten(q.shape(), acc), all_lse = unwritten({B, H, Tq}, acc);
  for (const Set& set : rounds) {
    const Tensor o = unwritten(q.shape(), acc), lse = unwritten({B, H, Tq}, acc);
    run([&] {
      forward(o, lse, q, set.kv, set.at);
      Values both = download(o);
      for (double x : download(lse)) both.push_back(x);
      return both;
    });
    const Attention expected =
        reference(B, H, D, q_values, set.k, set.v, dy_values, queries, set.at);
    close("out of a round", download(o), expected.out);
    const Values round_lse = download(lse);
    for (size_t i = 0; i < round_lse.size(); i++)
      if (std::isinf(expected.lse[i])) CHECK_LE(round_lse[i], -1e38);
    if (&set == &rounds[0]) {
      copy(out, o);
      copy(all_lse, lse);
      continue;
    }
    const Tensor before = unwritten(out.shape(), acc), lse_before = unwritten(lse.shape(), acc);
    copy(before, out);
    copy(lse_before, all_lse);
    in_every_order([&] {
      copy(out, before);
      copy(all_lse, lse_before);
      merge_attention(out, all_lse, o, lse);
      Values both = download(out);
      for (double x : download(all_lse)) both.push_back(x);
      return both;
    });
  }
  close("merged out", download(out), whole.out);
  close("merged lse", download(all_lse), whole.lse);

  // backward, each round's part added to what is there
  const Tensor o = tensor_of(whole.out, q.shape(), dtype),
               lse = tensor_of(whole.lse, {B, H, Tq}, acc),
               start = random_tensor(q.shape(), acc, 4);
  Values dq_expected = download(start);
  for (size_t i = 0; i < dq_expected.size(); i++) dq_expected[i] += whole.dq[i];
  const Values dq = run([&] {
    const Tensor d = unwritten(q.shape(), acc);
    copy(d, start);
    for (const Set& set : rounds) {
      const Tensor dkv = unwritten(set.kv.shape(), acc);
      backward(d, dkv, dout, o, lse, q, set.kv, set.at, true);
    }
    return download(d);
  });
  close("dq", dq, dq_expected);
  for (const Set& set : rounds) {
    const Attention expected =
        reference(B, H, D, q_values, set.k, set.v, dy_values, queries, set.at, &whole);
    const Tensor dkv = unwritten(set.kv.shape(), dtype), d = unwritten(q.shape(), dtype);
    backward(d, dkv, dout, o, lse, q, set.kv, set.at, false);
    const Values got = download(dkv);
    // where no query sees a key, gradients are zero, and have no magnitude
    if (distance(expected.dv, Values(expected.dv.size())) == 0)
      CHECK(got == Values(got.size()), "a gradient from a query that sees nothing");
    else close("dkv", got, packed({expected.dk, expected.dv}, C));
  }
}

TEST(queries_and_keys_of_any_pieces_merge_to_the_whole) {
  double worst = 0;
  const int64_t T = 150;
  const Range pieces[]{{0, 37}, {37, 75}, {75, 112}, {112, 150}};
  for (auto [dtype, D] : {std::pair<Dtype, int64_t>{Dtype::f64, 20},
                          {Dtype::f32, 31},
                          {Dtype::bf16, 31},
                          {Dtype::bf16, 16},
                          {Dtype::bf16, 64},
                          {Dtype::bf16, 128}})
    for (int r : {0, 1})
      for (bool flash : {true, false})
        if (flash || D < 64)
          check_pieces(flash, dtype, T, D, {pieces[r], pieces[3 - r]},
                       {{pieces[0], pieces[3]}, {pieces[1], pieces[2]}}, worst);
  check_pieces(true, Dtype::bf16, 257, 32, {{0, 257}}, {{{0, 130}}, {{130, 257}}}, worst);
  check_pieces(true, Dtype::bf16, 100, 64, {{100, 130}}, {{{0, 100}}}, worst);
  measured("22 cuts, largest error ", worst, " of the bound");
}

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

// In bf16, too, where scores stay f32: their roundings show in lse. `out`: u for its own rounding
// and u for that of the probabilities. Gradients: as much, and the same again for what delta has of
// the rounding of out.
TEST(scores_of_hundreds_overflow_nothing_in_bf16) {
  double out = 0, lse = 0, gradients = 0;
  for (int64_t D : {32, 64, 31}) {
    const Case c{Dtype::bf16, 1, 150, 2, D, 10};
    const Inputs in(c);
    const Attention expected = reference(c, download(in.qkv), download(in.dout)),
                    got = run(c, in, true);
    const double score = expected.largest_score;
    CHECK_LE(200, score);
    out = std::max(out, relative_difference(got.out, expected.out));
    lse = std::max(lse, largest_difference(got.lse, expected.lse) / score);
    gradients = std::max(gradients, relative_difference(got.dqkv, expected.dqkv));
  }
  measured("out off by ", out, ", lse by ", lse, " of the largest score, gradients by ", gradients);
  CHECK_LE(out, 0x1p-7);
  CHECK_LE(lse, 1e-6);
  CHECK_LE(gradients, 0x1p-6);
}

TEST(results_whose_weights_are_e_to_the_300_are_merged) {
  for (const Dtype acc : {Dtype::f32, Dtype::f64}) {
    const int64_t T = 3, H = 2, D = 5;
    const double none = acc == Dtype::f32 ? std::numeric_limits<float>::lowest()
                                          : std::numeric_limits<double>::lowest();
    const Values a_lse = {300, 301, -300, -302, none, 7},
                 b_lse = {301, -400, -299, -302, 310, none};
    const Shape shape{1, T, H, D};
    const Tensor a = random_tensor(shape, acc, 1), b = random_tensor(shape, acc, 2),
                 lse = tensor_of(a_lse, {1, H, T}, acc), more = tensor_of(b_lse, {1, H, T}, acc);
    Values out = download(a), both(6), other = download(b);
    for (int64_t h = 0; h < H; h++)
      for (int64_t t = 0; t < T; t++) {
        const size_t i = size_t(h * T + t);
        const double most = std::max(a_lse[i], b_lse[i]), of_a = std::exp(a_lse[i] - most),
                     of_b = std::exp(b_lse[i] - most);
        both[i] = most + std::log(of_a + of_b);
        for (int64_t d = 0; d < D; d++) {
          double& x = out[size_t((t * H + h) * D + d)];
          x = (of_a * x + of_b * other[size_t((t * H + h) * D + d)]) / (of_a + of_b);
        }
      }
    merge_attention(a, lse, b, more);
    // weights are exp of differences of numbers of 300, which are rounded
    const double bound = 1000 * (acc == Dtype::f32 ? 0x1p-24 : 0x1p-53);
    CHECK_LE(relative_difference(download(a), out), bound, name_of(acc));
    CHECK_LE(relative_difference(download(lse), both), bound, name_of(acc));
  }
  measured("12 rows");
}

// Rows of whole packs at an address that is none: what looks at the addresses of all its arguments
// but one would read or write that one in packs.
TEST(rows_at_odd_addresses_have_the_same_results) {
  double worst = 0;
  const int64_t B = 1, T = 40, H = 2, D = 16;
  const Positions all{{0, T}};
  for (const Dtype dtype : {Dtype::f32, Dtype::bf16})
    for (int odd = 0; odd < 6; odd++) {
      auto place = [&, i = 0](const Tensor& x) mutable {
        const int64_t first = i++ == odd;
        const Tensor t = Tensor({first + x.numel()}, dtype, Memory::data).view(first, x.shape());
        copy(t, x);
        return t;
      };
      const Tensor q = place(random_tensor({B, T, H, D}, dtype, 1)),
                   kv = place(random_tensor({B, T, 2, H, D}, dtype, 2)),
                   dout = place(random_tensor({B, T, H, D}, dtype, 3)),
                   out = place(unwritten({B, T, H, D}, dtype)), dq = place(out), dkv = place(kv),
                   lse = unwritten({B, H, T}, master_dtype(dtype));
      const AttentionInputs in{q, kv, B, H, all, all};
      attention_flash_forward(out, lse, in);
      attention_flash_backward(dq, dkv, dout, delta_of(dout, out, B, T, H), lse, in);
      const Values pairs = download(kv);
      const Attention expected = reference(B, H, D, download(q), part_of(pairs, 2, 0, H * D),
                                           part_of(pairs, 2, 1, H * D), download(dout), all, all);
      for (const double d :
           {relative_difference(download(out), expected.out),
            relative_difference(download(dq), expected.dq),
            relative_difference(download(dkv), packed({expected.dk, expected.dv}, H * D))}) {
        CHECK_LE(d, dtype == Dtype::f32 ? 1e-5 : 0x1p-7, name_of(dtype), ", argument ", odd);
        worst = std::max(worst, d);
      }
    }
  measured("6 arguments, f32 and bf16: off by ", worst);
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
  CHECK_SAYS(attention_flash_forward(out, lse, whole_sequences(qkv, 1, 4, 1)), "128");
  CHECK_SAYS(attention_flash_forward(out, lse, whole_sequences(qkv, 1, 5, 1)), "T = 5");
  CHECK_SAYS(attention_plain_forward(out, {}, lse, whole_sequences(qkv, 1, 4, 1)), "(1, 1, 4)");
  const auto refuses = [&](const Positions& queries, const Positions& keys, const char* why) {
    const Tensor kv({1, keys.rows(), 2, 1, 160}, Dtype::f32, Memory::data);
    const AttentionInputs in{out, kv, 1, 1, queries, keys};
    CHECK_SAYS(attention_flash_forward(out, lse, in), why);
    CHECK_SAYS(attention_plain_forward(out, {}, {}, in), why);
  };
  refuses({{0, 4}}, {}, "queries without a key");
  refuses({{2, 4}, {0, 2}}, {{0, 4}}, "must ascend");
  refuses({{0, 4}}, {{2, 4}, {0, 2}}, "must ascend");
  const Tensor small({1, 4, 1, 8}, Dtype::bf16, Memory::data),
      pairs({1, 4, 2, 1, 8}, Dtype::bf16, Memory::data);
  CHECK_SAYS(attention_flash_backward(small, pairs, small, lse, lse,
                                      {small, pairs, 1, 1, {{0, 4}}, {{0, 4}}}, true),
             "bf16");
  measured("D over 128, shapes that disagree, no key, pieces out of order, bf16 added to");
}

int main(int argc, char** argv) {
  const int status = run_tests(argc, argv);
  close_device();
  return status;
}
