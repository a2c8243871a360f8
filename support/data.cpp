// data.cpp: see data.h.
#include "support/data.h"

#include <algorithm>
#include <filesystem>
#include <set>

#include "support/philox.h"

namespace fs = std::filesystem;

// ---- files

std::string project_root() {
  std::error_code error;
  // build/ may be a link to another disk: then where make runs
  for (fs::path p : {fs::read_symlink("/proc/self/exe", error), fs::current_path(error) / "build"})
    while ((p = p.parent_path()).has_relative_path())
      if (fs::exists(p / "train_gpt.cpp", error)) return p;
  return "";
}

std::vector<std::string> project_files(const std::string& root) {
  constexpr auto kOptions = fs::directory_options::skip_permission_denied;
  static const std::set<std::string> kExtensions = {".md", ".h", ".cpp", ".cu", ".cuh"};
  std::vector<std::string> files;
  std::error_code walk, none;  // what cannot be read is passed over
  for (auto i = fs::recursive_directory_iterator(root, kOptions, walk); !walk && i != fs::end(i);
       i.increment(walk)) {
    const std::string name = i->path().filename();
    if (i->is_directory(none) && (name == "build" || name[0] == '.')) i.disable_recursion_pending();
    const bool wanted = name == "Makefile" || kExtensions.count(i->path().extension());
    if (wanted && i->is_regular_file(none) && i->file_size(none) > 0) files.push_back(i->path());
  }
  std::ranges::sort(files);
  return files;
}

// ---- the dataset

const ShardFormat* shard_format(const MappedFile& file) {
  int32_t magic = 0;
  file.view.copy(reinterpret_cast<char*>(&magic), sizeof magic);
  const auto format = std::ranges::find(kShardFormats, magic, &ShardFormat::magic);
  return format == std::end(kShardFormats) ? nullptr : format;
}

Dataset::Part Dataset::open_part(const std::string& path) {
  const auto file = std::make_shared<const OpenFile>(path, OpenFile::kToRead);
  const MappedFile mapped(path, *file);
  const int64_t bytes = mapped.view.size();
  const ShardFormat* format = shard_format(mapped);
  if (!format) {
    REQUIRE(!path.ends_with(".bin"), path, " is no token shard in llm.c's format");
    return {path, file, 0, 1, 0, bytes};
  }
  int32_t header[3] = {};
  mapped.view.copy(reinterpret_cast<char*>(header), sizeof header);
  const auto [magic, version, promised] = header;
  const int64_t end = kShardHeader + promised * format->width;
  REQUIRE(version == format->version, path, " is a token shard of version ", version,
          "; expected version ", format->version);
  REQUIRE(promised > 0, path, " holds no tokens: its header says ", promised);
  REQUIRE(bytes == end, path, " promises ", promised, " tokens, which take ", end,
          " bytes, but has ", bytes, " bytes");
  return {path, file, kShardHeader, format->width, 0, promised};
}

void Dataset::check_file(const std::string& path) { open_part(path); }

Dataset Dataset::open(const std::vector<std::string>& files, int64_t context, int64_t vocab) {
  constexpr int64_t kCheckedAtOpening = 1 << 20;
  Dataset d;
  d.paths = files.empty() ? project_files(project_root()) : files;
  REQUIRE(!d.paths.empty(),
          "no --data was given, and the sources of this project, the default, are neither above "
          "the program nor here");
  d.from_ = files.empty() ? sentence("the ", d.paths.size(), " sources and docs of this project")
            : d.paths.size() == 1 ? d.paths[0]
                                  : sentence(d.paths.size(), " files");
  open_many_files();  // shards come in thousands
  std::set<fs::path> seen;
  d.context_ = context;
  d.vocab_ = vocab;
  for (const std::string& path : d.paths) {
    if (std::error_code none; !seen.insert(fs::weakly_canonical(path, none)).second)
      d.from_ += sentence(" (", path,
                          " is given more than once, and counts as often: what is held out may be "
                          "trained on)");
    d.parts_.push_back(open_part(path));
    Part &part = d.parts_.back(), &first = d.parts_.front();
    REQUIRE(part.width == first.width, "--data mixes tokens of ", 8 * first.width, " bits (",
            first.path, ") and ", 8 * part.width, " bits (", path, ")");
    part.first = d.tokens_;
    d.tokens_ += part.count;
    d.read(part.first, std::min(part.count, kCheckedAtOpening));
  }
  const int64_t length = context + 1;
  REQUIRE(d.tokens_ >= 2 * length, "--data: a context of ", context, " needs at least ", 2 * length,
          " tokens, ", length, " to train on and ", length, " held out; there are ", d.tokens_);
  d.train_ = d.tokens_ - std::max(d.tokens_ / 10, length);
  d.content = content_of(d.paths);
  return d;
}

// Tokens [first, first + count) of the row, across files where need be.
std::vector<int> Dataset::read(int64_t first, int64_t count) const {
  std::vector<int> tokens;
  tokens.reserve(count);
  auto part = std::ranges::upper_bound(parts_, first, {}, &Part::first) - 1;
  for (const int64_t end = first + count; first < end; first = (part++)->end()) {
    const int64_t start = first - part->first;  // in this file
    std::string bytes((std::min(end, part->end()) - first) * part->width, 0);
    read_at(*part->file, part->path, part->offset + start * part->width, bytes.size(),
            bytes.data());
    for (size_t at = 0; at < bytes.size(); at += part->width) {
      uint32_t token = 0;  // little-endian, as is every machine with a GPU
      bytes.copy(reinterpret_cast<char*>(&token), part->width, at);
      REQUIRE(token < vocab_, part->path, " has token ", token, " at position ",
              start + at / part->width, ", outside the vocabulary of ", vocab_, " (--vocab)");
      tokens.push_back(token);
    }
  }
  return tokens;
}

std::vector<int> Dataset::sequence(int64_t step, int64_t index, uint64_t seed) const {
  ASSERT(step >= 0 && index >= 0 && index <= UINT32_MAX);
  // a sequence may start at tokens 0 to train - context - 1
  const uint64_t starts = train_ - context_;
  const Philox4 r = philox(index, step, step >> 32, 2, seed, seed >> 32);
  const uint64_t bits = uint64_t(r.v[1]) << 32 | r.v[0];
  // the 64 bits as a fraction of 1, times starts
  return read((unsigned __int128)bits * starts >> 64, context_ + 1);
}

std::vector<int> Dataset::held_out(int64_t i) const {
  const int64_t n = held_out_sequences();
  ASSERT(i >= 0 && i < n);
  return read(train_ + i * all_held_out() / n * context_, context_ + 1);
}

std::string Dataset::describe() const {
  return sentence(from_, ", ", is_text() ? "text" : "token shards", ": ", train_,
                  " tokens to train on, ", tokens_ - train_, " held out");
}
