// fuzz_targets.h: everything that reads files or words of others, as functions of some bytes. An
// Error is an answer; any other exception, a sanitizer's report, or text that does not come back is
// a finding. tests/fuzz.sh makes up bytes (libFuzzer), tests/test_fuzz.cpp replays tests/corpus.
#pragma once
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "checkpoint/checkpoint.h"
#include "inference/tokenizer.h"
#include "launch/options.h"
#include "support/data.h"

namespace fuzz {

// a directory of this process, in memory where there is room
inline const std::string& directory() {
  static const struct Directory {
    std::string path = sentence("/dev/shm/threefold-fuzz.", getpid());
    Directory() { std::filesystem::create_directories(path); }
    ~Directory() { std::filesystem::remove_all(path); }
  } place;
  return place.path;
}

inline std::string write(const std::string& name, const std::string& bytes) {
  const std::string path = directory() + "/" + name;
  std::filesystem::create_directories(std::filesystem::path(path).parent_path());
  std::ofstream(path, std::ios::binary) << bytes;
  return path;
}

// The parts that `separator` ends; the last one is the rest.
inline std::vector<std::string> split(const std::string& bytes, char separator, size_t parts) {
  std::vector<std::string> all;
  for (size_t at = 0; all.size() < parts;) {
    const size_t end = all.size() + 1 < parts ? bytes.find(separator, at) : bytes.npos;
    all.push_back(bytes.substr(std::min(at, bytes.size()), end == bytes.npos ? end : end - at));
    at = end == bytes.npos ? bytes.size() : end + 1;
  }
  return all;
}

inline void safetensors(const std::string& bytes) {
  std::vector<double> values(16);
  for (const auto& [name, array] : open_safetensors(write("x.safetensors", bytes)))
    array.read(0, std::min<int64_t>(elements(array.shape), 16), Dtype::f64, values.data());
}

// With the checksum that it should have: what it says would else never be looked at.
inline void manifest(const std::string& bytes) {
  static const bool has_weights = [] {
    const auto zeros = [](void* to) { memset(to, 0, 64); };
    write_safetensors(write("c/weights-0.safetensors", ""), {{"a", {4, 4}, Dtype::f32, zeros}});
    return true;
  }();
  nlohmann::json json = nlohmann::json::parse(bytes, nullptr, false);
  if (has_weights && json.is_object()) {
    json.erase("checksum");
    json["checksum"] =
        checksum(json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
  }
  const auto replace = nlohmann::json::error_handler_t::replace;
  write("c/manifest.json", json.is_discarded() ? bytes : json.dump(-1, ' ', false, replace));
  const Checkpoint checkpoint(directory() + "/c");
  checkpoint.describe();
  checkpoint.verify("optimizer-");
  std::vector<float> values(16);
  for (const auto& [name, shape] : checkpoint.tensors)
    if (elements(shape) > 0 && elements(shape) <= 16)
      checkpoint.read(whole_tensor(name, shape), Part::weights, Dtype::f32, values.data());
}

inline void comes_back(const Tokenizer& tokenizer, const std::string& text) {
  std::string back;
  for (const int token : tokenizer.encode(text)) back += tokenizer.decode(token);
  if (tokenizer.size() > 0 && back != text) throw std::logic_error("the text does not come back");
}

inline void vocabulary(const std::string& bytes) {
  const auto parts = split(bytes, '\0', 3);
  write("v/vocab.json", parts[0]);
  write("v/merges.txt", parts[1]);
  comes_back(Tokenizer(directory() + "/v", 1000), parts[2]);
}

inline void tokenizer_json(const std::string& bytes) {
  const auto parts = split(bytes, '\0', 2);
  write("t/tokenizer.json", parts[0]);
  comes_back(Tokenizer(directory() + "/t", 1000), parts[1]);
}

inline void shard(const std::string& bytes) {
  const Dataset data = Dataset::open({write("shard", bytes)}, 4, 256);
  for (int step = 0; step < 3; step++) data.sequence(step, 0, 1);
  data.held_out(data.held_out_sequences() - 1);
}

inline void options(const std::string& bytes) {
  std::vector<std::string> words = {"train_gpt"};
  for (const std::string& word : split(bytes, '\n', 40)) words.push_back(word.c_str());
  while (words.back().empty()) words.pop_back();  // the parts that there were not
  std::vector<const char*> argv;
  for (const std::string& word : words) argv.push_back(word.c_str());
  Options o;
  o.given = parse(int(argv.size()), argv.data(), train_options(o));
  resolve(o, bytes.size() % 2);
  check(o);
}

struct Target {
  const char* name;
  void (*run)(const std::string& bytes);
};
inline constexpr Target kTargets[] = {
    {"safetensors", safetensors},       {"manifest", manifest}, {"vocabulary", vocabulary},
    {"tokenizer_json", tokenizer_json}, {"shard", shard},       {"options", options}};

// whether it is read
inline bool run(const Target& target, const std::string& bytes) {
  try {
    target.run(bytes);
    return true;
  } catch (const Error&) {
    return false;
  }
}

}  // namespace fuzz
