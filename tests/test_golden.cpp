// test_golden.cpp: the whole of training, model, loss, backward, clipping and AdamW, against what
// PyTorch computed once (tests/golden.py, tests/golden.bin), and against itself where two ways must
// give the same bits.
//
// differences are relative: the largest absolute difference over the largest magnitude of the same
// kind in the whole model
// bounds      f64 1e-12: rounding. f32 and bf16 are stated, with their reasons, at `Bounds`.
#include <algorithm>
#include <fstream>
#include <map>

#include "tests/one_rank.h"
#include "tests/tensors.h"

// ---- what PyTorch computed

struct Golden {
  int layers = 0, width = 0, heads = 0, context = 0, vocab = 0, batch = 0, steps = 0;
  uint64_t seed = 0;
  double lr = 0, clip = 0, decay = 0;
  std::vector<int> inputs, targets;
  std::vector<float> initial;  // all parameters, in the order of Gpt::params()
  std::vector<double> logits, losses, norms, gradients, weights;
};

class Reader {
 public:
  explicit Reader(const std::string& path) : file_(path, std::ios::binary) {
    REQUIRE(file_, "cannot open ", path, ": run the tests from the directory of the Makefile");
  }
  template <class T> std::vector<T> many(size_t n) {
    std::vector<T> values(n);
    REQUIRE(file_.read(reinterpret_cast<char*>(values.data()), n * sizeof(T)),
            "golden.bin ends too early");
    return values;
  }
  template <class T> T one() { return many<T>(1)[0]; }
  bool at_end() { return file_.peek() == EOF; }

 private:
  std::ifstream file_;
};

static Golden read_golden() {
  Reader in(std::string(__FILE__).substr(0, sizeof __FILE__ - sizeof "test_golden.cpp") +
            "golden.bin");
  const std::vector<int> header = in.many<int>(8);
  REQUIRE(header[0] == 0x33444c47, "golden.bin is not what tests/golden.py writes");
  Golden g;
  g.layers = header[1], g.width = header[2], g.heads = header[3], g.context = header[4],
  g.vocab = header[5];
  g.batch = header[6], g.steps = header[7], g.seed = in.one<uint64_t>();
  g.lr = in.one<double>(), g.clip = in.one<double>(), g.decay = in.one<double>();
  for (int b = 0; b < g.batch; b++) {
    const std::vector<int> row = in.many<int>(g.context + 1);
    g.inputs.insert(g.inputs.end(), row.begin(), row.end() - 1);
    g.targets.insert(g.targets.end(), row.begin() + 1, row.end());
  }
  const size_t P = parameter_count({g.layers, g.width, g.heads, g.context, g.vocab});
  g.initial = in.many<float>(P);
  g.logits = in.many<double>(g.inputs.size() * g.vocab);
  g.losses = in.many<double>(g.steps), g.norms = in.many<double>(g.steps);
  g.gradients = in.many<double>(P), g.weights = in.many<double>(P);
  REQUIRE(in.at_end(), "golden.bin is longer than expected");
  return g;
}

static const Golden& golden() {
  static const Golden g = read_golden();
  return g;
}

// ---- the same with Threefold

struct How {
  Dtype dtype = Dtype::f64;
  AttentionKind attention = AttentionKind::plain;
  bool recompute = false, deferred = false;
  int micro_batch = 0;           // sequences; 0: the whole batch
  int steps = 0;                 // 0: as many as PyTorch took
  double clip = -1, decay = -1;  // negative: the golden values
  bool logits = false;
};

struct Run {
  std::vector<double> initial, logits, losses, norms, gradients, weights;  // as in Golden
  // of each element of the gradients and weights
  std::vector<std::string> names;
};

static std::vector<double> gather(Gpt& gpt, Tensor Param::*which) {
  std::vector<double> all;
  for (Param* p : gpt.params()) {
    const std::vector<double> values = download(p->own(p->*which));
    all.insert(all.end(), values.begin(), values.end());
  }
  return all;
}

// One step's loss and gradients, as train_gpt computes them.
static double loss_and_gradients(WholeGpt& gpt, const How& how) {
  const Golden& g = golden();
  const int micro = how.micro_batch ? how.micro_batch : g.batch;
  const Tensor total({1}, Dtype::f64, Memory::workspace);
  fill(total, 0);
  gpt.zero_gradients();
  for (int b = 0; b < g.batch; b += micro) {
    const auto rows = [&](const std::vector<int>& v) {
      return std::vector<int>(v.begin() + b * g.context, v.begin() + (b + micro) * g.context);
    };
    Tape tape;
    std::deque<std::function<void()>> waiting;
    if (how.deferred) tape.deferred = &waiting;
    gpt.loss(tape, Tokens(micro, g.context, rows(g.inputs), rows(g.targets)), 1.0 / g.inputs.size(),
             total);
    tape.backward();
    if (how.deferred)
      CHECK_EQ(int(waiting.size()), 1 + 8 * g.layers,
               "every matrix and its bias defer their gradients, recomputed or not");
    for (auto& work : waiting) work();
  }
  gpt.finish_gradients();
  return download(total)[0];
}

static std::vector<double> forward_logits(Gpt& gpt) {
  const Golden& g = golden();
  return logits(gpt, Tokens(g.batch, g.context, g.inputs, g.targets));
}

static Run train(const How& how) {
  const Golden& g = golden();
  GptConfig config{g.layers, g.width, g.heads, g.context, g.vocab};
  config.dtype = how.dtype, config.attention = how.attention, config.recompute = how.recompute;
  WholeGpt gpt(config, g.seed);
  Optimizer optimizer =
      gpt.optimizer(how.clip < 0 ? g.clip : how.clip, how.decay < 0 ? g.decay : how.decay);
  Run run;
  for (Param* p : gpt.params()) run.names.insert(run.names.end(), p->numel(), p->name);
  run.initial = gather(gpt, &Param::value);
  if (how.logits) run.logits = forward_logits(gpt);
  for (int step = 0; step < (how.steps ? how.steps : g.steps); step++) {
    run.losses.push_back(loss_and_gradients(gpt, how));
    if (step == 0) run.gradients = gather(gpt, &Param::grad);
    optimizer.step(g.lr);
    run.norms.push_back(download(optimizer.norm())[0]);
  }
  // the master weights, when the model computes in bf16
  for (const ParamShard& s : optimizer.shards()) {
    const std::vector<double> values = download(s.weights);
    run.weights.insert(run.weights.end(), values.begin(), values.end());
  }
  return run;
}

// The largest |a - b| over the largest |b|; NaN if anything is.
static double difference(const std::vector<double>& a, const std::vector<double>& b) {
  CHECK_EQ(a.size(), b.size());
  double worst = 0, scale = 0;
  for (size_t i = 0; i < a.size(); i++) {
    if (!std::isfinite(a[i]) || !std::isfinite(b[i])) return NAN;
    worst = std::max(worst, std::abs(a[i] - b[i]));
    scale = std::max(scale, std::abs(b[i]));
  }
  return worst / scale;
}

// Where the worst element is, for the sentence of a failure.
static std::string worst_name(const Run& run, const std::vector<double>& a,
                              const std::vector<double>& b) {
  size_t worst = 0;
  for (size_t i = 0; i < a.size(); i++)
    if (!(std::abs(a[i] - b[i]) <= std::abs(a[worst] - b[worst]))) worst = i;
  return sentence("the worst is in ", run.names[worst], ": ", a[worst], ", expected ", b[worst]);
}

// How far training went astray: the root of the mean square of a - b over that of b - start. 1 is
// as good as no training at all.
static double astray(const std::vector<double>& a, const std::vector<double>& b,
                     const std::vector<float>& start) {
  double wrong = 0, way = 0;
  for (size_t i = 0; i < a.size(); i++)
    wrong += (a[i] - b[i]) * (a[i] - b[i]), way += (b[i] - start[i]) * (b[i] - start[i]);
  return std::sqrt(wrong / way);
}

struct Bounds {
  double logits, loss, gradients, norm, weights, astray;
};

// Masters that lose the bits which those that compute have not would pass all bounds below.
static void expect_more_bits_than_bf16(const Run& run) {
  std::map<std::string, int> all, short_ones;
  for (size_t i = 0; i < run.weights.size(); i++) {
    all[run.names[i]]++;
    short_ones[run.names[i]] += rounded(run.weights[i], Dtype::bf16) == run.weights[i];
  }
  for (const auto& [name, n] : all)
    CHECK_LE(short_ones[name], n / 2, "of ", n, " master weights of ", name,
             " so many are of bf16");
}

static void compare(How how, const Bounds& bounds) {
  const Golden& g = golden();
  how.logits = true;
  const Run run = train(how);
  const double logits = difference(run.logits, g.logits), loss = difference(run.losses, g.losses),
               norm = difference(run.norms, g.norms);
  const double gradients = difference(run.gradients, g.gradients),
               weights = difference(run.weights, g.weights);
  const double off = astray(run.weights, g.weights, g.initial);
  measured("differences: logits ", logits, ", losses ", loss, ", gradients ", gradients, ", norms ",
           norm, ", weights after ", g.steps, " steps ", weights, " (", off,
           " of the way that they went)");
  CHECK_LE(logits, bounds.logits);
  CHECK_LE(loss, bounds.loss);
  CHECK_LE(gradients, bounds.gradients, worst_name(run, run.gradients, g.gradients));
  CHECK_LE(norm, bounds.norm);
  CHECK_LE(weights, bounds.weights, worst_name(run, run.weights, g.weights));
  CHECK_LE(off, bounds.astray);
  if (how.dtype == Dtype::bf16) expect_more_bits_than_bf16(run);
}

static void expect_same_bits(const Run& a, const Run& b) {
  CHECK(a.losses == b.losses, "losses differ by ", difference(a.losses, b.losses));
  CHECK(a.gradients == b.gradients, "gradients differ by ", difference(a.gradients, b.gradients),
        "; ", worst_name(a, a.gradients, b.gradients));
  CHECK(a.norms == b.norms, "norms differ by ", difference(a.norms, b.norms));
  CHECK(a.weights == b.weights, "weights differ by ", difference(a.weights, b.weights), "; ",
        worst_name(a, a.weights, b.weights));
}

// ---- against PyTorch

TEST(initial_weights_equal_golden_bit_for_bit) {
  const Golden& g = golden();
  WholeGpt gpt({g.layers, g.width, g.heads, g.context, g.vocab}, g.seed);
  size_t i = 0;
  for (Param* p : gpt.params())
    for (double value : download(p->own(p->value))) {
      CHECK(i < g.initial.size(), "more weights than golden.bin has");
      CHECK_EQ(float(value), g.initial[i], "weight ", i, ", in ", p->name);
      i++;
    }
  CHECK_EQ(i, g.initial.size());
  measured(i, " weights");
}

// f64: rounding, 1.1e-16 an operation.
constexpr Bounds kDouble = {1e-12, 1e-12, 1e-12, 1e-12, 1e-12, 1e-12};
// f32: as many roundings, of 6e-8; about ten times what is measured. The weights are worse: Adam
// divides each gradient by its own size, so that an element whose gradient is far below the largest
// takes a full step in a direction that is less exact.
constexpr Bounds kSingle = {2e-6, 1e-6, 2e-6, 1e-6, 1e-5, 1e-4};
// bf16: a rounding is at most 2^-8 = 4e-3, of the weights and of every activation; about four times
// what is measured. Sums and gradients of parameters are f32, so that the loss averages the errors
// out. A small gradient may have the wrong sign, and three steps of 1e-3 in the wrong direction are
// 6e-3, as far as Adam goes: what counts for the weights is how far they are off on the whole.
constexpr Bounds kHalf = {2e-2, 1e-3, 3e-2, 1e-2, 6e-3, 0.15};

TEST(f64_equals_pytorch_with_plain_attention) {
  compare({.attention = AttentionKind::plain}, kDouble);
}
TEST(f64_equals_pytorch_with_flash_attention) {
  compare({.attention = AttentionKind::flash}, kDouble);
}
TEST(f32_equals_pytorch_with_plain_attention) {
  compare({.dtype = Dtype::f32, .attention = AttentionKind::plain}, kSingle);
}
TEST(f32_equals_pytorch_with_flash_attention) {
  compare({.dtype = Dtype::f32, .attention = AttentionKind::flash}, kSingle);
}
TEST(bf16_equals_pytorch_with_plain_attention) {
  compare({.dtype = Dtype::bf16, .attention = AttentionKind::plain}, kHalf);
}
TEST(bf16_equals_pytorch_with_flash_attention) {
  compare({.dtype = Dtype::bf16, .attention = AttentionKind::flash}, kHalf);
}

// Adam hides a wrong scale; these must not hide behind it.
TEST(weights_show_a_missing_clip_or_decay) {
  const double unclipped = difference(train({.clip = 0}).weights, golden().weights);
  const double undecayed = difference(train({.decay = 0}).weights, golden().weights);
  measured("weights differ by ", unclipped, " without clipping, ", undecayed,
           " without weight decay");
  CHECK_LE(1e-6, unclipped);
  CHECK_LE(1e-6, undecayed);
}

// ---- against itself

#ifdef CPU_FAST
static const std::vector<Dtype> kDtypes = {Dtype::f64, Dtype::f32, Dtype::bf16};
constexpr int kSteps = 2;
#else
// where every thread of a kernel is simulated, time is short
static const std::vector<Dtype> kDtypes = {Dtype::f32};
constexpr int kSteps = 1;
#endif

static void measured_where(const std::string& more) {
  for (Dtype dtype : kDtypes) measured(name_of(dtype), ", ");
  measured(more, kSteps, kSteps == 1 ? " step" : " steps");
}

// The run that others must equal, made once.
static const Run& reference(Dtype dtype, AttentionKind attention) {
  static std::map<std::pair<Dtype, AttentionKind>, Run> runs;
  const auto found = runs.find({dtype, attention});
  if (found != runs.end()) return found->second;
  return runs[{dtype, attention}] =
             train({.dtype = dtype, .attention = attention, .steps = kSteps});
}

TEST(two_runs_give_the_same_bits) {
  for (Dtype dtype : kDtypes)
    for (AttentionKind attention : {AttentionKind::plain, AttentionKind::flash})
      expect_same_bits(train({.dtype = dtype, .attention = attention, .steps = kSteps}),
                       reference(dtype, attention));
  measured_where("plain and flash attention, ");
}

TEST(recomputed_activations_give_the_same_bits) {
  for (Dtype dtype : kDtypes)
    for (AttentionKind attention : {AttentionKind::plain, AttentionKind::flash})
      expect_same_bits(
          train({.dtype = dtype, .attention = attention, .recompute = true, .steps = kSteps}),
          reference(dtype, attention));
  measured_where("plain and flash attention, ");
}

TEST(deferred_weight_gradients_give_the_same_bits) {
  for (Dtype dtype : kDtypes) {
    const Run now = train({.dtype = dtype, .micro_batch = 1, .steps = kSteps});
    for (bool recompute : {false, true})
      expect_same_bits(train({.dtype = dtype,
                              .recompute = recompute,
                              .deferred = true,
                              .micro_batch = 1,
                              .steps = kSteps}),
                       now);
  }
  measured_where("with and without recompute, 3 micro-batches, ");
}

TEST(micro_batches_add_up_to_one_batch) {
  const Run micro = train({.micro_batch = 1, .steps = kSteps}), whole = train({.steps = kSteps});
  const double loss = difference(micro.losses, whole.losses),
               gradients = difference(micro.gradients, whole.gradients);
  const double weights = difference(micro.weights, whole.weights);
  measured("f64, 3 micro-batches: losses ", loss, ", gradients ", gradients, ", weights ", weights);
  CHECK_LE(loss, 1e-12);
  CHECK_LE(gradients, 1e-12, worst_name(whole, micro.gradients, whole.gradients));
  CHECK_LE(weights, 1e-12, worst_name(whole, micro.weights, whole.weights));
}

// ---- the learning rate

TEST(the_learning_rate_rises_in_a_line_and_falls_along_half_a_cosine) {
  const auto rate = [](int64_t step, int64_t steps, int64_t warmup) {
    return learning_rate(step, steps, warmup, 1, 0.1);
  };
  CHECK_EQ(rate(1, 100, 10), 0.1);
  CHECK_EQ(rate(5, 100, 10), 0.5);
  CHECK_EQ(rate(10, 100, 10), 1);
  CHECK_LE(std::abs(rate(55, 100, 10) - 0.55), 1e-15);
  CHECK_LE(std::abs(rate(40, 100, 10) - 0.775), 1e-15);  // a third of the way: cos is 1/2
  CHECK_EQ(rate(100, 100, 10), 0.1);
  for (int64_t step = 11; step <= 100; step++)
    CHECK(rate(step, 100, 10) < rate(step - 1, 100, 10), "at step ", step);
  CHECK_EQ(rate(5, 5, 5), 1);
  CHECK(rate(1, 10, 0) < 1);
}

int main(int argc, char** argv) { return run_tests(argc, argv); }
