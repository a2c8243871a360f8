// test_fsdp.cpp: data parallelism and FSDP equal one rank, in f64 to rounding. Run under mpiexec -n 1..8: every layout replicate x fsdp of the
// world's size is compared with a plain single-rank computation that each rank does by itself.
#include "tests/parity.h"
#include "theory.h"

namespace {

const GptConfig kConfig = [] {
  GptConfig g{3, 20, 2, 9, 31};  // nothing here divides by 8
  g.dtype = Dtype::f64;
  return g;
}();

// Runs `work(layout)` for each replicate x fsdp = the world's size, with fsdp one of 1, 2, 3, 4, 8 and replicate 1 or 2 (or all ranks).
template <class Work> void each_layout(Work work) {
  for (int fsdp = 1; fsdp <= job().size; fsdp++) {
    if (job().size % fsdp) continue;
    const int replicate = job().size / fsdp;
    if (fsdp > 1 && replicate > 2) continue;
    work(Layout{1, replicate, fsdp, 1});
  }
}

std::string name_of(const Layout& l, const FsdpOptions& f, int64_t microbatch, bool recompute) {
  return sentence("replicate ", l.replicate, " fsdp ", l.fsdp, " zero ", f.zero, f.reshard ? " reshard" : " keep", " prefetch ", f.prefetch,
                  " microbatch ", microbatch, recompute ? " recompute" : "");
}

// Every ZeRO stage, reshard, prefetch, accumulation and recompute of one layout against one rank.
Difference all_settings(const Layout& layout, const Run& reference, int64_t batch, int& settings) {
  Mesh mesh = open_mesh(job(), layout);
  Difference worst;
  const int64_t per_rank = batch / (layout.replicate * layout.fsdp);
  for (int zero = 1; zero <= 3; zero++)
    for (bool reshard : {true, false})
      for (int prefetch = 0; prefetch <= 2; prefetch++)
        for (int64_t microbatch : {per_rank, int64_t(1)}) {
          if (zero < 3 && !reshard) continue;  // says nothing below stage 3
          if (layout.fsdp == 1 && (zero < 3 || !reshard)) continue;  // nothing is sharded
          if (microbatch == 1 && per_rank == 1 && prefetch > 0) continue;
          TrainerOptions options;
          options.batch = batch, options.microbatch = microbatch;
          options.fsdp = {zero, reshard, prefetch};
          GptConfig config = kConfig;
          config.recompute = prefetch == 1;
          const Difference d = compare(many_ranks(mesh, config, options, kSteps), reference);
          CHECK_LE(d.worst(), 1e-12, name_of(layout, options.fsdp, microbatch, config.recompute), ": loss ", d.loss, " gradients ", d.gradients,
                   " norm ", d.norm, " weights ", d.weights);
          worst.widen(d);
          settings++;
        }
  close_mesh(mesh);
  return worst;
}

}  // namespace

TEST(data_parallel_and_fsdp_equal_one_rank_in_f64) {
  const int64_t batch = 24;
  const Run reference = one_rank(kConfig, batch, kSteps);
  Difference worst;
  int settings = 0;
  each_layout([&](const Layout& layout) { worst.widen(all_settings(layout, reference, batch, settings)); });
  measured(settings, " settings: loss ", worst.loss, ", gradients ", worst.gradients, ", norm ", worst.norm, ", weights ", worst.weights);
}

TEST(bytes_sent_and_memory_held_equal_the_formulas_exactly) {
  int settings = 0;
  int64_t bytes = 0;
  each_layout([&](const Layout& layout) {
    Mesh mesh = open_mesh(job(), layout);
    for (Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f64})
      for (int zero = 1; zero <= 3; zero++)
        for (bool reshard : {true, false})
          for (int64_t m : {1, 3}) {
            GptConfig config = kConfig;
            config.dtype = dtype;
            TrainerOptions options;
            options.microbatch = 2, options.batch = 2 * m * layout.ranks();
            options.fsdp = {zero, reshard, int(m % 2)};
            const std::string name = sentence(name_of(dtype), " ", name_of(layout, options.fsdp, 2, false));
            const Theory expected = theory(config, layout, 0, 0, options);
            const MemoryUse before = device().memory;
            device().memory.peak = before.now;
            ledger.rows.clear();
            Trainer trainer(mesh, config, options);
            for (int step = 1; step <= 2; step++) {
              trainer.gradients([&](int64_t s) { return sequence(step, s, config); });
              trainer.update(1e-3);
            }
            CHECK_EQ(ledger.rows.size(), expected.step.size(), name);
            for (const auto& [key, row] : expected.step) {
              const Ledger::Row& got = ledger.rows[key];
              const std::string what = sentence(name, ": ", std::get<0>(key), " ", name_of(std::get<1>(key)), " for ", name_of(std::get<2>(key)));
              CHECK_EQ(got.calls, 2 * row.calls, what);
              CHECK_EQ(got.numerator, 2 * row.numerator, what);
              bytes += got.numerator / row.n;
            }
            for (Memory category : {Memory::parameters, Memory::gradients, Memory::optimizer})
              CHECK_EQ(device().memory.now[int(category)] - before.now[int(category)], expected.persistent[int(category)], name, ": ",
                       name_of(category));
            CHECK_LE(device().memory.peak[int(Memory::gather)], expected.gather_bound, name, ": borrowed units");
            settings++;
          }
    close_mesh(mesh);
  });
  measured(settings, " settings, ", bytes, " bytes on rank 0");
}

// Rounding differs with the order of summation, and 50 steps of Adam spread it: the curve stays together, not its last bits.
TEST(the_f32_curve_of_50_steps_equals_one_rank_within_1e_4) {
  GptConfig config{2, 32, 4, 16, 61};
  const Run reference = one_rank(config, 24, 50);
  double worst = 0;
  each_layout([&](const Layout& layout) {
    Mesh mesh = open_mesh(job(), layout);
    TrainerOptions options;
    options.batch = 24, options.microbatch = 24 / layout.ranks();
    worst = std::max(worst, relative({many_ranks(mesh, config, options, 50).losses}, {reference.losses}));
    close_mesh(mesh);
  });
  CHECK_LE(worst, 1e-4);
  measured("largest relative difference of the loss ", worst, "; it falls from ", reference.losses.front(), " to ", reference.losses.back());
}

// bf16 keeps 8 bits: each micro-batch's activations round to 2^-9 relative, differently for each grouping of rows only where products sum in another
// order; the weights that compute are rounded masters, so one flipped last bit (2^-8 of a weight) is what two layouts can differ by. On a loss
// that averages hundreds of tokens this stays below 2^-8.
TEST(the_bf16_curve_of_20_steps_equals_one_rank_within_2_to_the_minus_8) {
  GptConfig config{2, 32, 4, 16, 61};
  config.dtype = Dtype::bf16;
  const Run reference = one_rank(config, 24, 20);
  double worst = 0;
  each_layout([&](const Layout& layout) {
    Mesh mesh = open_mesh(job(), layout);
    TrainerOptions options;
    options.batch = 24, options.microbatch = 24 / layout.ranks();
    worst = std::max(worst, relative({many_ranks(mesh, config, options, 20).losses}, {reference.losses}));
    close_mesh(mesh);
  });
  CHECK_LE(worst, std::ldexp(1, -8));
  measured("largest relative difference of the loss ", worst);
}

TEST(a_held_out_loss_is_the_same_in_every_layout) {
  const GptConfig config = kConfig;
  double reference = 0, worst = 0;
  {
    Gpt gpt(config, 1337);
    Tensor total({1}, Dtype::f64, Memory::workspace);
    fill(total, 0);
    for (int64_t s = 0; s < 7; s++) {
      const auto t = sequence(0, s, config);
      Tape tape(false);
      gpt.loss(tape, Tokens(1, config.context, {t.begin(), t.end() - 1}, {t.begin() + 1, t.end()}), 1.0 / double(7 * config.context), total);
    }
    reference = download(total)[0];
  }
  each_layout([&](const Layout& layout) {
    Mesh mesh = open_mesh(job(), layout);
    TrainerOptions options;
    options.microbatch = 2, options.batch = 2 * layout.ranks();
    Trainer trainer(mesh, config, options);
    worst = std::max(worst, std::abs(trainer.evaluate(7, [&](int64_t s) { return sequence(0, s, config); }) - reference) / reference);
    close_mesh(mesh);
  });
  CHECK_LE(worst, 1e-12);
  measured("7 sequences: relative difference ", worst);
}

int main(int argc, char** argv) { return run_mpi_tests(argc, argv); }
