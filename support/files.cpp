// files.cpp: see files.h. Checksums are xxHash's.
#include "support/files.h"

#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <filesystem>
#include <xxhash.h>

// ---- reading

// An Error where a file has no end (a device) or, unless that is wanted, where its writer may never
// come (a pipe).
static struct stat examine(const OpenFile& file, const std::string& path,
                           bool may_be_pipe = false) {
  struct stat status;
  SYSTEM_CHECK(fstat(file.fd, &status) == 0, path, " cannot be examined");
  REQUIRE(!S_ISDIR(status.st_mode), path, " is a directory: name a file in it");
  REQUIRE(S_ISREG(status.st_mode) || (may_be_pipe && S_ISFIFO(status.st_mode)), path,
          " is not a regular file");
  return status;
}

MappedFile::MappedFile(const std::string& name, const OpenFile& file) : path(name) {
  const size_t bytes = examine(file, path).st_size;
  REQUIRE(bytes > 0, path, " is empty");
  void* mapped = mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE, file.fd, 0);
  SYSTEM_CHECK(mapped != MAP_FAILED, path, " cannot be mapped into memory");
  map = {mapped, [=](void* at) { munmap(at, bytes); }};
  view = {static_cast<const char*>(mapped), bytes};
}

void read_at(const OpenFile& file, const std::string& path, int64_t at, int64_t bytes, char* to) {
  for (int64_t done = 0; done < bytes;) {
    const ssize_t n = pread(file.fd, to + done, bytes - done, at + done);
    SYSTEM_CHECK(n >= 0, path, " cannot be read");
    REQUIRE(n > 0, path, " has become shorter while it was read");
    done += n;
    bytes_moved += n;
  }
}

bool is_there(const std::string& path) {
  struct stat status;
  if (stat(path.c_str(), &status) == 0) return true;
  SYSTEM_CHECK(errno == ENOENT || errno == ENOTDIR, path, " cannot be examined");
  return false;
}

std::vector<std::string> names_in(const std::string& directory) {
  std::vector<std::string> names;
  std::error_code error;
  for (std::filesystem::directory_iterator i(directory, error), end; !error && i != end;
       i.increment(error))
    names.push_back(i->path().filename());
  REQUIRE(!error, directory, " cannot be listed: ", error.message());
  return names;
}

void open_many_files() {
  rlimit files;
  if (getrlimit(RLIMIT_NOFILE, &files)) return;
  files.rlim_cur = files.rlim_max;
  setrlimit(RLIMIT_NOFILE, &files);
}

// Calls take(block) with what is in a file, one block after the other.
template <class Take>
static void for_blocks(const std::string& path, Take take, bool may_be_pipe = false) {
  const OpenFile file(path, may_be_pipe ? O_RDONLY : OpenFile::kToRead);
  examine(file, path, may_be_pipe);
  std::vector<char> block(1 << 20);
  while (true) {
    const ssize_t n = read(file.fd, block.data(), block.size());
    SYSTEM_CHECK(n >= 0, path, " cannot be read");
    if (n == 0) return;
    take(std::string_view(block.data(), n));
    bytes_moved += n;
  }
}

std::string read_file(const std::string& path, bool may_be_pipe, size_t longest) {
  std::string text;
  for_blocks(
      path,
      [&](std::string_view block) {
        text += block;
        REQUIRE(text.size() <= longest, path, " has more than ", longest, " bytes");
      },
      may_be_pipe);
  return text;
}

// ---- checksums

namespace {

// of pieces
struct Checksum {
  Checksum() { XXH3_64bits_reset(state.get()); }
  void add(std::string_view piece) {
    XXH3_64bits_update(state.get(), piece.data(), piece.size());
    file.bytes += piece.size();
  }
  WrittenFile end() {
    file.checksum = XXH3_64bits_digest(state.get());
    return file;
  }
  WrittenFile file;
  std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> state{XXH3_createState(),
                                                                 XXH3_freeState};
};

}  // namespace

uint64_t checksum(std::string_view bytes) { return XXH3_64bits(bytes.data(), bytes.size()); }

WrittenFile measure(const std::string& path) {
  Checksum sum;
  for_blocks(path, [&](std::string_view block) { sum.add(block); });
  return sum.end();
}

std::string content_of(const std::vector<std::string>& paths) {
  constexpr size_t kPiece = 16384;
  const size_t pieces = std::max<size_t>(64, 4096 / paths.size());  // of a file
  std::string sums;
  size_t bytes = 0;
  for (const std::string& path : paths) {
    const OpenFile file(path, OpenFile::kToRead);
    const size_t size = MappedFile(path, file).view.size();
    for (size_t at = 0; at < size; at += std::max(size / pieces, kPiece)) {
      std::string piece(std::min(kPiece, size - at), 0);
      read_at(file, path, at, piece.size(), piece.data());
      sums += sentence(checksum(piece), " ");
    }
    bytes += size;
  }
  return sentence(paths.size(), paths.size() == 1 ? " file of " : " files of ", bytes,
                  " bytes with digest ", checksum(sums));
}

// ---- writing

bool OpenFile::is_at(const std::string& path) const {
  struct stat mine, there;
  return fstat(fd, &mine) == 0 && stat(path.c_str(), &there) == 0 && mine.st_ino == there.st_ino &&
         mine.st_dev == there.st_dev;
}

// Beside `path`; renamed when it is whole.
WrittenFile write_file(const std::string& path, const std::function<void(const Write&)>& fill) {
  constexpr size_t kAhead = 16 << 20;
  const std::string beside = path + ".partial";
  struct stat old;
  REQUIRE(stat(path.c_str(), &old) || S_ISREG(old.st_mode), path,
          " is no file that can be written anew");
  const OpenFile file(beside, O_WRONLY | O_CREAT | O_NOFOLLOW | O_NONBLOCK);
  const bool is_free = flock(file.fd, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK;
  // who held it has perhaps just renamed it: then it is the finished file
  if (!is_free || !file.is_at(beside))
    throw BusyError(path + " is being written by another process");
  REQUIRE(examine(file, beside).st_nlink <= 1, beside, " has another name, too: remove it");
  Checksum sum;
  sum.file.name = path.substr(path.rfind('/') + 1);
  const auto check = [&](bool done) { SYSTEM_CHECK(done, path, " cannot be written"); };
  size_t ahead = 0;  // of the disk
  try {
    check(ftruncate(file.fd, 0) == 0);  // a process that was killed may have left something
    fill([&](std::string_view piece) {
      sum.add(piece);
      while (!piece.empty()) {
        const ssize_t n = write(file.fd, piece.data(), std::min(piece.size(), kAhead));
        check(n > 0);
        piece.remove_prefix(n);
        bytes_moved += n;
        ahead += n;
        if (ahead < kAhead) continue;
        // It works on this while the next is made, and has written what came before: an error of
        // that is told here, and no more by fsync.
        check(sync_file_range(file.fd, 0, 0, SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE) ==
                  0 ||
              errno == ENOSYS);
        ahead = 0;
      }
    });
    check(fsync(file.fd) == 0);
    // where a file system has no locks
    REQUIRE(file.is_at(beside) && examine(file, beside).st_size == sum.file.bytes, path,
            " cannot be written: another process has written to ", beside, " or removed it");
    check(rename(beside.c_str(), path.c_str()) == 0);
  } catch (...) {
    if (file.is_at(beside)) unlink(beside.c_str());
    throw;
  }
  return sum.end();
}

WrittenFile write_file(const std::string& path, std::string_view text) {
  return write_file(path, [&](const Write& write) { write(text); });
}

void sync_directory(const std::string& path) {
  const OpenFile directory(path, O_RDONLY);
  SYSTEM_CHECK(fsync(directory.fd) == 0 || errno == EINVAL, path, " cannot be written to the disk");
}
