// tool.cpp: shows, checks, exports and imports checkpoints: build/checkpoint
// info|verify|export|import. See checkpoint/checkpoint.h.
// idea      one process, no mesh: a checkpoint's pieces are read as if by a rank that owns
//           everything
// test      tests/test_checkpoint.sh; tests/huggingface.py opens what `export` writes
#include <algorithm>
#include <cmath>
#include <csignal>
#include <filesystem>

#include "checkpoint/checkpoint.h"
#include "inference/tokenizer.h"
#include "launch/options.h"
#include "support/json.h"

namespace fs = std::filesystem;
using nlohmann::json;

static const char kUsage[] =
    "usage: build/checkpoint info PATH          what is in it: PATH is a directory given to\n"
    "                                           --checkpoint, or one step in it\n"
    "       build/checkpoint verify PATH        read every file of every step and compare with\n"
    "                                           the manifests\n"
    "       build/checkpoint export PATH DIR    write DIR/model.safetensors and config.json,\n"
    "                                           which Hugging Face's GPT-2 opens; DIR is\n"
    "                                           new, empty, or of an earlier export of a\n"
    "                                           model with the same config.json\n"
    "       build/checkpoint import DIR PATH    the other way round: a checkpoint at step 0 that\n"
    "                                           --resume and build/generate take; DIR holds\n"
    "                                           model.safetensors (or its parts and\n"
    "                                           model.safetensors.index.json) and config.json,\n"
    "                                           perhaps tokenizer.json, or vocab.json and\n"
    "                                           merges.txt\n";

// An Error where its files are others than they were; says so where they are gone.
static Tokenizer tokenizer_of(const std::string& path, const Checkpoint& c) {
  const Tokenizer now(home_of(path, has_tokenizer), c.info.model.vocab, false, c.info.end_of_text);
  c.check_tokenizer(now.key());
  if (c.info.tokenizer && now.key() == 0)
    puts(printable(c.path + " was saved with a tokenizer, whose files are gone").c_str());
  return now;
}

// ---- info, verify

static void describe(const Checkpoint& c) { puts(printable(c.describe()).c_str()); }

static void check(const Checkpoint& c) {
  c.verify();
  if (c.info.tokenizer) tokenizer_of(c.path, c);
  const std::string text =
      sentence(c.path, ": whole, ", c.files.size(), " files, ", c.tensors.size(), " tensors");
  puts(printable(text).c_str());
}

// Does `work` with each step, and says what is wrong with those that are not whole: status 1.
static int each_step(const std::string& path, void (*work)(const Checkpoint&)) {
  at_work = "the checkpoints in " + path;
  int status = 0;
  std::vector<std::string> steps = checkpoints_in(path, [&](auto&, auto& why) {
    puts(printable(why).c_str());
    status = 1;
  });
  if (steps.empty()) steps = {newest_path(path)};
  for (const std::string& step : steps) try {
      work(Checkpoint(step));
    } catch (const std::exception& e) {
      puts(printable(words_of(e)).c_str());
      status = 1;
    }
  return status;
}

// ---- Hugging Face

// What a configuration may say beside the sizes.
static const json kThisModel = json::parse(R"({
  "model_type": "gpt2",
  "activation_function": "gelu_new",
  "layer_norm_epsilon": 1e-5,
  "tie_word_embeddings": true,
  "scale_attn_weights": true,
  "scale_attn_by_inverse_layer_idx": false,
  "add_cross_attention": false})");

// Of tokens that are bytes, where the vocabulary does not say so.
constexpr const char *kTokens = "tokens", *kBytes = "bytes";

// end: the token that ends a text; -1: none
static json config_of(const CheckpointInfo& info, int end) {
  const ModelSize& m = info.model;
  json config = kThisModel;
  config["architectures"] = {"GPT2LMHeadModel"};
  config["torch_dtype"] = "float32";
  for (const char* key : {"attn_pdrop", "embd_pdrop", "resid_pdrop"}) config[key] = 0;  // dropout
  for (const SizeOption& s : kSizes) config[s.hugging_face] = m.*s.member;
  config["n_ctx"] = m.context;
  for (const char* key : {"bos_token_id", "eos_token_id"})
    config[key] = end < 0 ? json() : json(end);
  if (info.bytes) config[kTokens] = kBytes;
  return config;
}

static void export_weights(const std::string& path, const std::string& dir) {
  at_work = "the export of " + path;
  const Checkpoint c(newest_path(path));
  c.verify("weights-");
  c.open_weights();  // from here on a run that saves may remove it
  std::vector<NamedArray> arrays;
  for (const auto& [name, shape] : c.tensors) {
    const Piece whole = whole_tensor(name, shape);
    arrays.push_back({name, shape, Dtype::f32,
                      [&c, whole](void* to) { c.read(whole, Part::weights, Dtype::f32, to); }});
  }
  const Tokenizer tokenizer = tokenizer_of(path, c);
  int end = tokenizer.end_of_text();
  // without a tokenizer, numbers of GPT-2's are what so large a vocabulary holds
  if (end < 0 && tokenizer.key() == 0 && !c.info.bytes && c.info.model.vocab >= 50257) end = 50256;
  const std::string weights = dir + "/model.safetensors", config = dir + "/config.json",
                    text = config_of(c.info, end).dump(2) + "\n";
  make_directory(dir);
  // An earlier export has this very text in it, and one that was killed at first only part of it.
  const bool is_new = std::ranges::all_of(names_in(dir), [](const std::string& name) {
    return name == "config.json.partial";
  });
  REQUIRE(is_new || (is_there(config) && read_file(config) == text), dir,
          " has other files than those of an export of such a model: give another directory");
  write_file(config, text);
  const WrittenFile w = write_safetensors(weights, arrays);
  copy_tokenizer(home_of(path, has_tokenizer), dir);
  sync_directory(dir);
  const std::string said = sentence(weights, ": ", arrays.size(), " tensors, ",
                                    format("%.1f", w.bytes / 1e6), " MB, from ", c.path);
  puts(printable(said).c_str());
}

static CheckpointInfo read_config(const std::string& path) {
  CheckpointInfo info;
  ModelSize& m = info.model;
  read_json(path, read_file(path), [&](json config) {
    const json& kind = config["model_type"];
    REQUIRE(kind.is_null() || kind == "gpt2", "its model_type is ", kind,
            ", and this model is gpt2");
    for (const SizeOption& s : kSizes) {
      m.*s.member = whole_number(config.at(s.hugging_face), s.most);
      REQUIRE(m.*s.member > 0, s.hugging_face, " is 0");
    }
    REQUIRE(m.width % m.heads == 0, "n_embd ", m.width, " does not divide by n_head ", m.heads);
    json& gelu = config["activation_function"];
    if (gelu == "gelu_pytorch_tanh") gelu = "gelu_new";  // the same
    json expected = kThisModel;
    expected["n_inner"] = 4 * m.width;
    for (const auto& [key, value] : expected.items())
      REQUIRE(config[key].is_null() || config[key] == value, key, " is ", config[key],
              "; this model has ", value);
    info.bytes = config[kTokens] == kBytes;
    const json& end = config["eos_token_id"];
    REQUIRE(end.is_null() || end.is_number_unsigned(), "eos_token_id is ", end,
            "; a text of this model ends with one token, or none");
    // a small model often keeps GPT-2's, 50256, which its vocabulary does not have
    if (!end.is_null() && end.get<uint64_t>() < uint64_t(m.vocab)) info.end_of_text = end;
  });
  return info;
}

// The weights in `dir`: of one file, or of the parts that an index names.
static StoredArrays read_weights(const std::string& dir) {
  const std::string whole = dir + "/model.safetensors", index = whole + ".index.json";
  std::set<std::string> parts = {"model.safetensors"};
  if (!is_there(whole) && is_there(index))
    read_json(index, read_file(index), [&](const json& file) {
      parts.clear();
      for (const auto& [tensor, part] : file.at("weight_map").items()) parts.insert(part);
      REQUIRE(!parts.empty(), "its weight_map names no file");
    });
  else
    REQUIRE(is_there(whole), dir,
            " has no model.safetensors: where it has weights of another "
            "kind, transformers' save_pretrained makes it");
  StoredArrays all;
  for (const fs::path part : parts) {
    REQUIRE(part == part.filename(), index, " names a file of another directory, ", part);
    for (const auto& [name, array] : open_safetensors(fs::path(dir) / part)) {
      const std::string short_name = name.substr(name.starts_with("transformer.") ? 12 : 0);
      REQUIRE(all.insert({short_name, array}).second, array.path, " has ", name,
              ", which is there already");
    }
  }
  return all;
}

static void import_weights(const std::string& dir, const std::string& path) {
  at_work = "the import of " + dir;
  const auto check_empty = [&] {
    REQUIRE(checkpoints_in(path).empty(), path,
            " holds checkpoints already: give another directory");
  };
  check_empty();
  CheckpointInfo info = read_config(dir + "/config.json");
  info.data = "imported from " + dir;
  const Tokenizer readable(dir, info.model.vocab);  // or an Error, before anything is written
  info.tokenizer = readable.key();
  info.bytes &= info.tokenizer == 0;
  StoredArrays all = read_weights(dir);
  // one matrix, tied: under both names, or one of them
  if (const auto head = all.extract("lm_head.weight"); !head.empty()) {
    const StoredArray& mine = head.mapped();
    const auto [wte, is_alone] = all.insert({"wte.weight", mine});
    REQUIRE(is_alone || wte->second.bytes() == mine.bytes(), mine.path,
            ": lm_head.weight is not wte.weight; the head of this model is its embedding");
  }
  Gpt gpt(GptConfig{info.model});  // names and shapes only
  std::vector<NamedArray> arrays;
  for (const Param* p : gpt.params()) {
    const auto found = all.extract(p->name);
    REQUIRE(!found.empty(), dir, " has no tensor ", p->name);
    const StoredArray& from = found.mapped();
    const Shape shape = file_shape(*p);
    REQUIRE(from.shape == shape, from.path, ": ", p->name, " is of shape ", to_string(from.shape),
            "; by config.json it should be ", to_string(shape));
    arrays.push_back(
        {p->name, shape, Dtype::f32, [from](void* to) {
           const int64_t n = elements(from.shape);
           from.read(0, n, Dtype::f32, to);
           const std::span numbers(static_cast<const float*>(to), n);
           REQUIRE(std::ranges::all_of(numbers, [](float x) { return std::isfinite(x); }),
                   from.path, " has weights that are not finite");
         }});
  }
  for (const auto& [name, left] : all)  // causal masks may be there, too
    REQUIRE(name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias"), left.path,
            ": the model of config.json has no ", name);
  make_directory(path);
  const DirectoryLock lock(path);
  check_empty();  // another import may have been here
  copy_tokenizer(dir, path);
  write_whole_checkpoint(path, info, arrays,
                         [](const std::string& text) { puts(printable(text).c_str()); });
  describe(Checkpoint(newest_path(path)));
}

// ---- main

int main(int argc, char** argv) {
  const std::vector<std::string> words(argv + 1, argv + argc);
  const auto is = [&](const char* what, size_t count) {
    return words.size() == count && words[0] == what;
  };
  const bool help = is("--help", 1) || is("help", 1);
  int status = 0;
  signal(SIGXFSZ, SIG_IGN);  // a file that may not grow is an error of write(), with a sentence
  const int failed = run_main("checkpoint", [&] {
    if (is("info", 2)) status = each_step(words[1], describe);
    else if (is("verify", 2)) status = each_step(words[1], check);
    else if (is("export", 3)) export_weights(words[1], words[2]);
    else if (is("import", 3)) import_weights(words[1], words[2]);
    else {
      if (!help && !words.empty())
        fprintf(stderr, "checkpoint: '%s' is none of these:\n", join(words, " ").c_str());
      fputs(kUsage, help ? stdout : stderr), status = !help;
    }
  });
  return failed || status;
}
