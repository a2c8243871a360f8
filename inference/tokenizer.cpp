// tokenizer.cpp: see tokenizer.h.
#include "inference/tokenizer.h"

#include <algorithm>
#include <bit>
#include <filesystem>
#include <set>
#include <span>

#include "inference/sampling.h"
#include "inference/unicode_table.h"
#include "support/json.h"
#include "support/metrics.h"

using nlohmann::json;

// ---- UTF-8

constexpr char32_t kNoCodePoint = 0x110000;

// The code point that begins at `at`, which moves past it. A byte that begins none is
// kNoCodePoint, and `at` moves by that byte alone.
static char32_t next_code_point(std::string_view text, size_t& at) {
  constexpr char32_t kLeast[] = {0, 0x80, 0x800, 0x10000};  // what needs so many bytes more
  const unsigned char first = text[at++];
  if (first < 0x80) return first;
  const size_t more = std::countl_one(first) - 1;
  if (more == 0 || more > 3 || at + more > text.size()) return kNoCodePoint;
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
  const SignRun* run = std::ranges::upper_bound(kSigns, c, {}, &SignRun::first);
  return run != kSigns && c <= run[-1].last ? run[-1].sign : Sign::other;
}

// ---- the files

constexpr int64_t kLargest = 10'000'000;  // number of a token

// They write each byte as a printable character: itself, or 256 and up for the others in order.
static std::string to_bytes(const std::string& written) {
  static const std::map<char32_t, char> bytes = [] {
    std::map<char32_t, char> all;
    char32_t next = 256;
    for (char32_t b = 0; b < 256; b++) {
      const bool printable = (b >= '!' && b <= '~') || (b >= 0xa1 && b != 0xad);
      all[printable ? b : next++] = char(b);
    }
    return all;
  }();
  std::string text;
  for (size_t at = 0; at < written.size();) {
    const auto found = bytes.find(next_code_point(written, at));
    REQUIRE(found != bytes.end(), "'", written, "' is no token of byte-level byte-pair encoding");
    text += found->second;
  }
  return text;
}

static const std::string kEndOfText = "<|endoftext|>";

Tokenizer::Tokenizer(const std::string& directory, int64_t vocab, bool bytes, int64_t end)
    : vocab_(vocab), end_(end) {
  const std::string base = directory + "/", one = base + kTokenizerJson;
  if (!has_tokenizer(directory)) {
    if (bytes || vocab == 256)
      for (int b = 0; b < std::min<int64_t>(vocab, 256); b++) add(b, std::string(1, char(b)));
  } else if (is_there(one)) {
    const std::string text = read_file(one);
    key_ = checksum(text);
    read_json(one, text, [&](const json& file) { read_tokenizer_json(file); });
  } else {
    const std::string words = read_file(base + kVocab), merges = read_file(base + kMerges),
                      more = base + kAddedTokens, added = is_there(more) ? read_file(more) : "";
    key_ = checksum(words + merges + added);
    if (!added.empty())
      read_json(more, added, [&](const json& tokens) {
        for (const auto& [text, number] : tokens.items()) add_special(number, text);
      });
    read_json(base + "vocab.json or merges.txt", words, [&](const json& vocabulary) {
      if (vocabulary.contains(kEndOfText) && !tokens_.contains(kEndOfText))
        add_special(vocabulary[kEndOfText], kEndOfText);
      json model = {{"vocab", vocabulary}, {"merges", json::array()}};
      std::istringstream lines(merges);
      for (std::string line; std::getline(lines, line);)
        if (line.find_first_not_of('\r') != line.npos && !line.starts_with("#version"))
          model["merges"].push_back(line);
      read_model(model);
    });
  }
  if (const auto found = tokens_.find(kEndOfText); end < 0 && found != tokens_.end())
    end_ = found->second;
  std::ranges::sort(special_, std::greater{}, [&](int t) { return texts_[t].size(); });
}

void Tokenizer::add(int64_t token, const std::string& text) {
  REQUIRE(vocab_ == 0 || token < vocab_, "it has token ", token, ", outside the vocabulary of ",
          vocab_, " (--vocab)");
  if (size() <= token) texts_.resize(token + 1);
  std::string& place = texts_[token];
  REQUIRE(!text.empty() && place.empty() && tokens_.emplace(text, token).second, "it has token ",
          token, " twice, an empty one, or two of one text");
  place = text;
  longest_ = std::max(longest_, int64_t(text.size()));
}

void Tokenizer::add_special(const json& number, const std::string& text) {
  const int64_t token = whole_number(number, kLargest);
  if (vocab_ && token >= vocab_) return;  // as padding is, which no model has seen
  add(token, text);
  special_.push_back(tokens_.at(text));
}

// Of all that such a file can ask for, what GPT-2's asks for.
void Tokenizer::read_tokenizer_json(const json& file) {
  const json &model = file.at("model"), &words = file.at("pre_tokenizer");
  REQUIRE(model.value("type", "BPE") == "BPE" && words.at("type") == "ByteLevel",
          "it is not of GPT-2's encoding, byte pairs (BPE) over words of ByteLevel");
  const json gpt2 = json::parse(R"({
    "/normalizer": null,
    "/pre_tokenizer/add_prefix_space": false,
    "/pre_tokenizer/use_regex": true,
    "/model/dropout": null,
    "/model/continuing_subword_prefix": "",
    "/model/end_of_word_suffix": "",
    "/model/byte_fallback": false,
    "/model/ignore_merges": false})");
  for (const auto& [place, value] : gpt2.items()) {
    const json found = file.value(json::json_pointer(place), value);
    REQUIRE(found == value || found.is_null() || found == "" || found == 0, place.substr(1), " is ",
            found, "; GPT-2's encoding has ", value);
  }
  const json after = file.value("post_processor", json());
  REQUIRE(after.is_null() || after.at("type") == "ByteLevel" ||
              (after.at("type") == "TemplateProcessing" && after.at("special_tokens").empty()),
          "post_processor adds something to a text: ", after);
  for (const json& added : file.value("added_tokens", json::array())) {
    for (const char* key : {"single_word", "lstrip", "rstrip"})
      REQUIRE(!added.value(key, false), key, " is true; GPT-2's encoding has false");
    add_special(added.at("id"), added.at("content"));
  }
  read_model(model);
}

void Tokenizer::read_model(const json& model) {
  std::unordered_map<std::string, int> special;
  for (const int t : special_) special[texts_[t]] = t;
  for (const auto& [written, number] : model.at("vocab").items()) {
    const auto added = special.find(written);
    if (added == special.end()) add(whole_number(number, kLargest), to_bytes(written));
    else REQUIRE(number == added->second, "it has two numbers of '", written, "'");
  }
  REQUIRE(size() > 0, "its vocabulary is empty");
  const json& merges = model.at("merges");
  int rank = 0;
  std::set<int> made(special_.begin(), special_.end());
  for (const json& pair : merges) {
    std::vector<std::string> parts;
    if (pair.is_array()) parts = pair;
    else {
      std::istringstream line(pair.get<std::string>());
      for (std::string part; line >> part;) parts.push_back(part);
    }
    REQUIRE(parts.size() == 2, pair, " is no pair");
    const auto token_of = [&](const std::string& written) {
      const auto found = tokens_.find(to_bytes(written));
      REQUIRE(found != tokens_.end(), "it merges ", pair, ", but its vocabulary lacks '", written,
              "'");
      return found->second;
    };
    const int whole = token_of(parts[0] + parts[1]);
    merges_[{token_of(parts[0]), token_of(parts[1])}] = {rank++, whole};
    made.insert(whole);
  }
  // but for a few, as "<pad>", "[PAD]" or RoBERTa's "madeupword0000", which not every file names
  std::vector<int> left;
  for (int t = 0; t < size(); t++)
    if (texts_[t].size() > 1 && texts_[t].find_first_of("<[") != 0 && !made.contains(t))
      left.push_back(t);
  REQUIRE(100 * int64_t(left.size()) <= size(), "none of its ", merges.size(), " merges makes its ",
          "token '", texts_[left[0]], "', or ", left.size() - 1, " others: some are missing");
}

// ---- encoding

// Where the word that begins at `at` ends. GPT-2's words are an English suffix ('s 't 're 've 'm
// 'll 'd), or a run of letters, numbers or other signs with the space before it; of several spaces
// the last one belongs to what follows.
static size_t word_end(std::string_view text, size_t at) {
  if (text[at] == '\'')
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
  std::map<size_t, int> parts;  // tokens, by where they begin
  for (size_t at = 0; at < word.size(); at++) {
    const auto found = tokens_.find(std::string(1, word[at]));
    REQUIRE(found != tokens_.end(), "the vocabulary has no token for '", word[at], "'");
    parts[at] = found->second;
  }
  const auto merge_of = [&](auto part) -> const Merge* {  // that it makes with the next one
    const auto next = part == parts.end() ? part : std::next(part);
    if (next == parts.end()) return nullptr;
    const auto m = merges_.find({part->second, next->second});
    return m == merges_.end() ? nullptr : &m->second;
  };
  std::set<std::pair<int, size_t>> candidates;  // rank, first of the two
  const auto look = [&](auto part) {
    if (const Merge* m = merge_of(part)) candidates.insert({m->rank, part->first});
  };
  for (auto part = parts.begin(); part != parts.end(); ++part) look(part);
  while (!candidates.empty()) {
    const auto [rank, at] = candidates.extract(candidates.begin()).value();
    const auto left = parts.find(at);
    const Merge* m = merge_of(left);
    if (!m || m->rank != rank) continue;  // one of the two has been merged since
    left->second = m->token;
    parts.erase(std::next(left));
    look(left);
    if (left != parts.begin()) look(std::prev(left));
  }
  for (const auto& [at, token] : parts) tokens.push_back(token);
}

// Without a tokenizer.
void Tokenizer::encode_numbers(const std::string& text, const Take& take) const {
  std::istringstream words(text);
  for (std::string word; words >> word;) {
    char* end;
    const long long token = strtoll(word.c_str(), &end, 10);
    REQUIRE(end == word.data() + word.size() && token >= 0 && token < vocab_, "'", word.c_str(),
            "' is no token: without a tokenizer beside the checkpoint (tokenizer.json, or "
            "vocab.json and merges.txt) a prompt is the numbers of its tokens, 0 to ",
            vocab_ - 1);
    take({int(token)}, text.size());
  }
}

void Tokenizer::encode(std::string_view text, const Take& take) const {
  constexpr size_t kKnownWords = 100'000;
  if (texts_.empty()) return encode_numbers(std::string(text), take);
  std::unordered_map<std::string, std::vector<int>> known;  // most words come again
  std::vector<size_t> places(special_.size(), 0);           // of the next of each
  for (size_t at = 0; at < text.size();) {
    size_t end = text.size();
    std::vector<int> special;  // what stands at the end: one or none
    for (size_t i = 0; i < special_.size(); i++) {
      if (places[i] <= at) places[i] = text.find(texts_[special_[i]], at);
      if (places[i] >= end) continue;
      end = places[i];
      special = {special_[i]};
    }
    while (at < end) {
      const std::string word(text.substr(at, word_end(text.substr(0, end), at) - at));
      if (known.size() > kKnownWords) known.clear();
      std::vector<int>& tokens = known[word];
      if (tokens.empty()) merge_pairs(word, tokens);
      at += word.size();
      take(tokens, at);
    }
    if (special.empty()) continue;
    at += texts_[special[0]].size();
    take(special, at);
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
  return size_t(token) < texts_.size() ? texts_[token] : "";
}

void Tokenizer::silence(std::span<double> logits) const {
  if (texts_.empty()) return;
  for (size_t token = 0; token < logits.size(); token++) {
    const bool has_text = token < texts_.size() && !texts_[token].empty();
    if (!has_text && int(token) != end_) logits[token] = kNever;
  }
}

bool has_tokenizer(const std::string& directory) {
  const std::span three(kTokenizerFiles.begin(), 3);  // the last only adds to two of them
  return !directory.empty() && std::ranges::any_of(three, [&](const std::string& name) {
    return is_there(directory + "/" + name);
  });
}

void copy_tokenizer(const std::string& from, const std::string& to) {
  namespace fs = std::filesystem;
  if (!from.empty() && fs::equivalent(from, to)) return;
  for (const fs::path name : kTokenizerFiles) {
    const bool brings = !from.empty() && is_there(from / name),
               is_same =
                   brings && is_there(to / name) && read_file(from / name) == read_file(to / name);
    if (is_same) continue;
    put_aside(to / name, "tokenizer files");
    if (brings) write_file(to / name, read_file(from / name));
  }
}

// ---- printing

std::string Screen::printed(const std::string& bytes) {
  if (!is_terminal_) return bytes;
  std::string text = begun_ + bytes;
  const bool begins = text.ends_with('\xc2');
  begun_ = text.substr(text.size() - begins);
  text.resize(text.size() - begins);
  return printable(text);
}

void Screen::show(const std::string& bytes) {
  const std::string text = printed(bytes);
  fwrite(text.data(), 1, text.size(), stdout);
  check_printed();  // a reader that has left ends the work
}
