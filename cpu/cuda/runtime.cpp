// runtime.cpp: CUDA's runtime for a machine with no GPU: errors, device memory, streams, events,
// copies.
//
// memory    one reserved range; a free block goes on a list of its size (eight sizes an octave, so
//           that rounding wastes at most 1/8; what one size has freed, no other gets) and is handed
//           out again in the order of the stream that freed it, or to any stream once that stream
//           has come to the place of the free
// streams   immediately in the caller, or queued: see cuda_runtime.h
// test      tests/test_cpu.cpp
#include <cuda_runtime.h>
#include <omp.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "host.h"
#include "support/check.h"

// ---- errors

namespace {
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t fail(cudaError_t error) {
  last_error = error;
  return error;
}

struct ErrorText {
  cudaError_t error;
  const char *name, *text;
};
const ErrorText error_texts[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration",
     "invalid configuration argument"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
};
const ErrorText& text_of(cudaError_t error) {
  for (const auto& t : error_texts)
    if (t.error == error) return t;
  static const ErrorText unknown{error, "unknown", "unrecognized error code"};
  return unknown;
}
}  // namespace

const char* cudaGetErrorName(cudaError_t error) { return text_of(error).name; }
const char* cudaGetErrorString(cudaError_t error) { return text_of(error).text; }
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

// ---- devices

namespace {

// How much memory the device has: the machine's, or less under a limit, which then has a name. A
// limit of what a process may map is shared with the rest of the program, and where ranks map each
// other's memory, with that.
struct Room {
  size_t bytes;
  std::string limit = "";
  void take_least(size_t other, const char* name) {
    if (other < bytes) bytes = other, limit = name;
  }
};

Room measure_room() {
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  Room room{size_t(sysconf(_SC_PHYS_PAGES)) * page};
  const char* ranks = getenv("MPI_LOCALNRANKS");
  const size_t shares = 1 + size_t(std::max(1, ranks ? atoi(ranks) : 1));
  size_t used[6] = {};  // pages: mapped, resident, shared, text, libraries, data
  std::ifstream statm("/proc/self/statm");
  for (size_t& pages : used) statm >> pages;
  const auto under = [&](auto resource, size_t pages, const char* name) {
    rlimit most;
    if (getrlimit(resource, &most) || most.rlim_cur == RLIM_INFINITY) return;
    room.take_least((most.rlim_cur - std::min<size_t>(most.rlim_cur, pages * page)) / shares, name);
  };
  under(RLIMIT_AS, used[0], "ulimit -v");
  under(RLIMIT_DATA, used[5], "ulimit -d");
  std::ifstream groups("/proc/self/cgroup");  // N:controllers:path, of version 2 0::path
  for (std::string line; std::getline(groups, line);) {
    const size_t colon = line.find(':'), second = line.find(':', colon + 1);
    const std::string kind = line.substr(colon + 1, second - colon - 1);
    if (second == std::string::npos || (kind != "memory" && !kind.empty())) continue;
    const std::string root = kind.empty() ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory",
                      file = kind.empty() ? "/memory.max" : "/memory.limit_in_bytes";
    for (std::string path = line.substr(second + 1);; path.resize(path.rfind('/'))) {
      size_t most;  // "max" is no number
      if (std::ifstream(root + path + file) >> most) room.take_least(most, "its control group");
      if (path.find('/') == std::string::npos) break;
    }
  }
  return room;
}
Room& room() {
  static Room room = measure_room();
  return room;
}

constexpr int kDevices = 256;  // one for any rank that asks
// not the number of cores: grids, and so sums, must not depend on the machine
constexpr int kMultiprocessors = 16;
constexpr int kSharedBytes = 48 << 10, kSharedBytesOptIn = 227 << 10;  // a block's, as on sm_90
// set aside for a kernel's static shared memory, which counts, too
constexpr int kStaticBytes = 1 << 10;
constexpr size_t kLeastStack = 256 << 10;  // of each thread
int current_device = 0;
std::mutex kernels_mutex;
std::unordered_map<const void*, int> shared_opt_in;  // cudaFuncSetAttribute
}  // namespace

cudaError_t cudaGetDeviceCount(int* count) { return *count = kDevices, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return fail(cudaErrorInvalidDevice);
  current_device = device;
  const size_t stack = cpu::settle_team();
  REQUIRE(stack >= kLeastStack, "a thread has a stack of ", stack >> 10,
          " KiB here, and the kernels need ", kLeastStack >> 10,
          ": raise ulimit -s, or OMP_STACKSIZE where it is set");
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  *p = {};
#ifdef CPU_FAST
  const std::string memory =
      room().limit.empty() ? "" : sentence(", ", room().bytes >> 20, " MiB under ", room().limit);
  snprintf(p->name, sizeof p->name, "CPU, FAST form, %d thread%s%s", omp_get_max_threads(),
           omp_get_max_threads() == 1 ? "" : "s", memory.c_str());
#else
  snprintf(p->name, sizeof p->name, "CPU, FAITHFUL form");
#endif
  p->totalGlobalMem = room().bytes;
  p->sharedMemPerBlockOptin = kSharedBytesOptIn;
  p->major = 0;  // no compute capability: not a GPU
  p->multiProcessorCount = kMultiprocessors;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
      value > kSharedBytesOptIn - kStaticBytes)
    return fail(cudaErrorInvalidValue);
  std::lock_guard lock(kernels_mutex);
  shared_opt_in[kernel] = value;
  return cudaSuccess;
}

bool cpu::legal_launch(const void* kernel, dim3 grid, dim3 block, size_t dynamic_shared,
                       cudaStream_t stream) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  const bool legal_grid = grid.x >= 1 && grid.x <= 0x7fffffff && grid.y >= 1 && grid.y <= 65535 &&
                          grid.z >= 1 && grid.z <= 65535;
  const bool legal_block = threads >= 1 && threads <= 1024 && block.z <= 64;
  if (!legal_grid || !legal_block) {
    last_error = cudaErrorInvalidConfiguration;
    return false;
  }
  if (!is_stream(stream)) {
    last_error = cudaErrorInvalidResourceHandle;
    return false;
  }
  if (dynamic_shared <= kSharedBytes - kStaticBytes) return true;
  std::lock_guard lock(kernels_mutex);
  const auto found = shared_opt_in.find(kernel);
  if (found != shared_opt_in.end() && dynamic_shared <= size_t(found->second)) return true;
  last_error = cudaErrorInvalidValue;
  return false;
}

#ifdef CPU_FAST
cpu::LaunchTime& cpu::launch_time(const void* kernel, int64_t blocks) {
  struct Slot {
    const void* kernel = nullptr;
    int64_t blocks = 0;
    LaunchTime time;
  };
  static thread_local Slot slots[256];  // a launch that finds its slot taken by another starts anew
  Slot& slot = slots[(reinterpret_cast<uintptr_t>(kernel) / 16 + size_t(blocks) * 31) % 256];
  if (slot.kernel != kernel || slot.blocks != blocks) slot = {kernel, blocks, {}};
  return slot.time;
}
void* cpu::shared_block(size_t bytes) {
  struct Block {
    void* data = nullptr;
    size_t bytes = 0;
    ~Block() { free(data); }
  };
  static thread_local Block block;
  if (bytes > block.bytes) {
    free(block.data);
    block.bytes = (bytes + 4095) / 4096 * 4096;
    block.data = host_memory(block.bytes);
  }
  return block.data;
}
#endif

// ---- streams

namespace {

unsigned streams_seed = 0;  // of the delays; 0: none

// A stream's queue and the thread that works it off, started by the first work that is queued.
class Queue {
 public:
  ~Queue() {
    if (!worker_.joinable()) return;
    push(nullptr);
    worker_.join();
  }
  void push(std::function<void()> work) {
    {
      std::lock_guard lock(mutex_);
      if (!worker_.joinable()) worker_ = std::thread([this] { run(); });
      work_.push_back(std::move(work));
      pending_++;
    }
    changed_.notify_all();
  }
  void drain() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return pending_ == 0; });
  }
  bool idle() {
    std::lock_guard lock(mutex_);
    return pending_ == 0;
  }
  void seed(unsigned seed) { random_.seed(seed); }  // while idle

 private:
  void run() {
    cpu::settle_team();
    for (;;) {
      std::function<void()> work;
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [this] { return !work_.empty(); });
        work = std::move(work_.front());
        work_.pop_front();
      }
      if (!work) return;
      dawdle();
      work();
      work = nullptr;
      {
        std::lock_guard lock(mutex_);
        pending_--;
      }
      changed_.notify_all();
    }
  }
  // Mostly no delay, sometimes a short one, seldom one that is longer than any kernel of a test.
  void dawdle() {
    if (streams_seed == 0) return;
    const unsigned draw = random_() % 100;
    if (draw < 60) return;
    const unsigned longest = draw < 95 ? 100 : 2000;
    std::this_thread::sleep_for(std::chrono::microseconds(random_() % longest));
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> work_;
  size_t pending_ = 0;  // queued or running
  std::mt19937 random_;
  std::thread worker_;
};

// What an event stands for since it was last recorded.
class Moment {
 public:
  void reach() {
    {
      std::lock_guard lock(mutex_);
      time_ = std::chrono::steady_clock::now();
      reached_ = true;
    }
    changed_.notify_all();
  }
  void wait() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return reached_; });
  }
  bool reached() {
    std::lock_guard lock(mutex_);
    return reached_;
  }
  std::chrono::steady_clock::time_point time() const { return time_; }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool reached_ = false;
  std::chrono::steady_clock::time_point time_;
};

}  // namespace

struct CUstream_st {
  Queue queue;
};
struct CUevent_st {
  std::shared_ptr<Moment> moment;  // null: never recorded
  bool is_timed = true;
};

namespace {

struct Streams {  // all there are; the null stream is the first
  std::mutex mutex;
  std::vector<std::unique_ptr<CUstream_st>> all;
  unsigned seeds = 0;
  Streams() { create(); }
  cudaStream_t create() {
    std::lock_guard lock(mutex);
    all.push_back(std::make_unique<CUstream_st>());
    all.back()->queue.seed(streams_seed * 1000003 + seeds++);
    return all.back().get();
  }
  auto find(cudaStream_t stream) {  // under `mutex`
    return std::find_if(all.begin(), all.end(),
                        [=](const auto& one) { return one.get() == stream; });
  }
  void seed() {
    std::lock_guard lock(mutex);
    seeds = 0;
    for (const auto& stream : all) stream->queue.seed(streams_seed * 1000003 + seeds++);
  }
};
Streams& streams() {
  static Streams& streams = *new Streams;  // never destroyed: see pool
  return streams;
}
CUstream_st& of(cudaStream_t stream) { return stream ? *stream : *streams().all.front(); }

// The error of a call whose handles these are.
cudaError_t check(cudaStream_t stream) {
  return cpu::is_stream(stream) ? cudaSuccess : fail(cudaErrorInvalidResourceHandle);
}
cudaError_t check(cudaEvent_t event) {
  return event ? cudaSuccess : fail(cudaErrorInvalidResourceHandle);
}

bool streams_from_environment() {
  const char* value = getenv("THREEFOLD_STREAMS");
  if (!value || !strcmp(value, "immediate")) return false;
  int read = 0;
  if (!strcmp(value, "queued")) return true;
  if (sscanf(value, "queued:%u%n", &streams_seed, &read) == 1 && !value[read] && streams_seed)
    return true;
  fprintf(stderr, "THREEFOLD_STREAMS is '%s', expected immediate, queued or queued:SEED\n", value);
  exit(1);
}
}  // namespace

bool cpu::streams_are_queued = streams_from_environment();

void cpu::queue_streams(unsigned seed) {
  cudaDeviceSynchronize();
  streams_seed = seed;
  streams().seed();
  streams_are_queued = true;
  poison_memory(true);
}
void cpu::run_streams_immediately() {
  cudaDeviceSynchronize();
  streams_are_queued = false;
}
bool cpu::is_stream(cudaStream_t stream) {
  if (!stream) return true;
  std::lock_guard lock(streams().mutex);
  return streams().find(stream) != streams().all.end();
}
void cpu::enqueue(cudaStream_t stream, std::function<void()> work) {
  if (streams_are_queued) of(stream).queue.push(std::move(work));
  else work();
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return *stream = streams().create(), cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return cudaStreamCreate(stream);
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  return cudaStreamCreate(stream);
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return *least = 0, *greatest = -5, cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  std::unique_ptr<CUstream_st> last;  // whose destructor waits, when nobody can use it any more
  auto& s = streams();
  std::lock_guard lock(s.mutex);
  const auto found = s.find(stream);
  if (!stream || found == s.all.end()) return fail(cudaErrorInvalidResourceHandle);
  last = std::move(*found);
  s.all.erase(found);
  cpu::host_waits++;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (const cudaError_t error = check(stream)) return error;
  cpu::host_waits++;
  if (cpu::streams_are_queued) of(stream).queue.drain();
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  if (const cudaError_t error = check(stream)) return error;
  return !cpu::streams_are_queued || of(stream).queue.idle() ? cudaSuccess
                                                             : fail(cudaErrorNotReady);
}
cudaError_t cudaDeviceSynchronize() {
  cpu::host_waits++;
  if (!cpu::streams_are_queued) return cudaSuccess;
  std::vector<CUstream_st*> all;
  {
    std::lock_guard lock(streams().mutex);
    for (const auto& stream : streams().all) all.push_back(stream.get());
  }
  for (CUstream_st* stream : all) stream->queue.drain();
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (const cudaError_t error = check(stream)) return error;
  if (const cudaError_t error = check(event)) return error;
  if (cpu::streams_are_queued && event->moment)
    cpu::enqueue(stream, [moment = event->moment] { moment->wait(); });
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* argument) {
  if (const cudaError_t error = check(stream)) return error;
  cpu::submit(stream, [=] { function(argument); });
  return cudaSuccess;
}

// ---- events

cudaError_t cudaEventCreate(cudaEvent_t* event) { return *event = new CUevent_st, cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  cudaEventCreate(event);
  (*event)->is_timed = !(flags & cudaEventDisableTiming);
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  if (const cudaError_t error = check(event)) return error;
  return delete event, cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  if (const cudaError_t error = check(stream)) return error;
  if (const cudaError_t error = check(event)) return error;
  event->moment = std::make_shared<Moment>();
  cpu::submit(stream, [moment = event->moment] { moment->reach(); });
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (const cudaError_t error = check(event)) return error;
  cpu::host_waits++;
  if (event->moment) event->moment->wait();
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (const cudaError_t error = check(event)) return error;
  return !event->moment || event->moment->reached() ? cudaSuccess : fail(cudaErrorNotReady);
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  if (!start || !end || !start->is_timed || !end->is_timed || !start->moment || !end->moment)
    return fail(cudaErrorInvalidResourceHandle);
  if (!start->moment->reached() || !end->moment->reached()) return fail(cudaErrorNotReady);
  *milliseconds =
      std::chrono::duration<float, std::milli>(end->moment->time() - start->moment->time()).count();
  return cudaSuccess;
}

// ---- device memory

namespace {

constexpr size_t kAlign = 256, kLargePage = 2 << 20;
constexpr int kCollapse = 25;  // MADV_COLLAPSE, which older headers lack

// A block lies in a room of the arena, which is handed out again to blocks of about its size.
struct Block {
  char *room, *data;
  size_t room_bytes, bytes;  // bytes 0: no block of ours
};

// Eight sizes an octave.
size_t rounded(size_t bytes) {
  size_t step = kAlign;
  while (step * 16 < bytes) step *= 2;
  return std::max(kAlign, (bytes + step - 1) / step * step);
}

// Whoever runs past a block is caught in the builds of tests. Under AddressSanitizer only blocks in
// use may be touched, and between two of them there is a gap. In FAITHFUL a room ends with a page
// that nobody may touch, and its block lies directly before it.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kGap = 256;
void allow(const void* data, size_t bytes) { ASAN_UNPOISON_MEMORY_REGION(data, bytes); }
void forbid(const void* data, size_t bytes) { ASAN_POISON_MEMORY_REGION(data, bytes); }
#else
constexpr size_t kGap = 0;
void allow(const void*, size_t) {}
void forbid(const void*, size_t) {}
#endif
#ifdef CPU_FAITHFUL
constexpr size_t kVector = 16;         // bytes; what kernels load and store at a time
constexpr int kMostGuards = 16 << 10;  // each costs two of the 65530 maps that a process may have
size_t guard_bytes() {
  static const size_t page = size_t(sysconf(_SC_PAGESIZE));
  return page;
}
size_t room_for(size_t bytes) {
  const size_t page = guard_bytes();
  return (rounded(bytes) + page - 1) / page * page + page;
}
Block place(char* room, size_t room_bytes, size_t bytes) {
  const size_t to_end = (bytes + kVector - 1) / kVector * kVector;
  return {room, room + room_bytes - guard_bytes() - to_end, room_bytes, bytes};
}
// What lies beside the block in its room is NaN (0xff), as the free room was.
void check_beside(const Block& block) {
  const auto check = [&](const char* begin, const char* end) {
    // at once: each byte is the next one's equal
    if (begin == end || (*begin == char(0xff) && !memcmp(begin, begin + 1, end - begin - 1)))
      return;
    while (*begin == char(0xff)) begin++;
    fprintf(stderr, "CUDA stand-in: a write beside a block of %zu bytes, at %td from its start\n",
            block.bytes, begin - block.data);
    abort();
  };
  check(block.room, block.data);
  check(block.data + block.bytes, block.room + block.room_bytes - guard_bytes());
}
#else
size_t guard_bytes() { return 0; }
size_t room_for(size_t bytes) { return rounded(bytes + kGap); }
Block place(char* room, size_t room_bytes, size_t bytes) { return {room, room, room_bytes, bytes}; }
void check_beside(const Block&) {}
#endif

class Pool {
 public:
  // A block that is free everywhere or was freed in this stream; null when the arena is full.
  void* take(size_t bytes, CUstream_st* stream = nullptr) {
    if (bytes > cpu::arena().size) return nullptr;
    std::lock_guard lock(mutex_);
    const size_t room_bytes = room_for(bytes);
    char* room = stream ? pop(freed_in_[stream][room_bytes]) : nullptr;
    if (!room) room = pop(free_[room_bytes]);
    if (room) counts_.reuses++;
    else room = carve(room_bytes);
    if (!room) return nullptr;
    const Block block = place(room, room_bytes, bytes);
    allow(block.data, bytes);
    in_use_[block.data] = block;
    counts_.allocations++;
    counts_.in_use += room_bytes;
    counts_.peak = std::max(counts_.peak, counts_.in_use);
    return block.data;
  }
  // Free everywhere; or, with a stream, for that stream alone (what it runs next comes after the
  // free) until `release`.
  struct Free {
    Block block;
    int64_t number;
  };
  Free give_back(void* data, CUstream_st* stream = nullptr) {
    std::lock_guard lock(mutex_);
    const auto found = in_use_.find(static_cast<char*>(data));
    if (found == in_use_.end()) return {};
    const Free free{found->second, ++frees_};
    in_use_.erase(found);
    counts_.in_use -= free.block.room_bytes;
    if (!stream) {
      wipe(free.block);
      forbid(free.block.room, free.block.room_bytes);
    }
    (stream ? freed_in_[stream] : free_)[free.block.room_bytes].push_back(free);
    return free;
  }
  // The stream has come to the place of the free. If it has not taken the room again since, any
  // stream may.
  void release(const Free& free, CUstream_st* stream) {
    std::lock_guard lock(mutex_);
    wipe(free.block);
    auto& list = freed_in_[stream][free.block.room_bytes];
    const auto found = std::find_if(list.begin(), list.end(),
                                    [&](const Free& f) { return f.number == free.number; });
    if (found == list.end()) return;
    list.erase(found);
    forbid(free.block.room, free.block.room_bytes);
    free_[free.block.room_bytes].push_back(free);
  }
  void poison(bool on) {
    std::lock_guard lock(mutex_);
    if (on && !poison_)
      for (const auto& [room_bytes, list] : free_)
        for (const Free& free : list) fill(free.block.room, room_bytes);
    poison_ = on;
  }
  bool holds(const char* data, size_t bytes) {
    std::lock_guard lock(mutex_);
    auto found = in_use_.upper_bound(data);
    if (found == in_use_.begin()) return false;
    const Block& block = (--found)->second;
    return bytes <= block.bytes && data - block.data <= ptrdiff_t(block.bytes - bytes);
  }
  cpu::PoolCounts counts() {
    std::lock_guard lock(mutex_);
    return counts_;
  }

 private:
  using Lists = std::unordered_map<size_t, std::vector<Free>>;
  static char* pop(std::vector<Free>& list) {
    if (list.empty()) return nullptr;
    char* room = list.back().block.room;
    list.pop_back();
    return room;
  }
  char* carve(size_t bytes) {
    const cpu::Arena& arena = cpu::arena();
    if (bytes > arena.size - counts_.carved) return nullptr;
    char* room = arena.base + counts_.carved;
    counts_.carved += bytes;
    // Memory that is shared gets large pages only on demand, and only where something lies.
    for (; arena.fd >= 0 && large_ < counts_.carved; large_ += kLargePage) {
      arena.base[large_] = 0;
      madvise(arena.base + large_, kLargePage, kCollapse);  // before Linux 6.1: no such advice
    }
#ifdef CPU_FAITHFUL
    if (guards_++ < kMostGuards) mprotect(room + bytes - guard_bytes(), guard_bytes(), PROT_NONE);
#endif
    if (poison_) fill(room, bytes);
    forbid(room, bytes);
    return room;
  }
  static void fill(char* room, size_t bytes) {
    allow(room, bytes);
    memset(room, 0xff, bytes - guard_bytes());
    forbid(room, bytes);
  }
  void wipe(const Block& block) {  // at its free
    if (!poison_) return;
    check_beside(block);
    memset(block.data, 0xff, block.bytes);
  }

  std::mutex mutex_;
  Lists free_;                                        // for any stream
  std::unordered_map<CUstream_st*, Lists> freed_in_;  // for that stream alone
  std::map<const char*, Block> in_use_;               // by `data`
  int64_t frees_ = 0;
  cpu::PoolCounts counts_{};
  size_t large_ = 0;  // bytes of the arena that lie on large pages, if the system has them
#ifdef CPU_FAITHFUL
  int guards_ = 0;
  bool poison_ = true;
#else
  bool poison_ = (cpu::streams_are_queued && streams_seed) || getenv("THREEFOLD_POISON");
#endif
};
Pool& pool() {
  // never destroyed: streams may still return blocks while the program exits
  static Pool& pool = *new Pool;
  return pool;
}

bool share_memory = false;

cpu::Arena reserve() {
  size_t size = std::max(kLargePage, room().bytes / kLargePage * kLargePage);
  int fd = -1;
  if (share_memory) {
    fd = memfd_create("threefold device memory", MFD_CLOEXEC);
    if (fd >= 0 && ftruncate(fd, off_t(size))) close(fd), fd = -1;
  }
  const int flags = fd >= 0 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
  void* base = MAP_FAILED;
  // a machine that promises no more than it has (vm.overcommit_memory 2) may refuse
  for (; size >= kLargePage; size /= 2) {
    base = mmap(nullptr, size + kLargePage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                -1, 0);
    if (base == MAP_FAILED) continue;
    // large pages begin at multiples of their size
    base = reinterpret_cast<void*>((uintptr_t(base) + kLargePage - 1) / kLargePage * kLargePage);
    base = mmap(base, size, PROT_READ | PROT_WRITE, flags | MAP_NORESERVE | MAP_FIXED, fd, 0);
    if (base != MAP_FAILED) break;
  }
  if (base == MAP_FAILED) return {-1, nullptr, 0};
  madvise(base, size, MADV_HUGEPAGE);
  madvise(base, size, MADV_DONTDUMP);  // a core of every rank would fill the node
  return {fd, static_cast<char*>(base), size};
}
}  // namespace

const cpu::Arena& cpu::arena() {
  static const Arena arena = reserve();
  return arena;
}
void cpu::share_device_memory() { share_memory = true; }
void cpu::poison_memory(bool on) { pool().poison(on); }
cpu::PoolCounts cpu::pool_counts() { return pool().counts(); }
bool cpu::in_one_block(const void* data, size_t bytes) {
  return pool().holds(static_cast<const char*>(data), bytes);
}

cudaError_t cudaMallocAsync(void** data, size_t bytes, cudaStream_t stream) {
  if (const cudaError_t error = check(stream)) return error;
  *data = bytes ? pool().take(bytes, &of(stream)) : nullptr;
  return *data || !bytes ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}
cudaError_t cudaFreeAsync(void* data, cudaStream_t stream) {
  if (const cudaError_t error = check(stream)) return error;
  if (!data) return cudaSuccess;
  CUstream_st* owner = cpu::streams_are_queued ? &of(stream) : nullptr;
  const Pool::Free free = pool().give_back(data, owner);
  if (!free.block.bytes) return fail(cudaErrorInvalidValue);
  if (owner) cpu::enqueue(stream, [=] { pool().release(free, owner); });
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** data, size_t bytes) {
  *data = bytes ? pool().take(bytes) : nullptr;
  return *data || !bytes ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}
cudaError_t cudaFree(void* data) {
  cudaDeviceSynchronize();
  return !data || pool().give_back(data).block.bytes ? cudaSuccess : fail(cudaErrorInvalidValue);
}
cudaError_t cudaMallocHost(void** data, size_t bytes) {
  *data = aligned_alloc(4096, std::max<size_t>(4096, (bytes + 4095) / 4096 * 4096));
  return *data ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}
cudaError_t cudaFreeHost(void* data) { return free(data), cudaSuccess; }
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) {
  return *pool = nullptr, cudaSuccess;
}
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }

// ---- copies

namespace {
// part(begin, end) over [0, bytes): on all cores when there is enough.
template <class Part> void in_parts(size_t bytes, Part part) {
  constexpr size_t kWorthIt = 1 << 20;
  if (bytes == 0) return;  // there may be no memory to point to
  if (bytes < kWorthIt || omp_get_max_threads() == 1) return part(0, bytes);
#pragma omp parallel
  {
    const size_t thread = size_t(omp_get_thread_num()), threads = size_t(omp_get_num_threads());
    const size_t share = (bytes / threads + 63) / 64 * 64;
    const size_t begin = std::min(bytes, thread * share);
    part(begin, thread + 1 == threads ? bytes : std::min(bytes, begin + share));
  }
}

// Device memory within a block, host memory anywhere else.
bool is_memory_of(bool device, const void* data, size_t bytes) {
  const cpu::Arena& arena = cpu::arena();
  const bool inside = data >= arena.base && data < arena.base + arena.size;
  return device ? cpu::in_one_block(data, bytes) : !inside;
}
bool legal_copy(const void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  if (!bytes) return true;
  return is_memory_of(kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice, to,
                      bytes) &&
         is_memory_of(kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice, from,
                      bytes);
}
}  // namespace

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  if (const cudaError_t error = check(stream)) return error;
  if (!legal_copy(to, from, bytes, kind)) return fail(cudaErrorInvalidValue);
  cpu::submit(stream, [=] {
    in_parts(bytes, [=](size_t begin, size_t end) {
      memcpy(static_cast<char*>(to) + begin, static_cast<const char*>(from) + begin, end - begin);
    });
  });
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  if (const cudaError_t error = cudaMemcpyAsync(to, from, bytes, kind, nullptr)) return error;
  return cudaStreamSynchronize(nullptr);
}
cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t stream) {
  if (const cudaError_t error = check(stream)) return error;
  if (bytes && !is_memory_of(true, data, bytes)) return fail(cudaErrorInvalidValue);
  cpu::submit(stream, [=] {
    in_parts(bytes, [=](size_t begin, size_t end) {
      memset(static_cast<char*>(data) + begin, value, end - begin);
    });
  });
  return cudaSuccess;
}
cudaError_t cudaMemset(void* data, int value, size_t bytes) {
  if (const cudaError_t error = cudaMemsetAsync(data, value, bytes, nullptr)) return error;
  return cudaStreamSynchronize(nullptr);
}
