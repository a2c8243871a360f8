// tokenizer.cpp: see tokenizer.h.
#include "inference/tokenizer.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <map>
#include <queue>
#include <sstream>

#include "checkpoint/safetensors.h"
#include "inference/unicode_table.h"
#include "support/json.h"

using nlohmann::json;

// ---- UTF-8

constexpr char32_t kNoCodePoint = 0x110000;

// The code point that begins at `at`, which moves behind it. A byte that begins none is
// kNoCodePoint, and `at` moves by that byte alone.
static char32_t next_code_point(std::string_view text, size_t& at) {
  constexpr char32_t kLeast[] = {0, 0x80, 0x800, 0x10000};  // what needs so many bytes more
  const unsigned char first = text[at++];
  if (first < 0x80) return first;
  const size_t more = first >= 0xf0 ? 3 : first >= 0xe0 ? 2 : first >= 0xc0 ? 1 : 0;
  if (more == 0 || first >= 0xf8 || at + more > text.size()) return kNoCodePoint;
  char32_t c = first & (0x3f >> more);
  for (size_t i = at; i < at + more; i++) {
    if ((text[i] & 0xc0) != 0x80) return kNoCodePoint;
    c = c << 6 | (text[i] & 0x3f);
  }
  if (c < kLeast[more] || c >= kNoCodePoint || (c >= 0xd800 && c < 0xe000)) return kNoCodePoint;
  at += more;
  return c;
}

static Sign sign_of(char32_t c) {
  if (c == ' ' || (c >= '\t' && c <= '\r')) return Sign::space;
  if (c < 0x80 && (c | 32) >= 'a' && (c | 32) <= 'z') return Sign::letter;
  if (c < 0x80) return c >= '0' && c <= '9' ? Sign::number : Sign::other;
  const SignRun* run = std::upper_bound(std::begin(kSigns), std::end(kSigns), c,
                                        [](char32_t c, const SignRun& r) { return c < r.first; });
  return run != kSigns && c <= run[-1].last ? run[-1].sign : Sign::other;
}

// ---- the files

// They write each byte as a printable character: itself, or 256 and up for the others in order.
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

constexpr int64_t kLargest = 10'000'000;  // number of a token

static std::string to_bytes(const std::string& written, const std::string& path) {
  static const std::map<char32_t, char> bytes = byte_of_character();
  std::string text;
  for (size_t at = 0; at < written.size();) {
    const auto found = bytes.find(next_code_point(written, at));
    REQUIRE(found != bytes.end(), path, ": '", written,
            "' is no token of byte-level byte-pair encoding");
    text += found->second;
  }
  return text;
}

Tokenizer::Tokenizer(const std::string& directory, int64_t vocab) : vocab_(vocab) {
  std::string paths[3];
  bool there[3] = {};
  for (size_t i = 0; i < 3 && !directory.empty(); i++) {
    paths[i] = directory + "/" + kTokenizerFiles[i];
    there[i] = is_there(paths[i]);
  }
  if (!there[0])
    REQUIRE(there[1] == there[2], directory, " has ", kTokenizerFiles[there[1] ? 1 : 2],
            " without ", kTokenizerFiles[there[1] ? 2 : 1], ": a tokenizer needs both");
  if (there[0])
    read_json(paths[0],
              " is no byte-level byte-pair encoding: ", [&] { read_tokenizer_json(paths[0]); });
  else if (there[1])
    read_json(paths[1], " is damaged: ", [&] { read_vocab_and_merges(paths[1], paths[2]); });
  else
    for (int b = 0; b < 256 && vocab == 256; b++) add(b, std::string(1, char(b)), false, "");
  if (const auto end = tokens_.find("<|endoftext|>"); end != tokens_.end()) end_ = end->second;
  std::sort(special_.begin(), special_.end(),
            [&](int a, int b) { return texts_[size_t(a)].size() > texts_[size_t(b)].size(); });
}

void Tokenizer::add(int64_t token, const std::string& text, bool special, const std::string& path) {
  REQUIRE(vocab_ == 0 || token < vocab_, path, " has token ", token, ", outside the vocabulary of ",
          vocab_);
  if (size() <= token) texts_.resize(size_t(token) + 1);
  std::string& place = texts_[size_t(token)];
  REQUIRE(!text.empty() && place.empty(), path, " has token ", token, " twice, or an empty one");
  place = text;
  REQUIRE(tokens_.insert({text, int(token)}).second, path, " has two tokens of one text, ", token);
  longest_ = std::max(longest_, int64_t(text.size()));
  if (special) special_.push_back(int(token));
}

void Tokenizer::add_merge(const std::string& left, const std::string& right,
                          const std::string& path) {
  const int rank = merges_read_++;
  const std::string a = to_bytes(left, path), b = to_bytes(right, path);
  for (const std::string& text : {a, b, a + b})
    REQUIRE(tokens_.count(text), path, " merges '", left, "' and '", right,
            "', but the vocabulary lacks ", text == a + b ? "what they make" : "one of the two");
  merges_[uint64_t(tokens_[a]) << 32 | uint64_t(tokens_[b])] = {rank, tokens_[a + b]};
}

void Tokenizer::read_vocab_and_merges(const std::string& vocab, const std::string& merges) {
  const std::string text = read_file(vocab), pairs = read_file(merges);
  const json j = parse_json(text);
  REQUIRE(j.is_object(), "it is no object of names");
  for (const auto& [written, number] : j.items()) {
    const bool special = written == "<|endoftext|>";
    add(whole_number(number, kLargest), special ? written : to_bytes(written, vocab), special,
        vocab);
  }
  std::istringstream lines(pairs);
  for (std::string line; std::getline(lines, line);) {
    while (!line.empty() && line.back() == '\r') line.pop_back();
    if (line.empty() || line.starts_with("#version")) continue;
    const size_t space = line.find(' ');
    REQUIRE(space != std::string::npos, merges, ": '", line, "' is no pair");
    add_merge(line.substr(0, space), line.substr(space + 1), merges);
  }
  key_ = checksum(text + pairs);
}

// Of all that such a file can ask for, what GPT-2's asks for.
void Tokenizer::read_tokenizer_json(const std::string& path) {
  const std::string text = read_file(path);
  const json j = parse_json(text), &model = j.at("model");
  const auto expect = [&](const json& object, const char* key, const json& value) {
    const auto found = object.find(key);
    REQUIRE(found == object.end() || found->is_null() || *found == "" || *found == value, path,
            ": ", key, " is ", *found, "; GPT-2's encoding has ", value);
  };
  const json& words = j.at("pre_tokenizer");
  REQUIRE(model.value("type", "BPE") == "BPE" && words.at("type") == "ByteLevel", path,
          " is not of GPT-2's encoding, byte pairs (BPE) over words of ByteLevel");
  expect(words, "add_prefix_space", false);
  expect(words, "use_regex", true);
  expect(j, "normalizer", nullptr);
  const json after = j.value("post_processor", json());
  if (after.is_object() && after.at("type") == "TemplateProcessing")
    expect(after, "special_tokens", json::object());  // that it would add to a text
  else if (!after.is_null()) expect(after, "type", "ByteLevel");
  for (const char* key : {"dropout", "continuing_subword_prefix", "end_of_word_suffix"})
    expect(model, key, nullptr);
  for (const char* key : {"byte_fallback", "ignore_merges"}) expect(model, key, false);
  for (const json& added : j.value("added_tokens", json::array())) {
    for (const char* key : {"single_word", "lstrip", "rstrip"}) expect(added, key, false);
    add(whole_number(added.at("id"), kLargest), added.at("content"), true, path);
  }
  for (const auto& [written, number] : model.at("vocab").items()) {
    const auto added = tokens_.find(written);
    if (added == tokens_.end())
      add(whole_number(number, kLargest), to_bytes(written, path), false, path);
    else REQUIRE(number == added->second, path, " has two numbers of '", written, "'");
  }
  for (const json& m : model.at("merges")) {
    const std::string line = m.is_string() ? m.get<std::string>() : "";
    const size_t space = line.find(' ');
    REQUIRE((m.is_array() && m.size() == 2) || space != std::string::npos, path, ": ", m,
            " is no pair");
    if (m.is_array()) add_merge(m[0], m[1], path);
    else add_merge(line.substr(0, space), line.substr(space + 1), path);
  }
  key_ = checksum(text);
}

// ---- encoding

// Where the word that begins at `at` ends. GPT-2's words are an English suffix ('s 't 're 've 'm
// 'll 'd), or a run of letters, numbers or other signs with the space before it; of several spaces
// the last one belongs to what follows.
static size_t word_end(std::string_view text, size_t at) {
  for (const std::string_view suffix : {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"})
    if (text.substr(at).starts_with(suffix)) return at + suffix.size();
  size_t end = at + (text[at] == ' ' && at + 1 < text.size()), last = at;
  for (std::optional<Sign> sign; end < text.size();) {
    size_t next = end;
    const Sign s = sign_of(next_code_point(text, next));
    if (s != sign.value_or(s)) return sign == Sign::space && last > at ? last : end;
    sign = s;
    last = end;
    end = next;
  }
  return end;
}

// The pairs of the word's tokens, that of the lowest rank first and of equal ones the leftmost.
void Tokenizer::merge_pairs(std::string_view word, std::vector<int>& tokens) const {
  const size_t n = word.size();
  struct Part {
    int token;             // -1: merged into one before it
    size_t before, after;  // n: none
  };
  std::vector<Part> parts(n);
  for (size_t i = 0; i < n; i++) {
    const auto found = tokens_.find(std::string(1, word[i]));
    REQUIRE(found != tokens_.end(), "vocab.json has no token for '", word[i], "'");
    parts[i] = {found->second, i ? i - 1 : n, i + 1};
  }
  const auto merge_of = [&](size_t at) -> const Merge* {
    if (at == n || parts[at].token < 0 || parts[at].after == n) return nullptr;
    const auto m =
        merges_.find(uint64_t(parts[at].token) << 32 | uint64_t(parts[parts[at].after].token));
    return m == merges_.end() ? nullptr : &m->second;
  };
  using Candidate = std::pair<int, size_t>;  // rank, first of the two
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> candidates;
  const auto look = [&](size_t at) {
    if (const Merge* m = merge_of(at)) candidates.push({m->rank, at});
  };
  for (size_t i = 0; i < n; i++) look(i);
  while (!candidates.empty()) {
    const auto [rank, at] = candidates.top();
    candidates.pop();
    const Merge* m = merge_of(at);
    if (!m || m->rank != rank) continue;  // one of the two has been merged since
    Part &left = parts[at], &right = parts[left.after];
    left.token = m->token;
    right.token = -1;
    left.after = right.after;
    if (left.after < n) parts[left.after].before = at;
    look(left.before);
    look(at);
  }
  for (size_t i = 0; i < n; i = parts[i].after) tokens.push_back(parts[i].token);
}

void Tokenizer::encode(std::string_view text, const Take& take) const {
  constexpr size_t kKnownWords = 100'000;
  std::unordered_map<std::string, std::vector<int>> known;  // most words come again
  if (texts_.empty()) {
    std::istringstream in{std::string(text)};
    for (std::string word; in >> word;) {
      char* end;
      const long long token = strtoll(word.c_str(), &end, 10);
      REQUIRE(
          !*end && token >= 0 && token < vocab_, "'", word,
          "' is no token: without a tokenizer beside the checkpoint (tokenizer.json, or vocab.json "
          "and merges.txt) a prompt is the numbers of its tokens, 0 to ",
          vocab_ - 1);
      take({int(token)}, in.eof() ? text.size() : size_t(in.tellg()));
    }
    return;
  }
  std::vector<size_t> places(special_.size(), 0);  // of the next of each
  for (size_t at = 0; at < text.size();) {
    size_t end = text.size(), which = special_.size();
    for (size_t i = 0; i < special_.size(); i++) {
      if (places[i] <= at)
        places[i] = std::min(text.find(texts_[size_t(special_[i])], at), text.size());
      if (places[i] >= end) continue;
      end = places[i];
      which = i;
    }
    while (at < end) {
      const size_t begin = at;
      at = word_end(text.substr(0, end), at);
      const std::string word(text.substr(begin, at - begin));
      if (known.size() > kKnownWords) known.clear();
      std::vector<int>& tokens = known[word];
      if (tokens.empty()) merge_pairs(word, tokens);
      take(tokens, at);
    }
    if (which == special_.size()) continue;
    at += texts_[size_t(special_[which])].size();
    take({special_[which]}, at);
  }
}

std::vector<int> Tokenizer::encode(std::string_view text) const {
  std::vector<int> tokens;
  encode(text, [&](const std::vector<int>& word, size_t) {
    tokens.insert(tokens.end(), word.begin(), word.end());
  });
  return tokens;
}

std::string Tokenizer::decode(int token) const {
  if (texts_.empty()) return std::to_string(token) + " ";
  return size_t(token) < texts_.size() ? texts_[size_t(token)] : "";
}

bool has_tokenizer(const std::string& directory) {
  return std::any_of(kTokenizerFiles.begin(), kTokenizerFiles.end(),
                     [&](const char* name) { return is_there(directory + "/" + name); });
}

void copy_tokenizer(const std::string& from, const std::string& to) {
  namespace fs = std::filesystem;
  for (const fs::path name : kTokenizerFiles)
    if (is_there(from / name) && !fs::equivalent(from, to))
      write_file(to / name, read_file(from / name));
}

void show(const std::string& bytes) {
  for (const char c : bytes)
    putchar(c == '\n' || c == '\t' || (c & 0xe0) ? (c == 127 ? '?' : c) : '?');
  check_printed();  // a reader that has left ends the work
}
