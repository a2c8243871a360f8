// tokenizer.h: text to tokens and back.
// idea      GPT-2's byte-level byte-pair encoding, from tokenizer.json, or vocab.json and
//           merges.txt, beside a checkpoint. Without those files tokens are the bytes, which no
//           pair merges, where the model was trained on them or its vocabulary is 256; else a text
//           is the numbers of its tokens.
// cost      n log n for a word of n bytes: an ordered set of the pairs that could be merged next
// source    Radford et al., "Language models are unsupervised multitask learners", 2019, section
//           2.2 (bytes, pairs inside words); Sennrich et al., "Neural machine translation of rare
//           words with subword units", 2016 (merging pairs); unicode_table.h (letters, numbers)
// not here  tokenizers of other kinds: a tokenizer.json that asks for anything else is refused;
//           its truncation and padding, which are about batches of texts, are not looked at
// test      tests/test_support.cpp; tests/byte_pairs.py compares with Hugging Face's library
#pragma once
#include <array>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <unordered_map>

#include "support/files.h"

// The files that a tokenizer may be read from.
inline constexpr char kTokenizerJson[] = "tokenizer.json", kVocab[] = "vocab.json",
                      kMerges[] = "merges.txt", kAddedTokens[] = "added_tokens.json";
inline constexpr std::array kTokenizerFiles = {kTokenizerJson, kVocab, kMerges, kAddedTokens};

class Tokenizer {
 public:
  // directory: where kTokenizerFiles may be; empty: nowhere. vocab: of the model, which may be
  // larger; 0: as large as it takes. bytes: without files, whatever the vocabulary. end: the token
  // that ends a text; -1: <|endoftext|>, if the files have it
  Tokenizer(const std::string& directory, int64_t vocab, bool bytes = false, int64_t end = -1);
  std::vector<int> encode(std::string_view text) const;  // an Error names what has no token
  // the same, word by word: take(its tokens, where it ends in the text)
  using Take = std::function<void(const std::vector<int>& tokens, size_t end)>;
  void encode(std::string_view text, const Take& take) const;
  // its bytes; a number is followed by a space
  std::string decode(int token) const;
  int end_of_text() const { return end_; }  // -1: there is none
  uint64_t key() const { return key_; }     // a checksum of its files; 0: there are none
  int64_t size() const { return texts_.size(); }
  // A model's vocabulary may be padded, or have holes: numbers without a text are not to be drawn,
  // but for that which ends a text.
  void silence(std::span<double> logits) const;
  int64_t longest() const { return longest_; }  // bytes of the longest token; 0: they are numbers

 private:
  void read_tokenizer_json(const nlohmann::json& file);
  void read_model(const nlohmann::json& model);  // {"vocab": {...}, "merges": [...]}
  void add(int64_t token, const std::string& text);
  void add_special(const nlohmann::json& number, const std::string& text);
  void encode_numbers(const std::string& text, const Take& take) const;
  void merge_pairs(std::string_view word, std::vector<int>& tokens) const;

  struct Merge {
    int rank, token;  // the lowest rank merges first; what it makes
  };
  int64_t vocab_, longest_ = 0;
  uint64_t key_ = 0;
  int end_;
  std::vector<std::string> texts_;               // by number; none: tokens are written as numbers
  std::unordered_map<std::string, int> tokens_;  // by their bytes
  std::map<std::pair<int, int>, Merge> merges_;  // by the two tokens
  std::vector<int> special_;  // found in a text before it is cut into words; the longest first
};

bool has_tokenizer(const std::string& directory);  // one of the first three
// The files in `from`, or none if it is empty, go to `to`, where others of these names are put
// aside; in one directory they stay.
void copy_tokenizer(const std::string& from, const std::string& to);

// Prints a text as it comes, piece by piece: to a terminal what is printable, elsewhere every byte.
class Screen {
 public:
  explicit Screen(bool is_terminal) : is_terminal_(is_terminal) {}
  // an Error once the reader has left
  void show(const std::string& bytes);
  // what is printed of the next piece; of a character in two pieces all comes with the second
  std::string printed(const std::string& bytes);

 private:
  const bool is_terminal_;
  std::string begun_;  // the first byte of U+0080 to U+00BF, which waits for the second
};
