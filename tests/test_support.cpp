// test_support.cpp: the plumbing: philox.h, options, data, metrics. No device, one rank; files live
// in a temporary directory.
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <optional>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <thread>

#include "support/data.h"
#include "support/json.h"
#include "support/metrics.h"
#include "launch/options.h"
#include "launch/watch.h"
#include "support/philox.h"
#include "checkpoint/checkpoint.h"
#include "checkpoint/safetensors.h"
#include "inference/sampling.h"
#include "inference/text_shards.h"
#include "tests/test.h"

namespace fs = std::filesystem;

// ---- files for the tests

struct TemporaryDirectory {
  std::string path = "/tmp/test_support.XXXXXX";
  TemporaryDirectory() {
    CHECK(mkdtemp(path.data()) != nullptr);
    if (const char* set = getenv("TMPDIR")) before = set;
    setenv("TMPDIR", path.c_str(), 1);  // or the next run would find what this one left in /tmp
  }
  ~TemporaryDirectory() {
    if (before) setenv("TMPDIR", before->c_str(), 1);
    else unsetenv("TMPDIR");
    fs::remove_all(path);
  }
  std::optional<std::string> before;
  std::string write(const std::string& name, const std::string& bytes) const {
    const fs::path file = fs::path(path) / name;
    fs::create_directories(file.parent_path());
    std::ofstream(file, std::ios::binary) << bytes;
    return file;
  }
};

template <class T> static std::string bytes_of(const std::vector<T>& values) {
  return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

// A token shard as llm.c writes it; `promised` < 0: as many as there are.
template <class T> static std::string shard(const std::vector<T>& tokens, int32_t magic = 20240520,
                                            int32_t version = 1, int32_t promised = -1) {
  std::vector<int32_t> header(256);
  header[0] = magic, header[1] = version,
  header[2] = promised < 0 ? int32_t(tokens.size()) : promised;
  return bytes_of(header) + bytes_of(tokens);
}

template <class T> static std::vector<T> counting(size_t n) {
  std::vector<T> v(n);
  for (size_t i = 0; i < n; i++) v[i] = T(i);
  return v;
}

static std::string contents(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(in), {});
}

// ---- philox

TEST(philox_gives_the_published_known_answers) {
  const auto equal = [](Philox4 r, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return r.v[0] == a && r.v[1] == b && r.v[2] == c && r.v[3] == d;
  };
  CHECK(equal(philox(0, 0, 0, 0, 0, 0), 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8));
  CHECK(
      equal(philox(~0u, ~0u, ~0u, ~0u, ~0u, ~0u), 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd));
  // digits of pi
  CHECK(equal(philox(0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0),
              0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1));
  measured("3 of 3 known answers of Random123");
}

// ---- options

static Options parsed(std::vector<const char*> words) {
  words.insert(words.begin(), "train_gpt");
  Options o;
  o.given = parse(int(words.size()), words.data(), train_options(o));
  return o;
}
static Options resolved(const std::vector<const char*>& words, bool has_gpu = false) {
  Options o = parsed(words);
  resolve(o, has_gpu);
  check(o);
  return o;
}

TEST(every_option_reaches_its_field) {
  std::istringstream text(
      "--model char --layers 1 --width 2 --heads 3 --context 4 --vocab 5 --data a b --tokenizer "
      "pairs --steps 6 --batch 7 --microbatch 8 --lr 0.5 --min-lr 1e-3 --warmup 9 --weight-decay 0 "
      "--clip 2.5 --seed 9223372036854775807 --dtype f64 --matmul own --attention flash "
      "--recompute --device-memory 10 --eval-every 11 --sample 12 --metrics m.jsonl --replicate 13 "
      "--fsdp 14 --zero 2 --reshard-after-forward no --prefetch 15 --timeout 16 --tp 18 "
      "--sequence-parallel --resume-step 19 --pp 20 --cp 21 --schedule zb --chunks 22 --checkpoint "
      "saved --save-every 23 --keep 24 --resume --trace t.json --trace-steps 25-26 --profile "
      "--help");
  const std::vector<std::string> all(std::istream_iterator<std::string>(text), {});
  std::vector<const char*> words;
  for (const std::string& word : all) words.push_back(word.c_str());
  const Options o = parsed(words);
  int options = 0;
  Options bound;
  for (const OptionGroup& group : train_options(bound))
    for (const Option& option : group.options) {
      CHECK_EQ(std::ranges::count(all, "--" + option.name), 1, option.name);
      options++;
    }
  const ModelSize& m = o.model;
  CHECK(o.model_name == "char" && m.layers == 1 && m.width == 2 && m.heads == 3 && m.context == 4 &&
        m.vocab == 5);
  CHECK_EQ(o.tokenizer, "pairs");
  CHECK(o.data == (std::vector<std::string>{"a", "b"}) && o.metrics == "m.jsonl" &&
        o.dtype == "f64" && o.matmul == "own");
  CHECK(o.steps == 6 && o.batch == 7 && o.microbatch == 8 && o.lr == 0.5 && o.min_lr == 1e-3 &&
        o.warmup == 9 && o.weight_decay == 0);
  CHECK(o.clip == 2.5 && o.seed == INT64_MAX && o.attention == "flash" && o.recompute && o.help);
  CHECK(o.device_memory == 10 && o.eval_every == 11 && o.sample == 12);
  CHECK(o.layout["replicate"] == 13 && o.layout["fsdp"] == 14 && o.zero == 2 && o.reshard == "no" &&
        o.prefetch == 15 && o.timeout == 16 && o.layout["tp"] == 18 && o.sequence_parallel &&
        o.resume_step == 19);
  CHECK(o.layout["pp"] == 20 && o.layout["cp"] == 21 && o.schedule == "zb" && o.chunks == 22 &&
        o.checkpoint == "saved" && o.save_every == 23 && o.keep == 24 && o.resume &&
        o.trace == "t.json" && o.traced.begin == 25 && o.traced.end == 26 && o.profile);
  const TrainerOptions trains = trainer_options(o);
  CHECK(trains.batch == 7 && trains.microbatch == 8 && trains.seed == INT64_MAX &&
        trains.clip == 2.5 && trains.weight_decay == 0 && trains.fsdp.zero == 2 &&
        !trains.fsdp.reshard && trains.fsdp.prefetch == 15 && trains.schedule == "zb" &&
        trains.chunks == 22);
  const GptConfig all_set = model_config(o),
                  others = model_config(parsed({"--dtype", "bf16", "--attention", "plain"}));
  CHECK(all_set.layers == 1 && all_set.width == 2 && all_set.heads == 3 && all_set.context == 4 &&
        all_set.vocab == 5 && all_set.dtype == Dtype::f64 &&
        all_set.attention == AttentionKind::flash && all_set.recompute &&
        all_set.sequence_parallel);
  CHECK(others.dtype == Dtype::bf16 && others.attention == AttentionKind::plain &&
        !others.recompute && !others.sequence_parallel);
  CHECK(model_config(parsed({"--dtype", "f32"})).dtype == Dtype::f32);
  const Options none = parsed({});
  CHECK(none.model_name.empty() && none.data.empty() && !none.recompute && !none.help &&
        none.seed == 1337 && none.matmul == "cublas");
  measured(options, " options");
}

TEST(presets_are_the_published_sizes_and_options_override_them) {
  const std::map<std::string, std::vector<int64_t>> sizes = {
      {"tiny", {4, 128, 4, 128, 256}},
      {"char", {6, 384, 6, 256, 256}},
      {"gpt2", {12, 768, 12, 1024, 50257}},
      {"gpt2-medium", {24, 1024, 16, 1024, 50257}},
      {"gpt2-large", {36, 1280, 20, 1024, 50257}},
      {"gpt2-xl", {48, 1600, 25, 1024, 50257}}};
  for (const auto& [name, size] : sizes) {
    const ModelSize m = resolved({"--model", name.c_str()}).model;
    CHECK(size == (std::vector<int64_t>{m.layers, m.width, m.heads, m.context, m.vocab}), name);
  }
  const ModelSize m = resolved({"--model", "gpt2", "--layers", "2", "--vocab", "300"}).model;
  CHECK(m.layers == 2 && m.vocab == 300 && m.width == 768 && m.context == 1024);
  measured(sizes.size(), " models");
}

TEST(unset_options_are_resolved_from_the_model_and_the_machine) {
  const Options tiny = resolved({}), gpu = resolved({}, true);
  const Options given =
      resolved({"--lr", "0.5", "--batch", "6", "--steps", "40", "--dtype", "f64"}, true);
  CHECK(tiny.batch == 16 && tiny.microbatch == 16 && tiny.lr == 1e-3 && tiny.min_lr == 1e-4 &&
        tiny.clip == 1 && tiny.weight_decay == 0.1);
  CHECK(tiny.steps == 300 && tiny.warmup == 15 && tiny.dtype == "f32" && gpu.dtype == "bf16");
  CHECK(given.min_lr == 0.05 && given.microbatch == 6 && given.warmup == 2 && given.dtype == "f64");
  CHECK_EQ(resolved({"--steps", "100000"}).warmup, 100);
  CHECK_EQ(resolved({"--warmup", "0"}).warmup, 0);
  CHECK_EQ(resolved({"--min-lr", "0"}).min_lr, 0);
  CHECK(resolved({"--fsdp", "2"}).zero == 3 && resolved({"--fsdp", "2", "--zero", "1"}).zero == 1);
  const Options replicas = resolved({"--replicate", "2"}), zero3 = resolved({"--fsdp", "2"});
  CHECK(tiny.prefetch == 0 && replicas.prefetch == 1 && zero3.prefetch == 1 &&
        resolved({"--fsdp", "2", "--prefetch", "0"}).prefetch == 0);
  CHECK_EQ(zero3.reshard, "yes");
  Options again = given;
  resolve(again, false);
  CHECK(again.dtype == "f64" && again.lr == given.lr && again.warmup == given.warmup,
        "resolving twice changes nothing");
}

TEST(unset_micro_batches_are_the_largest_that_fit_the_batch_and_the_schedule) {
  CHECK_EQ(resolved({"--pp", "2"}).microbatch, 4);
  CHECK_EQ(resolved({"--pp", "2", "--batch", "11"}).microbatch, 1);
  // not 4: 18 does not divide by it
  CHECK_EQ(resolved({"--pp", "2", "--batch", "18"}).microbatch, 3);
  CHECK_EQ(resolved({"--pp", "2", "--batch", "20"}).microbatch, 5);
  CHECK_EQ(resolved({"--pp", "2", "--batch", "10"}).microbatch, 2);
  // 5 micro-batches of 2 are not even
  CHECK_EQ(resolved({"--pp", "2", "--batch", "10", "--schedule", "interleaved"}).microbatch, 1);
  // fewer than 2 P
  CHECK_EQ(resolved({"--pp", "2", "--batch", "3"}).microbatch, 1);
  CHECK_EQ(resolved({"--pp", "2", "--fsdp", "3", "--batch", "36"}).microbatch, 3);
  CHECK_SAYS(resolved({"--fsdp", "2", "--batch", "11"}),
             "a batch of 11 does not divide by the 2 data-parallel ranks: give --batch 12");
}

TEST(reports_overwrite_neither_the_training_data_nor_each_other) {
  const TemporaryDirectory dir;
  const std::string data = dir.write("d.txt", "text"), again = dir.path + "/./d.txt",
                    other = dir.path + "/m.jsonl", link = dir.path + "/link";
  fs::create_hard_link(data, link);
  for (const std::string& name : {data, again, link}) {
    CHECK_SAYS(resolved({"--data", data.c_str(), "--metrics", name.c_str()}),
               "--metrics " + name + " would overwrite a file of the training data");
    CHECK_SAYS(resolved(
                   {"--pp", "2", "--data", other.c_str(), data.c_str(), "--trace", name.c_str()}),
               "--trace " + name + " would overwrite");
  }
  const std::string twice = dir.path + "/./m.jsonl";  // neither is there yet
  CHECK_SAYS(resolved({"--pp", "2", "--metrics", other.c_str(), "--trace", twice.c_str()}),
             "--metrics and --trace name the same file, ");
  resolved({"--pp", "2", "--data", data.c_str(), "--metrics", other.c_str(), "--trace",
            (dir.path + "/t.json").c_str()});
  if (const std::string root = project_root(); !root.empty())
    CHECK_SAYS(resolved({"--metrics", (root + "/README.md").c_str()}), "would overwrite");
}

TEST(contradictions_between_options_are_refused) {
  CHECK_SAYS(resolved({"--trace-steps", "2"}), "--trace-steps says which steps are traced");
  CHECK_SAYS(resolved({"--trace", "/t.json", "--trace-steps", "2-301"}),
             "--trace-steps: step 301 is after the last one, 300");
  CHECK_SAYS(resolved({"--trace", "/t.json", "--trace-steps", "3-2"}),
             "--trace-steps takes a number from 1 on, or two in order as in 5-8, not '3-2'");
  CHECK_SAYS(resolved({"--heads", "3"}),
             "a width of 128 does not divide by 3 heads: change --width or --heads");
  CHECK_SAYS(resolved({"--batch", "10", "--microbatch", "4"}),
             "a batch of 10 does not divide into micro-batches of 4");
  CHECK_SAYS(
      resolved({"--batch", "4", "--microbatch", "8"}),
      "a batch of 4 does not divide into micro-batches of 8 on 1 data-parallel ranks: change");
  CHECK_SAYS(resolved({"--batch", "12", "--microbatch", "2", "--fsdp", "2", "--replicate", "2"}),
             "a batch of 12 does not divide into micro-batches of 2 on 4 data-parallel ranks");
  CHECK_SAYS(resolved({"--lr", "1e-4", "--min-lr", "1e-3"}), "--min-lr 0.001 is above --lr 0.0001");
  CHECK_SAYS(resolved({"--lr", "0.001", "--min-lr", "0.0010000001"}),
             "--min-lr 0.0010000001 is above --lr 0.001");
  CHECK_SAYS(resolved({"--checkpoint", "c", "--resume-step", "3"}), "give both");
  CHECK_SAYS(resolved({"--zero", "3"}), "ranks of --fsdp and --cp, which are 1: give --fsdp or");
  CHECK_SAYS(resolved({"--cp", "4", "--context", "7"}),
             "--cp 4 cuts a sequence into 8 pieces, and a context of 7 has fewer tokens: give "
             "--context 8 or more");
  resolved({"--cp", "4", "--context", "8", "--zero", "2", "--prefetch", "2"});
  CHECK_SAYS(resolved({"--replicate", "2", "--reshard-after-forward", "no"}),
             "parameters that ZeRO-3 gathers: give --fsdp or --cp 2 or more and --zero 3");
  CHECK_SAYS(resolved({"--fsdp", "2", "--zero", "2", "--reshard-after-forward", "no"}),
             "give --fsdp or --cp 2 or more and --zero 3");
  CHECK_SAYS(resolved({"--fsdp", "2", "--zero", "1", "--reshard-after-forward", "yes"}),
             "give --fsdp or --cp 2 or more and --zero 3");
  CHECK_SAYS(resolved({"--reshard-after-forward", "yes"}),
             "parameters that ZeRO-3 gathers: give --fsdp or --cp 2 or more and --zero 3");
  resolved({"--fsdp", "2", "--reshard-after-forward", "no"}),
      resolved({"--fsdp", "2", "--reshard-after-forward", "yes"});
  CHECK_SAYS(
      resolved({"--prefetch", "3"}),
      "--prefetch is about what ranks gather and sum: give --fsdp, --cp or --replicate 2 or more");
  CHECK_SAYS(resolved({"--pp", "2", "--prefetch", "0"}), "--prefetch is about");
  resolved({"--replicate", "2", "--prefetch", "0"});
  CHECK_SAYS(resolved({"--width", "516", "--heads", "4"}),
             "with 4 heads makes them 129 wide: give --attention plain or more --heads");
  resolved({"--width", "512", "--heads", "4"}),
      resolved({"--width", "516", "--heads", "4", "--attention", "plain"});
  CHECK_SAYS(resolved({"--steps", "5", "--warmup", "6"}),
             "--warmup 6 is longer than the training of 5 steps");
  resolved({"--steps", "5", "--warmup", "5", "--min-lr", "1e-3"});  // equal is fine
}

TEST(an_unknown_option_suggests_the_nearest) {
  CHECK_SAYS(parsed({"--stesp", "3"}), "there is no option --stesp: did you mean --steps?");
  CHECK_SAYS(parsed({"--stpes", "3"}), "there is no option --stpes: did you mean --steps?");
  CHECK_SAYS(parsed({"--fspd", "3"}), "there is no option --fspd: did you mean --fsdp?");
  CHECK_SAYS(parsed({"-steps", "3"}), "there is no option -steps: did you mean --steps?");
  CHECK_SAYS(parsed({"--weight_decay", "0"}), "did you mean --weight-decay?");
  CHECK_SAYS(parsed({"--micro", "3"}), "did you mean --microbatch?");
  CHECK_SAYS(parsed({"--header", "3"}), "did you mean --heads?");
  CHECK_SAYS(parsed({"--micro-batch", "3"}), "did you mean --microbatch?");
  CHECK_SAYS(parsed({"--steps=3"}),
             "there is no option --steps=3: did you mean --steps, with a space before the value?");
  CHECK_SAYS(parsed({"--quantize"}), "there is no option --quantize (--help lists all options)");
  CHECK_SAYS(parsed({"-x"}), "there is no option -x (--help lists all options)");
  CHECK_SAYS(parsed({"--"}), "there is no option -- (--help lists all options)");
  CHECK_SAYS(parsed({"text.txt"}), "'text.txt' belongs to no option: options begin with --");
  CHECK_SAYS(parsed({"--steps", "3", "4"}), "'4' belongs to no option");
  CHECK_SAYS(parsed({""}), "'' belongs to no option");
}

TEST(a_missing_value_or_a_repeated_option_is_refused) {
  CHECK_SAYS(parsed({"--steps"}), "--steps needs a value: a whole number from 1 to 1000000000");
  CHECK_SAYS(parsed({"--steps", "--batch", "3"}), "--steps needs a value");
  CHECK_SAYS(parsed({"--data"}), "--data needs a value: one or more words");
  CHECK_SAYS(parsed({"--data", "--steps", "3"}), "--data needs a value");
  CHECK_SAYS(parsed({"--metrics", ""}), "--metrics takes a name, not ''");
  CHECK_SAYS(parsed({"--data", "a", ""}),
             "--data takes one or more words, none of them empty or beginning with --, not ''");
  CHECK_SAYS(parsed({"--recompute", "yes"}), "'yes' belongs to no option");
  CHECK_SAYS(parsed({"--steps", "3", "--steps", "3"}), "--steps is given twice");
  CHECK_SAYS(parsed({"--recompute", "--recompute"}), "--recompute is given twice");
  CHECK_SAYS(parsed({"--data", "a", "--steps", "3", "--data", "b"}), "--data is given twice");
}

TEST(a_value_that_is_not_allowed_is_refused) {
  for (const char* bad : {"0", "-5", "many", "3x", "1.5", "1e3", "", " 3", "+3", "0x10",
                          "1000000001", "99999999999999999999"})
    CHECK_SAYS(parsed({"--steps", bad}),
               sentence("--steps takes a whole number from 1 to 1000000000, not '", bad, "'"));
  for (const char* bad : {"0", "-1", "nan", "inf", "-inf", "1e999", "fast", "1e-3x", "", "0x1p3"})
    CHECK_SAYS(parsed({"--lr", bad}), sentence("--lr takes a number above 0, not '", bad, "'"));
  for (const char* bad : {"-0.1", "nan", "inf"})
    for (const char* option : {"--min-lr", "--weight-decay", "--clip"})
      CHECK_SAYS(parsed({option, bad}),
                 sentence(option, " takes a number of at least 0, not '", bad, "'"));
  for (const char* option : {"--layers", "--width", "--heads", "--context", "--vocab", "--batch",
                             "--microbatch", "--device-memory"})
    for (const char* bad : {"0", "-1"})
      CHECK_SAYS(parsed({option, bad}), sentence(option, " takes a whole number from 1 to "));
  for (const char* option : {"--warmup", "--seed", "--eval-every", "--sample"})
    CHECK_SAYS(parsed({option, "-1"}), sentence(option, " takes a whole number from 0 to "));
  for (const AxisKind& axis : kAxes)
    CHECK_SAYS(parsed({sentence("--", axis.name).c_str(), "50001"}),
               sentence("--", axis.name, " takes a whole number from 1 to 50000, not '50001'"));
  CHECK_SAYS(parsed({"--dtype", "f16"}), "--dtype takes f32|bf16|f64, not 'f16'");
  CHECK_SAYS(parsed({"--matmul", "mine"}), "--matmul takes cublas|own, not 'mine'");
  CHECK_SAYS(parsed({"--attention", ""}), "--attention takes plain|flash, not ''");
  CHECK_SAYS(parsed({"--model", "gpt5"}),
             "--model takes tiny|char|gpt2|gpt2-medium|gpt2-large|gpt2-xl, not 'gpt5'");
}

TEST(help_lists_groups_options_and_defaults_of_any_table) {
  bool fast = false;
  int64_t count = 7;
  double rate = 0.25;
  std::string shape = "round", name;
  std::vector<std::string> files;
  const OptionTable own = {{"Shapes",
                            {{"shape", "", choice(&shape, {"round", "square"}), "how it looks", ""},
                             {"fast", "", flag(&fast), "hurry", ""}}},
                           {"Numbers",
                            {{"count", "N", whole(&count, 2, 9), "how many", ""},
                             {"rate", "X", real(&rate), "how much", ""},
                             {"name", "NAME", text(&name), "called", "nameless"},
                             {"files", "FILE...", list(&files), "read", ""}}}};
  const std::string expected =
      "usage: x\n\nShapes\n"
      "  --shape round|square     how it looks [round]\n"
      "  --fast                   hurry\n"
      "\nNumbers\n"
      "  --count N                how many [7]\n"
      "  --rate X                 how much [0.25]\n"
      "  --name NAME              called [nameless]\n"
      "  --files FILE...          read\n";
  CHECK_EQ(help_text("usage: x", own), expected);
  const char* words[] = {"x", "--count", "9", "--files", "-a", "b", "--fast"};
  parse(7, words, own);
  CHECK(count == 9 && fast && files == (std::vector<std::string>{"-a", "b"}));
  const char* bad[] = {"x", "--count", "10"};
  CHECK_SAYS(parse(3, bad, own), "--count takes a whole number from 2 to 9, not '10'");
  measured("6 options in 2 groups");
}

// ---- data

TEST(text_bytes_are_tokens_and_files_are_read_as_one) {
  const TemporaryDirectory dir;
  std::string all;
  for (int i = 0; i < 400; i++) all += char(i * 7 % 256);
  const std::vector<std::string> files = {dir.write("a", all.substr(0, 1)),
                                          dir.write("b", all.substr(1, 384)),
                                          dir.write("c", all.substr(385))};
  const Dataset d = Dataset::open(files, 10, 256),
                one = Dataset::open({dir.write("all", all)}, 10, 256);
  CHECK(d.is_text() && d.held_out_sequences() == 3);
  for (int64_t i = 0; i < 3; i++) {
    const std::vector<int> tokens = d.held_out(i);  // the third begins in file b and ends in file c
    CHECK(tokens.size() == 11 && tokens == one.held_out(i));
    for (int64_t t = 0; t < 11; t++) CHECK_EQ(tokens[t], (unsigned char)all[360 + i * 10 + t]);
  }
  CHECK_SAYS(d.held_out(3), "does not hold");
  for (int64_t i = 0; i < 50; i++) CHECK(d.sequence(1, i, 5) == one.sequence(1, i, 5));
  CHECK_EQ(d.describe(), "3 files, text: 360 tokens to train on, 40 held out");
  CHECK_EQ(one.describe(), dir.path + "/all, text: 360 tokens to train on, 40 held out");
  fs::create_symlink(files[1], dir.path + "/link");
  for (const std::string& again : {files[1], dir.path + "/./b", dir.path + "/link"})
    CHECK_EQ(Dataset::open({files[1], again}, 10, 256).describe(),
             "2 files (" + again +
                 " is given more than once, and counts as often: what is held out may be trained "
                 "on), text: 692 tokens to train on, 76 held out");
}

TEST(an_open_file_knows_whether_it_is_still_at_its_place) {
  const TemporaryDirectory dir;
  const std::string place = dir.write("x.partial", ""), moved = place + ".moved";
  const OpenFile file(place, O_WRONLY | O_CREAT);
  CHECK(file.is_at(place));
  CHECK_EQ(rename(place.c_str(), moved.c_str()), 0);
  CHECK(!file.is_at(place) && file.is_at(moved));
  const OpenFile other(place, O_WRONLY | O_CREAT);
  CHECK(!file.is_at(place), "another file has its name");
}

TEST(what_another_process_does_to_a_file_that_is_written_is_noticed) {
  const TemporaryDirectory dir;
  const std::string place = dir.path + "/x", beside = place + ".partial",
                    mine = dir.write("mine", "kept");
  const auto written = [&](const auto& meanwhile) {
    write_file(place, [&](const Write& write) {
      write("it");
      meanwhile();
    });
  };
  const char* said = "another process has written to";
  CHECK_SAYS(written([&] { fs::rename(beside, mine + "2"); }), said);
  CHECK_SAYS(written([&] { std::ofstream(beside, std::ios::app) << "more"; }), said);
  CHECK(!is_there(place) && !is_there(beside));
  fs::create_hard_link(mine, beside);
  CHECK_SAYS(write_file(place, "it"), "x.partial has another name, too");
  CHECK_EQ(contents(mine), "kept");
  fs::remove(beside);
  CHECK_EQ(mkfifo(beside.c_str(), 0600), 0);
  CHECK_SAYS(write_file(place, "it"), "x.partial cannot be opened");  // and waits for no reader
}

TEST(a_file_that_has_become_shorter_is_not_read_on) {
  const TemporaryDirectory dir;
  const std::string file = dir.write("a", std::string(100'000, 'a'));
  const Dataset d = Dataset::open({file}, 10, 256);
  d.sequence(1, 0, 5);
  fs::resize_file(file, 5000);
  CHECK_SAYS(d.sequence(1, 0, 5), "a has become shorter while it was read");
  fs::remove(file);  // what is open stays
  std::ofstream(file) << "another";
  const Dataset one = Dataset::open({dir.write("b", std::string(100'000, 'b'))}, 10, 256);
  fs::rename(file, dir.path + "/b");
  one.sequence(1, 0, 5);
}

TEST(more_files_are_read_than_a_shell_lets_be_open) {
  const TemporaryDirectory dir;
  rlimit before;
  CHECK_EQ(getrlimit(RLIMIT_NOFILE, &before), 0);
  const rlimit few = {64, before.rlim_max};
  CHECK_EQ(setrlimit(RLIMIT_NOFILE, &few), 0);
  std::vector<std::string> files;
  for (int i = 0; i < 100; i++) files.push_back(dir.write(std::to_string(i), "a text of it"));
  CHECK_EQ(Dataset::open(files, 10, 256).sequence(1, 0, 5).size(), 11u);
  CHECK_EQ(setrlimit(RLIMIT_NOFILE, &before), 0);
}

TEST(token_shards_of_both_widths_are_read) {
  const TemporaryDirectory dir;
  const std::string thousand = shard(counting<uint16_t>(1000));
  const Dataset d =
      Dataset::open({dir.write("a.bin", thousand), dir.write("b.bin", thousand)}, 50, 1000);
  CHECK(!d.is_text() && d.held_out(2)[50] == 950);
  std::vector<uint32_t> wide = counting<uint32_t>(2000);
  for (uint32_t& t : wide) t += 100000;
  // a shard by its magic, whatever its name
  const std::string file = dir.write("wide", shard(wide, 20240801, 7));
  CHECK(Dataset::open({file}, 50, 128256).held_out(0)[3] == 101803);
  CHECK_EQ(Dataset::open({file}, 50, 128256).describe(),
           file + ", token shards: 1800 tokens to train on, 200 held out");
}

TEST(a_rank_is_behind_ranks_of_its_stage_alone) {
  std::vector<WatchRecord> records(5);
  for (int i = 0; i < 5; i++) {
    records[i].rank = i, records[i].stage = i / 3, records[i].heartbeat_ms = 9000;
    records[i].collectives = i == 1 ? 7 : i < 3 ? 9 : 2;
  }
  const auto said_of = [&](int rank) {  // its line
    const std::string all = standings(records, 10'000, 0) + "\n";
    const size_t begin = all.find(sentence("rank ", rank, ": "));
    return all.substr(begin, all.find('\n', begin) - begin);
  };
  const auto is_behind = [&](int rank) {
    return said_of(rank).find("behind") != std::string::npos;
  };
  for (int rank = 0; rank < 5; rank++) CHECK_EQ(is_behind(rank), rank == 1, said_of(rank));
  records[1].heartbeat_ms = 2000;
  CHECK(said_of(1).find("DOES NOT RUN since 8 s") != std::string::npos, said_of(1));
}

TEST(the_last_tenth_is_held_out_and_never_trained_on) {
  const TemporaryDirectory dir;
  const std::string file = dir.write("a.bin", shard(counting<uint16_t>(1000)));
  const Dataset d = Dataset::open({file}, 7, 1000);
  int lowest = 1000, highest = 0;
  for (int64_t step = 0; step < 200; step++)
    for (int64_t i = 0; i < 50; i++) {
      const std::vector<int> tokens = d.sequence(step, i, 3);
      CHECK_EQ(tokens.size(), 8u);
      for (int t = 1; t < 8; t++) CHECK_EQ(tokens[t], tokens[0] + t);
      lowest = std::min(lowest, tokens.front()), highest = std::max(highest, tokens.back());
    }
  CHECK(lowest == 0 && highest == 899, "10,000 draws of 893 starts reach both ends");
  CHECK(d.held_out(0)[0] == 900 && d.held_out_sequences() == 14 && d.held_out(13).back() == 998);
  // there are 99 sequences of one token: 32 of them, evenly spread, stand for all
  const Dataset many = Dataset::open({file}, 1, 1000);
  CHECK_EQ(many.held_out_sequences(), 32);
  for (int i = 0; i < 32; i++) CHECK_EQ(many.held_out(i)[0], 900 + i * 99 / 32);
  // a tenth is less than one sequence: one sequence is held out
  const Dataset small = Dataset::open({file}, 499, 1000);
  CHECK(small.held_out(0)[0] == 500 && small.held_out_sequences() == 1);
  CHECK(small.held_out(0).back() == 999 && small.sequence(1, 1, 1)[0] == 0);
  measured("trained on tokens ", lowest, " to ", highest, " of 1000");
}

TEST(a_sequence_depends_on_seed_step_and_index_alone) {
  const TemporaryDirectory dir;
  const std::string file = dir.write("a.bin", shard(counting<uint16_t>(60000)));
  const Dataset d = Dataset::open({file}, 3, 65536), again = Dataset::open({file}, 3, 65536);
  std::map<int, int> seen;
  int equal = 0;
  for (int64_t step = 0; step < 10; step++)
    for (int64_t i = 0; i < 10; i++) {
      CHECK(d.sequence(step, i, 42) == again.sequence(step, i, 42));
      seen[d.sequence(step, i, 42)[0]]++;
      equal += d.sequence(step, i, 42) == d.sequence(step, i, 43);
      equal += d.sequence(step, i, 42) == d.sequence(step, i, 42 + (int64_t(1) << 40));
      equal += d.sequence(step, i, 42) == d.sequence(step + (int64_t(1) << 32), i, 42);
    }
  // 100 draws of 54,000: 0.1 repeats are expected
  CHECK(seen.size() >= 98 && equal <= 2, seen.size(), " different, ", equal, " equal");
  // the formula, so that no change of the drawn batches goes unnoticed
  const Philox4 r = philox(4, 9, 0, 2, 42, 0);
  const double fraction = (r.v[0] / 4294967296.0 + r.v[1]) / 4294967296.0;
  CHECK_EQ(d.sequence(9, 4, 42)[0], int(fraction * (54000 - 3)));
  measured(seen.size(), " different starts of 100");
}

TEST(starts_are_drawn_evenly) {
  const TemporaryDirectory dir;
  const Dataset d =
      Dataset::open({dir.write("a", std::string(counting<char>(100).data(), 100))}, 10, 256);
  // 100 tokens, 11 of them held out; the last start leaves 10 after it
  const int starts = 79, draws = 79000;
  std::vector<int> count(starts);
  for (int i = 0; i < draws; i++) count.at(d.sequence(i / 100, i % 100, 1337)[0])++;
  double chi2 = 0;
  for (int c : count) chi2 += (c - 1000.0) * (c - 1000.0) / 1000.0;
  // 78 degrees of freedom: outside with a probability of 2e-4
  CHECK(chi2 > 39 && chi2 < 134, chi2);
  measured("chi2 = ", chi2, " with 78 degrees of freedom");
}

TEST(files_that_cannot_be_read_are_refused) {
  const TemporaryDirectory dir;
  const auto open = [&](const std::string& name) {
    Dataset::open({dir.path + "/" + name}, 4, 256);
  };
  CHECK_SAYS(open("nowhere"), dir.path + "/nowhere cannot be opened: No such file or directory");
  CHECK(symlink("loop", (dir.path + "/loop").c_str()) == 0);
  CHECK_SAYS(open("loop"), "loop cannot be opened: Too many levels of symbolic links");
  dir.write("empty", "");
  CHECK_SAYS(open("empty"), "empty is empty");
  CHECK_SAYS(open(""), "is a directory: name a file in it");
  CHECK(mkfifo((dir.path + "/pipe").c_str(), 0600) == 0);
  CHECK_SAYS(open("pipe"), "pipe is not a regular file");
  dir.write("closed", "abc");
  CHECK(chmod((dir.path + "/closed").c_str(), 0) == 0);
  if (geteuid() != 0) CHECK_SAYS(open("closed"), "closed cannot be opened: Permission denied");
  measured(geteuid() == 0 ? "5 sentences (root may read a file without permissions)"
                          : "6 sentences");
}

TEST(a_file_too_short_for_the_context_is_refused) {
  const TemporaryDirectory dir;
  const std::string nine = dir.write("nine", "123456789"), one = dir.write("one", "0");
  CHECK_SAYS(
      Dataset::open({nine}, 4, 256),
      "--data: a context of 4 needs at least 10 tokens, 5 to train on and 5 held out; there are 9");
  CHECK_SAYS(Dataset::open({nine, one}, 5, 256),
             "a context of 5 needs at least 12 tokens, 6 to train on and 6 held out; there are 10");
  // after five tokens to train on
  CHECK_EQ(Dataset::open({nine, one}, 4, 256).held_out(0)[0], '6');
}

TEST(shards_that_are_not_what_they_say_are_refused) {
  const TemporaryDirectory dir;
  const std::vector<uint16_t> tokens = counting<uint16_t>(100);
  const auto open = [&](const std::string& bytes) {
    Dataset::open({dir.write("x.bin", bytes)}, 4, 256);
  };
  open(shard(tokens));
  CHECK_SAYS(open(shard(tokens, 12345)), "x.bin is no token shard in llm.c's format");
  CHECK_SAYS(open("ab"), "x.bin is no token shard");
  CHECK_SAYS(open(shard(tokens, 20240520, 2)),
             "x.bin is a token shard of version 2; expected version 1");
  CHECK_SAYS(open(shard(tokens, 20240801, 1)),
             "x.bin is a token shard of version 1; expected version 7");
  CHECK_SAYS(open(shard(tokens).substr(0, 1000)),
             "x.bin promises 100 tokens, which take 1224 bytes, but has 1000 bytes");
  CHECK_SAYS(open(shard(tokens, 20240520, 1, 0)), "x.bin holds no tokens: its header says 0");
  CHECK_SAYS(open(shard(tokens, 20240520, 1, 150)),
             "x.bin promises 150 tokens, which take 1324 bytes, but has 1224 bytes");
  CHECK_SAYS(open(shard(tokens, 20240520, 1, 50)),
             "x.bin promises 50 tokens, which take 1124 bytes, but has 1224 bytes");
  CHECK_SAYS(open(shard(tokens) + "?"),
             "x.bin promises 100 tokens, which take 1224 bytes, but has 1225 bytes");
}

TEST(files_of_different_kinds_are_refused_together) {
  const TemporaryDirectory dir;
  const std::string text = dir.write("t.txt", std::string(500, 'x')),
                    narrow = dir.write("n.bin", shard(counting<uint16_t>(100))),
                    wide = dir.write("w.bin", shard(counting<uint32_t>(100), 20240801, 7));
  CHECK_SAYS(Dataset::open({text, narrow}, 4, 256),
             "--data mixes tokens of 8 bits (" + text + ") and 16 bits (" + narrow + ")");
  CHECK_SAYS(Dataset::open({narrow, wide}, 4, 256),
             "--data mixes tokens of 16 bits (" + narrow + ") and 32 bits (" + wide + ")");
}

TEST(a_token_outside_the_vocabulary_is_refused_with_its_place) {
  const TemporaryDirectory dir;
  const std::string text = dir.write("t.txt", "plain text \xc3\xa9 and more");
  const std::string negative = dir.write("n.bin", shard<uint32_t>({1, 2, ~0u, 4}, 20240801, 7));
  CHECK_SAYS(Dataset::open({text}, 4, 128),
             text + " has token 195 at position 11, outside the vocabulary of 128 (--vocab)");
  CHECK_SAYS(Dataset::open({negative}, 1, 50257),
             "n.bin has token 4294967295 at position 2, outside the vocabulary of 50257");
  // beyond what is checked at opening: found when it is used
  std::vector<uint16_t> late((1 << 20) + 1000, 7);
  late[(1 << 20) + 990] = 300;
  const std::string first = dir.write("ok.bin", shard<uint16_t>({1, 2, 3})),
                    second = dir.write("late.bin", shard(late));
  const Dataset d = Dataset::open({first, second}, 104'950, 256);  // one sequence is held out
  CHECK_SAYS(d.held_out(0), second + " has token 300 at position 1049566, outside");
}

TEST(without_data_the_projects_own_sources_are_read) {
  const TemporaryDirectory dir;
  for (const char* name : {"b.cpp", "a.md", "Makefile", "sub/x.cuh", "sub/x.cu", "z.h",
                           "build/no.cpp", "sub/build/no.h", ".git/no.md", "no.bin", "no.py"})
    dir.write(name, "text");
  dir.write("empty.h", "");
  std::string names;
  for (const std::string& file : project_files(dir.path))
    names += file.substr(dir.path.size() + 1) + " ";
  CHECK_EQ(names, "Makefile a.md b.cpp sub/x.cu sub/x.cuh z.h ");
  CHECK(project_files(dir.path + "/nowhere").empty() && project_files("").empty());
  if (project_root().empty()) {
    CHECK_SAYS(Dataset::open({}, 128, 256), "no --data was given");
    measured("the program is not inside the project");
  } else {
    CHECK(fs::exists(project_root() + "/train_gpt.cpp"));
    const Dataset d = Dataset::open({}, 128, 256);
    CHECK(d.is_text() &&
          d.describe().find("sources and docs of this project, text: ") != std::string::npos);
    measured(d.describe());
  }
}

// ---- metrics

TEST(metrics_are_one_json_object_a_line_that_gives_back_the_same_doubles) {
  const TemporaryDirectory dir;
  const std::string path = dir.path + "/m.jsonl";
  JsonLines metrics(path);
  CHECK_EQ(contents(path), "");  // the file is there before the first step
  metrics.step({1, 0.1, 1.0 / 3, 1e-3, 2048, 12.5});
  const std::string first =
      "{\"step\":1,\"loss\":0.1,\"grad_norm\":0.3333333333333333,\"lr\":0.001,"
      "\"tokens_per_second\":2048.0,\"step_ms\":12.5}\n";
  CHECK_EQ(contents(path), first);  // flushed: a run that is killed leaves whole lines
  metrics.line({{"summary", true}, {"b", {1}}, {"a", 4096}});
  CHECK_EQ(contents(path), first + "{\"summary\":true,\"b\":[1],\"a\":4096}\n");
  for (const double x :
       {0.1, 1.0 / 3, 5.0e-324, 1.7976931348623157e308, -0.0, 11.090354888959125}) {
    JsonLines one(path);
    one.step({1, x});
    CHECK_EQ(strtod(contents(path).c_str() + strlen("{\"step\":1,\"loss\":"), nullptr), x);
  }
}

TEST(a_resumed_run_keeps_the_metrics_of_the_steps_before_it_and_loses_no_others) {
  const TemporaryDirectory dir;
  const std::string path = dir.path + "/m.jsonl";
  const auto lines = [](std::vector<int> steps) {
    std::string s;
    for (const int step : steps)
      s += sentence("{\"step\":", step,
                    ",\"loss\":1.0,\"grad_norm\":0.0,\"lr\":0.0,"
                    "\"tokens_per_second\":0.0,\"step_ms\":0.0}\n");
    return s;
  };
  const std::string summary = "{\"summary\":true}\n", unfinished = "{\"step\":3,\"lo";
  const std::string all = lines({1, 2}) + summary + lines({3, 4, 5}) + summary;
  dir.write("m.jsonl", all);
  JsonLines(path, 3).step({4, 1});
  CHECK_EQ(contents(path), lines({1, 2}) + summary + lines({3, 4}));
  CHECK_EQ(contents(path + ".1"), all);
  JsonLines(path, 4).step({5, 1});  // nothing is too much there
  CHECK(!fs::exists(path + ".2"));
  dir.write("m.jsonl", lines({1, 2}) + unfinished);  // as a killed run leaves it
  JsonLines(path, 2).step({3, 1});
  CHECK_EQ(contents(path), lines({1, 2, 3}));
  CHECK_EQ(contents(path + ".2"), lines({1, 2}) + unfinished);
  for (const int run : {1, 2}) {  // no checkpoint was found, perhaps by a mistyped name
    JsonLines(path, 0).step({1, 1});
    CHECK_EQ(contents(path), lines({1}));
    CHECK_EQ(contents(path + ".3"), lines({1, 2, 3}));
    CHECK_EQ(fs::exists(path + ".4"), run == 2);
  }
  JsonLines(dir.path + "/new.jsonl", 7).step({8, 1});
  CHECK_EQ(contents(dir.path + "/new.jsonl"), lines({8}));
  JsonLines(path).step({2, 1});  // a run that does not resume begins anew, too
  CHECK_EQ(contents(path), lines({2}));
  CHECK_EQ(contents(path + ".5"), lines({1}));
  fs::create_symlink(path, dir.path + "/link");
  JsonLines(dir.path + "/link").step({3, 1});
  CHECK_EQ(contents(path), lines({2}));
  CHECK_EQ(contents(dir.path + "/link"), lines({3}));
}

TEST(numbers_in_sentences_say_which_they_are) {
  CHECK_EQ(sentence(1.0000001, " ", 0.1, " ", 1e-4, " ", 3.0, " ", 1e30, " ", -2.5, " ", 7),
           "1.0000001 0.1 0.0001 3 1e+30 -2.5 7");
  for (const double x : {1.0 / 3, 5e-324, 1.7976931348623157e308, 123456789.125})
    CHECK_EQ(strtod(sentence(x).c_str(), nullptr), x);
}

TEST(numbers_that_json_cannot_say_become_null) {
  const TemporaryDirectory dir;
  const double inf = std::numeric_limits<double>::infinity(),
               nan = std::numeric_limits<double>::quiet_NaN();
  JsonLines metrics(dir.path + "/m.jsonl");
  metrics.step({7, nan, inf, -inf, nan, inf});
  CHECK_EQ(contents(dir.path + "/m.jsonl"),
           "{\"step\":7,\"loss\":null,\"grad_norm\":null,\"lr\":null,"
           "\"tokens_per_second\":null,\"step_ms\":null}\n");
}

TEST(metrics_that_cannot_be_written_are_reported) {
  const TemporaryDirectory dir;
  CHECK_SAYS(JsonLines(dir.path + "/no/m.jsonl"),
             dir.path + "/no/m.jsonl cannot be opened: No such file or directory");
  CHECK_SAYS(JsonLines{dir.path}, "cannot be opened: Is a directory");
  JsonLines full("/dev/full");
  CHECK_SAYS(full.step({}), "/dev/full cannot be written: No space left on device");
  JsonLines none("");
  none.step({});
}

// What a Progress printed into a file.
template <class Body> static std::string printed(int64_t steps, bool terminal, Body body) {
  FILE* file = tmpfile();
  CHECK(file != nullptr);
  {
    Progress progress(steps, file, terminal);
    body(progress);
  }
  std::string text(size_t(ftell(file)), ' ');
  rewind(file);
  CHECK_EQ(fread(text.data(), 1, text.size(), file), text.size());
  fclose(file);
  return text;
}

TEST(progress_in_a_pipe_is_about_twenty_lines) {
  StepRecord last;
  const std::string text = printed(1000, false, [&](Progress& p) {
    for (int64_t step = 1; step <= 1000; step++)
      p.start_step(), last = p.end_step(step, 2.5, 0.75, 1e-3, 64);
  });
  const auto lines = std::count(text.begin(), text.end(), '\n');
  CHECK(text.starts_with("step 1/1000  loss 2.5000  norm 0.750  lr 1.00e-03  "), text);
  CHECK(text.find("\nstep 1000/1000  ") != std::string::npos &&
            text.ends_with(" tokens/s  0:00:00 left\n"),
        text);
  CHECK(lines == 21 && text.find('\r') == std::string::npos, lines);
  CHECK(last.step == 1000 && last.loss == 2.5 && last.grad_norm == 0.75 && last.lr == 1e-3 &&
        last.step_ms > 0);
  CHECK_LE(std::fabs(last.tokens_per_second * last.step_ms / 1e3 - 64), 1e-6);
  measured(lines, " lines for 1000 steps");
}

TEST(progress_on_a_terminal_rewrites_one_line) {
  const std::string text = printed(1000, true, [](Progress& p) {
    for (int64_t step = 1; step <= 1000; step++) {
      p.start_step();
      p.end_step(step, 2.5, 0.75, 1e-3, 64);
      if (step == 500) p.say(step, "held-out loss 3.2500");
    }
    p.done();
    p.done();
  });
  CHECK(text.starts_with("\rstep 1/1000  ") && text.ends_with(" left\033[K\n"), text);
  CHECK(text.find("\r\033[Kstep 500/1000  held-out loss 3.2500\n") != std::string::npos, text);
  CHECK_EQ(std::count(text.begin(), text.end(), '\n'), 2);
  CHECK_EQ(printed(9, true, [](Progress&) {}), "");
  CHECK_EQ(printed(9, false, [](Progress& p) { p.say(3, "held-out loss 1.0000"); }),
           "step 3/9  held-out loss 1.0000\n");
}

TEST(speed_leaves_out_the_first_step) {
  std::string speed, one;
  double later = 0;  // seconds of steps 2 and 3
  printed(3, false, [&](Progress& p) {
    CHECK_EQ(p.summary(1), "no step was timed");
    Stopwatch watch;
    for (int64_t step = 1; step <= 3; step++) {
      if (step == 2) watch = Stopwatch();
      p.start_step();
      usleep(step == 1 ? 300000 : 2000);
      p.end_step(step, 1, 1, 1, 1000);
      if (step == 1) one = p.summary(1e6);
    }
    speed = p.summary(1e6);
    later = watch.seconds();
  });
  double first = 0, rate = 0, ms = 0, gflops = 0;
  CHECK_EQ(sscanf(one.c_str(), "%lf tokens/s", &first), 1);
  CHECK_EQ(sscanf(speed.c_str(), "%lf tokens/s, %lf ms a step, %lf GFLOP/s", &rate, &ms, &gflops),
           3);
  CHECK_LE(first, 1000 / 0.3 + 1);
  CHECK_LE(ms, 1e3 * later / 2 + 1);  // with the first step it were 100 more
  CHECK_LE(std::fabs(rate * ms / 1e3 - 1000), 50);
  CHECK_LE(std::fabs(gflops - rate / 1e3), 0.01 * gflops);
  measured(one, "; then ", speed);
}

// ---- files of arrays

static void write_bytes(const std::string& path, const std::string& header,
                        const std::string& data) {
  const uint64_t length = header.size();
  std::ofstream out(path, std::ios::binary);
  out.write(reinterpret_cast<const char*>(&length), 8) << header << data;
}

TEST(safetensors_give_back_what_was_written) {
  const TemporaryDirectory dir;
  const std::string path = dir.path + "/x.safetensors";
  const std::vector<double> a = {1.5, -2, 1e300};
  const std::vector<float> b = {0.1f, 2.5f, -3e38f, 4};
  const auto from = [](const auto& v) {
    return [&v](void* to) { memcpy(to, v.data(), v.size() * sizeof v[0]); };
  };
  const WrittenFile w = write_safetensors(path, {{"a", {3}, Dtype::f64, from(a)},
                                                 {"b", {2, 2}, Dtype::f32, from(b)}});
  const StoredArrays file = open_safetensors(path);
  CHECK_EQ(file.size(), 2u);
  CHECK(file.at("b").shape == (Shape{2, 2}));
  std::vector<double> wide(4);
  file.at("b").read(0, 4, Dtype::f64, wide.data());
  for (size_t i = 0; i < 4; i++) CHECK_EQ(wide[i], double(b[i]));
  file.at("a").read(1, 2, Dtype::f64, wide.data());
  CHECK(wide[0] == a[1] && wide[1] == a[2]);
  CHECK(int64_t(read_file(path).size()) == w.bytes && checksum(read_file(path)) == w.checksum);
}

TEST(half_precision_arrays_are_read_exactly) {
  const TemporaryDirectory dir;
  const std::string path = dir.path + "/h.safetensors";
  // 1, -2, the smallest subnormal, the largest, 1/3 rounded; then bf16's 1 and -0.5
  const uint16_t halves[] = {0x3c00, 0xc000, 0x0001, 0x7bff, 0x3555, 0x3f80, 0xbf00};
  write_bytes(path,
              R"({"h":{"dtype":"F16","shape":[5],"data_offsets":[0,10]},)"
              R"("b":{"dtype":"BF16","shape":[2],"data_offsets":[10,14]}})",
              std::string(reinterpret_cast<const char*>(halves), sizeof halves));
  const StoredArrays file = open_safetensors(path);
  float got[5];
  file.at("h").read(0, 5, Dtype::f32, got);
  const float expected[] = {1, -2, 5.9604644775390625e-8f, 65504, 0.333251953125f};
  for (int i = 0; i < 5; i++) CHECK_EQ(got[i], expected[i]);
  file.at("b").read(0, 2, Dtype::f32, got);
  CHECK(got[0] == 1 && got[1] == -0.5f);
}

// What Hugging Face's library takes and refuses (safetensors 0.8), each header with 8 bytes of
// data.
TEST(safetensors_are_refused_where_others_refuse_them) {
  const TemporaryDirectory dir;
  const std::string path = dir.path + "/x.safetensors";
  const auto f32 = [](const char* name, const char* shape, const char* offsets) {
    return sentence('"', name, R"(":{"dtype":"F32","shape":)", shape, R"(,"data_offsets":)",
                    offsets, '}');
  };
  const auto opens = [&](const std::string& members) {
    write_bytes(path, "{" + members + "}", "12345678");
    return error_of([&] { open_safetensors(path); });
  };
  const std::string one = f32("a", "[2]", "[0,8]");
  for (const std::string& good :
       {one, f32("a", "[1]", "[0,4]") + "," + f32("b", "[]", "[4,8]"),
        f32("b", "[1]", "[4,8]") + "," + f32("a", "[1,1]", "[0,4]"),
        f32("none", "[0]", "[0,0]") + "," + one, one + R"(,"__metadata__":{"x":"y"})",
        one + R"(,"__metadata__":null)",
        std::string(R"("a":{"dtype":"F4","shape":[16],"data_offsets":[0,8]})"),
        std::string(R"("a":{"dtype":"BOOL","shape":[8],"data_offsets":[0,8]})")})
    CHECK_EQ(opens(good), "", good);
  const std::pair<std::string, const char*> bad[] = {
      {f32("a", "[2]", "[0,8]") + "," + f32("b", "[2]", "[0,8]"), "do not fill its data"},
      {f32("a", "[1]", "[0,4]") + "," + f32("b", "[1]", "[2,6]"), "do not fill its data"},
      {f32("a", "[1]", "[4,8]"), "do not fill its data"},
      {f32("a", "[1]", "[0,4]"), "do not fill its data"},
      {"", "do not fill its data"},
      {f32("a", "[2]", "[0,8,7]"), "has 3 data_offsets"},
      {f32("a", "[2]", "[0]"), "has 1 data_offsets"},
      {f32("a", "[2]", "[8,0]"), "does not take bytes 8 to 0"},
      {f32("a", "[2]", "[-8,0]"), "is no whole number"},
      {f32("a", "[2]", "[0.0,8]"), "is no whole number"},
      {f32("a", "[2.9]", "[0,8]"), "is no whole number"},
      {f32("a", "[2.0]", "[0,8]"), "is no whole number"},
      {f32("a", "[-2]", "[0,8]"), "is no whole number"},
      {f32("a", "[true,2]", "[0,8]"), "is no whole number"},
      {f32("a", "[\"2\"]", "[0,8]"), "is no whole number"},
      {f32("a", "2", "[0,8]"), "must be array"},
      {f32("a", "[4294967296,4294967296,2]", "[0,8]"), "does not take bytes 0 to 8"},
      {f32("a", "[9223372036854775807,2]", "[0,8]"), "does not take bytes 0 to 8"},
      {f32("a", "[99999999999999999999]", "[0,8]"), "is no whole number"},
      {one + "," + one, "the name \"a\" stands twice"},
      {one + R"(,"__metadata__":{"x":1})", "is damaged, or of another kind"},
      {R"("a":{"dtype":"F33","shape":[2],"data_offsets":[0,8]})", "there is no dtype F33"},
      {R"("a":{"dtype":"F32 F16","shape":[2],"data_offsets":[0,8]})", "there is no dtype F32 F16"},
      {R"("a":{"dtype":"F4","shape":[1],"data_offsets":[0,8]})", "does not take bytes 0 to 8"},
      {R"("a":{"dtype":"F32","shape":[2]})", "is damaged, or of another kind"},
      {R"("a":7)", "is damaged, or of another kind"}};
  for (const auto& [members, what] : bad) CHECK_SAYS(throw Error(opens(members)), what);
  write_bytes(path, "{" + one + "}" + std::string(1, 0), "12345678");
  CHECK_SAYS(open_safetensors(path), "a zero byte stands in it");
  write_bytes(path, "[]", "");
  CHECK_SAYS(open_safetensors(path), "is no object");
}

TEST(damaged_safetensors_are_refused) {
  const TemporaryDirectory dir;
  const std::string path = dir.path + "/d.safetensors";
  const auto says = [&](const std::string& header, const std::string& data, const char* what) {
    write_bytes(path, header, data);
    CHECK_SAYS(open_safetensors(path), what);
  };
  says(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", "1234",
       "do not fill its data: one ends at byte 8");
  says(R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}})", "12345678",
       "does not take bytes 0 to 8");
  says(R"({"a":{"dtype":"F32","shape":[2],"data_)", "", "is damaged, or of another kind");
  std::ofstream(path, std::ios::binary) << "12345678\x7f";
  CHECK_SAYS(open_safetensors(path), "its header would have");
  std::ofstream(path, std::ios::binary) << "123";
  CHECK_SAYS(open_safetensors(path), "and 0 follow");
  CHECK_SAYS(open_safetensors(dir.path + "/none"), "cannot be opened");
}

TEST(memory_that_is_not_there_is_no_damage_of_a_file) {
  const auto read = [](auto what) {
    read_json("x.json", R"({"a":1})", [&](const nlohmann::json&) { what(); });
  };
  bool passes = false;
  try {
    read([] { throw std::bad_alloc(); });
  } catch (const std::bad_alloc&) {
    passes = true;
  }
  CHECK(passes);
  CHECK_SAYS(read([] { throw Error("its a is 1"); }), "x.json is damaged, or of another kind: its");
  const std::string said = error_of([&] { read([] { throw Error(std::string(9000, 'a')); }); });
  CHECK(said.size() < 500 && said.ends_with("aa ..."), said);
}

TEST(a_checkpoint_is_loaded_into_a_model_of_its_shapes_alone) {
  const TemporaryDirectory directory;
  const Shape shape{2, 3};
  CheckpointInfo info;
  info.model = resolved({}).model;
  write_whole_checkpoint(directory.path, info,
                         {{"w", shape, Dtype::f32, [](void* to) { memset(to, 0, 24); }}}, {});
  const Checkpoint checkpoint(directory.path + "/step-00000000");
  Param w;
  w.name = "w";
  for (const int64_t rows : {2, 1}) {
    w.shape = {rows, 3};
    w.slice = {1, rows, 3, 0, rows};
    const Tensor x(w.shape, Dtype::f32, Memory::workspace);
    fill(x, 1);
    if (rows == 2) load(checkpoint, w, 0, Part::weights, x);
    else
      CHECK_SAYS(load(checkpoint, w, 0, Part::weights, x),
                 "w is (2, 3) there, and this model's is (1, 3)");
    CHECK_EQ(download(x)[0], rows == 2 ? 0 : 1);
  }
}

TEST(a_manifest_of_a_model_that_cannot_be_is_damaged) {
  using Json = nlohmann::json;
  const auto opened = [](const std::function<void(Json&)>& change) {
    const TemporaryDirectory directory;
    CheckpointInfo info;
    info.model = resolved({}).model;
    write_whole_checkpoint(directory.path, info, {{"w", {2, 3}, Dtype::f32, [](void*) {}}}, {});
    const std::string path = checkpoint_path(directory.path, 0), file = path + "/manifest.json";
    Json manifest = Json::parse(read_file(file));
    change(manifest);
    manifest.erase("checksum");
    manifest["checksum"] = checksum(manifest.dump());
    write_file(file, manifest.dump());
    Checkpoint(path).verify();
  };
  opened([](Json&) {});
  CHECK_SAYS(opened([](Json& m) { m["model"]["heads"] = -1; }), "-1 heads");
  CHECK_SAYS(opened([](Json& m) { m["model"]["heads"] = 0; }), "its model is");
  CHECK_SAYS(opened([](Json& m) { m["model"]["layers"] = 1LL << 40; }), "its model is");
  CHECK_SAYS(opened([](Json& m) { m["step"] = -5; }), "its step is -5");
  CHECK_SAYS(opened([](Json& m) { m["ranks"][0]["files"][0]["name"] = "../x"; }), "it names ../x");
  CHECK_SAYS(opened([](Json& m) { m["ranks"][0]["files"] = Json::array(); }),
             "it does not name weights-0.safetensors");
  CHECK_SAYS(opened([](Json& m) { m.erase("keep"); }), "key 'keep' not found");
  CHECK_SAYS(opened([](Json& m) { m["ranks"][0]["tensors"] = Json::object(); }), "no tensors");
  CHECK_SAYS(opened([](Json& m) {
               m["ranks"][0]["pieces"][0]["slice"] = {
                   {"outer", 1LL << 40}, {"split", 2}, {"inner", 1}, {"begin", 0}, {"end", 1}};
               m["ranks"][0]["pieces"][0]["count"] = 1LL << 40;
             }),
             "more than 100 million pieces");
}

TEST(words_of_others_move_no_cursor) {
  CHECK_EQ(printable("a\x1b[2J\n\tb\x7f \xc3\x9b \xc2\x9b\x31m\xc2\xa0\xc2"),
           "a?[2J\n\tb? \xc3\x9b ?1m\xc2\xa0\xc2");
}

// ---- sampling and tokens

static int picked(std::vector<double> logits, const Sampling& how, int64_t position) {
  return pick(logits, how, position);
}

TEST(sampling_follows_the_probabilities_and_its_cuts) {
  const std::vector<double> logits = {std::log(0.5), std::log(0.1), std::log(0.3), std::log(0.1)};
  const auto counts = [&](const Sampling& how) {
    std::vector<double> share(4);
    for (int i = 0; i < 20000; i++) share[size_t(picked(logits, how, i))] += 1.0 / 20000;
    return share;
  };
  const std::vector<double> all = counts({}), cold = counts({.temperature = 0.5}),
                            two = counts({.top_k = 2}), likely = counts({.top_p = 0.75});
  double worst = 0;
  const double squares = 0.25 + 0.01 + 0.09 + 0.01;
  for (size_t v = 0; v < 4; v++) {
    const double p = std::exp(logits[v]);
    worst = std::max({worst, std::abs(all[v] - p), std::abs(cold[v] - p * p / squares),
                      std::abs(two[v] - (v % 2 ? 0 : p / 0.8)),
                      std::abs(likely[v] - (v % 2 ? 0 : p / 0.8))});
  }
  CHECK_LE(worst, 0.015);  // four deviations of 20000 draws
  CHECK(two[1] == 0 && two[3] == 0 && likely[1] == 0 && likely[3] == 0);
  for (int i = 0; i < 50; i++)
    CHECK(picked(logits, {.temperature = 0}, i) == 0 && picked(logits, {.top_k = 1}, i) == 0 &&
          picked(logits, {.top_p = 0.4}, i) == 0);
  measured("80000 draws, shares within ", worst);
}

TEST(draws_differ_by_seed_position_and_sequence) {
  constexpr int64_t kHigh = int64_t(1) << 32;  // both halves of a number count
  std::set<std::vector<int>> different;
  for (const auto& [seed, first, sequence] : {std::array<int64_t, 3>{7, 0, 0},
                                              {8, 0, 0},
                                              {7 + kHigh, 0, 0},
                                              {7, 20, 0},
                                              {7, kHigh, 0},
                                              {7, 0, 1}}) {
    std::vector<int> draws;
    for (int64_t i = first; i < first + 20; i++) {
      std::vector<double> even(8);
      draws.push_back(pick(even, {.seed = uint64_t(seed)}, i, sequence));
    }
    different.insert(draws);
  }
  CHECK_EQ(different.size(), 6u);
}

// What pick does, with all tokens sorted.
static int pick_from_sorted(const std::vector<double>& logits, const Sampling& how, int64_t i) {
  const double most = *std::ranges::max_element(logits);
  std::vector<double> p, sums;
  for (const double l : logits) p.push_back(std::exp((l - most) / how.temperature));
  std::vector<int> order(p.size());
  std::iota(order.begin(), order.end(), 0);
  if (how.top_k > 0 || how.top_p < 1)  // else in the order of tokens
    std::ranges::stable_sort(order, std::greater{}, [&](int v) { return p[size_t(v)]; });
  if (how.top_k > 0) order.resize(std::min(order.size(), size_t(how.top_k)));
  for (double sum = 0; const int v : order) sums.push_back(sum += p[size_t(v)]);
  const auto last = std::ranges::lower_bound(sums, how.top_p * sums.back());
  const double u = philox(uint32_t(i), 0, 0, 1, uint32_t(how.seed), 0).v[0] / 4294967296.0;
  return order[size_t(std::upper_bound(sums.begin(), last, u * *last) - sums.begin())];
}

TEST(top_p_picks_what_sorting_all_tokens_would) {
  std::map<std::string, std::vector<double>> all;
  for (size_t v = 0; v < 5000; v++) {
    const Philox4 r = philox(uint32_t(v), 0, 0, 2, 7, 0);
    const double normal = std::sqrt(-2 * std::log((r.v[0] + 1.0) / 4294967297.0)) *
                          std::cos(2 * M_PI * r.v[1] / 4294967296.0);
    all["flat"].push_back(0.02 * normal);
    all["as a model's"].push_back(2 * normal);
    all["peaked"].push_back(8 * normal);
    all["all equal"].push_back(3);
    all["of four values"].push_back(double(r.v[2] % 4));
    all["ties at the border of 64"].push_back(v % 50 == 0 ? 9 : 0);
    all["only few of any weight"].push_back(v % 100 == 3 ? normal : -1e300);
  }
  int picks = 0;
  for (auto& [name, logits] : all)
    for (const size_t V : {5000, 257, 256, 255, 63, 1}) {
      logits.resize(V);
      for (const double top_p : {1e-9, 0.02, 0.25, 0.5, 0.9, 0.99, 0.99999, 1 - 1e-15, 1.0})
        for (int i = 0; i < 12; i++, picks++) {
          const int64_t top_k = i % 4 < 3 ? 0 : 70;
          const Sampling how{
              .temperature = i % 2 ? 1 : 0.7, .top_k = top_k, .top_p = top_p, .seed = 3};
          CHECK_EQ(picked(logits, how, i), pick_from_sorted(logits, how, i), name, ", ", V,
                   " tokens, ", top_p, ", ", top_k);
        }
    }
  measured(picks, " picks among 1 to 5000 tokens");
}

TEST(no_token_comes_from_logits_that_are_not_finite) {
  for (const double poor : {double(NAN), double(INFINITY), -double(INFINITY)})
    for (const double temperature : {0.0, 1.0})
      for (const int64_t top_k : {0, 1, 2})
        CHECK_SAYS(picked({1, poor, 2}, {.temperature = temperature, .top_k = top_k}, 5),
                   "the model's logits are not all finite numbers");
}

TEST(a_terminal_shows_no_control_characters_and_a_file_gets_every_byte) {
  const std::string bytes("a\r\0\x1b[2J\x7f\t\n \xc2\x9b \xc3\x9b \xe2\x80\x94 \xc2\xa0 \x9b", 25);
  CHECK_EQ(Screen(false).printed(bytes), bytes);
  CHECK_EQ(Screen(true).printed(bytes), "a???[2J?\t\n ? \xc3\x9b \xe2\x80\x94 \xc2\xa0 \x9b");
  Screen screen(true);  // also where a token is one byte
  std::string shown;
  for (const char c : bytes + "\xc2\xc2\x85\xc2\n") shown += screen.printed(std::string(1, c));
  CHECK_EQ(shown, Screen(true).printed(bytes) + "\xc2?\xc2\n");
}

static const char kPairs[] =
    R"({"l":0,"o":1,"w":2,"lo":3,"low":4,"\u0120":5,"\u0120low":6,"\u010a":7,"'":8,"s":9,)"
    R"("'s":10,"<|endoftext|>":11})";

TEST(tokens_are_bytes_pairs_or_numbers) {
  const TemporaryDirectory dir;
  const Tokenizer bytes("", 256), numbers(dir.path, 1000);
  CHECK(bytes.encode("a\xff") == (std::vector<int>{97, 255}) && bytes.decode(255) == "\xff");
  CHECK(numbers.encode(" 7 999") == (std::vector<int>{7, 999}) && numbers.decode(7) == "7 ");
  CHECK_SAYS(numbers.encode("1000"), "'1000' is no token");
  CHECK_SAYS(numbers.encode("7x"), "'7x' is no token");
  CHECK_SAYS(numbers.encode(std::string("7\0x", 3)), "is no token");
  std::ofstream(dir.path + "/vocab.json")
      << R"({"l":0,"o":1,"w":2,"lo":3,"low":4,"\u0120":5,"\u0120low":6,"\u010a":7,"'":8,"s":9,)"
      << R"("'s":10,"<|endoftext|>":11})";
  std::ofstream(dir.path + "/merges.txt") << "#version: 0.2\nl o\nlo w\n\u0120 low\n' s\n";
  const Tokenizer pairs(dir.path, 12);
  CHECK(pairs.encode("low low's\n") == (std::vector<int>{4, 6, 10, 7}));
  // of two spaces the last one belongs to the word
  CHECK(pairs.encode("low  low") == (std::vector<int>{4, 5, 6}));
  CHECK_EQ(pairs.decode(6), " low");
  CHECK_EQ(pairs.end_of_text(), 11);
  CHECK_SAYS(pairs.encode("x"), "the vocabulary has no token for 'x'");
  CHECK_SAYS(Tokenizer(dir.path, 5), "outside the vocabulary of 5");
  CHECK_EQ(Tokenizer(dir.path, 50304).end_of_text(), 11, "a padded vocabulary");
}

TEST(numbers_without_a_text_are_never_drawn) {
  const TemporaryDirectory dir;
  dir.write("vocab.json", R"({"a":0,"b":3})");
  dir.write("merges.txt", "#version: 0.2\n");
  const Tokenizer holes(dir.path, 9, false, 6);  // 1 and 2 have no text, and 4 to 8; 6 ends one
  const Tokenizer numbers(dir.path + "/nowhere", 9);
  const auto counts = [](const Tokenizer& t, const Sampling& how) {
    std::vector<int> drawn(9);
    for (int64_t i = 0; i < 3000; i++) {
      std::vector<double> logits(9, 2);
      t.silence(logits);
      drawn[size_t(pick(logits, how, i))]++;
    }
    return drawn;
  };
  for (const Sampling& how : {Sampling{},
                              {.temperature = 1e308},
                              {.temperature = 1e308, .top_k = 7},
                              {.temperature = 1e308, .top_p = 0.99}}) {
    const std::vector<int> drawn = counts(holes, how);
    CHECK_EQ(drawn[0] + drawn[3] + drawn[6], 3000, how.temperature);
    CHECK(std::min({drawn[0], drawn[3], drawn[6]}) > 800, how.temperature);
  }
  CHECK(std::ranges::min(counts(numbers, {})) > 0, "without a tokenizer all are tokens");
}

TEST(a_text_may_be_spelled_as_a_byte_is_written) {
  const TemporaryDirectory dir;
  // the text \u00e9 is two bytes, written \u00c3 and \u00a9; the byte e9 is written \u00e9
  dir.write("vocab.json", R"({"\u00c3":0,"\u00a9":1,"\u00c3\u00a9":2,"\u00e9":3})");
  dir.write("merges.txt", "\u00c3 \u00a9\n");
  const Tokenizer t(dir.path, 4);
  CHECK(t.encode("\u00e9\xe9") == (std::vector<int>{2, 3}));
  CHECK(t.decode(2) == "\u00e9" && t.decode(3) == "\xe9");
}

TEST(end_of_text_is_one_token) {
  const TemporaryDirectory dir;
  dir.write("vocab.json", kPairs);
  dir.write("merges.txt", "l o\nlo w\n\u0120 low\n' s\n");
  const Tokenizer t(dir.path, 12);
  const std::string end = "<|endoftext|>";
  CHECK(t.encode(end) == (std::vector<int>{11}) && t.decode(11) == end);
  CHECK(t.encode(end + end + "low") == (std::vector<int>{11, 11, 4}));
  // what stands before it is cut into words as if the text ended there
  CHECK(t.encode("low  " + end + " low") == (std::vector<int>{4, 5, 5, 11, 6}));
  CHECK_SAYS(t.encode("<|endof"), "no token for '<'");
}

TEST(a_tokenizer_json_is_read_like_vocab_and_merges) {
  const TemporaryDirectory dir;
  using nlohmann::json;
  json file = json::parse(
      R"({"added_tokens":[{"id":11,"content":"<|endoftext|>","special":true,"lstrip":false},
                          {"id":12,"content":"<|end","single_word":false}],
          "normalizer":null,
          "pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,"use_regex":true},
          "post_processor":{"type":"ByteLevel"},"decoder":{"type":"ByteLevel"},
          "model":{"type":"BPE","dropout":null,"continuing_subword_prefix":"","fuse_unk":false}})");
  file["model"]["vocab"] = json::parse(kPairs);
  file["model"]["merges"] = {"l o", "lo w", "\u0120 low", "' s"};
  const auto says = [&](const char* place, const json& value, const char* what) {
    json other = file;
    other[json::json_pointer(place)] = value;
    dir.write("tokenizer.json", other.dump());
    CHECK_SAYS(Tokenizer(dir.path, 13), what);
  };
  const auto reads = [&] {
    dir.write("tokenizer.json", file.dump());
    const Tokenizer t(dir.path, 13);
    // of two that fit, the longer one
    CHECK(t.encode("low low's<|endoftext|><|endlow") == (std::vector<int>{4, 6, 10, 11, 12, 4}));
    CHECK(t.end_of_text() == 11 && t.key() != 0 && t.size() == 13);
  };
  reads();
  file["model"]["merges"] =
      json::parse(R"([["l", "o"], ["lo", "w"], ["\u0120", "low"], ["'", "s"]])");
  reads();
  file["model"].erase("type");
  reads();
  // as transformers 5 writes it
  file["post_processor"] = json::parse(R"({"type":"TemplateProcessing","special_tokens":{}})");
  reads();
  says("/model/type", "WordPiece", "is not of GPT-2's encoding");
  says("/pre_tokenizer/type", "Metaspace", "is not of GPT-2's encoding");
  says("/pre_tokenizer", nullptr, "is damaged, or of another kind");
  says("/pre_tokenizer/add_prefix_space", true, "add_prefix_space is true");
  says("/pre_tokenizer/use_regex", false, "use_regex is false");
  says("/normalizer", {{"type", "NFC"}}, "normalizer is {\"type\":\"NFC\"}");
  says("/post_processor/type", "BertProcessing", "post_processor adds something to a text");
  says("/post_processor",
       json::parse(R"({"type":"TemplateProcessing","special_tokens":{"<s>":{"id":"<s>"}}})"),
       "post_processor adds something to a text");
  says("/model/byte_fallback", true, "byte_fallback is true");
  says("/model/ignore_merges", true, "ignore_merges is true");
  says("/model/dropout", 0.1, "dropout is 0.1");
  says("/added_tokens/0/lstrip", true, "lstrip is true");
  says("/added_tokens/0/id", 3, "has two numbers of '<|endoftext|>'");
  says("/model/vocab/lo", 4, "has token 4 twice");
  says("/model/vocab/lo", "3", "is no whole number");
  says("/model/merges/0", "lo", "is no pair");
  says("/model/merges/0", json::array({"l", "o", "w"}), "is no pair");
  says("/model/merges", 7, "must be string");
  dir.write("tokenizer.json", "{}");
  CHECK_SAYS(Tokenizer(dir.path, 13), "is damaged, or of another kind");
}

TEST(vocabularies_that_are_not_what_they_say_are_refused) {
  const TemporaryDirectory dir;
  const auto says = [&](const char* vocab, const char* merges, const char* what) {
    dir.write("vocab.json", vocab);
    dir.write("merges.txt", merges);
    CHECK_SAYS(Tokenizer(dir.path, 3), what);
  };
  says(R"({"a":0,"b":0})", "#version: 0.2\n", "has token 0 twice");
  says(R"({"a":0,"a":1})", "#version: 0.2\n", "the name \"a\" stands twice");
  says(R"({"a":0.0})", "#version: 0.2\n", "0.0 is no whole number");
  says(R"({"a":0,"b":-1})", "#version: 0.2\n", "-1 is no whole number");
  says(R"({"a":true})", "#version: 0.2\n", "true is no whole number");
  says(R"({"a":"0"})", "#version: 0.2\n", "is no whole number");
  says(R"({"a":3})", "#version: 0.2\n", "has token 3, outside the vocabulary of 3");
  says(R"({"a":4294967296})", "#version: 0.2\n", "is no whole number from 0 to");
  says(R"({"":0})", "#version: 0.2\n", "an empty one");
  says(R"({"a b":0})", "#version: 0.2\n", "'a b' is no token of byte-level");
  says(R"({"a":0)", "#version: 0.2\n", "vocab.json or merges.txt is damaged");
  says(R"([1])", "#version: 0.2\n", "vocab.json or merges.txt is damaged");
  says(R"({"a":0,"b":1})", "a b\n", "merges \"a b\", but its vocabulary lacks 'ab'");
  says(R"({"a":0,"ab":1})", "a b\n", "its vocabulary lacks 'b'");
  says(R"({"a":0,"b":1,"ab":2})", "ab\n", "\"ab\" is no pair");
  says(R"({"a":0,"b":1,"ab":2})", "a b c\n", "\"a b c\" is no pair");
  says(R"({"a":0,"aa":1,"aaa":2})", "a a\n", "none of its 1 merges makes its token 'aaa'");
  says("{}", "", "its vocabulary is empty");
  dir.write("vocab.json", R"({"a":0,"<pad>":1,"[PAD]":2})");
  CHECK(Tokenizer(dir.path, 3).encode("aa") == (std::vector<int>{0, 0}));
  nlohmann::json many;
  for (int i = 0; i < 257; i++) many["a" + std::to_string(i)] = i;
  dir.write("vocab.json", many.dump());
  dir.write("merges.txt", "#version: 0.2\rl o\r");
  CHECK_SAYS(Tokenizer(dir.path, 257), "none of its 0 merges makes its token 'a0'");
}

// Token b is the byte b.
static nlohmann::json byte_vocabulary() {
  nlohmann::json vocab;
  for (int b = 0, next = 256; b < 256; b++) {
    const bool printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
    const int c = printable ? b : next++;
    const std::string written =
        c < 128 ? std::string(1, char(c)) : std::string{char(0xc0 | c >> 6), char(0x80 | (c & 63))};
    vocab[written] = b;
  }
  return vocab;
}

TEST(words_are_cut_by_unicodes_properties) {
  const TemporaryDirectory dir;
  dir.write("vocab.json", byte_vocabulary().dump());
  dir.write("merges.txt", "#version: 0.2\n");
  const Tokenizer t(dir.path, 256);
  const auto words = [&](const std::string& text) {
    std::string cut;
    size_t begin = 0;
    t.encode(text, [&](const std::vector<int>& tokens, size_t end) {
      CHECK_EQ(tokens.size(), end - begin);
      cut += (begin ? "|" : "") + text.substr(begin, end - begin);
      begin = end;
    });
    return cut;
  };
  CHECK_EQ(words("a \u202fb"), "a| |\u202f|b");            // white space: narrow no-break,
  CHECK_EQ(words("a \u2007b"), "a| |\u2007|b");            // figure space,
  CHECK_EQ(words("a\u0085\u00a0b"), "a|\u0085|\u00a0|b");  // next line and no-break space;
  CHECK_EQ(words("a \u180eb"), "a| \u180e|b");             // no more since Unicode 6.3
  CHECK_EQ(words("a\u200bb"), "a|\u200b|b");
  CHECK_EQ(words("1\u00bd\u00b2\u0663\u216b"), "1\u00bd\u00b2\u0663\u216b");  // numbers
  CHECK_EQ(words("x\u00b2"), "x|\u00b2");
  CHECK_EQ(words("\u0915\u093e\u0915"), "\u0915|\u093e|\u0915");  // a vowel sign is no letter
  CHECK_EQ(words("\u4e2d\u6587abc \U0001d400"), "\u4e2d\u6587abc| \U0001d400");
  CHECK_EQ(words("we'll don't 'S"), "we|'ll| don|'t| '|S");
  CHECK_EQ(words("a  \n b"), "a|  \n| b");
  CHECK_EQ(words("a  "), "a|  ");
  // as Python's regex cuts them by GPT-2's pattern
  for (const std::string cut : {"it|'s| 2|'s| we|'ve| I|'m| he|'d",
                                "they|'re| you|'ll| '|twas| rock|'|n|'|roll",
                                "'t|is| '|d|'d",
                                "''|s| '|s|'s",
                                "...'|s",
                                "DON|'|T",
                                "don|\u2019|t",
                                "a|'",
                                "x| '|s",
                                "a|\r|\n|b",
                                "a| \r\n\r\n| b",
                                "a|\t|\t|b",
                                "\n\n\n",
                                "a|\v|\f|b",
                                "\x1c|x",
                                "\u00a0| b",
                                "\u3000|\u4e2d",
                                "\u2028|a",
                                "x|=|1|;|y|+=|22",
                                " | if| (|a|)| | {",
                                "3|.|14| 1|,|000",
                                "a| 1|b|2| c|_|d",
                                "-| --| ---",
                                "hello| | world|!!|  ",
                                "e|\u0301|t\u00e9",
                                "\U0001f600| \U0001f600\U0001f600"}) {
    std::string text = cut;
    std::erase(text, '|');
    CHECK_EQ(words(text), cut);
  }
  // damaged UTF-8: a byte is a sign by itself and takes nothing along
  CHECK_EQ(words("a\xc3"), "a|\xc3");
  CHECK_EQ(words("a\xc3"
                 "bc"),
           "a|\xc3|bc");
  CHECK_EQ(words("a\xe2\x80"
                 "b"),
           "a|\xe2\x80|b");
  CHECK_EQ(words("a\xf0\x9f\x98 b"), "a|\xf0\x9f\x98| b");
  CHECK_EQ(words("\xc0\xaf\xed\xa0\x80\xf5"
                 "a"),
           "\xc0\xaf\xed\xa0\x80\xf5|a");
  std::string damaged = contents(project_root() + "/README.md").substr(0, 4000);
  for (size_t i = 0; i < damaged.size(); i += 7) damaged[i] = char(i * 37);
  std::string back;
  for (const int token : t.encode(damaged)) back += t.decode(token);
  CHECK(back == damaged);
}

TEST(merging_takes_time_that_grows_with_the_length) {
  const TemporaryDirectory dir;
  nlohmann::json vocab = {{"a", 0}, {"b", 1}};
  std::string word = "a", merges;
  while (word.size() < 128) {
    merges += word + " " + word + "\n";
    word += word;
    vocab[word] = vocab.size();
  }
  dir.write("vocab.json", vocab.dump());
  dir.write("merges.txt", merges);
  const Tokenizer t(dir.path, 100);
  const auto began = std::chrono::steady_clock::now();
  const std::vector<int> tokens = t.encode(std::string(200'000, 'a'));
  measured(std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count(),
           " s for a word of 200 kB");
  CHECK_EQ(tokens.size(), 1563u);  // the rest of 64 is one
  CHECK(tokens[0] == 8 && tokens.back() == 7 && t.longest() == 128);
  // against the plain rule: the first of the pairs that were learned first, until there is none
  std::string text;
  for (int i = 0; i < 300; i++) text += i * i % 7 % 3 ? 'a' : 'b';
  std::vector<std::string> parts;
  for (const char c : text) parts.emplace_back(1, c);
  for (size_t length = 1; length < 128; length *= 2)
    for (size_t i = 0; i + 1 < parts.size(); i++)
      if (parts[i] == std::string(length, 'a') && parts[i + 1] == parts[i]) {
        parts[i] += parts[i + 1];
        parts.erase(parts.begin() + long(i) + 1);
      }
  std::vector<int> expected;
  for (const std::string& p : parts) expected.push_back(vocab[p]);
  CHECK(t.encode(text) == expected);
}

TEST(texts_become_shards_that_are_made_once) {
  const TemporaryDirectory dir;
  dir.write("v/vocab.json", kPairs);
  dir.write("v/merges.txt", "l o\nlo w\n\u0120 low\n' s\n");
  const Tokenizer t(dir.path + "/v", 12);
  const std::string a = dir.write("a.txt", "low low's\n<|endoftext|>low"),
                    bin = dir.write("b.bin", shard<uint16_t>({1, 2, 3}));
  std::vector<std::string> said;
  const auto say = [&](const std::string& text) { said.push_back(text); };
  const auto shards = token_shards({a, bin}, t, "", say);
  CHECK(shards.size() == 2 && shards[1] == bin && shards[0].starts_with(a + "."));
  CHECK_EQ(contents(shards[0]), shard<uint16_t>({4, 6, 10, 7, 11, 4}));
  CHECK(said.size() == 1 && said[0].find("a.txt is encoded and kept as ") != said[0].npos);
  CHECK(token_shards({a}, t, "", say)[0] == shards[0] && said.size() == 1, "it is there already");
  const Dataset data = Dataset::open(shards, 2, 12);
  CHECK_EQ(data.sequence(0, 0, 1).size(), 3u);
  // texts/* names shards, too, and what is left of one
  const std::string partial = shards[0] + ".partial";
  fs::copy_file(shards[0], partial);
  CHECK(token_shards({a, shards[0], partial}, t, "", say).size() == 1);
  fs::remove(partial);
  const std::string name = dir.write(std::string(240, 'x') + ".txt", "low"),
                    of = token_shards({name}, t, "", say)[0];
  CHECK(token_shards({name, of}, t, "", say).size() == 1, "a long name is cut in its shard's");
  // a shard of another user's is not taken
  if (geteuid() == 0) {
    std::ofstream(shards[0], std::ios::in).seekp(1024) << "\1";
    CHECK_EQ(chown(shards[0].c_str(), 65534, 65534), 0);
    CHECK_EQ(contents(token_shards({a}, t, "", say)[0]), shard<uint16_t>({4, 6, 10, 7, 11, 4}));
    CHECK_EQ(chown(a.c_str(), 65534, 65534), 0);
    CHECK_EQ(chown(shards[0].c_str(), 65534, 65534), 0);
    said.clear();
    token_shards({a}, t, "", say);
    CHECK(said.empty(), "the text's owner may have made it");
  }
  // another text or another vocabulary: another shard
  dir.write("a.txt", "low low\n");
  const auto after = token_shards({a}, t, "", say);
  CHECK(after[0] != shards[0] && contents(after[0]) == shard<uint16_t>({4, 6, 7}));
  std::string swapped = kPairs;
  swapped.replace(swapped.find("\"low\":4"), 7, "\"low\":3")
      .replace(swapped.find("\"lo\":3"), 6, "\"lo\":4");
  dir.write("v/vocab.json", swapped);
  const auto other = token_shards({a}, Tokenizer(dir.path + "/v", 12), "", say);
  CHECK(other[0] != after[0] && contents(other[0]) == shard<uint16_t>({3, 6, 7}));
  for (const auto& file : fs::directory_iterator(dir.path))
    CHECK(file.path().string().find("partial") == std::string::npos, file.path());
  // where nothing can be written beside the text: in the other directory
  fs::remove(after[0]);
  fs::create_directories(dir.path + "/other");
  fs::permissions(dir.path + "/other", fs::perms::all);
  fs::permissions(dir.path, fs::perms(0555));
  const bool root = geteuid() == 0;  // whom rights do not hold
  if (root) CHECK_EQ(seteuid(65534), 0);
  std::vector<std::string> placed;
  const std::string error = error_of([&] {
    for (int twice = 0; twice < 2; twice++)
      placed.push_back(token_shards({a}, t, dir.path + "/other", say)[0]);
  });
  if (root) CHECK_EQ(seteuid(0), 0);
  fs::permissions(dir.path, fs::perms(0755));
  CHECK_EQ(error, "");
  const std::string there = dir.path + "/other/" + fs::path(after[0]).filename().string();
  CHECK(placed == (std::vector<std::string>{there, there}), placed[0]);
}

TEST(a_text_that_changes_while_it_is_encoded_has_no_shard) {
  const TemporaryDirectory dir;
  dir.write("v/vocab.json", kPairs);
  dir.write("v/merges.txt", "l o\nlo w\n\u0120 low\n' s\n");
  const Tokenizer t(dir.path + "/v", 12);
  std::string words;
  while (words.size() < 1 << 22) words += "low low\n";
  const std::string text = dir.write("a.txt", words);
  std::string shard;
  int kept = 0;
  // meanwhile: while the text is encoded, and after its checksum is taken
  const auto encode = [&](const std::function<void()>& meanwhile) {
    const int64_t read = bytes_moved + int64_t(words.size());
    std::atomic<bool> done = false;
    std::thread other([&] {
      while (!done && bytes_moved <= read) usleep(100);
      meanwhile();
    });
    const auto say = [&](const std::string& said) { kept += said.find(" kept as ") != said.npos; };
    const std::string error = error_of([&] { shard = token_shards({text}, t, "", say)[0]; });
    done = true;
    other.join();
    return error;
  };
  CHECK_EQ(encode([] {}), "");
  CHECK(kept == 1 && shard.starts_with(text));
  fs::rename(shard, dir.path + "/other");
  CHECK_EQ(encode([&] { fs::copy_file(dir.path + "/other", shard); }), "");
  CHECK(kept == 1, "another process had it first, and its shard is taken");
  fs::remove(shard);
  CHECK_SAYS(throw Error(encode([&] { std::ofstream(text, std::ios::in) << 'w'; })),
             "a.txt was changed while it was encoded");
  CHECK(!is_there(shard));
}

// test_support encode DIR: the tokens of each text that the standard input has, a line each; a text
// ends with a zero byte (tests/byte_pairs.py)
static int encode_all(const std::string& directory) {
  const Tokenizer tokenizer(directory, 0);
  for (std::string text; std::getline(std::cin, text, '\0');) {
    for (const int token : tokenizer.encode(text)) printf("%d ", token);
    printf("\n");
  }
  return 0;
}

// test_support vocabulary DIR: a tokenizer in both forms, in DIR/two and DIR/one (test_formats.sh)
static int make_vocabulary(const std::string& directory) {
  nlohmann::json vocab = byte_vocabulary();
  const char* merges[] = {"t h", "th e", "\u0120 the"};
  for (const char* made : {"th", "the", "\u0120the", "<|endoftext|>"}) vocab[made] = vocab.size();
  const nlohmann::json end = {{"id", vocab.size() - 1}, {"content", "<|endoftext|>"}};
  const nlohmann::json both = {{"added_tokens", {end}},
                               {"pre_tokenizer",
                                {{"type", "ByteLevel"}, {"add_prefix_space", false}}},
                               {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", merges}}}};
  std::ofstream(directory + "/one/tokenizer.json") << both.dump();
  std::ofstream(directory + "/two/vocab.json") << vocab.dump();
  std::ofstream lines(directory + "/two/merges.txt");
  for (const char* merge : merges) lines << merge << "\n";
  return 0;
}

// test_support weights FROM DIR CHANGE: a file of weights, as others write it (test_formats.sh)
static int rewrite_weights(const std::string& from, const std::string& directory,
                           const std::string& change) {
  std::vector<NamedArray> parts[2];
  const StoredArrays file = open_safetensors(from);
  for (const auto& [name, e] : file) {
    const auto read = [&e = e](void* to) { e.read(0, elements(e.shape), Dtype::f32, to); };
    const auto zeros = [&e = e](void* to) { memset(to, 0, size_t(elements(e.shape)) * 4); };
    const bool wte = name == "wte.weight";
    auto& part = parts[change == "parts" && name < "h.1"];
    if (!wte || change != "head")
      part.push_back({"transformer." + name, e.shape, Dtype::f32, read});
    if (wte && (change == "head" || change == "both"))
      part.push_back({"lm_head.weight", e.shape, Dtype::f32, read});
    if (wte && change == "differs") part.push_back({"lm_head.weight", e.shape, Dtype::f32, zeros});
    if (wte && change == "twice") part.push_back({name, e.shape, Dtype::f32, read});
  }
  if (change != "parts") {
    write_safetensors(directory + "/model.safetensors", parts[0]);
    return 0;
  }
  nlohmann::json map;
  for (int i = 0; i < 2; i++) {
    const std::string name = sentence("model-0000", i + 1, "-of-00002.safetensors");
    write_safetensors(directory + "/" + name, parts[i]);
    for (const NamedArray& a : parts[i]) map[a.name] = name;
  }
  const nlohmann::json index = {{"metadata", {{"total_size", 1}}}, {"weight_map", map}};
  std::ofstream(directory + "/model.safetensors.index.json") << index.dump();
  return 0;
}

int main(int argc, char** argv) {
  const std::vector<std::string> words(argv + 1, argv + argc);
  if (words.size() == 2 && words[0] == "encode") return encode_all(words[1]);
  if (words.size() == 2 && words[0] == "vocabulary") return make_vocabulary(words[1]);
  if (words.size() == 4 && words[0] == "weights")
    return rewrite_weights(words[1], words[2], words[3]);
  return run_tests(argc, argv);
}
