// tokenizer.cpp: see tokenizer.h.
#include "inference/tokenizer.h"

#include <clocale>
#include <cwctype>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <sstream>

#include "support/check.h"
#include "checkpoint/safetensors.h"

// ---- the files

struct CodePoint {
  char32_t value;
  size_t at;
};  // where its bytes begin

// Of UTF-8; malformed bytes are code points of their own.
static std::vector<CodePoint> code_points(const std::string& text) {
  std::vector<CodePoint> points;
  for (size_t at = 0, length; at < text.size(); at += length) {
    const unsigned char first = text[at];
    length = first < 0x80       ? 1
             : first >> 5 == 6  ? 2
             : first >> 4 == 14 ? 3
             : first >> 3 == 30 ? 4
                                : 1;
    if (at + length > text.size()) length = 1;
    char32_t c = length == 1 ? first : first & (0xff >> (length + 1));
    for (size_t i = 1; i < length; i++) c = c << 6 | (text[at + i] & 0x3f);
    points.push_back({c, at});
  }
  return points;
}

// The files write each byte as a printable character: itself, or 256 and up for the others in
// order.
static std::map<char32_t, char> byte_of_character() {
  std::map<char32_t, char> bytes;
  char32_t next = 256;
  for (int b = 0; b < 256; b++) {
    const bool printable =
        (b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || (b >= 0xae && b <= 0xff);
    bytes[printable ? char32_t(b) : next++] = char(b);
  }
  return bytes;
}

static std::string to_bytes(const std::string& written, const std::string& path) {
  static const std::map<char32_t, char> bytes = byte_of_character();
  std::string text;
  for (const CodePoint& c : code_points(written)) {
    const auto found = bytes.find(c.value);
    REQUIRE(found != bytes.end(), path, ": ", written,
            " is no token of byte-level byte-pair encoding");
    text += found->second;
  }
  return text;
}

Tokenizer::Tokenizer(const std::string& directory, int64_t vocab) : vocab_(vocab) {
  const std::string vocabulary = directory + "/vocab.json", merges = directory + "/merges.txt";
  if (directory.empty() || !std::filesystem::exists(vocabulary) ||
      !std::filesystem::exists(merges)) {
    for (int b = 0; b < 256 && vocab == 256; b++) tokens_[texts_.emplace_back(1, char(b))] = b;
    return;
  }
  try {
    const auto json = nlohmann::json::parse(read_file(vocabulary));
    for (const auto& [written, number] : json.items()) {
      const int token = number;
      REQUIRE(token >= 0 && token < vocab, vocabulary, " has token ", token,
              ", outside the vocabulary of ", vocab);
      const bool special = written == "<|endoftext|>";
      if (special) end_ = token;
      if (texts_.size() <= size_t(token)) texts_.resize(size_t(token) + 1);
      texts_[size_t(token)] = special ? written : to_bytes(written, vocabulary);
      if (!special) tokens_[texts_[size_t(token)]] = token;
    }
  } catch (const nlohmann::json::exception& e) {
    throw Error(sentence(vocabulary, " is damaged: ", e.what()));
  }
  std::istringstream lines(read_file(merges));
  for (std::string line; std::getline(lines, line);) {
    const size_t space = line.find(' ');
    if (line.starts_with("#version") || space == std::string::npos) continue;
    while (!line.empty() && line.back() == '\r') line.pop_back();
    merges_.insert(
        {{to_bytes(line.substr(0, space), merges), to_bytes(line.substr(space + 1), merges)},
         int(merges_.size())});
  }
}

// ---- encoding

enum class Sign { space, letter, digit, other };

static Sign sign_of(char32_t c) {
  static const locale_t utf8 = newlocale(LC_CTYPE_MASK, "C.UTF-8", nullptr);
  if (c < 128)
    return isspace(int(c))   ? Sign::space
           : isalpha(int(c)) ? Sign::letter
           : isdigit(int(c)) ? Sign::digit
                             : Sign::other;
  if (!utf8) return Sign::letter;
  return iswspace_l(wint_t(c), utf8) || c == 0xa0 ? Sign::space
         : iswalpha_l(wint_t(c), utf8)            ? Sign::letter
                                                  : Sign::other;
}

// GPT-2's words: an English suffix ('s 't 're 've 'm 'll 'd), or a run of letters, digits or other
// signs with the space before it; of several spaces the last one belongs to what follows.
std::vector<std::string> Tokenizer::words(const std::string& text) const {
  std::vector<CodePoint> points = code_points(text);
  const size_t n = points.size();
  std::vector<Sign> signs;
  for (const CodePoint& c : points) signs.push_back(sign_of(c.value));
  points.push_back({0, text.size()});
  std::vector<std::string> words;
  for (size_t begin = 0, end; begin < n; begin = end) {
    const size_t at = points[begin].at;
    end = begin;
    for (const char* suffix : {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"})
      if (text.compare(at, strlen(suffix), suffix) == 0) end = begin + strlen(suffix);
    if (end == begin) {
      if (text[at] == ' ' && begin + 1 < n) end++;
      const Sign sign = signs[end];
      while (end < n && signs[end] == sign) end++;
      if (sign == Sign::space && end < n && end > begin + 1) end--;
    }
    words.push_back(text.substr(at, points[end].at - at));
  }
  return words;
}

std::vector<int> Tokenizer::encode(const std::string& text) const {
  std::vector<int> tokens;
  if (texts_.empty()) {
    std::istringstream in(text);
    for (std::string word; in >> word;) {
      char* end;
      const long long token = strtoll(word.c_str(), &end, 10);
      REQUIRE(
          !*end && token >= 0 && token < vocab_, "'", word,
          "' is no token: without vocab.json and merges.txt beside the checkpoint a prompt is the numbers of its tokens, 0 to ",
          vocab_ - 1);
      tokens.push_back(int(token));
    }
    return tokens;
  }
  for (const std::string& word : words(text)) {
    std::vector<std::string> parts;
    for (const char c : word) parts.push_back(std::string(1, c));
    while (parts.size() > 1) {  // merge the pair that was learned first
      int best = INT32_MAX;
      size_t at = 0;
      for (size_t i = 0; i + 1 < parts.size(); i++)
        if (const auto m = merges_.find({parts[i], parts[i + 1]});
            m != merges_.end() && m->second < best)
          best = m->second, at = i;
      if (best == INT32_MAX) break;
      parts[at] += parts[at + 1];
      parts.erase(parts.begin() + long(at) + 1);
    }
    for (const std::string& part : parts) {
      const auto found = tokens_.find(part);
      REQUIRE(found != tokens_.end(), "vocab.json has no token for '", part, "'");
      tokens.push_back(found->second);
    }
  }
  return tokens;
}

std::string Tokenizer::decode(int token) const {
  if (texts_.empty()) return std::to_string(token) + " ";
  return size_t(token) < texts_.size() ? texts_[size_t(token)] : "";
}
