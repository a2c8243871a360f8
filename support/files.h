// files.h: files whose errors are sentences, and that are written whole or not at all.
// cost      read through a map of the file, or in blocks; written once from front to back
// test      tests/test_support.cpp, tests/test_faults.sh
#pragma once
#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string_view>

#include "support/check.h"

// Read, written or verified by this process so far: so the watch sees that slow work moves on.
inline std::atomic<int64_t> bytes_moved = 0;

struct OpenFile {
  static constexpr int kToRead = O_RDONLY | O_NONBLOCK;  // does not wait for a pipe's writer
  OpenFile(const std::string& path, int flags) : fd(open(path.c_str(), flags | O_CLOEXEC, 0666)) {
    SYSTEM_CHECK(fd >= 0, path, " cannot be opened");
  }
  ~OpenFile() { close(fd); }
  OpenFile(const OpenFile&) = delete;
  bool is_at(const std::string& path) const;  // not another one, made there since
  const int fd;
};

// The bytes of a regular file that is not empty. If others make it shorter meanwhile, or the disk
// fails, looking at what is gone ends the process; read_at says so instead.
struct MappedFile {
  explicit MappedFile(const std::string& path)
      : MappedFile(path, OpenFile(path, OpenFile::kToRead)) {}
  MappedFile(const std::string& path, const OpenFile& file);
  std::string path;
  std::string_view view;
  std::shared_ptr<void> map;
};

// Puts bytes [at, at + bytes) of the file there; an Error where the file or the disk lacks some.
void read_at(const OpenFile& file, const std::string& path, int64_t at, int64_t bytes, char* to);

bool is_there(const std::string& path);  // an Error where the system does not say
std::vector<std::string> names_in(const std::string& directory);
// An error of the disk is an Error here, where a map of the file would end the process. So is what
// is no regular file, and might have no end (a pipe that the user names may be read), and what is
// longer than any file of others that is read so.
constexpr size_t kLongestText = 1 << 30;
std::string read_file(const std::string& path, bool may_be_pipe = false,
                      size_t longest = kLongestText);

uint64_t checksum(std::string_view bytes);  // XXH3, 64 bits: of a whole file it is WrittenFile's
// name: without the directory
struct WrittenFile {
  std::string name;
  int64_t bytes = 0;
  uint64_t checksum = 0;
};
WrittenFile measure(const std::string& path);  // reads it to its end; what it is now
// A digest of files for comparing copies of them: their sizes, and 4096 pieces of 16 KiB of all of
// them together, or 64 of each where they are more than 64; all bytes of those that have no more.
std::string content_of(const std::vector<std::string>& paths);

using Say = std::function<void(const std::string&)>;  // to those who wait

struct BusyError : Error {  // another process is writing the file
  using Error::Error;
};
// Writes a file that is there whole or not at all, and waits until the disk has its bytes (who
// needs its name there, too, syncs the directory). `fill` writes one piece after the other. A link
// of that name is replaced, and what it points to stays.
using Write = std::function<void(std::string_view piece)>;
WrittenFile write_file(const std::string& path, const std::function<void(const Write&)>& fill);
WrittenFile write_file(const std::string& path, std::string_view text);
void sync_directory(const std::string& path);  // the names in it are on the disk after that
void open_many_files();  // a shell lets a process have 1024 open, unless the process asks for more
