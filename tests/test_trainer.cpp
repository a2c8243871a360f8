// test_trainer.cpp: a step as its host sees it: which sequences it reads and when, that it waits
// for the device at the end alone, and what a profile and the report say of it. What a step
// computes is test_parity's, and each strategy's own test.
#include <unistd.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

#include "report/profile.h"
#include "report/report.h"
#include "tests/parity.h"
#include "tests/standstill.h"
#include "theory/machine.h"

namespace {

const GptConfig kConfig = [] {
  GptConfig g{6, 24, 4, 16, 32};  // three stages of two chunks: one stage has no end of the model
  g.dtype = Dtype::f64;
  return g;
}();

// Each strategy on all ranks, and pairs of them.
struct Setting {
  Layout layout;
  TrainerOptions options;
  bool rows = false;
};
std::vector<Setting> settings() {
  const int64_t n = job().size, half = n / 2;
  std::vector<Setting> all;
  const auto add = [&](const Layout& layout, const std::string& schedule = "1f1b", int zero = 3) {
    if (layout.ranks() != n || layout["pp"] > kConfig.layers / 2 || layout["tp"] > kConfig.heads)
      return;
    Setting s{layout, {}, layout["tp"] > 1};
    s.options.microbatch = 1;
    // 2 micro-batches a stage. Of long rings one: a GPU's queue is full after about 1000 launches,
    // and the host waits.
    s.options.batch = layout.data_ranks() * (layout["cp"] > 2 ? 1 : 2) * layout["pp"];
    s.options.schedule = schedule;
    s.options.fsdp.zero = zero;
    all.push_back(s);
  };
  add({{"replicate", n}});
  if (n == 1) return all;
  for (int zero : {1, 2, 3}) add({{"fsdp", n}}, "1f1b", zero);
  add({{"tp", n}});
  add({{"cp", n}});
  for (const std::string& schedule : schedule_names()) add({{"pp", n}}, schedule);
  add({{"pp", 2}, {"fsdp", half}}, "zbv");
  add({{"pp", 2}, {"tp", half}});
  add({{"fsdp", 2}, {"cp", half}});
  return all;
}
// Calls visit(mesh, config, options, name) for each. What fails on one rank ends the test on all:
// they would wait for it in the next setting.
template <class Visit> void each_setting(Visit visit) {
  for (const Setting& s : settings()) {
    GptConfig config = kConfig;
    config.sequence_parallel = s.rows;
    Mesh mesh = open_mesh(s.layout);
    collectively(job(), [&] {
      visit(mesh, config, s.options, sentence(to_string(s.layout), " ", s.options.schedule));
    });
    close_mesh(mesh);
  }
}

// The next token is one more, modulo the vocabulary.
std::vector<int> counting(int64_t step, int64_t s, const GptConfig& g) {
  std::vector<int> tokens;
  for (int64_t t = 0; t <= g.context; t++) tokens.push_back(int((31 * step + 7 * s + t) % g.vocab));
  return tokens;
}

// ---- a device that stands still

// Streams that run by themselves, as a GPU's do: with no GPU the stand-in's queues.
struct Queues {
  Queues() {
#ifdef CPU_FAST
    was_ = cpu::streams_are_queued;
    if (!was_) cpu::queue_streams(1);
#endif
  }
  ~Queues() {
#ifdef CPU_FAST
    if (!was_) cpu::run_streams_immediately();
#endif
  }
  bool was_ = true;
};

int64_t host_waits() {
#ifdef CPU_FAST
  return cpu::host_waits;
#else
  return 0;
#endif
}

}  // namespace

TEST(the_host_goes_through_a_step_while_the_device_stands_still_and_waits_once) {
  const Queues queues;
  if (getenv("PTXRUN_RACE")) skip("a PTX runner's streams run immediately");
  if (device().is_gpu && nccl_referee::watch && job().size > 1)
    skip("with COMM=mpi the host waits where two streams communicate (cpu/nccl/nccl.cpp)");
  int count = 0;
  each_setting([&](Mesh& mesh, const GptConfig& config, const TrainerOptions& options,
                   const std::string& name) {
    Trainer trainer(mesh, config, options);
    const auto read = [&](int64_t step) {
      return trainer.read([&](int64_t s) { return sequence(step, s, config); });
    };
    Batch batch = read(1);
    for (int step = 1; step <= 3; step++) {
      synchronize();
      const int64_t before = host_waits();
      bool stands;
      {
        Standstill device_stands_still(device().compute);
        trainer.gradients(batch);
        trainer.update(kLearningRate);
        batch = read(step + 1);
        stands = device_stands_still.stands();
        CHECK_EQ(host_waits(), before, name);
        device_stands_still.go();
        const auto [loss, norm] = trainer.results();
        if (host_waits()) CHECK_EQ(host_waits(), before + 1, name);
        CHECK(std::isfinite(loss) && std::isfinite(norm), name);
      }
      // a first step allocates
      CHECK(stands || step == 1, name, ": step ", step, " waited for the device");
    }
    count++;
  });
  measured(count, " settings");
}

// Shown in docs/choosing.md.
TEST(a_training_in_a_dozen_lines_learns_to_count) {
  if (getenv("PTXRUN_RACE")) skip("100 steps take minutes under a PTX runner");
  std::vector<double> losses;
  const GptConfig config{{2, 32, 4, 16, 24}};  // layers, width, heads, context, vocabulary
  TrainerOptions options;
  options.batch = 4 * job().size, options.microbatch = 2;
  Mesh mesh = open_mesh({{"fsdp", job().size}});
  {
    Trainer trainer(mesh, config, options);
    for (int64_t step = 1; step <= 100; step++) {
      trainer.gradients(trainer.read([&](int64_t s) { return counting(step, s, config); }));
      trainer.update(0.003);
      const auto [loss, norm] = trainer.results();
      losses.push_back(loss);
    }
  }
  close_mesh(mesh);
  CHECK_LE(losses.back(), 0.1);
  measured("the loss falls from ", losses[0], " to ", losses.back());
}

// ---- the batch

TEST(a_batch_that_is_read_ahead_trains_to_the_same_bits) {
  int count = 0;
  each_setting([&](Mesh& mesh, const GptConfig& config, const TrainerOptions& options,
                   const std::string& name) {
    const auto losses = [&](bool ahead) {
      Trainer trainer(mesh, config, options);
      std::vector<double> values;
      const auto of = [&](int64_t step) {
        return [&, step](int64_t s) { return sequence(step, s, config); };
      };
      Batch batch = trainer.read(of(1));
      for (int step = 1; step <= 3; step++) {
        if (ahead) trainer.gradients(batch);
        else trainer.gradients(trainer.read(of(step)));
        trainer.update(kLearningRate);
        if (ahead) batch = trainer.read(of(step + 1));
        const auto [loss, norm] = trainer.results();
        values.insert(values.end(), {loss, norm});
        // what reads other sequences comes between
        if (step == 2) values.push_back(trainer.evaluate(3, of(0)));
        if (step == 2 && ahead) CHECK(trainer.can_go_on(batch), name);
      }
      return values;
    };
    CHECK(losses(true) == losses(false), name);
    count++;
  });
  measured(count, " settings");
}

TEST(every_sequence_is_read_once_and_uploaded_with_its_micro_batch_where_the_model_ends) {
  int64_t uploads = 0;
  each_setting([&](Mesh& mesh, const GptConfig& config, const TrainerOptions& options,
                   const std::string& name) {
    Trainer trainer(mesh, config, options);
    const Schedule& schedule = trainer.pipeline.schedule();
    const int stage = mesh["pp"].rank;
    const bool first = stage == 0, last = stage == schedule.stage_of(schedule.positions() - 1);
    std::vector<int64_t> read;
    const Batch batch = trainer.read([&](int64_t s) {
      read.push_back(s);
      return sequence(1, s, config);
    });
    const size_t mine = size_t(options.batch / mesh.layout.data_ranks());
    CHECK_EQ(read.size(), first || last ? mine : 0, name);
    CHECK(std::is_sorted(read.begin(), read.end()), name);
    CHECK_EQ(std::set<int64_t>(read.begin(), read.end()).size(), read.size(), name);
    CHECK_EQ(int64_t(batch.size()), schedule.microbatches, name);
    for (const Tokens& tokens : batch) {
      CHECK_EQ(tokens.T, config.context);
      const int64_t rows = tokens.rows();
      CHECK_EQ(tokens.inputs.empty() ? 0 : tokens.inputs.numel(), first ? rows : 0, name);
      CHECK_EQ(tokens.targets.empty() ? 0 : tokens.targets.numel(), last ? rows : 0, name);
      if (!first || !last) continue;
      // parts of one upload
      CHECK_EQ(tokens.targets.data<int>() - tokens.inputs.data<int>(), rows, name);
      CHECK_EQ(tokens.order.data<int>() - tokens.targets.data<int>(), rows, name);
      uploads++;
    }
  });
  measured(uploads, " micro-batches of rank 0 in one upload each");
}

// ---- what is refused

TEST(training_does_not_go_on_with_moments_that_are_not_finite) {
  each_setting([&](Mesh& mesh, const GptConfig& config, const TrainerOptions& options,
                   const std::string& name) {
    Trainer trainer(mesh, config, options);
    const Batch batch = trainer.read([&](int64_t s) { return sequence(1, s, config); });
    const auto& shards = trainer.optimizer().shards();
    // of a parameter that counts on this rank: what all tp ranks have whole counts on one
    const auto shard =
        std::ranges::find_if(shards, [](const ParamShard& s) { return s.param->counted; });
    CHECK(shard != shards.end(), name);
    std::vector<bool> goes_on{trainer.can_go_on(batch)};
    for (const Tensor& moment : {shard->m, shard->v}) {
      fill(moment, INFINITY);
      goes_on.push_back(trainer.can_go_on(batch));
      fill(moment, 0);
    }
    goes_on.push_back(trainer.can_go_on(batch));
    CHECK(goes_on == std::vector({true, false, false, true}), name);
  });
}

TEST(a_batch_that_does_not_fit_is_refused) {
  const GptConfig config = kConfig;
  TrainerOptions options;
  options.microbatch = 1;
  options.batch = job().size * 2;
  Mesh mesh = open_mesh({{"fsdp", job().size}});
  Trainer trainer(mesh, config, options);
  const auto all = [&](int last) {
    return [&, last](int64_t) {
      std::vector<int> tokens(config.context + 1);
      tokens.back() = last;
      return tokens;
    };
  };
  CHECK_SAYS(trainer.read(all(int(config.vocab))), "no token 32");
  CHECK_SAYS(trainer.read(all(-1)), "no token -1");
  CHECK_EQ(trainer.read(all(int(config.vocab) - 1)).size(), 2u);
  trainer.fsdp.begin_step(2);
  CHECK_SAYS(trainer.fsdp.finish_backward(), "unfinished");
  close_mesh(mesh);
}

// ---- the profile and the report

TEST(a_profile_has_every_op_of_a_step_and_no_more_time_than_the_step) {
  double share = 1;
  each_setting([&](Mesh& mesh, const GptConfig& config, const TrainerOptions& options,
                   const std::string& name) {
    Trainer trainer(mesh, config, options);
    const auto of = [&](int64_t s) { return sequence(1, s, config); };
    Profile profile;
    double seconds = 0;
    int64_t bytes = 0;
    for (int step = 1; step <= 3; step++) {
      if (step == 2) bytes = ledger.bytes();  // the first one warms up
      const Stopwatch clock;
      op_times.start(OpTimes::everything);
      profile.host_begins();
      trainer.gradients(trainer.read(of));
      trainer.update(kLearningRate);
      profile.host_reads();
      profile.host_waits();
      trainer.results();
      op_times.stop();
      const double took = clock.seconds();
      if (step > 1) seconds += took;
      profile.end_step(took);
    }
    bytes = ledger.bytes() - bytes;
    double named = 0, kernels = 0, sent = 0, multiplied = 0;
    for (const auto& [op, row] : profile.rows()) {
      CHECK(!op.empty(), name);
      CHECK(row.calls > 0 && row.calls % 2 == 0, name, ": ", op, " ran ", row.calls,
            " times in two equal steps");
      CHECK(row.seconds >= 0, name, ": ", op);
      named += row.seconds;
      (row.collective ? sent : kernels) += row.collective ? row.work.bytes : row.seconds;
      if (op.starts_with("matmul")) multiplied += row.work.flops;
    }
    // collectives may run beside the kernels
    CHECK_LE(device().is_gpu || kDelayed ? kernels : named, seconds, name);
    share = std::min(share, named / seconds);
    // what the ledger entered, and what the model's size says
    CHECK_LE(std::abs(sent - double(bytes)), 1e-9 * double(bytes) + 16, name);
    const double flops = 2 * flops_per_token(config) * double(options.batch * config.context),
                 attention = 2 * 6.0 * double(config.layers * config.width * config.context) *
                             double(options.batch * config.context);
    if (job().size == 1) {
      CHECK_EQ(multiplied, flops - attention, name);
      CHECK_EQ(profile.rows().at("adamw").calls, 2);
      CHECK_EQ(profile.rows().at("read a batch").calls, 2);
    }
  });
  measured("named ops are ", format("%.1f", 100 * share), "% of a step, at least");
}

// Numbers that a block reads and writes beside its products and its attention, in activations of
// width C; and in the head those of the logits.
TEST(the_planner_counts_the_passes_that_kernels_make) {
  if (job().size > 1) return skip("one rank tells");
  const auto bytes_of_ops = [](int64_t layers) {
    const GptConfig config{{layers, 256, 4, 64, 2048}, Dtype::f32};
    Mesh mesh = open_mesh({});
    TrainerOptions options;
    options.batch = options.microbatch = 8;
    Trainer trainer(mesh, config, options);
    Profile profile;
    profile.host_begins();
    op_times.start(OpTimes::everything);
    trainer.gradients(trainer.read([&](int64_t s) { return sequence(1, s, config); }));
    op_times.stop();
    trainer.results();
    profile.end_step(1);
    close_mesh(mesh);
    std::map<std::string, double> bytes;
    for (const auto& [op, row] : profile.rows())
      if (op.starts_with("cross_entropy")) bytes["logits"] += row.work.bytes;
      else if (!op.starts_with("attention"))
        bytes[op.ends_with("_backward") ? "backward" : "forward"] += row.work.bytes;
    return bytes;
  };
  const auto one = bytes_of_ops(1), two = bytes_of_ops(2);
  const SoftwareProfile& p = profile_named("threefold");
  for (const auto& [name, passes] : {std::pair{"forward", p.forward}, {"backward", p.backward}}) {
    const double rows = (two.at(name) - one.at(name)) / (8 * 64 * 256 * 4);
    CHECK_EQ(std::round(10 * rows) / 10, passes.rows + passes.columns + 4 * passes.hidden, name);
    measured(name, " ", rows, "; ");
  }
  // with attention's 1 and 3 the 28 that tests/test_host_calls.sh counts
  CHECK_EQ(p.forward.kernels, 5);
  CHECK_EQ(p.backward.kernels, 19);
  const double logits = one.at("logits") / (8 * 64 * 2048 * 4);
  CHECK_EQ(std::round(10 * logits) / 10, p.forward.logits + p.backward.logits);
}

TEST(nothing_is_timed_that_is_not_asked_for) {
  const Tensor x({3}, Dtype::f32, Memory::data);
  int ops = 0;
  const auto count = [&] {
    ops = 0;
    op_times.each([&](const OpTimes::Op&) { ops++; });
    return ops;
  };
  op_times.start(OpTimes::collectives);
  add(x, x, x);
  CHECK_EQ(count(), 0);
  op_times.start(OpTimes::everything);
  add(x, x, x);
  cast(x, x);  // a copy inside it is a part of it
  op_times.stop();
  add(x, x, x);
  synchronize();
  CHECK_EQ(count(), 2);
}

TEST(a_report_has_the_bubbles_of_what_was_timed_and_shows_bytes_that_differ) {
  const int64_t n = job().size, stages = n % 2 ? n : 2;
  TrainerOptions options;
  options.microbatch = 1, options.batch = 4 * n / stages;
  Mesh mesh = open_mesh({{"pp", stages}, {"fsdp", n / stages}});
  ledger.rows.clear();
  Trainer trainer(mesh, kConfig, options);
  trainer.pipeline.measures = true;
  trainer.gradients(trainer.read([&](int64_t s) { return sequence(1, s, kConfig); }));
  trainer.update(kLearningRate);
  char path[] = "/tmp/report-XXXXXX";
  if (mesh.rank == 0) close(mkstemp(path));
  nlohmann::json pipeline;
  bool differs[2]{};
  for (const bool one_more_byte : {false, true}) {
    for (auto& [key, row] : ledger.rows) row.numerator += one_more_byte * row.n;
    std::optional<JsonLines> metrics;
    collectively(job(), [&] { metrics.emplace(mesh.rank ? "" : path); });
    FILE* const out = std::exchange(stdout, fopen("/dev/null", "w"));
    const std::string error =
        error_of([&] { compare_with_theory(mesh, trainer, 1, {.ms = 1}, *metrics); });
    fclose(std::exchange(stdout, out));
    metrics.reset();
    collectively(job(), [&] {
      REQUIRE(error.empty(), error);
      if (mesh.rank) return;
      std::ifstream file(path);
      const nlohmann::json summary = nlohmann::json::parse(file);
      unlink(path);
      const std::string text = summary.at("text");
      differs[one_more_byte] = text.find("DIFFERS") != std::string::npos;
      pipeline = summary.at("pipeline");
    });
  }
  close_mesh(mesh);
  if (mesh.rank) return;
  CHECK(!differs[false] && differs[true] == (n > 1));
  // executed: as timed; predicted: each computation takes the mean of its kind on its stage
  const Schedule& schedule = trainer.pipeline.schedule();
  const Durations took = pipeline["took_ms"];
  Durations means;
  for (size_t stage = 0; stage < took.size(); stage++) {
    const std::vector<Action>& actions = schedule.actions[stage];
    means.emplace_back(actions.size());
    for (size_t i = 0; i < actions.size(); i++)
      for (size_t j = 0; j < actions.size(); j++)
        if (actions[i].kind == actions[j].kind)
          means[stage][i] += took[stage][j] / schedule.microbatches;
  }
  const double bubble = pipeline["bubble"], predicted = pipeline["predicted_bubble"];
  CHECK_EQ(bubble, simulate(schedule, took).bubble());
  CHECK_LE(std::abs(predicted - simulate(schedule, means).bubble()), 1e-12);
  measured(stages, " stages: bubble ", bubble, ", predicted ", predicted);
}

int main(int argc, char** argv) { return run_mpi_tests(argc, argv); }
