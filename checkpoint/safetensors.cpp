// safetensors.cpp: see safetensors.h. JSON is read by nlohmann/json, checksums are xxHash's.
#include "checkpoint/safetensors.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <memory>
#include <tuple>
#include <xxhash.h>

#include "support/json.h"
#include "support/progress.h"

static_assert(std::endian::native == std::endian::little, "safetensors are little-endian");

// ---- writing

namespace {

class Checksum {
 public:
  Checksum() { XXH3_64bits_reset(state_.get()); }
  void add(const void* from, size_t bytes) { XXH3_64bits_update(state_.get(), from, bytes); }
  uint64_t value() const { return XXH3_64bits_digest(state_.get()); }

 private:
  std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> state_{XXH3_createState(),
                                                                  XXH3_freeState};
};

// written beside, and renamed when it is whole; keeps a checksum of what goes through it
class OutputFile {
 public:
  explicit OutputFile(const std::string& path)
      : path_(path),
        beside_(path + ".partial"),
        fd_(::open(beside_.c_str(), O_WRONLY | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0666)) {
    REQUIRE(fd_ >= 0, beside_, " cannot be created: ", strerror(errno));
    // one that a process left when it was killed is begun again
    if (flock(fd_, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
      close(fd_);
      throw Error(path_ + " is being written by another process");
    }
    if (ftruncate(fd_, 0) != 0) fail();
  }
  ~OutputFile() {
    if (fd_ < 0) return;
    unlink(beside_.c_str());
    close(fd_);
  }
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;
  void write(const void* from, int64_t bytes) {
    sum_.add(from, size_t(bytes));
    bytes_ += bytes;
    for (const char* p = static_cast<const char*>(from); bytes > 0;) {
      const ssize_t n = ::write(fd_, p, size_t(bytes));
      if (n == 0 || (n < 0 && errno != EINTR)) fail();
      if (n > 0) p += n, bytes -= n, bytes_moved += n;
    }
    // the disk starts now and works while the next arrays are read
    if (bytes_ - flushing_ >= kAhead) {
      sync_file_range(fd_, flushing_, bytes_ - flushing_, SYNC_FILE_RANGE_WRITE);
      flushing_ = bytes_;
    }
  }
  WrittenFile finish() {
    // in pieces, so that the watch sees a slow disk move on; what fails, fsync says
    for (int64_t at = 0; at < bytes_; at += kAhead, bytes_moved++)
      sync_file_range(fd_, at, kAhead,
                      SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE |
                          SYNC_FILE_RANGE_WAIT_AFTER);
    if (fsync(fd_) != 0 || rename(beside_.c_str(), path_.c_str()) != 0) fail();
    close(fd_);  // after fsync it has nothing left to say
    fd_ = -1;
    return {std::filesystem::path(path_).filename(), bytes_, sum_.value()};
  }

 private:
  [[noreturn]] void fail() {
    throw Error(sentence(path_, " cannot be written: ", strerror(errno)));
  }
  static constexpr int64_t kAhead = 16 << 20;
  std::string path_, beside_;
  int fd_;
  int64_t bytes_ = 0, flushing_ = 0;
  Checksum sum_;
};

// Calls take(block) with what is in a file, one block after the other. An error of the disk is an
// Error here, where a map of the file would end the process.
template <class Take> void for_blocks(const std::string& path, Take take) {
  // a pipe without a writer must not block
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  REQUIRE(fd >= 0, path, " cannot be opened: ", strerror(errno));
  std::vector<char> block(1 << 20);
  ssize_t n;
  while ((n = ::read(fd, block.data(), block.size())) != 0) {
    if (n < 0 && errno != EINTR) break;
    if (n < 0) continue;
    take(std::string_view(block.data(), size_t(n)));
    bytes_moved += n;
  }
  const int error = n < 0 ? errno : 0;
  close(fd);
  REQUIRE(!error, path, " cannot be read: ", strerror(error));
}

const char* safetensors_name(Dtype dtype) {
  ASSERT(dtype != Dtype::i32);
  return dtype == Dtype::f64 ? "F64" : dtype == Dtype::f32 ? "F32" : "BF16";
}

// of an element of any dtype that the format has, which its name says
int64_t bits_of(const std::string& dtype) {
  static const std::set<std::string> known = {
      "F64",     "F32",         "F16",         "BF16",    "BOOL",    "U8",  "I8",      "U16",
      "I16",     "U32",         "I32",         "U64",     "I64",     "C64", "F8_E5M2", "F8_E4M3",
      "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4"};
  REQUIRE(known.count(dtype), "there is no dtype ", dtype);
  return dtype == "BOOL" ? 8 : atoll(dtype.c_str() + dtype.find_first_of("123468"));
}

std::vector<int64_t> whole_numbers(const nlohmann::json& list) {
  REQUIRE(list.is_array(), list, " is no list");
  std::vector<int64_t> numbers;
  for (const auto& n : list) numbers.push_back(whole_number(n));
  return numbers;
}

}  // namespace

WrittenFile write_safetensors(const std::string& path, const std::vector<NamedArray>& arrays) {
  nlohmann::ordered_json header;
  header["__metadata__"] = {{"format", "pt"}};  // readers of Hugging Face ask for it
  int64_t end = 0;
  for (const NamedArray& a : arrays) {
    const int64_t begin = end;
    end += elements(a.shape) * int64_t(size_of(a.dtype));
    header[a.name] = {{"dtype", safetensors_name(a.dtype)},
                      {"shape", a.shape},
                      {"data_offsets", {begin, end}}};
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const uint64_t length = text.size();
  OutputFile file(path);
  file.write(&length, sizeof length);
  file.write(text.data(), int64_t(text.size()));
  std::vector<char> bytes;
  for (const NamedArray& a : arrays) {
    bytes.resize(size_t(elements(a.shape)) * size_of(a.dtype));
    a.read(bytes.data());
    file.write(bytes.data(), int64_t(bytes.size()));
  }
  return file.finish();
}

void write_file(const std::string& path, const std::string& text) {
  OutputFile file(path);
  file.write(text.data(), int64_t(text.size()));
  file.finish();
}

uint64_t checksum(std::string_view bytes) { return XXH3_64bits(bytes.data(), bytes.size()); }

std::string read_file(const std::string& path) {
  std::string text;
  for_blocks(path, [&](std::string_view block) { text += block; });
  return text;
}

WrittenFile measure(const std::string& path) {
  Checksum sum;
  int64_t bytes = 0;
  for_blocks(path, [&](std::string_view block) {
    sum.add(block.data(), block.size());
    bytes += int64_t(block.size());
  });
  return {path, bytes, sum.value()};
}

bool is_there(const std::string& path) {
  struct stat status;
  if (stat(path.c_str(), &status) == 0) return true;
  REQUIRE(errno == ENOENT || errno == ENOTDIR, path, " cannot be examined: ", strerror(errno));
  return false;
}

// ---- reading

SafetensorsFile::SafetensorsFile(const std::string& path) : file_(path, "") {
  constexpr uint64_t kLongest = 100'000'000;
  uint64_t length = 0;
  REQUIRE(file_.bytes >= 8, path, " is no safetensors file: it has ", file_.bytes, " bytes");
  memcpy(&length, file_.data, 8);
  REQUIRE(length <= std::min(kLongest, uint64_t(file_.bytes - 8)), path,
          " is truncated or no safetensors file: its header would have ", length,
          " bytes, and the file has ", file_.bytes);
  const int64_t data = 8 + int64_t(length);
  read_json(path, " has a damaged header: ", [&] {
    const auto header = parse_json(file_.view().substr(8, length));
    REQUIRE(header.is_object(), "it is no object of names");
    for (const auto& [name, value] : header.items())
      if (name != "__metadata__") entries_[name] = entry(name, value, data);
      else if (!value.is_null()) value.get<std::map<std::string, std::string>>();
  });
  check_places(data);
}

SafetensorsFile::Entry SafetensorsFile::entry(const std::string& name, const nlohmann::json& value,
                                              int64_t data) const {
  const auto place = whole_numbers(value.at("data_offsets"));
  Entry e{value.at("dtype"), whole_numbers(value.at("shape")), 0, 0};
  REQUIRE(place.size() == 2, name, " has ", place.size(), " data_offsets, expected 2");
  REQUIRE(place[0] <= place[1] && place[1] <= file_.bytes - data, path(), " is truncated: ", name,
          " would end at byte ", place[1], " of ", file_.bytes - data);
  int64_t bits = bits_of(e.dtype);
  bool fits = true;
  for (const int64_t n : e.shape) fits = fits && !__builtin_mul_overflow(bits, n, &bits);
  REQUIRE(fits && bits % 8 == 0 && bits / 8 == place[1] - place[0], path(), ": ", name,
          " of shape ", to_string(e.shape), " in ", e.dtype, " does not take ", place[1] - place[0],
          " bytes");
  e.begin = data + place[0];
  e.end = data + place[1];
  return e;
}

// Every byte of the data belongs to one tensor.
void SafetensorsFile::check_places(int64_t data) const {
  std::vector<std::tuple<int64_t, int64_t, std::string>> places{{file_.bytes, file_.bytes, "end"}};
  for (const auto& [name, e] : entries_) places.emplace_back(e.begin, e.end, name);
  std::sort(places.begin(), places.end());
  int64_t next = data;
  for (const auto& [begin, end, name] : places) {
    REQUIRE(begin == next, path(),
            begin > next ? " has bytes that belong to no tensor before "
                         : " has bytes of two tensors in ",
            name, ": it begins at byte ", begin, ", and what comes before ends at ", next);
    next = end;
  }
}

const SafetensorsFile::Entry& SafetensorsFile::at(const std::string& name) const {
  const auto found = entries_.find(name);
  REQUIRE(found != entries_.end(), path(), " has no tensor ", name);
  return found->second;
}

static float from_half(uint16_t h) {
  const int exponent = h >> 10 & 31, fraction = h & 1023;
  const float magnitude = exponent == 0    ? std::ldexp(float(fraction), -24)
                          : exponent == 31 ? (fraction ? NAN : INFINITY)
                                           : std::ldexp(float(1024 + fraction), exponent - 25);
  return h >> 15 ? -magnitude : magnitude;
}

template <class T> static T take(const unsigned char* p) {
  T value;
  memcpy(&value, p, sizeof value);
  return value;
}

static double element(const unsigned char* p, const std::string& dtype) {
  if (dtype == "F64") return take<double>(p);
  if (dtype == "F32") return take<float>(p);
  const uint16_t bits = take<uint16_t>(p);
  return dtype == "F16" ? from_half(bits) : std::bit_cast<float>(uint32_t(bits) << 16);
}

void SafetensorsFile::read(const Entry& e, int64_t first, int64_t count, Dtype dtype,
                           void* to) const {
  const bool readable = e.dtype == "F64" || e.dtype == "F32" || e.dtype.ends_with("F16");
  REQUIRE(readable, path(), " has a tensor in ", e.dtype, "; F64, F32, F16 and BF16 can be read");
  const int64_t size = bits_of(e.dtype) / 8;
  ASSERT(first >= 0 && first + count <= elements(e.shape));
  const unsigned char* from = file_.data + e.begin + first * size;
  bytes_moved += count * size;
  if (e.dtype == safetensors_name(dtype)) {
    memcpy(to, from, size_t(count * size));
    return;
  }
  ASSERT(dtype == Dtype::f64 || dtype == Dtype::f32);
  for (int64_t i = 0; i < count; i++)
    if (dtype == Dtype::f64) static_cast<double*>(to)[i] = element(from + i * size, e.dtype);
    else static_cast<float*>(to)[i] = float(element(from + i * size, e.dtype));
}
