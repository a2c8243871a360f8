// safetensors.cpp: see safetensors.h. JSON is read by nlohmann/json, checksums are xxHash's.
#include "checkpoint/safetensors.h"

#include <fcntl.h>
#include <unistd.h>

#include <bit>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <xxhash.h>

#include "support/progress.h"

static_assert(std::endian::native == std::endian::little, "safetensors are little-endian");

// ---- writing

namespace {

// written beside, and renamed when it is whole; keeps a checksum of what goes through it
class OutputFile {
 public:
  explicit OutputFile(const std::string& path)
      : path_(path),
        beside_(path + ".partial"),
        fd_(::open(beside_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666)) {
    REQUIRE(fd_ >= 0, path_, " cannot be created: ", strerror(errno));
    XXH3_64bits_reset(hash_.get());
  }
  ~OutputFile() {
    if (fd_ >= 0) close(fd_), unlink(beside_.c_str());
  }
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;
  void write(const void* from, int64_t bytes) {
    XXH3_64bits_update(hash_.get(), from, size_t(bytes));
    bytes_ += bytes;
    for (const char* p = static_cast<const char*>(from); bytes > 0;) {
      const ssize_t n = ::write(fd_, p, size_t(bytes));
      REQUIRE(n > 0 || (n < 0 && errno == EINTR), path_, " cannot be written: ", strerror(errno));
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
    REQUIRE(fsync(fd_) == 0, path_, " cannot be written: ", strerror(errno));
    REQUIRE(rename(beside_.c_str(), path_.c_str()) == 0, path_,
            " cannot be written: ", strerror(errno));
    close(fd_);  // after fsync it has nothing left to say
    fd_ = -1;
    return {std::filesystem::path(path_).filename(), bytes_, XXH3_64bits_digest(hash_.get())};
  }

 private:
  static constexpr int64_t kAhead = 16 << 20;
  std::string path_, beside_;
  int fd_;
  int64_t bytes_ = 0, flushing_ = 0;
  std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> hash_{XXH3_createState(),
                                                                 XXH3_freeState};
};

const char* safetensors_name(Dtype dtype) {
  ASSERT(dtype != Dtype::i32);
  return dtype == Dtype::f64 ? "F64" : dtype == Dtype::f32 ? "F32" : "BF16";
}

int64_t size_of_name(const std::string& dtype) {
  return dtype == "F64" ? 8 : dtype == "F32" ? 4 : dtype == "F16" || dtype == "BF16" ? 2 : 0;
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

uint64_t checksum(std::string_view bytes) {
  constexpr size_t kPiece = 16 << 20;
  const std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> state(XXH3_createState(),
                                                                       XXH3_freeState);
  XXH3_64bits_reset(state.get());
  for (size_t at = 0; at < bytes.size(); at += kPiece) {
    const std::string_view piece = bytes.substr(at, kPiece);
    XXH3_64bits_update(state.get(), piece.data(), piece.size());
    bytes_moved += int64_t(piece.size());
  }
  return XXH3_64bits_digest(state.get());
}

std::string read_file(const std::string& path) { return std::string(MappedFile(path, "").view()); }

// ---- reading

SafetensorsFile::SafetensorsFile(const std::string& path) : file_(path, "") {
  uint64_t length = 0;
  REQUIRE(file_.bytes >= 8, path, " is no safetensors file: it has ", file_.bytes, " bytes");
  memcpy(&length, file_.data, 8);
  REQUIRE(length <= uint64_t(file_.bytes - 8), path,
          " is truncated or no safetensors file: its header would have ", length,
          " bytes, and the file has ", file_.bytes);
  const int64_t data = 8 + int64_t(length);
  try {
    const auto header = nlohmann::json::parse(file_.data + 8, file_.data + data);
    for (const auto& [name, value] : header.items()) {
      if (name == "__metadata__") continue;
      Entry e{value.at("dtype"), value.at("shape").get<Shape>(), value.at("data_offsets").at(0),
              value.at("data_offsets").at(1)};
      e.begin += data, e.end += data;
      REQUIRE(data <= e.begin && e.begin <= e.end && e.end <= file_.bytes, path,
              " is truncated: ", name, " would end at byte ", e.end, " of ", file_.bytes);
      REQUIRE(!size_of_name(e.dtype) ||
                  elements(e.shape) * size_of_name(e.dtype) == e.end - e.begin,
              path, ": ", name, " of shape ", to_string(e.shape), " in ", e.dtype,
              " does not take ", e.end - e.begin, " bytes");
      entries_[name] = e;
    }
  } catch (const nlohmann::json::exception& e) {
    throw Error(sentence(path, " has a damaged header: ", e.what()));
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
  const int64_t size = size_of_name(e.dtype);
  REQUIRE(size, path(), " has a tensor in ", e.dtype, "; F64, F32, F16 and BF16 can be read");
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
