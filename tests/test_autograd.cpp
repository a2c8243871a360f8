// test_autograd.cpp: every op of the tape, and a whole small GPT, against central differences in
// double precision; who may write where; and what memory the tape holds.
//
// A loss is a sum of an op's outputs with fixed random weights. `check_gradients` compares the
// tape's gradient of each input and parameter with (loss(x + h) - loss(x - h)) / 2h, one element at
// a time (some of them, for a large tensor, always the last), and once along a random direction
// through all elements of a tensor, so that none goes unchecked.
#include <algorithm>
#include <random>

#include "tests/one_rank.h"
#include "tests/test.h"

// ---- tools

#ifdef CPU_FAST
// elements of a tensor that are checked one by one; layers of the whole GPT
constexpr int64_t kElements = 40, kLayers = 2;
constexpr int kSteps = 200;  // of the model of one's own
#else
// where every thread of a kernel is simulated, time is short
constexpr int64_t kElements = 1, kLayers = 1;
constexpr int kSteps = 3;
#endif

static std::vector<double> noise(int64_t n, unsigned seed) {
  std::mt19937 bits(seed);
  std::vector<double> v(n);
  for (double& x : v) x = bits() / 2147483648.0 - 1;  // uniform in [-1, 1)
  return v;
}

static Tensor random_tensor(Shape shape, unsigned seed) {
  Tensor t(std::move(shape), Dtype::f64, Memory::activations);
  upload(t, noise(t.numel(), seed).data());
  return t;
}

static Param random_param(const std::string& name, Shape shape, unsigned seed) {
  Param p;
  p.name = name;
  p.slice = {1, shape[0], elements(shape) / shape[0], 0, shape[0]};
  p.shape = shape;
  p.value = random_tensor(shape, seed);
  p.grad = Tensor(shape, Dtype::f64, Memory::gradients);
  fill(p.grad, 0);
  return p;
}

// The sum of y with random weights; when recording, those become y's gradient.
static double weigh(Tape& tape, const Var& y, unsigned seed) {
  const std::vector<double> values = download(y.value);
  const Tensor weights = random_tensor(y.value.shape(), seed);
  double sum = 0;
  const std::vector<double> w = download(weights);
  for (size_t i = 0; i < values.size(); i++) sum += w[i] * values[i];
  if (tape.recording()) *y.grad = weights;
  return sum;
}

using Loss = std::function<double(Tape&, const std::vector<Var>&)>;

struct Checked {  // a tensor whose gradient is checked
  std::string name;
  Tensor value;
  std::vector<double> gradient;
};

struct Worst {  // the largest differences, and the largest gradient
  double element = 0, direction = 0, gradient = 0;
  std::string name;
  void see(double& worst, double d, const std::string& where) {
    const double larger = worst_of(worst, d);
    if (larger > worst) worst = larger, name = where;
  }
};

static std::vector<Var> leaves(const std::vector<Tensor>& x) {
  std::vector<Var> vars(x.size());
  for (size_t i = 0; i < x.size(); i++) vars[i].value = x[i];
  return vars;
}

// The tape's gradients of x and of each param.
static std::vector<Checked> tape_gradients(const std::vector<Tensor>& x,
                                           const std::vector<Param*>& params, const Loss& loss,
                                           const std::function<void()>& finish) {
  for (Param* p : params) fill(p->grad, 0);
  Tape tape;
  const std::vector<Var> vars = leaves(x);
  loss(tape, vars);
  tape.backward();
  if (finish) finish();
  CHECK_EQ(tape.size(), size_t(0));
  std::vector<Checked> all;
  for (size_t i = 0; i < x.size(); i++)
    all.push_back({sentence("input ", i), x[i], download(take(vars[i].grad))});
  for (Param* p : params) all.push_back({p->name, p->value, download(p->grad)});
  return all;
}

static Worst differences(const std::vector<Tensor>& x, const std::vector<Param*>& params,
                         const Loss& loss, const std::function<void()>& finish = nullptr) {
  const double h = 1e-5;
  const auto forward = [&] {
    Tape tape(false);
    return loss(tape, leaves(x));
  };
  Worst worst;
  for (const Checked& c : tape_gradients(x, params, loss, finish)) {
    const std::vector<double> at = download(c.value), u = noise(at.size(), 77);
    // d loss / d epsilon of value + epsilon * direction
    const auto slope = [&](const std::function<double(size_t)>& direction) {
      double sides[2];
      for (int side : {0, 1}) {
        std::vector<double> moved = at;
        for (size_t j = 0; j < at.size(); j++) moved[j] += (side ? h : -h) * direction(j);
        upload(c.value, moved.data());
        sides[side] = forward();
      }
      return (sides[1] - sides[0]) / (2 * h);
    };
    const int64_t n = at.size(), stride = std::max<int64_t>(1, n / kElements);
    for (int64_t i = n - 1; i >= 0; i -= stride)
      worst.see(worst.element,
                std::abs(slope([&](size_t j) { return j == size_t(i) ? 1 : 0; }) - c.gradient[i]),
                c.name);
    double along = 0;
    for (int64_t i = 0; i < n; i++) {
      along += c.gradient[i] * u[i];
      worst.gradient = std::max(worst.gradient, std::abs(c.gradient[i]));
    }
    worst.see(worst.direction, std::abs(slope([&](size_t j) { return u[j]; }) - along), c.name);
    upload(c.value, at.data());
  }
  return worst;
}

// Every difference must be below 1e-7 of the largest gradient of x and params. With h = 1e-5 the
// truncation is h^2 = 1e-10 times a third derivative, and rounding 1e-16 / h = 1e-11 times the
// loss.
static void check_gradients(const std::vector<Tensor>& x, const std::vector<Param*>& params,
                            const Loss& loss, const std::function<void()>& finish = nullptr) {
  static double element, direction;  // of this test
  if (test::note.empty()) element = direction = 0;
  const Worst w = differences(x, params, loss, finish);
  CHECK_LE(w.element, 1e-7 * w.gradient, "the worst is ", w.name);
  CHECK_LE(w.direction, 1e-7 * w.gradient, "the worst is ", w.name);
  element = std::max(element, w.element / w.gradient),
  direction = std::max(direction, w.direction / w.gradient);
  test::note = sentence("differences ", element, " of the largest gradient, ", direction,
                        " along random directions");
}

// ---- ops

TEST(gradient_of_linear) {
  Param w = random_param("w", {5, 3, 2}, 2), bias = random_param("bias", {3, 2}, 3);
  for (Param* b : {&bias, static_cast<Param*>(nullptr)}) {
    std::vector<Param*> params = {&w};
    if (b) params.push_back(b);
    check_gradients({random_tensor({7, 5}, 1)}, params, [&](Tape& tape, const std::vector<Var>& x) {
      const Var y = linear(tape, x[0], w);
      return weigh(tape, b ? add_bias(tape, y, *b) : y, 4);
    });
  }
}

TEST(gradient_of_linear_transposed) {
  Param w = random_param("w", {6, 5}, 2);
  check_gradients({random_tensor({7, 5}, 1)}, {&w}, [&](Tape& tape, const std::vector<Var>& x) {
    return weigh(tape, linear(tape, x[0], w, true), 3);
  });
}

TEST(gradient_of_layernorm) {
  Param gain = random_param("gain", {9}, 2), bias = random_param("bias", {9}, 3);
  check_gradients({random_tensor({7, 9}, 1)}, {&gain, &bias},
                  [&](Tape& tape, const std::vector<Var>& x) {
                    return weigh(tape, layernorm(tape, x[0], gain, bias), 4);
                  });
}

TEST(gradient_of_add_layernorm) {
  Param gain = random_param("gain", {9}, 3), bias = random_param("bias", {9}, 4),
        h_bias = random_param("h_bias", {9}, 5);
  const std::vector<Tensor> x = {random_tensor({7, 9}, 1), random_tensor({7, 9}, 2)};
  // both outputs used
  check_gradients(x, {&h_bias, &gain, &bias}, [&](Tape& tape, const std::vector<Var>& x) {
    const auto [sum, y] = add_layernorm(tape, x[0], x[1], h_bias, gain, bias);
    return weigh(tape, sum, 5) + weigh(tape, y, 6);
  });
  // only the normalised one
  check_gradients(x, {&h_bias, &gain, &bias}, [&](Tape& tape, const std::vector<Var>& x) {
    return weigh(tape, add_layernorm(tape, x[0], x[1], h_bias, gain, bias).second, 6);
  });
}

TEST(gradient_of_gelu_and_add) {
  const std::vector<Tensor> x = {random_tensor({7, 9}, 1), random_tensor({7, 9}, 2)};
  for (const Tensor& t : x) add(t, t, t);  // to [-2, 2), where gelu bends
  check_gradients({x[0]}, {}, [&](Tape& tape, const std::vector<Var>& x) {
    return weigh(tape, gelu(tape, x[0]), 3);
  });
  check_gradients(x, {}, [&](Tape& tape, const std::vector<Var>& x) {
    return weigh(tape, add(tape, x[0], x[1]), 3);
  });
  Param bias = random_param("bias", {9}, 4);
  check_gradients({x[0]}, {&bias}, [&](Tape& tape, const std::vector<Var>& x) {
    return weigh(tape, gelu(tape, x[0], &bias), 3);
  });
  check_gradients(x, {&bias}, [&](Tape& tape, const std::vector<Var>& x) {
    return weigh(tape, add(tape, x[0], x[1], &bias), 3);
  });
}

static void check_attention(AttentionKind kind) {
  const int64_t B = 2, T = 5, H = 2, D = 8;
  check_gradients({random_tensor({B * T, 3 * H * D}, 1)}, {},
                  [&](Tape& tape, const std::vector<Var>& x) {
                    return weigh(tape, attention(tape, x[0], B, T, H, kind), 2);
                  });
}

TEST(gradient_of_plain_attention) { check_attention(AttentionKind::plain); }
TEST(gradient_of_flash_attention) { check_attention(AttentionKind::flash); }

TEST(gradient_of_embedding_and_cross_entropy) {
  const int64_t B = 2, T = 4, C = 6, V = 7;
  Param wte = random_param("wte", {V, C}, 1), wpe = random_param("wpe", {T, C}, 2);
  const Tokens tokens(B, T, {3, 1, 3, 3, 0, 6, 1, 3}, {1, 3, 3, 0, 6, 1, 3, 5});
  const Tensor total({1}, Dtype::f64, Memory::workspace);
  // logits = x wte^T: wte is used twice
  check_gradients({}, {&wte, &wpe}, [&](Tape& tape, const std::vector<Var>&) {
    fill(total, 0);
    cross_entropy(tape, linear(tape, embedding(tape, tokens, wte, wpe), wte, true), tokens.targets,
                  V, 0.37, total);
    return download(total)[0];
  });
}

TEST(loss_is_the_same_with_and_without_its_gradient) {
  const Tensor targets({6}, Dtype::i32, Memory::data), total({1}, Dtype::f64, Memory::workspace);
  const std::vector<int> ids = {0, 10, 3, 4, 4, 7};
  std::vector<double> before;
  upload(targets, ids.data());
  double losses[2], expected = 0;
  for (bool recording : {false, true}) {
    Tape tape(recording);
    fill(total, 1000);  // it adds to what is there
    Tensor logits = random_tensor({6, 11}, 1);
    before = download(logits);
    Var taken{std::move(logits)};
    const std::shared_ptr<Tensor> grad = taken.grad;
    cross_entropy(tape, std::move(taken), targets, 11, 0.5, total);
    losses[recording] = download(total)[0] - 1000;
    // recording, the logits turned into their gradient
    CHECK_EQ(grad->empty(), !recording);
    CHECK(!recording || download(*grad) != before);
  }
  const Tensor kept = random_tensor({6, 11}, 1);
  Tape tape;
  CHECK_SAYS(cross_entropy(tape, Var{kept}, targets, 11, 0.5, total),
             "a backward reads logits that become their gradient");
  for (int r = 0; r < 6; r++) {
    double sum = 0;
    for (int v = 0; v < 11; v++) sum += std::exp(before[r * 11 + v]);
    expected += 0.5 * (std::log(sum) - before[r * 11 + ids[r]]);
  }
  CHECK_EQ(losses[0], losses[1]);
  CHECK_LE(std::abs(losses[0] - expected), 1e-12);
  measured("loss ", losses[0]);
}

// ---- a value used twice

TEST(gradient_of_a_value_used_twice) {
  Param w = random_param("w", {6, 6}, 2), gain = random_param("gain", {6}, 3),
        bias = random_param("bias", {6}, 4), h_bias = random_param("h_bias", {6}, 5);
  const Tensor x = random_tensor({5, 6}, 1);
  check_gradients({x}, {}, [&](Tape& tape, const std::vector<Var>& x) {
    return weigh(tape, add(tape, x[0], x[0]), 5);
  });
  // one gradient reaches two gelus: neither may write in it
  check_gradients({x}, {}, [&](Tape& tape, const std::vector<Var>& x) {
    return weigh(tape, add(tape, gelu(tape, x[0]), gelu(tape, x[0])), 5);
  });
  // a residual stream, and w used twice
  check_gradients({x}, {&w, &h_bias, &gain, &bias}, [&](Tape& tape, const std::vector<Var>& x) {
    const Var inner = linear(tape, layernorm(tape, x[0], gain, bias), w);
    const auto [sum, y] = add_layernorm(tape, x[0], inner, h_bias, gain, bias);
    return weigh(tape, add(tape, add(tape, sum, linear(tape, y, w)), x[0]), 5);
  });
  // both terms of a sum are the same value
  check_gradients({x}, {&h_bias, &gain, &bias}, [&](Tape& tape, const std::vector<Var>& x) {
    const auto [sum, y] = add_layernorm(tape, x[0], x[0], h_bias, gain, bias);
    return weigh(tape,
                 add(tape, layernorm(tape, sum, gain, bias), layernorm(tape, sum, gain, bias)), 5) +
           weigh(tape, y, 6);
  });
}

TEST(gradient_of_recompute) {
  Param w = random_param("w", {6, 6}, 2), gain = random_param("gain", {6}, 3),
        bias = random_param("bias", {6}, 4);
  const auto f = [&](Tape& tape, const Var& x) {
    return add(tape, x, gelu(tape, linear(tape, layernorm(tape, x, gain, bias), w), &bias));
  };
  check_gradients({random_tensor({5, 6}, 1)}, {&w, &gain, &bias},
                  [&](Tape& tape, const std::vector<Var>& x) {
                    const Var twice = recompute(tape, recompute(tape, x[0], f), f);
                    return weigh(tape, add(tape, twice, x[0]), 5);
                  });
}

// ---- a whole GPT

// no weight is 0 or 1, so that none can be forgotten
static std::unique_ptr<WholeGpt> random_gpt(GptConfig config) {
  auto gpt = std::make_unique<WholeGpt>(config, 1);
  for (Param* p : gpt->params()) {
    std::vector<double> values = noise(p->numel(), 100 + p->id);
    for (double& v : values) v = 0.4 * v + (p->deviation == 0 ? p->constant : 0);
    const Tensor exact({p->numel()}, Dtype::f64, Memory::workspace);
    upload(exact, values.data());
    cast(p->own(p->value), exact);
  }
  return gpt;
}

static void check_gpt(AttentionKind kind, bool recompute) {
  const int64_t B = 2, T = 3;
  auto gpt = random_gpt({{kLayers, 8, 2, 4, 7}, Dtype::f64, kind, recompute});
  const Tokens tokens(B, T, {3, 1, 3, 0, 6, 1}, {1, 3, 3, 6, 1, 5});
  const Tensor total({1}, Dtype::f64, Memory::workspace);
  check_gradients(
      {}, gpt->params(),
      [&](Tape& tape, const std::vector<Var>&) {
        fill(total, 0);
        gpt->loss(tape, tokens, 1.0 / (B * T), total);
        return download(total)[0];
      },
      [&] { gpt->finish_gradients(); });
}

TEST(gradient_of_gpt_with_plain_attention) { check_gpt(AttentionKind::plain, false); }
TEST(gradient_of_gpt_with_flash_attention) { check_gpt(AttentionKind::flash, false); }
TEST(gradient_of_gpt_with_recompute) { check_gpt(AttentionKind::plain, true); }

// ---- who may write where

static Tensor constant(double value) {
  Tensor t({3}, Dtype::f64, Memory::activations);
  fill(t, value);
  return t;
}

TEST(accumulate_never_writes_into_a_gradient_that_others_hold) {
  using Values = std::vector<double>;
  const auto slot = [](Tensor t) { return std::make_shared<Tensor>(std::move(t)); };
  const auto all = [](double v) { return Values(3, v); };

  auto grad = slot({});  // empty: takes g as it is
  Tensor g = constant(1);
  accumulate(grad, g);
  CHECK_EQ(grad->raw(), g.raw());

  grad = slot(constant(1));  // the gradient is ours alone: g is added in place
  void* mine = grad->raw();
  g = constant(2);
  accumulate(grad, g);
  CHECK_EQ(grad->raw(), mine);
  CHECK(download(*grad) == all(3) && download(g) == all(2));

  Tensor held = constant(1);  // somebody holds ours, nobody holds g: the sum goes into g
  grad = slot(held);
  g = constant(2);
  void* theirs = g.raw();
  accumulate(grad, std::move(g));
  CHECK_EQ(grad->raw(), theirs);
  CHECK(download(*grad) == all(3) && download(held) == all(1));

  grad = slot(held);  // both are held: a new tensor
  g = constant(2);
  accumulate(grad, g);
  CHECK(grad->raw() != held.raw() && grad->raw() != g.raw());
  CHECK(download(*grad) == all(3) && download(held) == all(1) && download(g) == all(2));
  measured("all four cases");
}

// Runs f's backward with a gradient that the test holds too (or not); the gradient must keep its
// bits. Returns what activations grew by.
static int64_t growth(bool hold, const std::function<Var(Tape&, const Var&)>& f) {
  Tape tape;
  const Var x{random_tensor({4, 6}, 1)};
  Var y = f(tape, x);
  *y.grad = random_tensor(y.value.shape(), 2);
  y.value = Tensor();
  const Tensor held = hold ? *y.grad : Tensor();
  const std::vector<double> before = hold ? download(held) : std::vector<double>();
  MemoryUse& m = device().memory;
  const int64_t start = m.now[int(Memory::activations)];
  m.peak = m.now;
  tape.backward();
  CHECK(!hold || download(held) == before,
        "the backward wrote into a gradient that somebody else holds");
  return m.peak[int(Memory::activations)] - start;
}

TEST(gradients_are_overwritten_in_place_only_when_nobody_holds_them) {
  Param gain = random_param("gain", {6}, 3), bias = random_param("bias", {6}, 4);
  const int64_t one = 4 * 6 * 8;  // bytes of an activation
  const auto run_gelu = [](Tape& tape, const Var& x) { return gelu(tape, x); };
  const auto run_add = [](Tape& tape, const Var& x) { return add(tape, x, x); };
  const auto run_residual = [&](Tape& tape, const Var& x) {
    return add(tape, x, layernorm(tape, x, gain, bias));
  };
  CHECK_EQ(growth(false, run_gelu), 0);
  CHECK_EQ(growth(true, run_gelu), one);
  CHECK_EQ(growth(false, run_add), one);  // both terms want it: the sum needs memory of its own
  CHECK_EQ(growth(true, run_add), one);
  // the layernorm's dy is the residual's gradient as well
  CHECK_EQ(growth(false, run_residual), one);
  CHECK_EQ(growth(true, run_residual), one);

  // a residual gradient that only the layernorm reads is updated in place
  Tape tape;
  const Var x{random_tensor({4, 6}, 1)};
  const Var y = layernorm(tape, x, gain, bias);
  *y.grad = random_tensor({4, 6}, 2), *x.grad = random_tensor({4, 6}, 3);
  const void* residual = x.grad->raw();
  tape.backward();
  CHECK_EQ(x.grad->raw(), residual);
  measured("gelu, add, residual and layernorm");
}

TEST(the_first_writer_overwrites_a_fresh_gradient_and_the_next_adds) {
  Param wte = random_param("wte", {7, 6}, 1), wpe = random_param("wpe", {5, 6}, 2),
        gain = random_param("gain", {6}, 3), bias = random_param("bias", {6}, 4),
        w = random_param("w", {6, 6}, 5), b = random_param("b", {6}, 6);
  const std::vector<Param*> params = {&wte, &wpe, &gain, &bias, &w, &b};
  const Tokens tokens(1, 3, {4, 0, 4}, {1, 2, 3});  // not every row of wte and wpe
  const auto gradients = [&](bool fresh, bool separate, int uses) {
    for (Param* p : params) fill(p->grad, fresh ? 1e30 : 0), p->fresh = fresh;
    if (separate) separate_uses(wte), fill(wte.head_use->grad, 1e30);
    const Tensor total({1}, Dtype::f64, Memory::workspace);
    for (int i = 0; i < uses; i++) {
      Tape tape;
      const Var x = layernorm(tape, embedding(tape, tokens, wte, wpe), gain, bias);
      const Var y = gelu(tape, add_bias(tape, linear(tape, x, w), b));
      cross_entropy(tape, linear(tape, y, wte, true), tokens.targets, 7, 1, total);
      tape.backward();
    }
    join_uses(wte);
    wte.head_use.reset();
    std::vector<double> all;
    for (Param* p : params)
      for (double v : download(p->grad)) all.push_back(v);
    return all;
  };
  for (bool separate : {false, true})
    for (int uses : {1, 3}) {
      const std::vector<double> cleared = gradients(false, separate, uses),
                                fresh = gradients(true, separate, uses);
      CHECK(fresh == cleared, "they differ, ", uses, " uses");
    }
  measured("6 parameters, one of them tied, 1 and 3 times");
}

TEST(deferred_weight_gradients_wait_for_their_turn) {
  Param w = random_param("w", {6, 5}, 2), bias = random_param("bias", {5}, 3);
  std::deque<std::function<void()>> deferred;
  std::vector<double> now;
  for (auto* queue : {static_cast<decltype(&deferred)>(nullptr), &deferred}) {
    fill(w.grad, 0);
    fill(bias.grad, 0);
    Tape tape;
    tape.deferred = queue;
    const Var x{random_tensor({4, 6}, 1)};
    weigh(tape, add_bias(tape, linear(tape, x, w), bias), 4);
    tape.backward();
    CHECK(!x.grad->empty());
    if (!queue) now = download(w.grad);
  }
  CHECK_EQ(deferred.size(), size_t(2));
  CHECK(download(w.grad) == std::vector<double>(30, 0) &&
        download(bias.grad) == std::vector<double>(5, 0));
  for (const auto& work : deferred) work();
  CHECK(download(w.grad) == now);
  measured("two closures, the same 30 gradients afterwards");
}

// ---- memory

// bytes of activations: forward done, backward done, highest
struct Footprint {
  int64_t before, held, after, peak;
};

static Footprint footprint(bool recompute) {
  const int64_t B = 2, T = 8;
  auto gpt = random_gpt({{4, 16, 2, T, 16}, Dtype::f32, AttentionKind::flash, recompute});
  std::vector<int> ids(B * T, 3);
  const Tokens tokens(B, T, ids, ids);
  const Tensor total({1}, Dtype::f64, Memory::workspace);
  fill(total, 0);
  MemoryUse& m = device().memory;
  const int a = int(Memory::activations);
  Footprint f{m.now[a], 0, 0, 0};
  m.peak = m.now;
  Tape tape;
  gpt->loss(tape, tokens, 1, total);
  f.held = m.now[a];
  tape.backward();
  f.after = m.now[a], f.peak = m.peak[a];
  return f;
}

TEST(backward_returns_every_activation) {
  for (bool recompute : {false, true}) {
    const Footprint f = footprint(recompute);
    CHECK_LE(1000, f.held - f.before);
    CHECK_EQ(f.after, f.before);
    measured(recompute ? ", with recompute " : "held after the forward ", f.held - f.before,
             " bytes, after the backward ", f.after - f.before);
  }
}

TEST(recompute_lowers_the_peak_of_activations) {
  const Footprint without = footprint(false), with = footprint(true);
  measured("peak ", without.peak, " bytes without, ", with.peak, " with recompute (4 layers)");
  CHECK_LE(with.peak, without.peak / 2);
}

TEST(the_tape_drops_each_entry_once_it_has_run) {
  Tape tape;
  MemoryUse& m = device().memory;
  const int64_t before = m.total;
  int64_t seen = -1;
  tape.push([&] { seen = m.total - before; });
  {
    const Tensor big({1000}, Dtype::f64, Memory::activations);
    tape.push([big] { CHECK_EQ(device().memory.now[int(Memory::activations)] >= 8000, true); });
  }
  CHECK_EQ(m.total - before, 8000);
  tape.backward();
  CHECK_EQ(seen, 0);
  measured("8000 bytes held by one entry were back when the next one ran");
}

TEST(a_tape_that_does_not_record_keeps_nothing) {
  const int64_t before = device().memory.total;
  {
    Tape tape(false);
    const Var x{random_tensor({4, 6}, 1)};
    const Var y = gelu(tape, gelu(tape, x));
    CHECK_EQ(tape.size(), size_t(0));
    // x and y; the value between them is gone
    CHECK_EQ(device().memory.total - before, 2 * 4 * 6 * 8);
  }
  CHECK_EQ(device().memory.total, before);
  measured("x and y only");
}

TEST(a_gradient_that_was_never_computed_is_named) {
  Tape tape;
  const Var y = gelu(tape, Var{random_tensor({4, 6}, 1)});
  CHECK_SAYS(tape.backward(), "was not computed before it was needed");
  measured("a sentence");
}

// ---- what a reader builds with it: docs/tensors_and_autograd.md shows these lines

static Param own_param(const std::string& name, const Shape& shape, uint32_t id, float deviation) {
  Param p;
  p.name = name, p.shape = shape, p.id = id, p.deviation = deviation;
  p.slice = {1, shape[0], elements(shape) / shape[0], 0, shape[0]};  // this rank owns all of it
  p.value = Tensor(shape, Dtype::f32, Memory::parameters);
  p.grad = Tensor(shape, Dtype::f32, Memory::gradients);
  p.initialise(p.value, 1, 0);
  return p;
}
static Tensor zeros(const Shape& shape) {
  const Tensor x(shape, Dtype::f32, Memory::optimizer);
  fill(x, 0);
  return x;
}

TEST(a_model_of_ones_own_learns) {
  const int64_t R = 256, hidden = 32;
  Param w1 = own_param("w1", {2, hidden}, 0, 0.5), b1 = own_param("b1", {hidden}, 1, 0),
        w2 = own_param("w2", {hidden, 2}, 2, 0.2), b2 = own_param("b2", {2}, 3, 0);
  const std::vector<Param*> params{&w1, &b1, &w2, &b2};
  std::vector<ParamShard> shards;
  for (Param* p : params)
    shards.push_back({p->value, {}, p->grad, zeros(p->shape), zeros(p->shape), p});
  Optimizer optimizer(shards, std::ssize(params), 1, 0);  // clips the norm at 1, no weight decay

  const Tensor x({R, 2}, Dtype::f32, Memory::data), targets({R}, Dtype::i32, Memory::data),
      loss({1}, Dtype::f64, Memory::workspace);
  std::vector<double> losses;
  for (int step = 0; step < kSteps; step++) {
    std::vector<float> points;
    std::vector<int> classes;  // do both coordinates have one sign?
    for (const double coordinate : noise(2 * R, step)) points.push_back(coordinate);
    for (int64_t i = 0; i < R; i++) classes.push_back(points[2 * i] * points[2 * i + 1] > 0);
    upload(x, points.data());
    upload(targets, classes.data());
    fill(loss, 0);
    for (Param* p : params) p->fresh = true;  // its gradient is written, and not added to
    Tape tape;
    const Var h = gelu(tape, linear(tape, Var{x}, w1), &b1);
    Var logits = add_bias(tape, linear(tape, h, w2), b2);
    cross_entropy(tape, std::move(logits), targets, 2, 1.0 / R, loss);
    tape.backward();
    optimizer.step(0.02);
    losses.push_back(download(loss)[0]);
  }
  CHECK_LE(losses.back(), kSteps > 100 ? 0.15 : losses[0]);
  measured("the loss falls from ", losses[0], " to ", losses.back(), " in ", kSteps, " steps");
}

TEST(what_does_not_fit_is_refused) {
  Tape tape;
  Param w = random_param("w", {5, 3}, 2), bias = random_param("bias", {3}, 3);
  for (const int64_t rows : {4, 20}) {  // a kernel of its own for few
    CHECK_SAYS(linear(tape, Var{random_tensor({rows, 4}, 1)}, w), "4) times (5, 3) is not");
    CHECK_SAYS(add(tape, Var{random_tensor({rows, 6}, 1)}, Var{random_tensor({rows, 6}, 1)}, &bias),
               "a bias (3) of rows");
  }
  CHECK_SAYS(Tensor({2, -4}, Dtype::f32, Memory::workspace), "no tensor is (2, -4)");
  w.id = 1;
  CHECK_SAYS(Optimizer({{w.value, {}, w.grad, w.value, w.value, &w}}, 1, 0, 0), "w is number 1");
}

int main(int argc, char** argv) { return run_tests(argc, argv); }
