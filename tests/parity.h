// parity.h: one training run by a plain single rank, the same by a layout of many ranks, and how
// far they are apart; what a layout sends and holds beside the theory.
//
// relative here: the largest absolute difference over the largest magnitude of the same kind in the
// whole reference model
#pragma once
#include <cmath>
#include <set>

#include "tests/mpi_test.h"
#include "tests/one_rank.h"
#include "theory/theory.h"

// Two steps have every wait between a step and the one before it, and suffice where streams are
// queued and delays, which take their time, come at random. The third starts from moments that are
// no longer 0.
inline const bool kDelayed = getenv("THREEFOLD_STREAMS");
inline const int kSteps = kDelayed ? 2 : 3;
constexpr double kLearningRate = 1e-3;

inline std::vector<int> sequence(int64_t step, int64_t s, const GptConfig& g) {
  std::vector<int> tokens;
  for (int64_t t = 0; t <= g.context; t++)
    tokens.push_back(int((step * 7919 + s * 104729 + t * t * 31 + t * 17) % g.vocab));
  return tokens;
}

struct Run {  // what a training run computed: of each step, of each parameter, in a row
  std::vector<double> losses, norms, gradients;
  std::vector<double> weights;  // at the end
};

inline void append(std::vector<double>& all, const std::vector<double>& more) {
  all.insert(all.end(), more.begin(), more.end());
}

// What work() computes on rank 0, on every rank: they may share cores.
template <class Work> Run from_rank_0(Work work) {
  Run run;
  on_first_rank(job(), [&] { run = work(); });
  for (std::vector<double>* values : {&run.losses, &run.norms, &run.gradients, &run.weights}) {
    int64_t size = int64_t(values->size());
    MPI_Ibcast(&size, 1, MPI_INT64_T, 0, MPI_COMM_WORLD, UntilDone());
    values->resize(size_t(size));
    MPI_Ibcast(values->data(), int(size), MPI_DOUBLE, 0, MPI_COMM_WORLD, UntilDone());
  }
  return run;
}

// The reference: whole parameters, no mesh, no units, the batch in one piece.
inline Run train_alone(const GptConfig& config, int64_t batch, int steps) {
  WholeGpt gpt(config, 1337);
  Optimizer optimizer = gpt.optimizer(1.0, 0.1);
  Tensor total({1}, Dtype::f64, Memory::workspace);
  Run run;
  for (int step = 1; step <= steps; step++) {
    std::vector<int> inputs, targets;
    for (int64_t s = 0; s < batch; s++) {
      const auto t = sequence(step, s, config);
      inputs.insert(inputs.end(), t.begin(), t.end() - 1);
      targets.insert(targets.end(), t.begin() + 1, t.end());
    }
    gpt.zero_gradients();
    fill(total, 0);
    Tape tape;
    gpt.loss(tape, Tokens(batch, config.context, inputs, targets),
             1.0 / double(batch * config.context), total);
    tape.backward();
    gpt.finish_gradients();
    run.losses.push_back(download(total)[0]);
    for (Param* p : gpt.params()) append(run.gradients, download(p->own(p->grad)));
    optimizer.step(kLearningRate);
    run.norms.push_back(download(optimizer.norm())[0]);
  }
  for (Param* p : gpt.params()) append(run.weights, download(p->own(p->value)));
  return run;
}
inline Run one_rank(const GptConfig& config, int64_t batch, int steps) {
  return from_rank_0([&] { return train_alone(config, batch, steps); });
}

// The sum over an axis of what each rank has, in f64.
inline std::vector<double> sum_over(const Axis& axis, const std::vector<double>& mine) {
  if (axis.size == 1) return mine;
  const Tensor t({int64_t(mine.size())}, Dtype::f64, Memory::workspace);
  upload(t, mine.data());
  synchronize();
  NCCL_CHECK(ncclAllReduce(t.raw(), t.raw(), mine.size(), ncclFloat64, ncclSum, axis.comm,
                           device().communication));
  CUDA_CHECK(cudaStreamSynchronize(device().communication));
  return download(t);
}

// Gradients or weights of every parameter in its global shape, from what each rank updates of it.
enum class WholeOf { gradients, weights, masters };
inline std::vector<double> whole_model(Mesh& mesh, Trainer& trainer, WholeOf what) {
  std::vector<int64_t> starts;  // of each parameter, by its id, all in a row
  int64_t all = 0;
  for (Param* p : trainer.gpt.params()) starts.push_back(all), all += elements(p->shape);
  // this rank's part; what tp ranks must have the same; by stage
  std::vector<double> mine(size_t(all), 0.0), copies(size_t(all), 0.0), first, last;
  for (const ParamShard& shard : trainer.optimizer().shards()) {
    const Slice& s = shard.param->slice;
    const int64_t n = s.end - s.begin;
    const std::vector<double> values =
        download(what == WholeOf::gradients                          ? shard.gradient
                 : what == WholeOf::masters || shard.compute.empty() ? shard.weights
                                                                     : shard.compute);
    for (size_t k = 0; k < values.size(); k++) {
      const int64_t i = shard.first + int64_t(k), inner = i % s.inner, middle = i / s.inner % n,
                    outer = i / s.inner / n;
      const size_t to =
          size_t(starts[shard.param->id] + (outer * s.split + s.begin + middle) * s.inner + inner);
      mine[to] = n < s.split || mesh["tp"].rank == 0 ? values[k] : 0;
      copies[to] = values[k];
    }
  }
  const Axis shards = mesh.shards;
  mine = sum_over(shards, mine), copies = sum_over(shards, copies);
  mine = sum_over(mesh["tp"], mine);
  for (size_t i = 0; i < mine.size(); i++)
    if (copies[i] != 0)
      CHECK_EQ(copies[i], mine[i], "element ", i, " of the model differs between tp ranks");
  // the first parameter: on the first and the last piece's stage
  const Schedule& schedule = trainer.pipeline.schedule();
  const bool twice = schedule.stage_of(schedule.positions() - 1) != 0;
  const size_t tied = twice ? size_t(elements(trainer.gpt.tied().shape)) : 0;
  first = last = mine;
  if (mesh["pp"].rank != 0) std::fill(first.begin(), first.begin() + long(tied), 0.0);
  last.resize(tied);
  if (mesh["pp"].rank == 0) std::fill(last.begin(), last.end(), 0.0);
  first = sum_over(mesh["pp"], first);
  if (tied) last = sum_over(mesh["pp"], last);
  CHECK(std::equal(last.begin(), last.end(), first.begin()),
        "the token embedding is not the same on the first and the last stage");
  return first;
}

// What a step finds where it will put gradients is no part of them. (A number: kernels that are
// compiled for finite numbers may take NaN for 0.)
constexpr double kSpoiled = 1e30;
inline void spoil_gradients(Trainer& trainer) {
  for (const ParamShard& s : trainer.optimizer().shards()) fill(s.gradient, kSpoiled);
  for (const Param* p : trainer.gpt.params()) {
    if (!p->grad.empty()) fill(p->grad, kSpoiled);
    if (p->head_use) fill(p->head_use->grad, kSpoiled);
  }
}
// Nor does anything but numbers leave it, in padding either.
inline void expect_numbers(Trainer& trainer) {
  std::set<int> units;
  for (const ParamShard& s : trainer.optimizer().shards()) units.insert(s.param->unit);
  for (int unit : units)
    for (double x : download(trainer.fsdp.units().at(unit).shard_grad))
      CHECK(std::abs(x) < kSpoiled / 2, "a gradient of unit ", unit, " is ", x);
}

inline Run many_ranks(Mesh& mesh, const GptConfig& config, const TrainerOptions& options, int steps,
                      bool curve_alone = false) {
  Trainer trainer(mesh, config, options);
  Run run;
  for (int step = 1; step <= steps; step++) {
    if (!curve_alone) spoil_gradients(trainer);
    trainer.gradients(trainer.read([&](int64_t s) { return sequence(step, s, config); }));
    if (!curve_alone) {
      expect_numbers(trainer);
      append(run.gradients, whole_model(mesh, trainer, WholeOf::gradients));
    }
    trainer.update(kLearningRate);
    const auto [loss, norm] = trainer.results();
    run.losses.push_back(loss);
    run.norms.push_back(norm);
  }
  if (!curve_alone) run.weights = whole_model(mesh, trainer, WholeOf::weights);
  return run;
}
// Losses and norms alone: a long curve needs no gradients.
inline Run curve_of(Mesh& mesh, const GptConfig& config, const TrainerOptions& options, int steps) {
  return many_ranks(mesh, config, options, steps, true);
}

inline double relative(const std::vector<double>& a, const std::vector<double>& b) {
  CHECK_EQ(a.size(), b.size());
  double d = 0, largest = 0;
  for (size_t i = 0; i < a.size(); i++) {
    d = worst_of(d, std::abs(a[i] - b[i]));
    largest = std::max(largest, std::abs(b[i]));
  }
  return d / largest;
}

struct Difference {
  double loss = 0, gradients = 0, norm = 0, weights = 0;
  double worst() const { return std::max(std::max(loss, gradients), std::max(norm, weights)); }
  void widen(const Difference& d) {
    loss = std::max(loss, d.loss), gradients = std::max(gradients, d.gradients);
    norm = std::max(norm, d.norm), weights = std::max(weights, d.weights);
  }
};

inline Difference compare(const Run& a, const Run& b) {
  return {relative(a.losses, b.losses), relative(a.gradients, b.gradients),
          relative(a.norms, b.norms), relative(a.weights, b.weights)};
}

// Settings against one rank in f64, so many steps each.
class Parity {
 public:
  Parity(const GptConfig& config, int64_t batch)
      : Parity(one_rank(config, batch, kSteps), kSteps) {}
  Parity(const Run& reference, int steps) : reference_(reference), steps_(steps) {}
  void check(Mesh& mesh, const GptConfig& config, const TrainerOptions& options,
             const std::string& name) {
    const Difference d = compare(many_ranks(mesh, config, options, steps_), reference_);
    CHECK_LE(d.worst(), 1e-12, name, ": loss ", d.loss, " gradients ", d.gradients, " norm ",
             d.norm, " weights ", d.weights);
    worst_.widen(d);
    settings_++;
  }
  int settings() const { return settings_; }
  const Difference& worst() const { return worst_; }
  void report() const {
    CHECK(settings_ > 0);
    measured(settings_, " settings: loss ", worst_.loss, ", gradients ", worst_.gradients,
             ", norm ", worst_.norm, ", weights ", worst_.weights);
  }

 private:
  Run reference_;
  int steps_;
  Difference worst_;
  int settings_ = 0;
};

// Two steps: what this rank sent and what it holds between steps equal the theory exactly, as do
// the activations kept for backwards. Then check(trainer). Returns the bytes sent, each once.
template <class Check> int64_t equals_theory(Mesh& mesh, const GptConfig& config,
                                             const TrainerOptions& options, const std::string& name,
                                             Check check) {
  const Theory expected = theory(config, mesh.layout, mesh.rank, options);
  const MemoryUse before = device().memory;
  device().memory.peak = before.now;
  ledger.rows.clear();
  Trainer trainer(mesh, config, options);
  int64_t parameters = 0;
  for (const Param* p : trainer.gpt.params()) parameters += elements(p->shape);
  CHECK_EQ(parameters, parameter_count(config), name);
  for (int step = 1; step <= 2; step++) {
    trainer.gradients(trainer.read([&](int64_t s) { return sequence(step, s, config); }));
    trainer.update(kLearningRate);
  }
  int64_t bytes = 0;
  CHECK_EQ(ledger.rows.size(), expected.step.rows.size(), name);
  for (const auto& [key, row] : expected.step.rows) {
    const Ledger::Row& got = ledger.rows[key];
    const std::string what = sentence(name, ": ", std::get<0>(key), " ", name_of(std::get<1>(key)),
                                      " for ", name_of(std::get<2>(key)));
    CHECK_EQ(got.calls, 2 * row.calls, what);
    CHECK_EQ(int64_t(got.numerator), int64_t(2 * row.numerator), what);
    CHECK_EQ(got.n, row.n, what);
    bytes += got.bytes();
  }
  for (Memory category : {Memory::parameters, Memory::gradients, Memory::optimizer})
    CHECK_EQ(device().memory.now[int(category)] - before.now[int(category)],
             expected.persistent[int(category)], name, ": ", name_of(category));
  CHECK_LE(device().memory.peak[int(Memory::gather)], expected.gather_bound, name,
           ": whole buffers in use");
  CHECK_EQ(trainer.pipeline.most_live_bytes(), expected.activations, name,
           ": activations kept for backwards");
  check(trainer);
  return bytes;
}

// The mean loss of so many held-out sequences and the logits after a prompt, by one rank. Of 7, a
// prime, every micro-batch has one sequence; of 24 as many as the options say.
struct HeldOut {
  int64_t sequences;
  std::vector<int> prompt;
  double loss;
  std::vector<double> logits;
};
inline HeldOut held_out(const GptConfig& config, int64_t sequences, std::vector<int> prompt) {
  WholeGpt gpt(config, 1337);
  const Tensor total({1}, Dtype::f64, Memory::workspace);
  fill(total, 0);
  for (int64_t s = 0; s < sequences; s++) {
    const auto t = sequence(0, s, config);
    Tape tape(false);
    gpt.loss(tape, Tokens(1, config.context, {t.begin(), t.end() - 1}, {t.begin() + 1, t.end()}),
             1.0 / double(sequences * config.context), total);
  }
  const Tokens tokens(1, int64_t(prompt.size()), prompt, prompt);
  const std::vector<double> all = logits(gpt, tokens);
  return {sequences, prompt, download(total)[0], {all.end() - config.vocab, all.end()}};
}
// How far a layout's are from these, at most.
inline double difference(Mesh& mesh, const GptConfig& config, const TrainerOptions& options,
                         const HeldOut& expected) {
  Trainer trainer(mesh, config, options);
  const double loss =
      trainer.evaluate(expected.sequences, [&](int64_t s) { return sequence(0, s, config); });
  return std::max(relative({loss}, {expected.loss}),
                  relative(trainer.next_logits(expected.prompt), expected.logits));
}
