// data.cpp: see data.h.
#include "support/data.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <set>
#include <utility>

#include "support/philox.h"

namespace fs = std::filesystem;

// ---- files

MappedFile::MappedFile(const std::string& name, const std::string& whose) : path(name) {
  // a pipe without a writer must not block
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  REQUIRE(fd >= 0, whose, path, " cannot be opened: ", strerror(errno));
  const struct Closer {
    int fd;
    ~Closer() { close(fd); }
  } closer{fd};  // the map stays
  struct stat status = {};
  REQUIRE(fstat(fd, &status) == 0, whose, path, " cannot be examined: ", strerror(errno));
  REQUIRE(!S_ISDIR(status.st_mode), whose, path, " is a directory",
          whose.empty() ? "" : ": name the files in it, such as " + path + "/*.txt");
  REQUIRE(S_ISREG(status.st_mode), whose, path, " is not a regular file");
  bytes = status.st_size;
  REQUIRE(bytes > 0, whose, path, " is empty");
  void* mapped = mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE, fd, 0);
  REQUIRE(mapped != MAP_FAILED, whose, path, " cannot be mapped into memory: ", strerror(errno));
  data = static_cast<const unsigned char*>(mapped);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path(std::move(other.path)), data(std::exchange(other.data, nullptr)), bytes(other.bytes) {}

MappedFile::~MappedFile() {
  if (data) munmap(const_cast<unsigned char*>(data), bytes);
}

std::string content_of(const std::vector<std::string>& paths) {
  constexpr int64_t kBegin = 1 << 20, kPieces = 64, kPiece = 4096;
  std::string all;
  int64_t bytes = 0;
  for (const std::string& path : paths) {
    const MappedFile file(path, "");
    const std::string_view view = file.view();
    const auto add = [&](int64_t at, int64_t count) {
      all += sentence(std::hash<std::string_view>()(view.substr(size_t(at), size_t(count))), " ");
    };
    add(0, kBegin);
    for (int64_t i = 1; i <= kPieces; i++)
      add(std::max<int64_t>(0, (file.bytes - kPiece) / kPieces * i), kPiece);
    bytes += file.bytes;
  }
  return sentence(paths.size(), paths.size() == 1 ? " file of " : " files of ", bytes,
                  " bytes with digest ", std::hash<std::string>()(all));
}

std::string project_root() {
  std::error_code error;
  for (fs::path p = fs::read_symlink("/proc/self/exe", error).parent_path(); p.has_relative_path();
       p = p.parent_path())
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
    if (wanted && i->is_regular_file(none) && i->file_size(none) > 0)
      files.push_back(i->path().lexically_relative(root));
  }
  std::sort(files.begin(), files.end());
  for (std::string& file : files) file = fs::path(root) / file;
  return files;
}

// ---- the dataset

bool holds_tokens(const MappedFile& file) {
  int32_t magic = 0;
  memcpy(&magic, file.data, std::min<size_t>(size_t(file.bytes), sizeof magic));
  return magic == kMagic16 || magic == kMagic32;
}

Dataset::Part Dataset::open_part(const std::string& path) {
  constexpr int64_t kHeader = 256 * sizeof(int32_t);
  MappedFile file(path);
  const int64_t bytes = file.bytes;
  int32_t header[3] = {};
  memcpy(header, file.data, std::min<int64_t>(bytes, sizeof(header)));
  const auto [magic, version, promised] = header;
  if (!holds_tokens(file)) {
    REQUIRE(!path.ends_with(".bin"), "--data: ", path,
            " is no token shard in llm.c's format: it begins with ", magic, ", not with ", kMagic16,
            " (16-bit tokens) or ", kMagic32, " (32-bit tokens)");
    return {std::move(file), 0, 1, 0, bytes};
  }
  const int64_t width = magic == kMagic16 ? 2 : 4, end = kHeader + promised * width;
  const int32_t expected = magic == kMagic16 ? kVersion16 : kVersion32;
  REQUIRE(bytes >= kHeader, "--data: ", path, " ends within its header: it has ", bytes,
          " bytes of ", kHeader);
  REQUIRE(version == expected, "--data: ", path, " is a token shard of version ", version,
          "; expected version ", expected);
  REQUIRE(promised > 0, "--data: ", path, " holds no tokens: its header says ", promised);
  REQUIRE(bytes == end, "--data: ", path, " promises ", promised, " tokens, which take ", end,
          " bytes, but has ", bytes, " bytes, room for ", (bytes - kHeader) / width, " tokens");
  return {std::move(file), kHeader, width, 0, promised};
}

Dataset Dataset::open(const std::vector<std::string>& files, int64_t context, int64_t vocab) {
  constexpr int64_t kCheckedAtOpening = 1 << 20;
  const std::vector<std::string> paths = files.empty() ? project_files(project_root()) : files;
  REQUIRE(!paths.empty(),
          "no --data was given, and the sources of this project, the default, are not where the "
          "program is");
  const auto kind = [](const Part& p) {
    return p.width == 1 ? "text" : p.width == 2 ? "16-bit tokens" : "32-bit tokens";
  };
  Dataset d;
  d.from_ = files.empty() ? sentence("the ", paths.size(), " sources and docs of this project")
            : paths.size() == 1 ? paths[0]
                                : sentence(paths.size(), " files");
  std::set<fs::path> seen;
  for (const std::string& path : paths)
    if (std::error_code none; !seen.insert(fs::weakly_canonical(path, none)).second)
      d.from_ += sentence(" (", path, " is given more than once, and counts as often)");
  d.context_ = context;
  d.vocab_ = vocab;
  for (const std::string& path : paths) {
    d.parts_.push_back(open_part(path));
    Part &part = d.parts_.back(), &first = d.parts_.front();
    REQUIRE(part.width == first.width, "--data mixes ", kind(first), " (", first.file.path,
            ") with ", kind(part), " (", path, "): the files of a run must be of one kind");
    part.first = d.tokens_;
    d.tokens_ += part.count;
    d.read(part.first, std::min(part.count, kCheckedAtOpening));
  }
  const int64_t length = context + 1;
  REQUIRE(d.tokens_ >= 2 * length, "--data: a context of ", context, " needs at least ", 2 * length,
          " tokens, ", length, " to train on and ", length, " held out; ",
          paths.size() == 1 ? paths[0] + " has " : "the files together have ", d.tokens_);
  d.train_ = d.tokens_ - std::max(d.tokens_ / 10, length);
  return d;
}

// Tokens [first, first + count) of the row, across files where need be.
std::vector<int> Dataset::read(int64_t first, int64_t count) const {
  std::vector<int> tokens;
  tokens.reserve(count);
  auto part = std::upper_bound(parts_.begin(), parts_.end(), first,
                               [](int64_t n, const Part& p) { return n < p.first; }) -
              1;
  for (int64_t n = first; n < first + count; n++) {
    if (n == part->first + part->count) ++part;
    const int64_t position = n - part->first;
    uint32_t token = 0;  // little-endian, as is every machine with a GPU
    memcpy(&token, part->file.data + part->offset + position * part->width, part->width);
    REQUIRE(token < uint64_t(vocab_), "--data: ", part->file.path, " has token ", token,
            " at position ", position, ", outside the vocabulary of ", vocab_, " (--vocab)");
    tokens.push_back(int(token));
  }
  return tokens;
}

std::vector<int> Dataset::sequence(int64_t step, int64_t index, uint64_t seed) const {
  ASSERT(step >= 0 && index >= 0 && index <= UINT32_MAX);
  // a sequence may start at tokens 0 to train - context - 1
  const uint64_t starts = train_ - context_;
  const Philox4 r = philox(uint32_t(index), uint32_t(step), uint32_t(step >> 32), 2, uint32_t(seed),
                           uint32_t(seed >> 32));
  const uint64_t bits = uint64_t(r.v[1]) << 32 | r.v[0];
  // the 64 bits as a fraction of 1, times starts
  const uint64_t start = uint64_t((unsigned __int128)bits * starts >> 64);
  return read(int64_t(start), context_ + 1);
}

std::vector<int> Dataset::held_out(int64_t i) const {
  ASSERT(i >= 0 && i < held_out_sequences());
  return read(train_ + i * context_, context_ + 1);
}

std::vector<std::string> Dataset::paths() const {
  std::vector<std::string> paths;
  for (const Part& part : parts_) paths.push_back(part.file.path);
  return paths;
}

std::string Dataset::describe() const {
  return sentence(from_, ", ", is_text() ? "text" : "token shards", ": ", train_,
                  " tokens to train on, ", tokens_ - train_, " held out");
}
