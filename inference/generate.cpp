// generate.cpp: continues texts with a trained model, or a fresh one by seed, over tensor parallel
// ranks and pipeline stages.
// idea      parse the options, read the prompts, prefill each, then decode all of them together
//           until they are long enough
// test      tests/test_cli.sh (the program from outside), tests/test_generator.cpp (its numbers)
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>

#include "inference/generator.h"
#include "launch/options.h"
#include "launch/program.h"
#include "inference/sampling.h"
#include "inference/tokenizer.h"
#include "theory/theory.h"

// ---- options

struct GenerateOptions : CommonOptions {
  std::vector<std::string> prompts, files;
  int64_t tokens = 100, top_k = 0;
  double temperature = 0.8, top_p = 1;
};

static OptionTable table(GenerateOptions& o) {
  OptionGroup model = model_options(o);
  model.title = "Model, without a checkpoint";
  return {
      {"A checkpoint",
       {
           {"checkpoint", "DIR", Text{&o.checkpoint},
            "directory of train_gpt's --checkpoint (its newest), or one step in it",
            "a fresh model"},
       }},
      model,
      {"Text",
       {
           {"prompt", "TEXT...",
            List{&o.prompts, "; a text that begins with -- is read by --prompt-file -"},
            "what to continue; several are continued together"},
           {"prompt-file", "FILE...", List{&o.files}, "the same from files; - is standard input"},
           {"tokens", "N", Whole{&o.tokens}, "how many to add to each"},
           {"temperature", "X", Real{&o.temperature},
            "below 1: likelier tokens more often; 0: always the likeliest"},
           {"top-k", "K", Whole{&o.top_k, 0}, "only the K likeliest; 0: all"},
           {"top-p", "P", Real{&o.top_p, false},
            "only the likeliest that together reach this probability"},
       }},
      computing_options(o),
      mesh_options(o.layout, false),
  };
}

static void resolve(GenerateOptions& o, std::unique_ptr<Checkpoint>& checkpoint) {
  if (!o.checkpoint.empty()) {
    const ModelSize& m = o.model;
    REQUIRE(
        o.model_name.empty() && std::max({m.layers, m.width, m.heads, m.context, m.vocab}) == 0,
        "the model's sizes are the checkpoint's: leave out --model, --layers, --width, --heads, "
        "--context and --vocab");
    checkpoint = std::make_unique<Checkpoint>(newest_path(o.checkpoint));
    o.model = checkpoint->info.model;
  }
  resolve_common(o, device().is_gpu);
  check_common(o);
  REQUIRE(o.top_p <= 1, "--top-p ", o.top_p, " is above 1: it is a probability");
  const int64_t channels = o.model.width / o.model.heads;
  REQUIRE(
      channels <= 256, "heads of ", channels,
      " channels are too wide for the attention of new tokens, which takes at most 256: give more "
      "--heads");
}

// ---- prompts: read by rank 0, which alone has the standard input

static std::vector<std::string> read_prompts(const GenerateOptions& o) {
  std::vector<std::string> texts = o.prompts;
  for (const std::string& name : o.files) {
    std::ifstream file;
    if (name != "-") {
      file.open(name, std::ios::binary);
      REQUIRE(file, "--prompt-file: ", name, " cannot be read: ", strerror(errno));
      REQUIRE(!std::filesystem::is_directory(name), "--prompt-file: ", name, " is a directory");
    }
    texts.emplace_back(std::istreambuf_iterator<char>(name == "-" ? std::cin : file),
                       std::istreambuf_iterator<char>());
  }
  REQUIRE(!texts.empty(),
          "there is nothing to continue: give --prompt TEXT or --prompt-file FILE (- is standard "
          "input)");
  return texts;
}

static std::vector<std::vector<int>> encode_prompts(const GenerateOptions& o,
                                                    const Tokenizer& tokenizer) {
  std::vector<std::vector<int>> prompts;
  const int64_t T = o.model.context;
  for (const std::string& text : read_prompts(o)) {
    const int64_t bytes = int64_t(text.size()), longest = tokenizer.longest();
    REQUIRE(longest == 0 || bytes < T * longest, "prompt ", prompts.size() + 1, " has ", bytes,
            " bytes, at least ", (bytes + longest - 1) / longest,
            " tokens; with the model's context of ", T, " at most ", T - 1,
            " leave room for a new one");
    const std::vector<int>& p = prompts.emplace_back(tokenizer.encode(text));
    const int64_t n = int64_t(p.size());
    REQUIRE(n > 0, "prompt ", prompts.size(), " is empty: a text is continued from its last token");
    REQUIRE(n < T, "prompt ", prompts.size(), " has ", n, " tokens; with the model's context of ",
            T, " at most ", T - 1, " leave room for a new one");
    REQUIRE(n + o.tokens <= T, "prompt ", prompts.size(), " of ", n, " tokens and --tokens ",
            o.tokens, " more do not fit the model's context of ", T);
  }
  return prompts;
}

// ---- output

static void print_statistics(const Generator& generator, std::vector<double> seconds, double first,
                             int64_t tokens, int64_t sent, int64_t predicted) {
  fprintf(stderr, "\nfirst token after %.1f ms\n", first * 1e3);
  if (seconds.empty()) return;
  double sum = 0;
  for (const double s : seconds) sum += s;
  std::sort(seconds.begin(), seconds.end());
  const auto rank = [&](double share) {
    return seconds[std::min(seconds.size() - 1, size_t(share * double(seconds.size())))] * 1e3;
  };
  fprintf(stderr, "each token    median %.2f ms, 99th percentile %.2f ms, %.1f tokens/s\n",
          rank(0.5), rank(0.99), double(tokens) / sum);
  fprintf(stderr, "memory        %.1f MiB of weights, %.1f MiB of keys and values\n",
          double(device().memory.now[int(Memory::parameters)]) / 1048576,
          double(generator.cache_bytes()) / 1048576);
  const double steps = double(seconds.size());
  fprintf(stderr, "sent a token  %.1f bytes by rank 0, predicted %.1f%s\n", double(sent) / steps,
          double(predicted) / steps, sent == predicted ? "" : "   DIFFERS");
}

// ---- generation

static void generate(const GenerateOptions& o, const Job& job, Mesh& mesh,
                     const Checkpoint* checkpoint, const Tokenizer& tokenizer,
                     const std::vector<std::vector<int>>& prompts, Watch& watch) {
  using Clock = std::chrono::steady_clock;
  const auto since = [](Clock::time_point t) {
    return std::chrono::duration<double>(Clock::now() - t).count();
  };
  const size_t B = prompts.size();
  size_t longest = 0;
  for (const auto& p : prompts) longest = std::max(longest, p.size());
  Generator generator(mesh, model_config(o), int64_t(B), int64_t(longest) + o.tokens);
  if (checkpoint) watch.at_files([&] { generator.load_weights(*checkpoint); });
  else generator.initialise(uint64_t(o.seed));

  const Sampling how{o.temperature, o.top_k, o.top_p, uint64_t(o.seed)};
  int64_t made = 0;  // tokens of each text
  const auto pick_all = [&](const Generator::Logits& logits) {
    std::vector<int> picked(B);
    for (size_t b = 0; b < logits.size(); b++)
      picked[b] = pick(logits[b], how, int64_t(prompts[b].size()) + made, int64_t(b));
    made++;
    return generator.share(picked);
  };
  // the first is shown as it is made; the others, made beside it, after it
  std::vector<std::string> texts(B);
  const auto add = [&](size_t b, int token) {
    texts[b] += tokenizer.decode(token);
    if (job.speaks && b == 0) show(tokenizer.decode(token));
  };
  for (size_t b = 0; b < B; b++)
    for (const int token : prompts[b]) add(b, token);
  synchronize();

  const Clock::time_point began = Clock::now();
  Generator::Logits logits;
  for (size_t b = 0; b < B; b++) {
    watch.progress();
    for (auto& row : generator.prefill(int64_t(b), prompts[b])) logits.push_back(std::move(row));
  }
  std::vector<int> next = pick_all(logits);
  const double first = since(began);
  std::vector<double> seconds;
  std::vector<bool> ended(B, false);
  ledger.rows.clear();
  int64_t added = 0;  // by decoding
  while (true) {
    for (size_t b = 0; b < B; b++) {
      ended[b] = ended[b] || next[b] == tokenizer.end_of_text();
      if (!ended[b]) add(b, next[b]), added += made > 1;  // the first is prefill's
    }
    if (made == o.tokens || std::count(ended.begin(), ended.end(), false) == 0) break;
    watch.progress();
    const Clock::time_point start = Clock::now();
    next = pick_all(generator.decode(next));
    seconds.push_back(since(start));
  }
  if (!job.speaks) return;
  for (size_t b = 1; b < B; b++) show(sentence("\n\n--- ", b + 1, "\n", texts[b]));
  show("\n");
  const int64_t predicted = decoding_bytes(generator.gpt.config, mesh.layout, mesh["pp"].rank,
                                           int64_t(B), int64_t(seconds.size()));
  print_statistics(generator, seconds, first, added, ledger.bytes(), predicted);
}

// ---- main

int main(int argc, char** argv) {
  GenerateOptions o;
  std::unique_ptr<Checkpoint> checkpoint;
  std::unique_ptr<Tokenizer> tokenizer;
  std::vector<std::vector<int>> prompts;
  const auto prepare = [&](const Job& job) -> std::optional<Start> {
    const char* usage =
        "usage: build/generate --prompt TEXT [options]\n"
        "Continues a text with a model. [In brackets: what holds without the option.]";
    const std::string help = help_text(usage, table(o));
    parse(argc, argv, table(o));
    if (o.help) {
      if (job.speaks) fputs(help.c_str(), stdout);
      return {};
    }
    open_device(job.local_rank % device_count(), o.device_memory << 20);
    resolve(o, checkpoint);
    check_ranks(o.layout, job.size);
    matmul_backend = o.matmul == "own" ? MatmulBackend::own : MatmulBackend::cublas;
    if (checkpoint) checkpoint->verify("weights-", job.rank, job.size);
    tokenizer = std::make_unique<Tokenizer>(
        checkpoint ? std::filesystem::canonical(checkpoint->path).parent_path().string() : "",
        o.model.vocab);
    if (job.rank == 0) prompts = encode_prompts(o, *tokenizer);
    auto given = values_of(table(o));
    if (checkpoint)
      given.emplace_back("the checkpoint", content_of({checkpoint->path + "/manifest.json"}));
    return Start{o.layout, o.timeout, given};
  };
  return run_program("generate", argc, argv, prepare,
                     [&](const Job& job, Mesh& mesh, Watch& watch) {
                       prompts = nlohmann::json::parse(
                           gather_text(nlohmann::json(prompts).dump())[0]);  // rank 0's
                       generate(o, job, mesh, checkpoint.get(), *tokenizer, prompts, watch);
                     });
}
