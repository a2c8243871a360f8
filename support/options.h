// options.h: the command line. A table says once what each option is called, takes, defaults to and means; one parser serves any table.
// idea      a row binds a name to a field of a struct; parsing, --help and every error sentence are read off the rows
// adding    an option is one field in Options and one row in the table of options.cpp; a rule between options is a line in check()
// not here  --name=value, abbreviations, configuration files
// test      tests/test_support.cpp
#pragma once
#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "support/check.h"

// ---- the parser: knows no option

// What an option takes. read() stores a word in the field, or returns false if it is not allowed; allowed() completes "takes ...".
struct Flag {
  bool* field;
  bool read(const std::string&) const { return *field = true; }
  std::string allowed() const { return "no value"; }
  std::string now() const { return ""; }
};
struct Whole {
  int64_t* field;
  int64_t low = 1, high = 1'000'000'000;
  bool read(const std::string& word) const;
  std::string allowed() const { return sentence("a whole number from ", low, " to ", high); }
  std::string now() const { return sentence(*field); }
};
struct Real {  // finite and never negative
  double* field;
  bool zero = true;  // 0 is allowed, too
  bool read(const std::string& word) const;
  std::string allowed() const { return zero ? "a number of at least 0" : "a number above 0"; }
  std::string now() const { return sentence(*field); }
};
struct Choice {
  std::string* field;
  std::vector<std::string> names;
  bool read(const std::string& word) const;
  std::string allowed() const;
  std::string now() const { return *field; }
};
struct Text {
  std::string* field;
  bool read(const std::string& word) const { return !(*field = word).empty(); }
  std::string allowed() const { return "a name"; }
  std::string now() const { return *field; }
};
struct List {  // every following word up to the next option
  std::vector<std::string>* field;
  std::string others = "";  // where words go that are not allowed
  bool read(const std::string& word) const { return field->push_back(word), !word.empty(); }
  std::string allowed() const { return "one or more words, none of them empty" + others; }
  std::string now() const { return ""; }
};

struct Option {
  std::string name;    // without the dashes
  std::string value;   // what --help calls the value; empty for a flag, and for a choice, whose names are shown
  std::variant<Flag, Whole, Real, Choice, Text, List> takes;
  std::string help;    // one line
  std::string unset;   // the default in words; empty: the field's value
};
struct OptionGroup {
  std::string title;
  std::vector<Option> options;
};
using OptionTable = std::vector<OptionGroup>;

// Fills the fields that the table is bound to; an Error names the option and what is allowed.
void parse(int argc, const char* const* argv, const OptionTable& table);
// The groups with every option and its default. The table must be bound to a struct that nothing was parsed into.
std::string help_text(const std::string& usage, const OptionTable& table);

// ---- models by name

struct ModelSize { int64_t layers = 0, width = 0, heads = 0, context = 0, vocab = 0; };
OptionGroup model_options(std::string& name, ModelSize& model);        // --model and what overrides its sizes
void resolve_model(const std::string& name, ModelSize& model);         // sizes that are 0 become the named model's
void check_model(const ModelSize& model, const std::string& attention);  // sizes that cannot work: a sentence

// ---- the options of train_gpt

// Fields without a default here are unset until resolve(): 0, empty, or negative where 0 has a meaning.
struct Options {
  std::string model_name = "tiny";
  ModelSize model;
  std::vector<std::string> data;  // empty: the project's own sources and docs

  int64_t steps = 0;
  int64_t batch = 0;       // sequences per optimizer step
  int64_t microbatch = 0;  // sequences per micro-batch
  double lr = 0, min_lr = -1;
  int64_t warmup = -1;
  double weight_decay = 0.1, clip = 1.0;
  int64_t seed = 1337;

  std::string dtype;
  std::string matmul = "cublas", attention = "flash";
  bool recompute = false;

  int64_t pp = 1, replicate = 1, fsdp = 1, tp = 1;  // ranks of the axes; their product is what mpiexec starts
  int64_t zero = 0, prefetch = -1;                  // unset where they mean nothing: without shards; without shards and copies
  std::string reshard;                              // unset below ZeRO-3
  bool sequence_parallel = false;
  std::string schedule;             // empty: 1f1b
  int64_t chunks = 0;               // of a stage
  std::string trace;                // empty: none
  int64_t timeout = 600;            // seconds
  int64_t device_memory = 0;  // MiB; 0: no cap
  std::string checkpoint;     // directory; empty: nothing is saved
  int64_t save_every = 0, keep = -1;  // 0: at the end only; all
  bool resume = false;

  int64_t eval_every = 0, sample = 0;  // 0: never, none
  std::string metrics;                 // empty: none
  bool help = false;
  std::string command;  // the words as they were given
};

Options parse_options(int argc, const char* const* argv);
void print_help();
void resolve(Options& options, bool has_gpu);  // what is unset, from the model, the machine and the other options
void check(const Options& options);            // resolved options that contradict each other: a sentence
