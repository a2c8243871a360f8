// test_generator.cpp: the model one token at a time, from a cache and over ranks, says what the
// whole model says at once. Run under mpiexec -n 1, 2, 3, 4, 8: every pp x tp of the ranks is
// compared with one rank, in f64.
#include "inference/generator.h"
#include "inference/sampling.h"
#include "tests/mpi_test.h"
#include "tests/one_rank.h"
#include "theory/theory.h"

namespace {

const GptConfig kConfig = [] {  // heads, width and vocabulary that 3 ranks do not divide
  GptConfig g{5, 40, 4, 48, 37};
  g.dtype = Dtype::f64;
  return g;
}();

const std::vector<std::vector<int>> kPrompts = {{3, 1, 4, 1, 5},
                                                {9},
                                                {2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2}};

std::vector<Layout> layouts() {
  const int64_t n = job().size;
  std::vector<Layout> all;
  for (int64_t pp = 1; pp <= std::min(n, kConfig.layers); pp++)
    if (n % pp == 0 && n / pp <= kConfig.heads) all.push_back({{"pp", pp}, {"tp", n / pp}});
  REQUIRE(!all.empty(), "no pp x tp of ", n, " ranks has at most 5 stages and 4 heads");
  return all;
}

// What the whole model, without a cache, says after the last token.
std::vector<double> without_cache(Gpt& gpt, const std::vector<int>& tokens) {
  const int64_t n = int64_t(tokens.size()), V = gpt.config.vocab;
  const std::vector<double> all = logits(gpt, Tokens(1, n, tokens, tokens));
  return {all.end() - V, all.end()};
}

double apart(const std::vector<double>& a, const std::vector<double>& b) {
  CHECK_EQ(a.size(), b.size());
  double difference = 0, size = 0;
  for (size_t i = 0; i < a.size(); i++) {
    difference = worst_of(difference, std::abs(a[i] - b[i]));
    size = std::max(size, std::abs(b[i]));
  }
  return difference / size;
}

// worst: logits against the model without a cache
struct Texts {
  std::vector<std::vector<int>> tokens;
  double worst = 0;
};

// Continues the prompts together.
Texts continue_all(Mesh& mesh, const GptConfig& config,
                   const std::vector<std::vector<int>>& prompts, const Sampling& how, int64_t count,
                   Gpt* whole) {
  const size_t B = prompts.size(), V = size_t(config.vocab);
  Generator generator(mesh, config, int64_t(B), config.context);
  generator.initialise(7);
  Texts t{prompts};
  Generator::Logits logits;
  for (size_t b = 0; b < B; b++) {
    const Generator::Logits row = generator.prefill(int64_t(b), prompts[b]);
    logits.insert(logits.end(), row.begin(), row.end());
  }
  for (int64_t i = 0; i < count; i++) {
    std::vector<int> next(B);
    for (size_t b = 0; b < logits.size() / V; b++) {
      std::vector<double> row(&logits[b * V], &logits[b * V] + V);
      if (whole) t.worst = std::max(t.worst, apart(row, without_cache(*whole, t.tokens[b])));
      next[b] = pick(row, how, int64_t(t.tokens[b].size()), int64_t(b));
    }
    next = generator.share(next);
    for (size_t b = 0; b < B; b++) t.tokens[b].push_back(next[b]);
    logits = generator.decode(next);
  }
  return t;
}

}  // namespace

TEST(the_cache_and_every_layout_say_what_the_whole_model_says) {
  WholeGpt whole(kConfig, 7);
  double worst = 0;
  for (const Layout& layout : layouts()) {
    Mesh mesh = open_mesh(layout);
    for (const double temperature : {0.0, 1.0})
      for (const AttentionKind kind : {AttentionKind::plain, AttentionKind::flash}) {
        GptConfig config = kConfig;
        config.attention = kind;
        worst = std::max(
            worst,
            continue_all(mesh, config, kPrompts, {.temperature = temperature}, 30, &whole).worst);
      }
    close_mesh(mesh);
  }
  CHECK_LE(worst, 1e-12);
  measured(layouts().size(), " layouts, prefill and 29 new tokens of 3 texts: logits within ",
           worst);
}

TEST(every_layout_picks_the_tokens_of_one_rank) {
  Mesh one;  // of this rank alone
  size_t different = 0;
  for (const Sampling& how : {Sampling{.temperature = 0}, Sampling{.temperature = 1},
                              Sampling{.temperature = 1.3, .top_k = 9, .top_p = 0.8, .seed = 5}}) {
    const Texts expected = continue_all(one, kConfig, kPrompts, how, 35, nullptr);
    for (const Layout& layout : layouts()) {
      Mesh mesh = open_mesh(layout);
      CHECK(continue_all(mesh, kConfig, kPrompts, how, 35, nullptr).tokens == expected.tokens,
            to_string(layout));
      close_mesh(mesh);
    }
    if (how.temperature > 0)
      different += expected.tokens !=
                   continue_all(one, kConfig, kPrompts, {.temperature = 0}, 35, nullptr).tokens;
  }
  CHECK_EQ(different, 2);  // sampling is not greedy
  close_mesh(one);
  measured("greedy, seeded, and top-k with top-p: 35 tokens of 3 texts");
}

TEST(texts_in_a_batch_are_what_they_are_alone) {
  Mesh one;
  const Texts together = continue_all(one, kConfig, kPrompts, {.temperature = 0}, 20, nullptr);
  for (size_t b = 0; b < kPrompts.size(); b++)
    CHECK(continue_all(one, kConfig, {kPrompts[b]}, {.temperature = 0}, 20, nullptr).tokens[0] ==
              together.tokens[b],
          "prompt ", b);
  close_mesh(one);
}

TEST(a_sequence_that_starts_anew_forgets_what_it_was) {
  Mesh one;
  Generator generator(one, kConfig, 2, 20);
  generator.initialise(7);
  const auto logits = [&](const std::vector<int>& first) {
    generator.prefill(0, first);
    generator.prefill(1, kPrompts[0]);
    return generator.decode({4, 4});
  };
  const Generator::Logits fresh = logits(kPrompts[1]);
  logits(kPrompts[2]);  // longer
  CHECK(logits(kPrompts[1]) == fresh);
  CHECK_SAYS(generator.prefill(0, {}), "n > 0");
  close_mesh(one);
}

TEST(f32_and_bf16_stay_near_f64) {
  Mesh mesh = open_mesh(layouts()[0]);
  WholeGpt whole(kConfig, 7);
  // bf16: 8 bits, 5 layers of 4 roundings
  for (const auto& [dtype, bound] : {std::pair{Dtype::f32, 1e-4}, std::pair{Dtype::bf16, 5e-2}}) {
    GptConfig config = kConfig;
    config.dtype = dtype;
    const double worst = continue_all(mesh, config, kPrompts, {.temperature = 0}, 10, &whole).worst;
    collectively(job(),
                 [&, dtype = dtype, bound = bound] { CHECK_LE(worst, bound, name_of(dtype)); });
    Generator generator(mesh, config, 1, 20);
    generator.initialise(7);
    const std::vector<double> logits = generator.prefill(0, {1, 2, 3});
    const Axis& pp = mesh["pp"];
    collectively(job(), [&] {
      CHECK_EQ(logits.empty(), pp.rank + 1 < pp.size);  // the last stage has them
      CHECK(logits.empty() || !are_bf16(logits), "logits are rounded to bf16");
    });
    measured(name_of(dtype), " ", worst, "  ");
  }
  close_mesh(mesh);
}

TEST(bytes_sent_while_decoding_equal_the_formula_exactly) {
  int64_t all = 0;
  for (const Layout& layout : layouts())
    for (const Dtype dtype : {Dtype::f32, Dtype::f64, Dtype::bf16}) {
      Mesh mesh = open_mesh(layout);
      GptConfig config = kConfig;
      config.dtype = dtype;
      Generator generator(mesh, config, 2, 20);
      generator.initialise(1);
      generator.prefill(0, {1, 2, 3});
      generator.prefill(1, {1, 2});
      ledger.rows.clear();
      for (int i = 0; i < 7; i++) {
        generator.decode({i, i + 1});
        generator.share({0, 0});
      }
      const int64_t sent = ledger.bytes();
      CHECK_EQ(sent, decoding_bytes(config, layout, mesh["pp"].rank, 2, 7), to_string(layout), " ",
               name_of(dtype));
      int64_t cache = 0;  // keys and values of 2 sequences with room for 20 tokens
      const int64_t heads = generator.gpt.tp.part(config.heads).size();
      const ModelPiece mine = generator.gpt.pieces(mesh["pp"].size)[mesh["pp"].rank];
      for (const ModelPart& part : mine)
        if (part.kind == ModelPart::block)
          cache += 2 * 2 * 20 * heads * (config.width / config.heads) * size_of(dtype);
      CHECK_EQ(device().memory.now[int(Memory::cache)], cache);
      all += sent;
      close_mesh(mesh);
    }
  measured(all, " bytes");
}

int main(int argc, char** argv) { return run_mpi_tests(argc, argv); }
