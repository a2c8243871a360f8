// options.h: the command line. A table says once what each option is called, takes, defaults to and
// means; one parser serves any table.
// idea      a row binds a name to a field of a struct; parsing, --help and every error sentence are
//           read off the rows
// adding    an option is one field in Options and one row in the table of options.cpp, and one line
//           in model_config or trainer_options if the model or the trainer reads it; a rule between
//           options is a line in check()
// not here  --name=value, abbreviations, configuration files
// test      tests/test_support.cpp
#pragma once
#include <set>

#include "trainer.h"

// ---- the parser: knows no option

// What an option takes: one of the kinds below, which are bound to a field.
struct Takes {
  std::string allowed;                 // completes "takes ..."
  std::function<std::string()> value;  // what the field holds, with every digit
  // stores a word in the field; false: it is not allowed
  std::function<bool(const std::string& word)> read;
  // words: every following one up to the next option
  enum { nothing, a_word, words } what = a_word;
};
Takes flag(bool* field);
Takes whole(int64_t* field, int64_t low = 1, int64_t high = 1'000'000'000);
Takes real(double* field, bool zero = true);  // finite and never negative; zero: 0 is allowed, too
Takes choice(std::string* field, const std::vector<std::string>& names);
Takes text(std::string* field);
Takes range(Range* field);  // its end is the last one
// instead: what takes other words, too
Takes list(std::vector<std::string>* field, const std::string& instead = "");

struct Option {
  std::string name;  // without the dashes
  // what --help calls the value; empty for a flag, and for a choice, which shows what is allowed
  std::string value;
  Takes takes;
  std::string help;        // one line
  std::string unset = "";  // the default in words; empty: the field's value
};
struct OptionGroup {
  std::string title;
  std::vector<Option> options;
};
using OptionTable = std::vector<OptionGroup>;

// Fills the fields that the table is bound to; an Error names the option and what is allowed.
// Returns which options were given, without the dashes.
std::set<std::string> parse(int argc, const char* const* argv, const OptionTable& table);
// By its word, as "--layers"; an Error where there is none.
const Option& find_option(const OptionTable& table, const std::string& word);
// What each option stands at, by name.
NamedValues values_of(const OptionTable& table);
// The groups with every option and its default. The table must be bound to a struct that nothing
// was parsed into.
std::string help_text(const std::string& usage, const OptionTable& table);

// ---- the options that train_gpt and generate share

// Of a model: --name VALUE, and what Hugging Face's config.json calls it.
struct SizeOption {
  const char *name, *value, *hugging_face;
  int64_t ModelSize::*member;
  int64_t most;
  const char* help;
};
inline constexpr SizeOption kSizes[] = {
    {"layers", "N", "n_layer", &ModelSize::layers, 10'000, "blocks"},
    {"width", "C", "n_embd", &ModelSize::width, 1'000'000, "channels"},
    {"heads", "H", "n_head", &ModelSize::heads, 1'000'000,
     "attention heads; the width divides by them"},
    {"context", "T", "n_positions", &ModelSize::context, 10'000'000, "tokens in a sequence"},
    {"vocab", "V", "vocab_size", &ModelSize::vocab, 1'000'000'000,
     "number of different tokens; bytes of text need 256"}};

// Fields without a default here, and in Options, are unset until they are resolved: 0, empty, or
// negative where 0 has a meaning.
struct CommonOptions {
  std::string model_name;
  ModelSize model;
  std::string checkpoint;  // directory; empty: none
  int64_t seed = 1337;
  std::string dtype, matmul = "cublas", attention = "flash";
  Layout layout;              // the product of its axes is what mpiexec starts
  int64_t device_memory = 0;  // MiB; 0: no cap
  int64_t timeout = 600;      // seconds
  bool recompute = false, sequence_parallel = false;  // in training alone
  bool help = false;
  std::set<std::string> given;  // which of them were
};
OptionGroup model_options(CommonOptions& options);  // --model and what overrides its sizes
// --pp and the like: a row for each axis, or for each that splits no tokens
OptionGroup mesh_options(Layout& layout, bool has_batch);
OptionGroup computing_options(CommonOptions& options);
// sizes that are unset become the named model's
void resolve_common(CommonOptions& options, bool has_gpu);
// the largest named model that is not wider
std::string nearest_model(const ModelSize& size);
std::string to_string(const ModelSize& size);
GptConfig model_config(const CommonOptions& options);
// what cannot work: a sentence. chunks: of a stage
void check_common(const CommonOptions& options, int64_t chunks = 1);

// ---- the options of train_gpt

struct Options : CommonOptions {
  std::string tokenizer;       // directory; empty: the checkpoint's, if it has one
  int64_t end_of_text = -1;    // of the checkpoint's; -1: the tokenizer's
  uint64_t tokenizer_key = 0;  // Tokenizer::key(), or the checkpoint's where none is found; 0: none
  std::vector<std::string> data;  // empty: the project's own sources and docs
  int64_t steps = 0;
  int64_t batch = 0;       // sequences per optimizer step
  int64_t microbatch = 0;  // sequences per micro-batch
  double lr = 0, min_lr = -1;
  int64_t warmup = -1;
  double weight_decay = 0.1, clip = 1.0;

  int64_t zero = 3, prefetch = 1;
  std::string reshard = "yes", schedule = "1f1b";
  int64_t chunks = 0;                // of a stage
  std::string trace;                 // empty: none
  Range traced;                      // steps; the end is the last one
  int64_t save_every = 0, keep = 2;  // 0: at the end only; all
  bool resume = false;
  int64_t resume_step = -1;  // the newest

  int64_t eval_every = 0, sample = 0;  // 0: never, none
  std::string metrics;                 // empty: none
  bool profile = false;
  std::string command;  // the words as they were given
};

OptionTable train_options(Options& options);
// what is unset, from the model, the machine and the other options
void resolve(Options& options, bool has_gpu);
// Options that would do nothing beside the others are refused: "--option why".
struct Rule {
  std::vector<const char*> options;
  bool means_something;
  const char* why;
};
// By these rules and then by train_gpt's, for which an axis of size 0 may have any.
void check_meaning(const Options& options, std::vector<Rule> rules = {});
// the same, and resolved options that contradict each other: a sentence
void check(const Options& options);
TrainerOptions trainer_options(const Options& options);
