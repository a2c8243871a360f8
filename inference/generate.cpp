// generate.cpp: continues texts with a trained model, or a fresh one by seed, over tensor parallel
// ranks and pipeline stages.
// idea      parse the options, read the prompts, prefill each, then decode all of them together
//           until they are long enough
// test      tests/test_cli.sh (the program from outside), tests/test_generator.cpp (its numbers)
#include <algorithm>
#include <iostream>
#include <numeric>
#include <nlohmann/json.hpp>

#include "inference/generator.h"
#include "launch/program.h"
#include "inference/sampling.h"
#include "inference/tokenizer.h"
#include "support/stopwatch.h"
#include "theory/theory.h"

// ---- options

struct GenerateOptions : CommonOptions {
  std::vector<std::string> prompts, files;
  int64_t tokens = 0;  // 0: 100, or what has room
  int64_t top_k = 0;
  double temperature = 0.8, top_p = 1;
  bool raw = false;
};

static OptionTable table(GenerateOptions& o) {
  OptionGroup model = model_options(o);
  model.title = "Model, without a checkpoint";
  return {
      {"A checkpoint",
       {
           {"checkpoint", "DIR", text(&o.checkpoint),
            "directory of train_gpt's --checkpoint (its newest), or one step in it",
            "a fresh model"},
       }},
      model,
      {"Text",
       {
           {"prompt", "TEXT...", list(&o.prompts, " (--prompt-file takes any text)"),
            "what to continue; several are continued together"},
           {"prompt-file", "FILE...", list(&o.files),
            "the same from files, without the end of their last line; - is standard input, under "
            "mpiexec of at most 64 KiB"},
           {"tokens", "N", whole(&o.tokens), "how many to add to each",
            "100, or what the context has room for"},
           {"temperature", "X", real(&o.temperature),
            "below 1: likelier tokens more often; 0: always the likeliest"},
           {"top-k", "K", whole(&o.top_k, 0), "only the K likeliest; 0: all"},
           {"top-p", "P", real(&o.top_p, false),
            "only the likeliest that together reach this probability (of what --top-k leaves)"},
           {"raw", "", flag(&o.raw), "control characters, too, even to a terminal"},
       }},
      computing_options(o),
      mesh_options(o.layout, false),
  };
}

static void resolve(GenerateOptions& o, std::optional<Checkpoint>& checkpoint) {
  if (!o.checkpoint.empty()) {
    for (const Option& size : model_options(o).options)
      REQUIRE(!o.given.count(size.name), "the model's sizes are the checkpoint's: leave out --",
              size.name);
    checkpoint.emplace(newest_path(o.checkpoint));
    o.model = checkpoint->info.model;
  }
  resolve_common(o, device().is_gpu);
  const int64_t channels = o.model.width / o.model.heads;
  REQUIRE(channels <= 256, "heads of ", channels,
          " channels are too wide for the attention of new tokens, which takes at most 256: ",
          checkpoint ? "build/generate cannot decode this checkpoint's model"
                     : "give more --heads");
  check_common(o);
  REQUIRE(o.top_p <= 1, "--top-p ", o.top_p, " is above 1: it is a probability");
  REQUIRE(o.temperature > 0 || (o.top_k == 0 && o.top_p == 1),
          "--top-k and --top-p limit what is drawn from, and --temperature 0 always takes the "
          "likeliest: leave out one of them");
}

// ---- prompts: read by rank 0, which alone has the standard input

// How many tokens each of them gets: what was asked for, which must fit, or as many as fit. The
// last one is not read again, and takes no place of the context.
static int64_t tokens_to_add(const GenerateOptions& o,
                             const std::vector<std::vector<int>>& prompts) {
  const auto longest = std::ranges::max_element(prompts, {}, &std::vector<int>::size);
  const std::string name =
      sentence("prompt ", longest - prompts.begin() + 1, " of ", longest->size(), " tokens");
  const int64_t T = o.model.context, room = T - int64_t(longest->size()) + 1;
  REQUIRE(room > 0, name, " is longer than the model's context of ", T);
  REQUIRE(o.tokens <= room, name, " and --tokens ", o.tokens,
          " more do not fit the model's context of ", T, ": give --tokens ", room, " or less");
  return o.tokens > 0 ? o.tokens : std::min<int64_t>(100, room);
}

static std::vector<std::vector<int>> encode_prompts(const GenerateOptions& o,
                                                    const Tokenizer& tokenizer) {
  std::vector<std::string> texts = o.prompts;
  for (const std::string& name : o.files) {
    std::string& text =
        texts.emplace_back(name == "-" ? std::string(std::istreambuf_iterator<char>(std::cin), {})
                                       : read_file(name, true));
    for (const char end : {'\n', '\r'})
      if (text.ends_with(end)) text.pop_back();
  }
  REQUIRE(!texts.empty(),
          "there is nothing to continue: give --prompt TEXT or --prompt-file FILE (- is standard "
          "input)");
  std::vector<std::vector<int>> prompts;
  const int64_t T = o.model.context, longest = tokenizer.longest();
  for (const std::string& text : texts) {
    const std::string name = sentence("prompt ", prompts.size() + 1);
    const int64_t bytes = text.size();
    REQUIRE(longest == 0 || bytes <= T * longest, name, " has ", bytes, " bytes, at least ",
            ceil_div(bytes, std::max<int64_t>(longest, 1)),
            " tokens, and is longer than the model's context of ", T);
    prompts.push_back(tokenizer.encode(text));
    REQUIRE(!prompts.back().empty(), name, " is empty: a text is continued from its last token");
  }
  tokens_to_add(o, prompts);  // or an Error, before the mesh is opened
  return prompts;
}

// ---- output

// seconds: of each token; the first one's with the prompts. decoded: tokens after the first, of
// those sequences that had not ended
static void print_statistics(const GptConfig& config, const Mesh& mesh, std::vector<double> seconds,
                             size_t sequences, int64_t decoded) {
  fprintf(stderr, "first token after %.1f ms\n", seconds[0] * 1e3);
  seconds.erase(seconds.begin());
  if (seconds.empty()) return;
  const size_t n = seconds.size();
  std::ranges::sort(seconds);
  fprintf(stderr, "each token    median %.2f ms, 99th percentile %.2f ms, %.1f tokens/s\n",
          seconds[n / 2] * 1e3, seconds[n * 99 / 100] * 1e3,
          decoded / std::reduce(seconds.begin(), seconds.end()));
  const auto mib = [](Memory category) { return device().memory.now[int(category)] / 1048576.0; };
  fprintf(stderr, "memory        %.1f MiB of weights, %.1f MiB of keys and values\n",
          mib(Memory::parameters), mib(Memory::cache));
  const int64_t sent = ledger.bytes(),
                predicted = decoding_bytes(config, mesh.layout, mesh["pp"].rank, sequences, n);
  fprintf(stderr, "sent a token  %.1f bytes by rank 0, predicted %.1f%s\n", double(sent) / n,
          double(predicted) / n, sent == predicted ? "" : "   DIFFERS");
}

// ---- generation

static void generate(const GenerateOptions& o, const Job& job, const Mesh& mesh,
                     const std::optional<Checkpoint>& checkpoint, const Tokenizer& tokenizer,
                     const std::vector<std::vector<int>>& prompts, Watch& watch) {
  const size_t B = prompts.size(), V = o.model.vocab;
  const int64_t tokens = tokens_to_add(o, prompts);
  const size_t longest = std::ranges::max(prompts, {}, &std::vector<int>::size).size();
  Generator generator(mesh, model_config(o), B, longest + tokens - 1);
  if (checkpoint) watch.at_files([&] { generator.load_weights(*checkpoint); });
  else generator.initialise(o.seed);

  // the first is shown as it is made; the others, made beside it, after it
  Screen screen(!o.raw && job.prints_to_terminal());
  std::vector<std::string> texts(B);
  const auto add = [&](size_t b, int token) {
    const std::string text = tokenizer.decode(token);
    if (b > 0) texts[b] += text;
    else if (job.speaks) screen.show(text);
  };
  for (size_t b = 0; b < B; b++)
    for (const int token : prompts[b]) add(b, token);
  synchronize();

  const Sampling how{o.temperature, o.top_k, o.top_p, uint64_t(o.seed)};
  std::vector<double> seconds;  // of each token
  std::vector<bool> ended(B, false);
  std::vector<int> next(B);
  int64_t decoded = 0;
  for (int64_t made = 0; made < tokens && std::ranges::count(ended, false) > 0; made++) {
    const Stopwatch token;
    Generator::Logits logits;
    watch.progress();
    if (made > 0) logits = generator.decode(next);
    else
      for (size_t b = 0; b < B; b++) {
        const Generator::Logits row = generator.prefill(b, prompts[b]);
        logits.insert(logits.end(), row.begin(), row.end());
        watch.progress();
      }
    for (size_t b = 0; b < logits.size() / V; b++) {
      const std::span of_text{&logits[b * V], V};
      tokenizer.silence(of_text);
      next[b] = pick(of_text, how, prompts[b].size() + made, b);
    }
    next = generator.share(next);
    if (made == 0) ledger.rows.clear();  // from here on it is of decoding
    else decoded += std::ranges::count(ended, false);
    seconds.push_back(token.seconds());
    for (size_t b = 0; b < B; b++) {
      ended[b] = ended[b] || next[b] == tokenizer.end_of_text();
      if (!ended[b]) add(b, next[b]);
    }
  }
  if (!job.speaks) return;
  for (size_t b = 1; b < B; b++) screen.show(sentence("\n\n--- ", b + 1, "\n", texts[b]));
  screen.show("\n");
  fprintf(stderr, "\nmodel         %s: %s in %s\n",
          checkpoint ? checkpoint->path.c_str() : "untrained (--checkpoint has a trained one)",
          to_string(o.model).c_str(), name_of(generator.gpt.config.dtype));
  if (const auto n = std::ranges::count(ended, true))
    fprintf(stderr, "ended         %ld of %zu texts, by the token that ends one\n", long(n), B);
  print_statistics(generator.gpt.config, mesh, seconds, B, decoded);
}

// ---- main

int main(int argc, char** argv) {
  GenerateOptions o;
  std::optional<Checkpoint> checkpoint;
  std::optional<Tokenizer> tokenizer;
  std::vector<std::vector<int>> prompts;
  const auto prepare = [&](const Job& job) {
    resolve(o, checkpoint);
    check_ranks(o.layout, job.size);
    if (checkpoint) {
      checkpoint->verify("weights-", job.rank, job.size);
      checkpoint->open_weights();  // from here on a run that saves may remove it
    }
    const std::string home = checkpoint ? home_of(o.checkpoint, has_tokenizer) : "";
    const CheckpointInfo info = checkpoint ? checkpoint->info : CheckpointInfo{};
    tokenizer.emplace(home, o.model.vocab, info.bytes, info.end_of_text);
    if (checkpoint) checkpoint->check_tokenizer(tokenizer->key());
    if (job.rank == 0) prompts = encode_prompts(o, *tokenizer);
    auto given = values_of(table(o));
    if (checkpoint)
      given.emplace_back("the checkpoint", content_of({checkpoint->path + "/manifest.json"}));
    given.emplace_back("the tokenizer's checksum", sentence(tokenizer->key()));
    return given;
  };
  const auto work = [&](const Job& job, const Mesh& mesh, Watch& watch) {
    prompts = gather(prompts)[0];  // the first rank's
    generate(o, job, mesh, checkpoint, *tokenizer, prompts, watch);
  };
  const char* usage =
      "usage: build/generate --prompt TEXT [options]\n"
      "Continues a text with a model. [In brackets: what holds without the option.]";
  return run_program("generate", usage, argc, argv, o, table, prepare, work);
}
