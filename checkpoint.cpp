// checkpoint.cpp: shows, checks, exports and imports checkpoints: build/checkpoint info|verify|export|import. See support/checkpoint.h.
// idea      one process, no mesh: a checkpoint's pieces are read as if by a rank that owns everything
// test      tests/test_checkpoint.sh; tests/huggingface.py opens what `export` writes
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "gpt.h"
#include "support/checkpoint.h"

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

static const char kUsage[] =
    "usage: build/checkpoint info PATH           what is in it: PATH is a directory given to --checkpoint, or one step in it\n"
    "       build/checkpoint verify PATH         read every file of every step and compare with the manifests\n"
    "       build/checkpoint export PATH DIR     write DIR/model.safetensors and config.json, which Hugging Face's GPT-2 opens\n"
    "       build/checkpoint import DIR PATH     the other way round: a checkpoint at step 0 that --resume and build/generate take;\n"
    "                                            DIR holds model.safetensors and config.json, perhaps vocab.json and merges.txt\n";

// ---- info, verify

static void describe(const Checkpoint& c) {
  int64_t parameters = 0, bytes = 0;
  for (const auto& [name, shape] : c.tensors) parameters += elements(shape);
  for (const Checkpoint::File& f : c.files) bytes += f.bytes;
  const ModelSize& m = c.info.model;
  printf("%s\n  step     %lld\n  model    %lld layers, width %lld, %lld heads, context %lld, vocabulary %lld: %.2f M parameters in %s%s\n", c.path.c_str(),
         (long long)c.info.step, (long long)m.layers, (long long)m.width, (long long)m.heads, (long long)m.context, (long long)m.vocab, double(parameters) / 1e6,
         name_of(c.info.dtype), c.has_moments ? " and their moments" : ", without moments");
  printf("  layout   %s\n  files    %zu, %.1f MB\n", to_string(c.info.layout).c_str(), c.files.size(), double(bytes) / 1e6);
  if (!c.info.options.empty()) printf("  options  %s\n", c.info.options.c_str());
  if (!c.info.data.empty()) printf("  data     %s\n", c.info.data.c_str());
}

static std::vector<std::string> steps_of(const std::string& path) {
  const std::vector<std::string> steps = checkpoints_in(path);
  return steps.empty() ? std::vector<std::string>{newest_path(path)} : steps;
}

static int info(const std::string& path) {
  int damaged = 0;
  for (const std::string& step : steps_of(path)) try {
      describe(Checkpoint(step));
    } catch (const Error& e) {
      printf("%s\n  %s\n", step.c_str(), e.what());
      damaged++;
    }
  return damaged != 0;
}

static int verify(const std::string& path) {
  int damaged = 0;
  for (const std::string& step : steps_of(path)) try {
      const Checkpoint c(step);
      for (size_t f = 0; f < c.files.size(); f++) c.verify(f);
      c.verify_cover();
      printf("%s: whole, %zu files, %zu tensors\n", step.c_str(), c.files.size(), c.tensors.size());
    } catch (const Error& e) {
      printf("%s\n", e.what());
      damaged++;
    }
  return damaged != 0;
}

// ---- Hugging Face

static Json config_of(const ModelSize& m) {
  return {{"architectures", {"GPT2LMHeadModel"}}, {"model_type", "gpt2"}, {"n_layer", m.layers}, {"n_embd", m.width}, {"n_head", m.heads},
          {"n_positions", m.context}, {"n_ctx", m.context}, {"vocab_size", m.vocab}, {"activation_function", "gelu_new"}, {"layer_norm_epsilon", 1e-5},
          {"tie_word_embeddings", true}, {"bos_token_id", m.vocab - 1}, {"eos_token_id", m.vocab - 1}, {"torch_dtype", "float32"}};
}

static void export_weights(const std::string& path, const std::string& dir) {
  const Checkpoint c(newest_path(path));
  std::vector<NamedArray> arrays;
  for (const auto& [name, shape] : c.tensors) {
    const Piece whole{name, {1, 1, elements(shape), 0, 1}, 0, elements(shape)};
    arrays.push_back({name, shape, Dtype::f32, [&c, whole](void* to) { c.read(whole, Part::weights, Dtype::f32, to); }});
  }
  std::error_code error;
  fs::create_directories(dir, error);
  REQUIRE(!error, dir, " cannot be created: ", error.message());
  const WrittenFile w = write_safetensors(dir + "/model.safetensors", arrays);
  write_file(dir + "/config.json", config_of(c.info.model).dump(2) + "\n");
  printf("%s/model.safetensors: %zu tensors, %.1f MB, from %s\n", dir.c_str(), arrays.size(), double(w.bytes) / 1e6, c.path.c_str());
}

static ModelSize read_config(const std::string& path) {
  try {
    const Json j = Json::parse(read_file(path));
    REQUIRE(j.value("model_type", "gpt2") == "gpt2", path, " is of a ", j.at("model_type"), ", not of GPT-2");
    const std::string gelu = j.value("activation_function", "gelu_new");
    REQUIRE(gelu == "gelu_new" || gelu == "gelu_pytorch_tanh", path, " asks for the activation ", gelu, "; this model has gelu_new");
    REQUIRE(j.value("layer_norm_epsilon", 1e-5) == 1e-5, path, " asks for a layer_norm_epsilon of ", j.at("layer_norm_epsilon"), "; this model has 1e-5");
    return {j.at("n_layer"), j.at("n_embd"), j.at("n_head"), j.at("n_positions"), j.at("vocab_size")};
  } catch (const nlohmann::json::exception& e) {
    throw Error(sentence(path, " does not describe a GPT-2: ", e.what()));
  }
}

static void import_weights(const std::string& dir, const std::string& path) {
  const ModelSize m = read_config(dir + "/config.json");
  const SafetensorsFile file(dir + "/model.safetensors");
  GptConfig config{m.layers, m.width, m.heads, m.context, m.vocab};
  Gpt gpt(config);  // names and shapes only
  std::vector<NamedArray> arrays;
  for (const Param* p : gpt.params()) {
    const bool prefixed = !file.entries().count(p->name);
    const SafetensorsFile::Entry& e = file.at(prefixed ? "transformer." + p->name : p->name);
    const Shape shape = file_shape(*p);
    REQUIRE(e.shape == shape, file.path(), ": ", p->name, " is of shape ", to_string(e.shape), "; by config.json it should be ", to_string(shape));
    arrays.push_back({p->name, shape, Dtype::f32, [&file, &e](void* to) { file.read(e, 0, elements(e.shape), Dtype::f32, to); }});
  }
  write_whole_checkpoint(path, {0, m, {}, Dtype::f32, 0, "", "imported from " + dir}, arrays);
  for (const char* name : {"vocab.json", "merges.txt"})
    if (fs::exists(dir + "/" + name)) fs::copy_file(dir + "/" + name, path + "/" + name, fs::copy_options::overwrite_existing);
  describe(Checkpoint(newest_path(path)));
}

// ---- main

int main(int argc, char** argv) {
  const std::vector<std::string> words(argv + 1, argv + argc);
  const auto is = [&](const char* what, size_t count) { return words.size() == count && words[0] == what; };
  const bool help = is("--help", 1) || is("help", 1);
  int status = 0;
  try {
    if (is("info", 2)) status = info(words[1]);
    else if (is("verify", 2)) status = verify(words[1]);
    else if (is("export", 3)) export_weights(words[1], words[2]);
    else if (is("import", 3)) import_weights(words[1], words[2]);
    else fputs(kUsage, help ? stdout : stderr), status = !help;
    check_printed();
    return status;
  } catch (const std::exception& e) {
    fprintf(stderr, "checkpoint: %s\n", e.what());
    return 1;
  }
}
