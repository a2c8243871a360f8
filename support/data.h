// data.h: the tokens to train on, and which of them each step sees.
// idea      files stay open and are read as one row of tokens. Where a sequence starts is a
//           function of (seed, step, number of the sequence in the global batch) alone, so every
//           layout of ranks trains on the same batch without a word between ranks
// formats   text, whose bytes are the tokens; llm.c's .bin shards: 256 int32 {magic, version,
//           number of tokens, 0...}, then the tokens: uint16 (magic 20240520, version 1) or uint32
//           (magic 20240801, version 7). A file is a shard if it begins with a magic
// split     the last 10 % of the tokens, at least one sequence, are never trained on
// checks    the first million tokens of each file when it is opened, and every token when it is
//           used: a shard outside the vocabulary fails at the start, and shards of many gigabytes
//           are not read through first. A file that has become shorter is refused when what is
//           gone is wanted; another file of its name does not matter
// not here  tokenizers (inference/text_shards.h makes shards of texts), shuffled epochs
// test      tests/test_support.cpp
#pragma once
#include "support/files.h"

// of llm.c's shards
struct ShardFormat {
  int32_t magic, version;
  int64_t width;  // bytes a token
};
constexpr ShardFormat kShardFormats[] = {{20240520, 1, 2}, {20240801, 7, 4}};
constexpr int64_t kShardHeader = 256 * sizeof(int32_t);
const ShardFormat* shard_format(const MappedFile& file);  // by its magic; null: it is text

class Dataset {
 public:
  // No files: the sources and docs of this project. Sequences have `context` inputs, so context + 1
  // tokens.
  static Dataset open(const std::vector<std::string>& files, int64_t context, int64_t vocab);

  static void check_file(const std::string& path);  // an Error where a shard is not whole

  // index: in the global batch of the step
  std::vector<int> sequence(int64_t step, int64_t index, uint64_t seed) const;
  // Of the tenth that is not trained on. Where it has more than kMostHeldOut sequences, so many of
  // them, spread evenly over it, stand for all.
  static constexpr int64_t kMostHeldOut = 32;
  std::vector<int> held_out(int64_t i) const;
  int64_t held_out_sequences() const { return std::min(all_held_out(), kMostHeldOut); }
  bool is_text() const { return parts_[0].width == 1; }
  std::string describe() const;
  std::vector<std::string> paths;  // of its files
  std::string content;             // content_of them, when they were opened

 private:
  struct Part {
    std::string path;
    std::shared_ptr<const OpenFile> file;
    int64_t offset, width;  // bytes before the first token, bytes a token
    int64_t first, count;   // number of its first token in the whole row, tokens
    int64_t end() const { return first + count; }
  };
  static Part open_part(const std::string& path);
  std::vector<int> read(int64_t first, int64_t count) const;
  // how many sequences the held-out part has, each of which starts with the last token of the one
  // before
  int64_t all_held_out() const { return (tokens_ - train_ - 1) / context_; }

  std::string from_;  // for people
  std::vector<Part> parts_;
  int64_t context_ = 0, vocab_ = 0, tokens_ = 0, train_ = 0;
};

// The nearest directory above the program that holds train_gpt.cpp; if there is none, the current
// one or the nearest above it; empty: none of them.
std::string project_root();
// Sources and docs below `root`, sorted by name; nothing from build/ and hidden directories.
std::vector<std::string> project_files(const std::string& root);
