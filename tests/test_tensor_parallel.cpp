// test_tensor_parallel.cpp: tensor parallelism, alone and with FSDP or copies, equals one rank, in f64 to rounding; bytes and memory equal the
// formulas exactly. Run under mpiexec -n 1, 2, 3, 4, 6, 8: every layout with tp > 1 of the world's size and at most one other axis.
#include "tests/parity.h"
#include "theory.h"

namespace {

const GptConfig kConfig = [] {  // 10 heads, 80 hidden, 31 tokens, 9 rows a sequence: 3, 4, 6 and 8 divide none of them but 4 and 8 the hidden width
  GptConfig g{2, 20, 10, 9, 31};
  g.dtype = Dtype::f64;
  return g;
}();

template <class Work> void each_layout(Work work) {
  const int n = job().size;
  for (int tp = n; tp >= 1; tp--) {
    if (n % tp || (tp == 1 && n > 1)) continue;
    work(Layout{1, 1, n / tp, tp});
    if (tp < n) work(Layout{1, n / tp, 1, tp});
  }
}

struct Setting {
  bool by_rows, recompute;
  AttentionKind attention;
  int64_t microbatch;
  FsdpOptions fsdp;
  GptConfig of(GptConfig g) const {
    g.sequence_parallel = by_rows, g.recompute = recompute, g.attention = attention;
    return g;
  }
};

// By rows or not, recompute or not, and, taking turns with them, both kinds of attention, one or more micro-batches, the ZeRO stages.
template <class Work> void each_setting(const Layout& layout, int64_t per_rank, Work work) {
  int turn = 0;
  for (bool by_rows : {false, true})
    for (bool recompute : {false, true})
      for (int zero = 1; zero <= 3; zero++) {
        if (layout.fsdp == 1 && zero < 3 && !(zero == 1)) continue;
        turn++;
        Setting s{by_rows, recompute, turn % 2 ? AttentionKind::flash : AttentionKind::plain, turn % 3 ? int64_t(1) : per_rank, {zero, turn % 4 != 0, turn % 3}};
        work(s);
      }
}

std::string name_of(const Layout& l, const Setting& s) {
  return sentence(to_string(l), s.by_rows ? " by rows" : "", s.recompute ? " recompute" : "", s.attention == AttentionKind::plain ? " plain" : " flash",
                  " micro-batch ", s.microbatch, " zero ", s.fsdp.zero, s.fsdp.reshard ? " reshard" : " keep", " prefetch ", s.fsdp.prefetch);
}

double curve(const GptConfig& config, int steps) {  // the largest relative difference of a loss, over layouts, by rows and not
  const Run reference = one_rank(config, 24, steps);
  double worst = 0;
  each_layout([&](const Layout& layout) {
    Mesh mesh = open_mesh(job(), layout);
    for (bool by_rows : {false, true}) {
      GptConfig g = config;
      g.sequence_parallel = by_rows;
      TrainerOptions options;
      options.batch = 24, options.microbatch = 24 / (layout.replicate * layout.fsdp);
      worst = std::max(worst, relative({many_ranks(mesh, g, options, steps).losses}, {reference.losses}));
    }
    close_mesh(mesh);
  });
  return worst;
}

}  // namespace

TEST(tensor_parallelism_equals_one_rank_in_f64) {
  const int64_t batch = 12;
  const Run reference = one_rank(kConfig, batch, kSteps);
  Difference worst;
  int settings = 0;
  each_layout([&](const Layout& layout) {
    Mesh mesh = open_mesh(job(), layout);
    each_setting(layout, batch / (layout.replicate * layout.fsdp), [&](const Setting& s) {
      TrainerOptions options;
      options.batch = batch, options.microbatch = s.microbatch, options.fsdp = s.fsdp;
      const Difference d = compare(many_ranks(mesh, s.of(kConfig), options, kSteps), reference);
      CHECK_LE(d.worst(), 1e-12, name_of(layout, s), ": loss ", d.loss, " gradients ", d.gradients, " norm ", d.norm, " weights ", d.weights);
      worst.widen(d);
      settings++;
    });
    close_mesh(mesh);
  });
  measured(settings, " settings: loss ", worst.loss, ", gradients ", worst.gradients, ", norm ", worst.norm, ", weights ", worst.weights);
}

TEST(initial_weights_have_the_bits_of_one_rank) {
  for (Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f64}) {
    GptConfig config = kConfig;
    config.dtype = dtype;
    Gpt one(config, 1337);
    each_layout([&](const Layout& layout) {
      Mesh mesh = open_mesh(job(), layout);
      TrainerOptions options;
      options.microbatch = 1, options.batch = layout.replicate * layout.fsdp;
      Trainer trainer(mesh, config, options);
      const auto initial = whole_model(mesh, trainer, &Fsdp::whole_weights);
      for (size_t i = 0; i < initial.size(); i++)
        CHECK(initial[i] == download(one.params()[i]->value), one.params()[i]->name, " in ", name_of(dtype));
      close_mesh(mesh);
    });
  }
  measured("f32, bf16, f64");
}

TEST(bytes_sent_and_memory_held_equal_the_formulas_exactly) {
  int settings = 0;
  int64_t bytes = 0;
  each_layout([&](const Layout& layout) {
    Mesh mesh = open_mesh(job(), layout);
    for (Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f64})
      each_setting(layout, 3, [&](const Setting& s) {
        GptConfig config = s.of(kConfig);
        config.dtype = dtype;
        TrainerOptions options;
        const int64_t m = s.microbatch == 1 ? 3 : 1;
        options.microbatch = s.microbatch, options.batch = m * s.microbatch * layout.replicate * layout.fsdp, options.fsdp = s.fsdp;
        const std::string name = sentence(name_of(dtype), " ", name_of(layout, s));
        const Theory expected = theory(config, layout, 0, mesh.tp.rank, options);
        const MemoryUse before = device().memory;
        ledger.rows.clear();
        Trainer trainer(mesh, config, options);
        for (int step = 1; step <= 2; step++) {
          trainer.gradients([&](int64_t i) { return sequence(step, i, config); });
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
          CHECK_EQ(device().memory.now[int(category)] - before.now[int(category)], expected.persistent[int(category)], name, ": ", name_of(category));
        CHECK_EQ(trainer.kept_activations(), expected.activations, name, ": activations kept for the backward");
        settings++;
      });
    close_mesh(mesh);
  });
  measured(settings, " settings, ", bytes, " bytes on rank 0");
}

// A vocabulary so large that the logits of all of it would be larger than everything else: if a rank ever held them, its peak would show it.
TEST(no_rank_ever_holds_the_logits_of_the_whole_vocabulary) {
  if (job().size == 1) return skip("one rank holds them");
  GptConfig config{1, 16, 8, 16, 4001};
  double largest_share = 0;
  each_layout([&](const Layout& layout) {
    Mesh mesh = open_mesh(job(), layout);
    for (bool by_rows : {false, true}) {
      config.sequence_parallel = by_rows;
      TrainerOptions options;
      options.microbatch = 4, options.batch = 4 * layout.replicate * layout.fsdp;
      Trainer trainer(mesh, config, options);
      MemoryUse& use = device().memory;
      use.peak = use.now;
      const int64_t before = use.now[int(Memory::activations)];
      trainer.gradients([&](int64_t s) { return sequence(1, s, config); });
      trainer.update(1e-3);
      trainer.evaluate(8, [&](int64_t s) { return sequence(0, s, config); });
      const double all = double(4 * config.context * config.vocab) * 4, share = double(use.peak[int(Memory::activations)] - before) / all;
      CHECK(share < 1, to_string(layout), ": activations at their peak are ", share, " of full logits");
      largest_share = std::max(largest_share, share);
    }
    close_mesh(mesh);
  });
  measured("activations at their peak are ", largest_share, " of full logits at most");
}

TEST(the_f32_curve_of_50_steps_equals_one_rank_within_1e_4) {
  const double worst = curve({2, 40, 10, 16, 61}, 50);
  CHECK_LE(worst, 1e-4);
  measured("largest relative difference of the loss ", worst);
}

// bf16 keeps 8 bits. A row-parallel result is the sum of n partial sums, each rounded to 2^-9 relative before they are added, where one rank
// rounds once; a residual stream of 2 layers collects 4 such sums. Averaged over the tokens of a batch these errors cancel: the loss stays
// within a rounding, 2^-8, of one rank's.
TEST(the_bf16_curve_of_20_steps_equals_one_rank_within_2_to_the_minus_8) {
  GptConfig config{2, 40, 10, 16, 61};
  config.dtype = Dtype::bf16;
  const double worst = curve(config, 20);
  CHECK_LE(worst, std::ldexp(1, -8));
  measured("largest relative difference of the loss ", worst);
}

TEST(held_out_loss_and_next_token_are_the_same_in_every_layout) {
  Gpt gpt(kConfig, 1337);
  const Tensor total({1}, Dtype::f64, Memory::workspace);
  fill(total, 0);
  for (int64_t s = 0; s < 7; s++) {
    const auto t = sequence(0, s, kConfig);
    Tape tape(false);
    gpt.loss(tape, Tokens(1, kConfig.context, {t.begin(), t.end() - 1}, {t.begin() + 1, t.end()}), 1.0 / double(7 * kConfig.context), total);
  }
  const double reference = download(total)[0];
  const std::vector<int> prompt = {3, 1, 4, 1, 5};
  Tape tape(false);
  Var x = gpt.embed(tape, Tokens(1, 5, prompt, prompt));
  for (int64_t l = 0; l < kConfig.layers; l++) x = gpt.block(tape, l, x, 1, 5);
  const std::vector<double> all = download(gpt.logits(tape, x, 5).value), next(all.end() - kConfig.vocab, all.end());
  double loss = 0, logits = 0;
  each_layout([&](const Layout& layout) {
    Mesh mesh = open_mesh(job(), layout);
    for (bool by_rows : {false, true}) {
      GptConfig config = kConfig;
      config.sequence_parallel = by_rows;
      TrainerOptions options;
      options.microbatch = 2, options.batch = 2 * layout.replicate * layout.fsdp;
      Trainer trainer(mesh, config, options);
      loss = std::max(loss, std::abs(trainer.evaluate(7, [&](int64_t s) { return sequence(0, s, config); }) - reference) / reference);
      logits = std::max(logits, relative({trainer.next_logits(prompt)}, {next}));
    }
    close_mesh(mesh);
  });
  CHECK_LE(loss, 1e-12);
  CHECK_LE(logits, 1e-12);
  measured("loss ", loss, ", logits ", logits);
}

TEST(more_ranks_than_heads_are_refused) {
  CHECK_SAYS(Gpt({1, 12, 3, 4, 31}, Axis{"tp", 4, 0}), "--tp 4 has more ranks than the 3 attention heads");
  CHECK_SAYS(Gpt({1, 16, 4, 4, 3}, Axis{"tp", 4, 0}), "--tp 4 has more ranks than the vocabulary has tokens (3)");
}

int main(int argc, char** argv) { return run_mpi_tests(argc, argv); }
