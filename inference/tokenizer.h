// tokenizer.h: text to tokens and back.
// idea      GPT-2's byte-level byte-pair encoding, from vocab.json and merges.txt beside a
//           checkpoint. Without those files a vocabulary of 256 is the bytes, which no pair merges,
//           and of any other a text is the numbers of its tokens.
// source    Radford et al., "Language models are unsupervised multitask learners", 2019, section
//           2.2 (bytes, pairs inside words); Sennrich et al., "Neural machine translation of rare
//           words with subword units", 2016 (merging pairs)
// limits    letters beyond ASCII are told from signs by the C library, whose digits of other
//           scripts count as letters: such texts may be cut into words, and so tokens, otherwise
//           than by the original; what they decode to is the same
// test      tests/test_support.cpp
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

class Tokenizer {
 public:
  // directory: where vocab.json and merges.txt may be; empty: nowhere
  Tokenizer(const std::string& directory, int64_t vocab);
  std::vector<int> encode(const std::string& text) const;  // an Error names what has no token
  // its bytes; a number is followed by a space
  std::string decode(int token) const;
  int end_of_text() const { return end_; }  // -1: there is none

 private:
  std::vector<std::string> words(const std::string& text) const;
  int64_t vocab_;
  int end_ = -1;
  std::map<std::string, int> tokens_;  // by their bytes
  std::vector<std::string> texts_;     // by number; none: tokens are written as numbers
  std::map<std::pair<std::string, std::string>, int> merges_;  // rank: lower merges first
};
