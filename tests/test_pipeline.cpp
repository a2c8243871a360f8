// test_pipeline.cpp: every schedule, alone and with the other strategies, equals one rank, in f64
// to rounding; all schedules equal each other bit for bit; bytes and live activations equal the
// formulas exactly. Run under mpiexec -n 1, 2, 3, 4, 8 (6 works, too).
#include "tests/parity.h"
#include "theory/simulate.h"

namespace {

const GptConfig kConfig = [] {  // 17 layers: no number of stages from 2 to 8 divides them
  GptConfig g{17, 12, 4, 5, 13};
  g.attention = AttentionKind::plain;  // flash attention pads these tiny heads to whole tiles
  g.dtype = Dtype::f64;
  return g;
}();

bool is_ring(const std::string& schedule) {
  return schedule_row(schedule).placement == Placement::ring;
}
bool takes(const std::string& schedule, int chunks) {
  return is_ring(schedule) || schedule_row(schedule).chunks() == chunks;
}

struct Setting {
  Layout layout;
  std::string schedule;
  int chunks;
  int64_t microbatches;
  FsdpOptions fsdp;
  bool recompute, by_rows;
  GptConfig of(GptConfig g) const {
    g.recompute = recompute, g.sequence_parallel = by_rows;
    return g;
  }
  TrainerOptions options(int64_t batch) const {
    TrainerOptions o;
    o.batch = batch, o.microbatch = batch / (microbatches * layout.data_ranks());
    o.schedule = schedule, o.chunks = chunks, o.fsdp = fsdp;
    return o;
  }
  std::string name() const {
    return sentence(to_string(layout), " ", schedule, " chunks ", chunks, " micro-batches ",
                    microbatches, " zero ", fsdp.zero, fsdp.reshard ? " reshard" : " keep",
                    " prefetch ", fsdp.prefetch, recompute ? " recompute" : "",
                    by_rows ? " sequence parallel" : "");
  }
};

// Every layout pp x (one other axis, or fsdp x tp) of the world's size; alone with each schedule
// and 1 to 16 micro-batches, with others with two numbers of them, which on 6 and 8 ranks take
// turns. ZeRO stages, prefetch, recompute and slices of rows take turns, too.
template <class Work> void each_setting(Work work) {
  const int n = job().size;
  if (n == 1) skip("no pipeline");
  int turn = 0;
  for (int pp = n; pp >= 2; pp--) {
    if (n % pp) continue;
    const int rest = n / pp;
    std::vector<Layout> layouts{{{"pp", pp}, {"tp", rest}}};
    if (rest > 1)
      layouts.insert(layouts.end(),
                     {{{"pp", pp}, {"fsdp", rest}}, {{"pp", pp}, {"replicate", rest}}});
    if (rest == 4)
      layouts = {{{"pp", pp}, {"fsdp", 2}, {"tp", 2}},
                 {{"pp", pp}, {"replicate", 2}, {"tp", 2}},
                 {{"pp", pp}, {"replicate", 2}, {"fsdp", 2}}};
    for (const Layout& layout : layouts) {
      Mesh mesh = open_mesh(layout);
      int other = 0;  // every second of a layout's settings
      for (const std::string& schedule : schedule_names())
        for (int chunks : {1, 2, 3})
          for (int64_t m : {1, 3, 4, 8, 16}) {
            const bool looped = is_ring(schedule);
            if (!takes(schedule, chunks) || pp * chunks > kConfig.layers) continue;
            if (looped && m % pp) continue;
            if (rest > 1 && m != (pp == 3 ? 3 : 8) && m != 4) continue;
            if (rest > 1 && n > 4 && !kDelayed && other++ % 2 == (layout["fsdp"] > 1)) continue;
            // Streams with random delays take their time: one number of micro-batches, and with
            // other axes the schedules that differ most
            if (kDelayed && (m != 4 || chunks > 2 || (rest > 1 && (looped || schedule == "gpipe"))))
              continue;
            turn++;
            const int zero = 1 + turn % 3;
            work(mesh, Setting{layout,
                               schedule,
                               chunks,
                               m,
                               {zero, zero < 3 || turn % 2 == 0, turn % 4 == 3 ? 0 : 1},
                               turn % 5 < 2,
                               layout["tp"] > 1 && turn % 2 == 1});
          }
      close_mesh(mesh);
    }
  }
}

}  // namespace

TEST(every_schedule_equals_one_rank_in_f64) {
  const int64_t batch = 48;
  Parity parity(kConfig, batch);
  each_setting([&](Mesh& mesh, const Setting& s) {
    if (batch % (s.microbatches * s.layout.data_ranks())) return;
    parity.check(mesh, s.of(kConfig), s.options(batch), s.name());
  });
  parity.report();
}

TEST(every_schedule_has_the_bits_of_one_rank_in_f32_over_20_steps) {
  if (job().size == 1) return skip("no pipeline");
  GptConfig config = kConfig;
  config.dtype = Dtype::f32;
  const int pp = job().size;
  const int64_t m = pp == 3 || pp == 6 ? 6 : 8, batch = 2 * m;
  Setting s{Layout{{"pp", pp}}, "1f1b", 1, m, {}, false, false};
  const Run reference = from_rank_0([&] {
    Mesh alone;
    const Run run = curve_of(alone, config, s.options(batch), 20);
    close_mesh(alone);
    return run;
  });
  Mesh mesh = open_mesh(s.layout);
  int runs = 0;
  for (const std::string& schedule : schedule_names())
    for (int chunks : {1, 2}) {
      if (!takes(schedule, chunks)) continue;
      s.schedule = schedule, s.chunks = chunks;
      const Run run = curve_of(mesh, config, s.options(batch), 20);
      CHECK(run.losses == reference.losses && run.norms == reference.norms, s.name());
      runs++;
    }
  close_mesh(mesh);
  measured(runs, " schedules, losses and norms; the loss goes from ", reference.losses.front(),
           " to ", reference.losses.back());
}

TEST(bytes_sent_and_live_activations_equal_the_formulas_exactly) {
  int settings = 0;
  int64_t bytes = 0;
  each_setting([&](Mesh& mesh, const Setting& s) {
    GptConfig config = s.of(kConfig);
    config.dtype = settings % 3 == 0 ? Dtype::f32 : settings % 3 == 1 ? Dtype::bf16 : Dtype::f64;
    const Schedule schedule =
        make_schedule(s.schedule, s.layout["pp"], int(s.microbatches), s.chunks);
    const std::string name = sentence(name_of(config.dtype), " ", s.name());
    const TrainerOptions options = s.options(3 * s.microbatches * s.layout.data_ranks());
    bytes += equals_theory(mesh, config, options, name, [&](Trainer& trainer) {
      CHECK_EQ(trainer.pipeline.most_live(), peak_live(schedule, mesh["pp"].rank), name,
               ": live micro-batches");
    });
    settings++;
  });
  measured(settings, " settings, ", bytes, " bytes on rank 0");
}

// However far a stage runs ahead, activations that it has sent stay for four exchanges at most.
TEST(what_was_sent_is_freed_however_many_micro_batches_there_are) {
  if (job().size == 1) return skip("no pipeline");
  GptConfig config = kConfig;
  config.layers = 3 * job().size;
  Mesh mesh = open_mesh({{"pp", job().size}});
  const auto not_kept = [&](int m) {  // bytes of activations at the most, without those on tapes
    Setting s{Layout{{"pp", job().size}}, "gpipe", 1, m, {}, false, false};
    Trainer trainer(mesh, config, s.options(m));
    MemoryUse& memory = device().memory;
    const int64_t before = memory.now[int(Memory::activations)];
    memory.peak = memory.now;
    trainer.gradients(trainer.read([&](int64_t s) { return sequence(1, s, config); }));
    trainer.results();
    return memory.peak[int(Memory::activations)] - before - trainer.pipeline.most_live_bytes();
  };
  const int64_t few = not_kept(5), some = not_kept(8), many = not_kept(16);
  close_mesh(mesh);
  CHECK_EQ(few, many);
  CHECK_EQ(some, many);
  measured(few, " bytes of activations beside those that are kept for backwards");
}

TEST(two_hundred_random_runs_end) {
  if (job().size == 1) return skip("no pipeline");
  GptConfig config{9, 8, 2, 3, 11};
  config.attention = AttentionKind::plain;
  const int pp = job().size;
  Mesh mesh = open_mesh({{"pp", pp}});
  uint64_t state = 7;
  const auto below = [&](uint64_t n) {
    return int((state = state * 6364136223846793005u + 1442695040888963407u) >> 33) % int(n);
  };
  std::vector<std::string> schedules = schedule_names();  // those that can cut so few layers
  std::erase_if(schedules, [&](const std::string& name) {
    return !takes(name, 1) && schedule_row(name).chunks() * pp > config.layers;
  });
  double sum = 0;
  for (int run = 0; run < 200; run++) {
    const std::string& schedule = schedules[size_t(below(schedules.size()))];
    const bool looped = is_ring(schedule);
    const int chunks = looped ? 1 + below(uint64_t(config.layers / pp)) : 0,
              m = looped ? pp * (1 + below(2)) : 1 + below(12);
    Setting s{Layout{{"pp", pp}}, schedule, chunks, m, {}, below(2) == 1, false};
    Trainer trainer(mesh, s.of(config), s.options(m));
    trainer.gradients(trainer.read([&](int64_t i) { return sequence(run, i, config); }));
    trainer.update(1e-3);
    sum += trainer.results().loss;
  }
  close_mesh(mesh);
  CHECK_LE(sum / 200, 3);
  measured("a mean loss of ", sum / 200);
}

TEST(held_out_loss_and_next_token_are_the_same_in_every_layout) {
  const HeldOut expected = held_out(kConfig, 7, {3, 1, 4, 1});
  double worst = 0;
  each_setting([&](Mesh& mesh, const Setting& s) {
    if (s.microbatches != (s.layout["pp"] == 3 ? 3 : s.layout["pp"] == 6 ? 16 : 8)) return;
    worst =
        std::max(worst, difference(mesh, s.of(kConfig),
                                   s.options(s.microbatches * s.layout.data_ranks()), expected));
  });
  CHECK_LE(worst, 1e-12);
  measured("relative difference ", worst);
}

TEST(a_next_token_is_picked_from_f32_logits_where_the_model_is_bf16) {
  GptConfig config = kConfig;
  config.dtype = Dtype::bf16;
  config.context = 16;
  for (const Layout& layout : {Layout{{"pp", job().size}}, Layout{{"cp", job().size}}}) {
    Mesh mesh = open_mesh(layout);
    TrainerOptions options;
    options.microbatch = options.batch = 1;
    Trainer trainer(mesh, config, options);
    CHECK(!are_bf16(trainer.next_logits(std::vector<int>(16, 3))), to_string(layout));
    close_mesh(mesh);
  }
}

TEST(layers_are_cut_evenly_with_the_head_weighed_in) {
  const auto cut = [](int64_t layers, double head, const std::vector<int>& stages) {
    std::vector<int64_t> s;
    for (const Range& r : split_layers(layers, head, stages)) s.push_back(r.size());
    return s;
  };
  const auto sizes = [&](int64_t layers, double head, int p) {
    return cut(layers, head, make_schedule("1f1b", p, 1).stages_of_positions());
  };
  CHECK(sizes(12, 0, 4) == (std::vector<int64_t>{3, 3, 3, 3}));
  CHECK(sizes(12, 3, 3) == (std::vector<int64_t>{5, 5, 2}));
  CHECK(sizes(30, 0, 3) == (std::vector<int64_t>{10, 10, 10}));
  CHECK(sizes(4, 10, 4) == (std::vector<int64_t>{1, 1, 1, 1}));
  for (int p = 1; p <= 17; p++) {
    int64_t sum = 0;
    for (int64_t n : sizes(17, 1.5, p)) {
      sum += n;
      CHECK(n >= 1);
    }
    CHECK_EQ(sum, 17);
  }
  CHECK_SAYS(sizes(3, 0, 4), "3 layers cannot be cut into 4 pieces");

  // of several chunks, too: the busiest stage has hardly more than its share, or only what it must
  int cases = 0;
  for (const auto& [name, chunks] : {std::pair{"interleaved", 3}, {"zbv", 2}})
    for (int p = 2; p <= 8; p++)
      for (const double head : {0.0, 0.4, 1.0, 3.1})
        for (int64_t layers = chunks * p; layers <= 3 * chunks * p; layers++) {
          const Schedule s = make_schedule(name, p, p, chunks);
          const std::vector<int64_t> of = cut(layers, head, s.stages_of_positions());
          std::vector<double> work(p);
          for (int i = 0; i < s.positions(); i++) work[s.stage_of(i)] += of[i];
          work[s.stage_of(s.positions() - 1)] += head;
          const double share = (layers + head) / p, most = std::max(share + 1, chunks + head);
          CHECK(std::ranges::max(work) < most + 1e-9, name, ", ", p, " stages, ", layers,
                " layers and a head of ", head, ": ", std::ranges::max(work));
          cases++;
        }
  measured(cases, " cuts into stages of several chunks");
}

int main(int argc, char** argv) { return run_mpi_tests(argc, argv); }
