// options.cpp: what train_gpt and generate share, the table of train_gpt's options, then the parser
// that serves any table.
// test      tests/test_support.cpp
#include "launch/options.h"

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "support/data.h"

// ---- models by name, and the options that train_gpt and generate share

namespace {

// The sizes of GPT-2 are those of Radford et al., 2019. Batches are modest: without --microbatch, a
// batch is one micro-batch.
struct Preset {
  const char* name;
  ModelSize size;
  int64_t steps, batch;
  double lr;
};
const Preset kPresets[] = {
    {"tiny", {4, 128, 4, 128, 256}, 300, 16, 1e-3},
    {"char", {6, 384, 6, 256, 256}, 2000, 64, 1e-3},
    {"gpt2", {12, 768, 12, 1024, 50257}, 1000, 16, 3e-4},
    {"gpt2-medium", {24, 1024, 16, 1024, 50257}, 1000, 8, 3e-4},
    {"gpt2-large", {36, 1280, 20, 1024, 50257}, 1000, 8, 2e-4},
    {"gpt2-xl", {48, 1600, 25, 1024, 50257}, 1000, 4, 2e-4},
};

}  // namespace

static const Preset& preset_of(const std::string& name) {
  return row_named(kPresets, "model", name);
}

OptionGroup model_options(CommonOptions& o) {
  OptionGroup group{"Model",
                    {{"model", "", choice(&o.model_name, names_of(kPresets)), "size of the model",
                      kPresets[0].name}}};
  for (const SizeOption& s : kSizes)
    group.options.push_back(
        {s.name, s.value, whole(&(o.model.*s.member), 1, s.most), s.help, "the model's"});
  return group;
}

OptionGroup mesh_options(Layout& layout, bool has_batch) {
  OptionGroup group{"Mesh: mpiexec -n N, N being the product of these", {}};
  for (size_t a = 0; a < kAxes.size(); a++) {
    const AxisKind& axis = kAxes[a];
    if ((axis.splits_batch || axis.splits_sequence) && !has_batch) continue;
    group.options.push_back({axis.name, "N", whole(&layout.sizes[a], 1, 50'000), axis.help});
  }
  return group;
}

OptionGroup computing_options(CommonOptions& o) {
  return {
      "Computing",
      {
          {"dtype", "", choice(&o.dtype, {"f32", "bf16", "f64"}),
           "what is computed in; f64 is for proofs", "bf16 on a GPU, else f32"},
          {"matmul", "", choice(&o.matmul, {"cublas", "own"}),
           "who multiplies matrices: cuBLAS or the kernels of this project"},
          {"attention", "", choice(&o.attention, {"plain", "flash"}),
           "plain: whole matrices of scores; flash: tiles of them with an online softmax, which is "
           "more exact in bf16 (build/generate: for prompts alone)"},
          {"seed", "N", whole(&o.seed, 0, INT64_MAX),
           "decides what is random: initial weights, batches, samples"},
          {"device-memory", "MiB", whole(&o.device_memory),
           "stop when more device memory than this is asked for", "no cap"},
          {"timeout", "SECONDS", whole(&o.timeout, 1),
           "without progress for so long, say where each rank stands and end"},
          {"help", "", flag(&o.help), "print this"},
      }};
}

void resolve_common(CommonOptions& o, bool has_gpu) {
  if (o.model_name.empty()) o.model_name = kPresets[0].name;
  for (const SizeOption& s : kSizes)
    if (o.model.*s.member == 0) o.model.*s.member = preset_of(o.model_name).size.*s.member;
  if (o.dtype.empty()) o.dtype = has_gpu ? "bf16" : "f32";
}

std::string nearest_model(const ModelSize& size) {
  std::string name;
  for (const Preset& p : kPresets)
    if (name.empty() || p.size.width <= size.width) name = p.name;
  return name;
}

std::string to_string(const ModelSize& m) {
  return sentence(m.layers, " layers, width ", m.width, ", ", m.heads, " heads, context ",
                  m.context, ", vocabulary ", m.vocab);
}

GptConfig model_config(const CommonOptions& o) {
  GptConfig config{o.model};
  config.dtype = o.dtype == "f64" ? Dtype::f64 : o.dtype == "bf16" ? Dtype::bf16 : Dtype::f32;
  config.attention = o.attention == "flash" ? AttentionKind::flash : AttentionKind::plain;
  config.recompute = o.recompute;
  config.sequence_parallel = o.sequence_parallel;
  return config;
}

void check_common(const CommonOptions& o, int64_t chunks) {
  const ModelSize& m = o.model;
  const int64_t tp = o.layout["tp"], pp = o.layout["pp"];
  REQUIRE(m.width % m.heads == 0, "a width of ", m.width, " does not divide by ", m.heads,
          " heads: change --width or --heads");
  REQUIRE(o.attention != "flash" || m.width / m.heads <= 128,
          "--attention flash takes heads of at most 128 channels, and a width of ", m.width,
          " with ", m.heads, " heads makes them ", m.width / m.heads,
          " wide: give --attention plain", o.checkpoint.empty() ? " or more --heads" : "");
  REQUIRE(tp <= std::min(m.heads, m.vocab), "--tp ", tp,
          " has more ranks than there are attention heads (", m.heads,
          ") or tokens in the vocabulary (", m.vocab, ") for them to share");
  REQUIRE(pp * chunks <= m.layers, m.layers, " layers cannot be cut into ", pp,
          " stages: each needs at least ", chunks, chunks > 1 ? ", one a chunk" : "");
}

// ---- train_gpt: options, defaults, contradictions

OptionTable train_options(Options& o) {
  const Preset& tiny = kPresets[0];
  const auto by_model = [&](double value) {
    return sentence("by model, ", tiny.name, ": ", value);
  };
  return {
      model_options(o),
      {"Data",
       {
           {"data", "FILE...", list(&o.data),
            "plain text or llm.c's .bin token shards; the last tenth of all is held out",
            "this project's sources"},
           {"tokenizer", "DIR", text(&o.tokenizer),
            "what encodes texts: tokenizer.json, or vocab.json and merges.txt, of byte pairs",
            "the checkpoint's; without one bytes are tokens"},
       }},
      {"Training",
       {
           {"steps", "N", whole(&o.steps),
            "optimizer steps, each on sequences from random places of the data",
            by_model(tiny.steps)},
           {"batch", "B", whole(&o.batch), "sequences per optimizer step, over all ranks",
            by_model(tiny.batch)},
           {"microbatch", "B", whole(&o.microbatch, 1, 100'000'000),
            "sequences per micro-batch of a rank",
            "all of the rank's; with pp at most 1/(2P) of them"},
           {"lr", "X", real(&o.lr, false), "highest learning rate", by_model(tiny.lr)},
           {"min-lr", "X", real(&o.min_lr), "learning rate at the end", "a tenth of --lr"},
           {"warmup", "N", whole(&o.warmup, 0), "steps until the learning rate is at its highest",
            "5% of --steps, rounded down, at most 100"},
           {"weight-decay", "X", real(&o.weight_decay),
            "AdamW's weight decay, times the learning rate: of all but gains and biases"},
           {"clip", "X", real(&o.clip), "largest norm of the gradient; 0: no limit"},
           {"recompute", "", flag(&o.recompute),
            "keep only the input of each block and run its forward again in the backward"},
       }},
      computing_options(o),
      mesh_options(o.layout, true),
      {"Strategies: what the ranks of an axis share",
       {
           {"zero", "STAGE", whole(&o.zero, 1, 3),
            "what fsdp and cp shard: 1: optimizer state, 2: gradients, too, 3: and parameters"},
           {"reshard-after-forward", "", choice(&o.reshard, {"yes", "no"}),
            "ZeRO-3: free whole parameters after the forward, and gather them again"},
           {"prefetch", "K", whole(&o.prefetch, 0, 1000),
            "layers gathered ahead while others compute; above 0 gradients are summed meanwhile"},
           {"sequence-parallel", "", flag(&o.sequence_parallel),
            "with tp: activations between the split layers are split by tokens, too"},
           {"schedule", "", choice(&o.schedule, schedule_names()),
            "with pp: in which order a stage computes its micro-batches"},
           {"chunks", "N", whole(&o.chunks, 1, 1000),
            "with interleaved: pieces of the model that a stage has", "2"},
       }},
      {"Checkpoints",
       {
           {"checkpoint", "DIR", text(&o.checkpoint),
            "save weights and optimizer state here at the end, and when a signal ends the run",
            "none"},
           {"save-every", "K", whole(&o.save_every, 0),
            "save every K steps, too; 0: at the end alone"},
           {"keep", "N", whole(&o.keep, 0),
            "remove all but the newest N checkpoints of those saved with an N above 0; 0: remove "
            "none"},
           {"resume", "", flag(&o.resume),
            "go on from the newest complete checkpoint, in this or any other layout"},
           {"resume-step", "N", whole(&o.resume_step, 0),
            "with --resume: from that of step N; later ones are renamed to later-step-...",
            "the newest"},
       }},
      {"Reports",
       {
           {"eval-every", "K", whole(&o.eval_every, 0),
            "report the loss on sequences spread over the held-out tenth every K steps, and with "
            "--resume before the first; 0: never"},
           {"sample", "K", whole(&o.sample, 0),
            "print K tokens that the trained model continues with"},
           {"metrics", "FILE.jsonl", text(&o.metrics),
            "write one JSON object per step to this file, of that step alone; an earlier run's is "
            "renamed to FILE.jsonl.1",
            "none"},
           {"profile", "", flag(&o.profile),
            "print where a step's time goes: each kernel and collective, beside what the machine "
            "can do"},
           {"trace", "FILE.json", text(&o.trace),
            "write what every rank computes, sends and holds in a step, in Chrome's trace format",
            "none"},
           {"trace-steps", "A-B", range(&o.traced), "with --trace: which steps", "the last one"},
       }},
  };
}

void resolve(Options& o, bool has_gpu) {
  resolve_common(o, has_gpu);
  const Preset& preset = preset_of(o.model_name);
  if (o.steps == 0) o.steps = preset.steps;
  const int64_t ranks = o.layout.data_ranks(), pp = o.layout["pp"];
  const ScheduleRow& schedule = schedule_row(o.schedule);
  if (o.chunks == 0) o.chunks = pp > 1 ? schedule.chunks() : 1;
  // a pipeline wants several micro-batches
  const int64_t parts = ranks * (pp > 1 ? 2 * pp : 1);
  if (o.batch == 0) o.batch = round_up(preset.batch, parts);
  // the largest that divides the batch, into a number of micro-batches that the schedule takes
  if (o.microbatch == 0) {
    const int64_t each = ranks * schedule.divisor(pp), n = o.batch % each ? 1 : o.batch / each;
    o.microbatch = 1;
    for (int64_t d = 1; d * d <= n; d++)
      for (const int64_t b : {d, n / d})  // which divide n, if one does
        if (n % d == 0 && b <= o.batch / parts) o.microbatch = std::max(o.microbatch, b);
  }
  if (ranks * o.layout["cp"] == 1) o.prefetch = 0;
  if (o.lr == 0) o.lr = preset.lr;
  if (o.min_lr < 0) o.min_lr = o.lr / 10;
  if (o.traced.begin == 0) o.traced = {o.steps, o.steps};
  if (o.warmup < 0) o.warmup = std::min<int64_t>(o.steps / 20, 100);
}

TrainerOptions trainer_options(const Options& o) {
  return {.batch = o.batch,
          .microbatch = o.microbatch,
          .seed = uint64_t(o.seed),
          .clip = o.clip,
          .weight_decay = o.weight_decay,
          .fsdp = {.zero = int(o.zero), .reshard = o.reshard == "yes", .prefetch = int(o.prefetch)},
          .schedule = o.schedule,
          .chunks = int(o.chunks)};
}

// A report overwrites nothing that is read, and no other report.
static void check_reports(const Options& o) {
  namespace fs = std::filesystem;
  std::error_code none;  // what is not there is no other file
  for (const std::string& data : o.data.empty() ? project_files(project_root()) : o.data)
    for (const auto& [option, file] : {std::pair{"--metrics ", o.metrics}, {"--trace ", o.trace}})
      REQUIRE(!fs::equivalent(file, data, none), option, file,
              " would overwrite a file of the training data: give another name");
  REQUIRE(o.metrics.empty() || o.trace.empty() ||
              fs::weakly_canonical(o.metrics, none) != fs::weakly_canonical(o.trace, none),
          "--metrics and --trace name the same file, ", o.trace);
}

void check_meaning(const Options& o, std::vector<Rule> rules) {
  const int64_t shards = o.layout["fsdp"] * o.layout["cp"];
  rules.insert(
      rules.end(),
      {{{"zero"},
        shards != 1,
        "shards over the ranks of --fsdp and --cp, which are 1: give --fsdp or --cp 2 or more"},
       {{"reshard-after-forward"},
        shards != 1 && o.zero == 3,
        "is about the parameters that ZeRO-3 gathers: give --fsdp or --cp 2 or more and --zero 3"},
       {{"prefetch"},
        shards * o.layout["replicate"] != 1,
        "is about what ranks gather and sum: give --fsdp, --cp or --replicate 2 or more"},
       {{"sequence-parallel"},
        o.layout["tp"] != 1,
        "splits activations over the ranks of --tp, which is 1: give --tp 2 or more"},
       {{"schedule", "chunks"}, o.layout["pp"] != 1, "is about a pipeline: give --pp 2 or more"},
       {{"trace-steps"}, !o.trace.empty(), "says which steps are traced: give --trace FILE.json"},
       {{"save-every", "keep", "resume"},
        !o.checkpoint.empty(),
        "needs a directory: give --checkpoint DIR"},
       {{"resume-step"}, o.resume, "says where --resume goes on: give both"}});
  for (const auto& rule : rules)
    for (const char* option : rule.options)
      REQUIRE(rule.means_something || !o.given.count(option), "--", option, " ", rule.why);
}

void check(const Options& o) {
  const int64_t pp = o.layout["pp"], cp = o.layout["cp"], ranks = o.layout.data_ranks();
  if (pp > 1) make_schedule(o.schedule, 1, 1, o.chunks);  // or it has other chunks
  check_common(o, pp > 1 ? o.chunks : 1);
  REQUIRE(o.batch % ranks == 0, "a batch of ", o.batch, " does not divide by the ", ranks,
          " data-parallel ranks: give --batch ",
          round_up(o.batch, o.microbatch * ranks * schedule_row(o.schedule).divisor(pp)));
  REQUIRE(o.batch % (o.microbatch * ranks) == 0, "a batch of ", o.batch,
          " does not divide into micro-batches of ", o.microbatch, " on ", ranks,
          " data-parallel ranks: change --batch or --microbatch");
  REQUIRE(cp == 1 || o.model.context >= 2 * cp, "--cp ", cp, " cuts a sequence into ", 2 * cp,
          " pieces, and a context of ", o.model.context, " has fewer tokens: give --context ",
          2 * cp, " or more");
  check_meaning(o);
  REQUIRE(o.min_lr <= o.lr, "--min-lr ", o.min_lr, " is above --lr ", o.lr);
  REQUIRE(o.warmup <= o.steps, "--warmup ", o.warmup, " is longer than the training of ", o.steps,
          " steps");
  REQUIRE(o.traced.end <= o.steps, "--trace-steps: step ", o.traced.end, " is after the last one, ",
          o.steps);
  check_reports(o);
}

// ---- the parser

template <class Number> static bool read_all(const std::string& word, Number& field) {
  const char* end = word.data() + word.size();
  const auto [stop, error] = std::from_chars(word.data(), end, field);
  return error == std::errc() && stop == end;
}

template <class Field> static std::function<std::string()> value_of(const Field* field) {
  return [=] { return sentence(*field); };
}

Takes flag(bool* field) {
  return {"", [=] { return *field ? "given" : "not given"; },
          [=](const auto&) { return *field = true; }, Takes::nothing};
}

Takes whole(int64_t* field, int64_t low, int64_t high) {
  return {sentence("a whole number from ", low, " to ", high), value_of(field),
          [=](const auto& word) {
            return read_all(word, *field) && low <= *field && *field <= high;
          }};
}

Takes real(double* field, bool zero) {
  return {zero ? "a number of at least 0" : "a number above 0", value_of(field),
          [=](const auto& word) {
            return read_all(word, *field) && std::isfinite(*field) &&
                   (*field > 0 || (zero && *field == 0));
          }};
}

Takes choice(std::string* field, const std::vector<std::string>& of) {
  return {join(of, "|"), value_of(field),
          [=](const auto& word) { return std::ranges::find(of, *field = word) != of.end(); }};
}

Takes text(std::string* field) {
  return {"a name", value_of(field), [=](const auto& word) { return !(*field = word).empty(); }};
}

Takes range(Range* field) {
  return {"a number from 1 on, or two in order as in 5-8",
          [=] { return sentence(field->begin, "-", field->end); },
          [=](const auto& word) {
            const size_t dash = word.find('-');  // none: one number, and npos + 1 is 0
            return read_all(word.substr(0, dash), field->begin) &&
                   read_all(word.substr(dash + 1), field->end) && 1 <= field->begin &&
                   field->begin <= field->end;
          }};
}

Takes list(std::vector<std::string>* field, const std::string& instead) {
  return {"one or more words, none of them empty or beginning with --" + instead,
          [=] { return join(*field, " "); },
          [=](const auto& word) {
            field->push_back(word);
            return !word.empty();
          },
          Takes::words};
}

const Option& find_option(const OptionTable& table, const std::string& word) {
  REQUIRE(word.starts_with('-'), "'", word,
          "' belongs to no option: options begin with --, and --help lists them");
  const std::string name = word.substr(std::min(word.find_first_not_of('-'), word.size())),
                    left = name.substr(0, name.find('='));
  std::string nearest;
  ptrdiff_t alike = 1;  // letters that both begin with
  for (const OptionGroup& group : table)
    for (const Option& option : group.options) {
      const std::string& other = option.name;
      if (word == "--" + other) return option;
      const ptrdiff_t same = std::ranges::mismatch(left, other).in1 - left.begin();
      if (same <= alike) continue;
      alike = same;
      nearest =
          ": did you mean --" + other + (left == name ? "?" : ", with a space before the value?");
    }
  throw Error(sentence("there is no option ", word, nearest, " (--help lists all options)"));
}

std::set<std::string> parse(int argc, const char* const* argv, const OptionTable& table) {
  std::set<std::string> seen;
  for (int i = 1; i < argc;) {
    const std::string name = argv[i++];
    const Option& option = find_option(table, name == "-h" ? "--help" : name);
    REQUIRE(seen.insert(option.name).second, "--", option.name, " is given twice");
    const Takes& takes = option.takes;
    const bool flag = takes.what == Takes::nothing;
    const auto follows = [&] { return i < argc && !std::string(argv[i]).starts_with("--"); };
    REQUIRE(flag || follows(), "--", option.name, " needs a value: ", takes.allowed);
    do {
      const std::string word = flag ? "" : argv[i++];
      REQUIRE(takes.read(word), "--", option.name, " takes ", takes.allowed, ", not '", word, "'");
    } while (takes.what == Takes::words && follows());
  }
  return seen;
}

NamedValues values_of(const OptionTable& table) {
  NamedValues values;
  for (const OptionGroup& group : table)
    for (const Option& option : group.options)
      values.emplace_back("--" + option.name, option.takes.value());
  return values;
}

std::string help_text(const std::string& usage, const OptionTable& table) {
  constexpr size_t kColumn = 27;
  std::string text = usage + "\n";
  for (const OptionGroup& group : table) {
    text += "\n" + group.title + "\n";
    for (const Option& option : group.options) {
      const Takes& takes = option.takes;
      const bool flag = takes.what == Takes::nothing;
      const std::string value = option.value.empty() ? takes.allowed : option.value,
                        unset = !option.unset.empty() || flag ? option.unset : takes.value();
      std::string left = "  --" + option.name + (flag ? "" : " " + value);
      if (left.size() + 2 > kColumn) left += "\n" + std::string(kColumn, ' ');
      else left.resize(kColumn, ' ');
      text += left + option.help + (unset.empty() ? "" : " [" + unset + "]") + "\n";
    }
  }
  return text;
}
