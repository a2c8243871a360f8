// tool.cpp: shows, checks, exports and imports checkpoints: build/checkpoint
// info|verify|export|import. See checkpoint/checkpoint.h.
// idea      one process, no mesh: a checkpoint's pieces are read as if by a rank that owns
//           everything
// test      tests/test_checkpoint.sh; tests/huggingface.py opens what `export` writes
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>

#include "gpt.h"
#include "checkpoint/checkpoint.h"
#include "inference/tokenizer.h"
#include "support/json.h"

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

static const char kUsage[] =
    "usage: build/checkpoint info PATH          what is in it: PATH is a directory given to\n"
    "                                           --checkpoint, or one step in it\n"
    "       build/checkpoint verify PATH        read every file of every step and compare with\n"
    "                                           the manifests\n"
    "       build/checkpoint export PATH DIR    write DIR/model.safetensors and config.json,\n"
    "                                           which Hugging Face's GPT-2 opens\n"
    "       build/checkpoint import DIR PATH    the other way round: a checkpoint at step 0 that\n"
    "                                           --resume and build/generate take; DIR holds\n"
    "                                           model.safetensors (or its parts and\n"
    "                                           model.safetensors.index.json) and config.json,\n"
    "                                           perhaps tokenizer.json, or vocab.json and\n"
    "                                           merges.txt\n";

// ---- info, verify

static void describe(const Checkpoint& c) {
  int64_t parameters = 0, bytes = 0;
  for (const auto& [name, shape] : c.tensors) parameters += elements(shape);
  for (const WrittenFile& f : c.files) bytes += f.bytes;
  const ModelSize& m = c.info.model;
  printf(
      "%s\n  step     %lld\n  model    %lld layers, width %lld, %lld heads, context %lld, "
      "vocabulary %lld: %.2f M parameters in %s%s\n",
      c.path.c_str(), (long long)c.info.step, (long long)m.layers, (long long)m.width,
      (long long)m.heads, (long long)m.context, (long long)m.vocab, double(parameters) / 1e6,
      name_of(c.info.dtype), c.has_moments ? " and their moments" : ", without moments");
  printf("  layout   %s\n  files    %zu, %.1f MB\n", to_string(c.info.layout).c_str(),
         c.files.size(), double(bytes) / 1e6);
  if (!c.info.options.empty()) printf("  options  %s\n", c.info.options.c_str());
  if (!c.info.data.empty()) printf("  data     %s\n", c.info.data.c_str());
}

static void check(const Checkpoint& c) {
  c.verify();
  printf("%s: whole, %zu files, %zu tensors\n", c.path.c_str(), c.files.size(), c.tensors.size());
}

// Does `work` with each step, and says what is wrong with those that are not whole: status 1.
static int each_step(const std::string& path, void (*work)(const Checkpoint&)) {
  std::vector<std::string> steps = checkpoints_in(path);
  if (steps.empty()) steps = {newest_path(path)};
  int status = 0;
  for (const std::string& step : steps) try {
      work(Checkpoint(step));
    } catch (const std::exception& e) {
      printf("%s\n", e.what());
      status = 1;
    }
  return status;
}

// ---- Hugging Face

// end: the token that ends a text; -1: none
static Json config_of(const ModelSize& m, int end) {
  const Json end_of_text = end < 0 ? Json() : Json(end);
  return {{"architectures", {"GPT2LMHeadModel"}},
          {"model_type", "gpt2"},
          {"n_layer", m.layers},
          {"n_embd", m.width},
          {"n_head", m.heads},
          {"n_positions", m.context},
          {"n_ctx", m.context},
          {"vocab_size", m.vocab},
          {"activation_function", "gelu_new"},
          {"layer_norm_epsilon", 1e-5},
          {"tie_word_embeddings", true},
          {"bos_token_id", end_of_text},
          {"eos_token_id", end_of_text},
          {"torch_dtype", "float32"}};
}

static void export_weights(const std::string& path, const std::string& dir) {
  const Checkpoint c(newest_path(path));
  c.verify("weights-");
  std::vector<NamedArray> arrays;
  for (const auto& [name, shape] : c.tensors) {
    const Piece whole{name, {1, 1, elements(shape), 0, 1}, 0, elements(shape)};
    arrays.push_back({name, shape, Dtype::f32,
                      [&c, whole](void* to) { c.read(whole, Part::weights, Dtype::f32, to); }});
  }
  const std::string home = fs::canonical(c.path).parent_path();
  const Tokenizer tokenizer(home, c.info.model.vocab);
  // without a tokenizer, numbers of GPT-2's are what so large a vocabulary holds
  const bool gpt2 = !tokenizer.has_pairs() && c.info.model.vocab >= 50257;
  make_directory(dir);
  copy_tokenizer(home, dir);
  const WrittenFile w = write_safetensors(dir + "/model.safetensors", arrays);
  write_file(dir + "/config.json",
             config_of(c.info.model, gpt2 ? 50256 : tokenizer.end_of_text()).dump(2) + "\n");
  printf("%s/model.safetensors: %zu tensors, %.1f MB, from %s\n", dir.c_str(), arrays.size(),
         double(w.bytes) / 1e6, c.path.c_str());
}

static ModelSize read_config(const std::string& path) {
  try {
    const Json j = Json::parse(read_file(path));
    const auto size = [&](const char* key, int64_t most = 1'000'000) {
      const Json& n = j.at(key);
      REQUIRE(n.is_number_integer() && n > 0 && n <= most, path, ": ", key, " is ", n,
              "; it takes a whole number from 1 to ", most);
      return n.get<int64_t>();
    };
    const ModelSize m{size("n_layer", 10'000), size("n_embd"), size("n_head"),
                      size("n_positions", 10'000'000), size("vocab_size", 1'000'000'000)};
    REQUIRE(m.width % m.heads == 0, path, ": n_embd ", m.width, " does not divide by n_head ",
            m.heads);
    const std::string gelu = j.value("activation_function", "gelu_new");
    REQUIRE(gelu == "gelu_new" || gelu == "gelu_pytorch_tanh", path, " asks for the activation ",
            gelu, "; this model has gelu_new");
    const Json only{{"model_type", "gpt2"},        {"layer_norm_epsilon", 1e-5},
                    {"n_inner", 4 * m.width},      {"tie_word_embeddings", true},
                    {"scale_attn_weights", true},  {"scale_attn_by_inverse_layer_idx", false},
                    {"add_cross_attention", false}};
    for (const auto& [key, value] : only.items())
      REQUIRE(j.value(key, Json()).is_null() || j.at(key) == value, path, ": ", key, " is ",
              j.at(key), "; this model has ", value);
    return m;
  } catch (const nlohmann::json::exception& e) {
    throw Error(sentence(path, " does not describe a GPT-2: ", e.what()));
  }
}

// The files of weights in `dir`: one, or the parts that an index names.
static std::vector<std::unique_ptr<SafetensorsFile>> open_weights(const std::string& dir) {
  const std::string whole = dir + "/model.safetensors", index = whole + ".index.json";
  std::set<std::string> parts = {"model.safetensors"};
  if (!is_there(whole) && is_there(index))
    read_json(index, " is damaged: ", [&] {
      const nlohmann::json map = parse_json(read_file(index)).at("weight_map");
      REQUIRE(map.is_object() && !map.empty(), "its weight_map names no file");
      parts.clear();
      for (const auto& part : map) parts.insert(part.get<std::string>());
    });
  std::vector<std::unique_ptr<SafetensorsFile>> files;
  for (const fs::path part : parts) {
    REQUIRE(part == part.filename(), index, " names a file of another directory, ", part);
    files.push_back(std::make_unique<SafetensorsFile>(fs::path(dir) / part));
  }
  return files;
}

// A tensor in one of the files.
struct Found {
  const SafetensorsFile* file;
  const SafetensorsFile::Entry* entry;
  void read(void* to) const { file->read(*entry, 0, elements(entry->shape), Dtype::f32, to); }
  bool operator==(const Found& other) const {
    std::vector<float> mine(size_t(elements(entry->shape))), others(mine);
    if (entry->shape != other.entry->shape) return false;
    read(mine.data());
    other.read(others.data());
    return mine == others;
  }
};

static void import_weights(const std::string& dir, const std::string& path) {
  REQUIRE(!holds_checkpoints(path), path, " holds checkpoints already: give another directory");
  const ModelSize m = read_config(dir + "/config.json");
  const Tokenizer readable(dir, m.vocab);  // or an Error, before anything is written
  const auto files = open_weights(dir);
  std::map<std::string, Found> all;
  for (const auto& file : files)
    for (const auto& [name, entry] : file->entries()) {
      const std::string short_name = name.substr(name.starts_with("transformer.") ? 12 : 0);
      REQUIRE(all.insert({short_name, {file.get(), &entry}}).second, file->path(), " has ", name,
              ", which is there already");
    }
  // one matrix, tied: under both names, or one of them
  if (const auto head = all.extract("lm_head.weight"); !head.empty()) {
    const auto [wte, alone] = all.insert({"wte.weight", head.mapped()});
    REQUIRE(alone || wte->second == head.mapped(), head.mapped().file->path(),
            ": lm_head.weight is not wte.weight; the head of this model is its embedding");
  }
  Gpt gpt(GptConfig{m});  // names and shapes only
  std::vector<NamedArray> arrays;
  for (const Param* p : gpt.params()) {
    const auto found = all.extract(p->name);
    REQUIRE(!found.empty(), dir, " has no tensor ", p->name);
    const Found& from = found.mapped();
    const Shape shape = file_shape(*p);
    REQUIRE(from.entry->shape == shape, from.file->path(), ": ", p->name, " is of shape ",
            to_string(from.entry->shape), "; by config.json it should be ", to_string(shape));
    arrays.push_back({p->name, shape, Dtype::f32, [from](void* to) { from.read(to); }});
  }
  for (const auto& [name, left] : all)  // causal masks may be there, too
    REQUIRE(name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias"), left.file->path(),
            ": the model of config.json has no ", name);
  make_directory(path);
  const DirectoryLock lock(path);
  copy_tokenizer(dir, path);
  write_whole_checkpoint(path, {0, m, {}, Dtype::f32, 0, "", "imported from " + dir}, arrays);
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
  try {
    if (is("info", 2)) status = each_step(words[1], describe);
    else if (is("verify", 2)) status = each_step(words[1], check);
    else if (is("export", 3)) export_weights(words[1], words[2]);
    else if (is("import", 3)) import_weights(words[1], words[2]);
    else fputs(kUsage, help ? stdout : stderr), status = !help;
    check_printed();
    return status;
  } catch (const std::exception& e) {
    fprintf(stderr, "checkpoint: %s\n", words_of(e).c_str());
    return 1;
  }
}
