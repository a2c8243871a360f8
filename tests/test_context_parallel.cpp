// test_context_parallel.cpp: context parallelism, alone and with every other strategy, equals one
// rank, in f64 to rounding; bytes and memory equal the formulas exactly; every rank has the same
// work. Run under mpiexec -n 1, 2, 3, 4, 8: every layout with cp > 1 of the world's size and at most
// one other axis, lengths that 2 cp divides and that it does not.
#include "tests/parity.h"

namespace {

const GptConfig kConfig = [] {  // 5 heads, 23 words, 3 layers
  GptConfig g{3, 20, 5, 17, 23};
  g.dtype = Dtype::f64;
  return g;
}();

template <class Work> void each_layout(Work work) {
  const int n = job().size;
  for (int cp = n; cp > 1; cp--) {
    if (n % cp) continue;
    const int rest = n / cp;
    work(Layout{{"cp", cp}, {"fsdp", rest}});
    if (rest == 1) continue;
    work(Layout{{"cp", cp}, {"replicate", rest}});
    if (rest <= kConfig.heads) work(Layout{{"cp", cp}, {"tp", rest}});
    if (rest <= 3) work(Layout{{"cp", cp}, {"pp", rest}});
  }
}

struct Setting {
  int64_t length;
  AttentionKind attention;
  bool recompute, by_rows;
  int64_t microbatches;
  FsdpOptions fsdp;
  const char* schedule;
};
constexpr AttentionKind plain = AttentionKind::plain, flash = AttentionKind::flash;
const Setting kSettings[] = {
    {16, flash, false, false, 1, {3, true, 1}, "1f1b"},
    {17, plain, true, true, 2, {1, true, 1}, "zb"},
    {31, flash, true, true, 4, {2, true, 0}, "gpipe"},
    {33, plain, false, true, 4, {3, false, 2}, "1f1b"},
    {64, flash, false, true, 2, {2, true, 1}, "zb"},
    {257, flash, true, false, 1, {1, true, 0}, "1f1b"},
};

template <class Work> void each_setting(const Layout& layout, Work work) {
  for (const Setting& s : kSettings) {
    GptConfig g = kConfig;
    g.context = s.length, g.attention = s.attention, g.recompute = s.recompute;
    g.sequence_parallel = s.by_rows && layout["tp"] > 1;
    TrainerOptions o;
    const int64_t m = layout["pp"] > 1 ? std::max<int64_t>(s.microbatches, 2) : s.microbatches;
    o.batch = 4 * layout.data_ranks(), o.microbatch = 4 / m;
    o.fsdp = s.fsdp, o.schedule = s.schedule;
    work(g, o,
         sentence(to_string(layout), ", length ", s.length,
                  s.attention == plain ? " plain" : " flash", s.recompute ? " recompute" : "",
                  g.sequence_parallel ? " by rows" : "", " zero ", s.fsdp.zero, " prefetch ",
                  s.fsdp.prefetch, " ", s.schedule, " ", m, " micro-batches"));
  }
}

}  // namespace

TEST(context_parallelism_equals_one_rank_in_f64) {
  std::map<std::pair<int64_t, int64_t>, Parity> references;  // by length and batch
  int settings = 0;
  Difference worst;
  each_layout([&](const Layout& layout) {
    Mesh mesh = open_mesh(layout);
    each_setting(layout, [&](const GptConfig& g, const TrainerOptions& o, const std::string& name) {
      const auto key = std::pair(g.context, o.batch);
      const auto reference = references.try_emplace(key, g, o.batch).first;
      reference->second.check(mesh, g, o, name);
    });
    close_mesh(mesh);
  });
  for (const auto& [key, parity] : references) {
    settings += parity.settings();
    worst.widen(parity.worst());
  }
  measured(settings, " settings: loss ", worst.loss, ", gradients ", worst.gradients, ", norm ",
           worst.norm, ", weights ", worst.weights);
}

TEST(bytes_sent_and_memory_held_equal_the_formulas_exactly) {
  int settings = 0;
  int64_t bytes = 0;
  each_layout([&](const Layout& layout) {
    Mesh mesh = open_mesh(layout);
    each_setting(layout, [&](GptConfig g, const TrainerOptions& o, const std::string& name) {
      const Dtype dtypes[] = {Dtype::f32, Dtype::bf16, Dtype::f64};
      g.dtype = dtypes[settings++ % 3];
      bytes += equals_theory(mesh, g, o, sentence(name_of(g.dtype), " ", name), [](Trainer&) {});
    });
    close_mesh(mesh);
  });
  measured(settings, " settings, ", bytes, " bytes sent by rank 0");
}

int main(int argc, char** argv) { return run_mpi_tests(argc, argv); }
