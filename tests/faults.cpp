// faults.cpp: a library to preload in which one call fails: open, read, write, fsync, rename,
// unlink or mmap of a file whose path holds a text. tests/test_faults.sh uses it.
//
//   FAULT_PATH=text                  which files
//   FAULT_CALL=name, FAULT_RANK=r    only calls of this name, only in this rank's process
//   FAULT_LOG=file                   each such call appends "name path" there
//   FAULT_AT=n FAULT_ERRNO=e         the n-th of them fails with this errno; with 0 a read or a
//                                    write moves only half of the bytes
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

const char* variable(const char* name) {
  const char* value = getenv(name);
  return value ? value : "";
}

template <class Call> Call next(const char* name) {
  return reinterpret_cast<Call>(dlsym(RTLD_NEXT, name));
}

std::atomic<int> calls = 0;

bool fails(const char* name, const char* path) {
  const char *wanted = variable("FAULT_PATH"), *only = variable("FAULT_CALL"),
             *rank = variable("FAULT_RANK"), *log = variable("FAULT_LOG");
  if (!*wanted || !path || !strstr(path, wanted)) return false;
  if (*only && strcmp(only, name) != 0) return false;
  if (*rank && strcmp(rank, variable("PMI_RANK")) != 0) return false;
  if (*log) {
    char line[1024];
    const int bytes = snprintf(line, sizeof line, "%s %s\n", name, path);
    const long fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND, 0666);
    syscall(SYS_write, fd, line, bytes);
    syscall(SYS_close, fd);
  }
  if (++calls != atoi(variable("FAULT_AT"))) return false;
  errno = atoi(variable("FAULT_ERRNO"));
  return true;
}

bool fails(const char* name, int fd) {
  char link[64], path[1024];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t bytes = readlink(link, path, sizeof path - 1);
  if (bytes < 0) return false;
  path[bytes] = 0;
  return fails(name, path);
}

// of a read or a write of so many bytes: how many it may move; -1: it fails
ssize_t allowed(const char* name, int fd, size_t bytes) {
  if (!fails(name, fd)) return bytes;
  return errno ? -1 : (bytes + 1) / 2;
}

}  // namespace

extern "C" {

int open(const char* path, int flags, ...) {
  va_list more;
  va_start(more, flags);
  const mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0;
  va_end(more);
  if (fails("open", path)) return -1;
  return next<int (*)(const char*, int, ...)>("open")(path, flags, mode);
}
int open64(const char* path, int flags, ...) {
  va_list more;
  va_start(more, flags);
  const mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0;
  va_end(more);
  if (fails("open", path)) return -1;
  return next<int (*)(const char*, int, ...)>("open64")(path, flags, mode);
}
ssize_t read(int fd, void* to, size_t bytes) {
  const ssize_t n = allowed("read", fd, bytes);
  return n < 0 ? n : next<ssize_t (*)(int, void*, size_t)>("read")(fd, to, n);
}
ssize_t pread(int fd, void* to, size_t bytes, off_t at) {
  const ssize_t n = allowed("read", fd, bytes);
  return n < 0 ? n : next<ssize_t (*)(int, void*, size_t, off_t)>("pread")(fd, to, n, at);
}
ssize_t write(int fd, const void* from, size_t bytes) {
  const ssize_t n = allowed("write", fd, bytes);
  return n < 0 ? n : next<ssize_t (*)(int, const void*, size_t)>("write")(fd, from, n);
}
ssize_t pwrite(int fd, const void* from, size_t bytes, off_t at) {
  const ssize_t n = allowed("write", fd, bytes);
  return n < 0 ? n : next<ssize_t (*)(int, const void*, size_t, off_t)>("pwrite")(fd, from, n, at);
}
int fsync(int fd) {
  if (fails("fsync", fd)) return -1;
  return next<int (*)(int)>("fsync")(fd);
}
int rename(const char* from, const char* to) {
  if (fails("rename", to)) return -1;
  return next<int (*)(const char*, const char*)>("rename")(from, to);
}
int unlink(const char* path) {
  if (fails("unlink", path)) return -1;
  return next<int (*)(const char*)>("unlink")(path);
}
int remove(const char* path) {
  if (fails("unlink", path)) return -1;
  return next<int (*)(const char*)>("remove")(path);
}
int unlinkat(int directory, const char* path, int flags) {
  if (fails("unlink", directory)) return -1;
  return next<int (*)(int, const char*, int)>("unlinkat")(directory, path, flags);
}
void* mmap(void* at, size_t bytes, int protection, int flags, int fd, off_t offset) {
  if (fd >= 0 && fails("mmap", fd)) return MAP_FAILED;
  return next<void* (*)(void*, size_t, int, int, int, off_t)>("mmap")(at, bytes, protection, flags,
                                                                      fd, offset);
}

}  // extern "C"
