// nccl_shared.cpp: ranks of one node read each other's memory in place: a Link whose messages are
// flags and whose copies are plain loads.
//
// idea      each process owns one memfd (the region) with a shelf at its start (status, doorbell),
//           desks for its communicators and staging blocks. Peers map it, and the arena of the
//           CPU's device memory, through /proc/PID/fd. Only the owner writes records and flags. A
//           desk is never freed: the last records of every rank stay readable, and a peer may still
//           be reading them.
// waiting   whoever changes a flag rings the doorbell of those who sleep; whoever wants to sleep
//           says so first and looks once more.
// cost      all-gather reads (n-1) slices, reduce-scatter (n-1) slices, all-reduce both; one flag
//           written and n-1 read for each meeting
// test      tests/test_nccl.cpp
#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <bit>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>

#include "nccl_internal.h"

namespace nccl {

// ---- the region: this process's shared memory

namespace {

struct Shelf {
  // tells a peer that it mapped the right process
  std::atomic<uint64_t> cookie;
  alignas(64) std::atomic<uint32_t> doorbell, asleep;
  Status status;
};

class Region {
 public:
  Region() {
    fd = int(memfd_create("threefold nccl", MFD_CLOEXEC));
    if (fd < 0) fd = open("/tmp", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    void* memory = MAP_FAILED;
    for (bytes = size_t(1) << 36; bytes >= kLeast; bytes >>= 8) {  // ulimit -v may allow less
      if (fd >= 0 && ftruncate(fd, off_t(bytes))) close(fd), fd = -1;
      const int flags = (fd >= 0 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS) | MAP_NORESERVE;
      memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, fd, 0);
      if (memory != MAP_FAILED) break;
    }
    if (memory == MAP_FAILED)
      fail(ncclSystemError, "mmap of ", kLeast >> 20,
           " MiB of address space failed: ", strerror(errno));
    base = static_cast<char*>(memory);
    madvise(base, bytes, MADV_DONTDUMP);
    std::random_device random;
    shelf()->cookie = uint64_t(random()) << 32 | random();
    shelf()->status.peer_world = -1;
  }
  Shelf* shelf() const { return reinterpret_cast<Shelf*>(base); }
  uint64_t carve(size_t size, size_t align) {
    std::lock_guard lock(mutex_);
    const uint64_t at = (end_ + align - 1) / align * align;
    if (size > bytes - at)
      fail(ncclSystemError, "the NCCL stand-in has staged more than ", bytes >> 20, " MiB");
    end_ = at + size;
    return at;
  }
  char* take(size_t size) {
    size = std::bit_ceil(std::max<size_t>(size, kAlign));
    {
      std::lock_guard lock(mutex_);
      auto& list = free_[size];
      if (!list.empty()) {
        char* block = list.back();
        list.pop_back();
        return block;
      }
    }
    char* block = base + carve(size, kAlign);
#if !defined(CPU_FAST) && !defined(CPU_FAITHFUL)
    if (cudaHostRegister(block, size, cudaHostRegisterPortable) != cudaSuccess)
      fail(ncclUnhandledCudaError, "cudaHostRegister could not pin ", size, " bytes for staging");
#endif
    return block;
  }
  void give(char* block, size_t size) {
    std::lock_guard lock(mutex_);
    free_[std::bit_ceil(std::max<size_t>(size, kAlign))].push_back(block);
  }

  // address space; pages come when they are touched
  static constexpr size_t kLeast = 1 << 28, kAlign = 1 << 16;
  size_t bytes = 0;
  int fd = -1;
  char* base = nullptr;

 private:
  std::mutex mutex_;
  uint64_t end_ = sizeof(Shelf);
  std::map<size_t, std::vector<char*>> free_;
};
Region& region() {
  // lives as long as the process: streams may outlast static destructors
  static Region* region = new Region;
  return *region;
}

// ---- peers

struct Peer {
  char *region = nullptr, *arena = nullptr;
};
std::mutex peers_mutex;
// by world rank; mapped once, kept, also while the program exits
auto& peers = *new std::map<int, Peer>;

// bytes 0: the whole file
char* map_of(int pid, int fd, size_t bytes) {
  const int opened = open(sentence("/proc/", pid, "/fd/", fd).c_str(), O_RDWR | O_CLOEXEC);
  if (opened < 0) return nullptr;
  struct stat about;
  void* memory = MAP_FAILED;
  if (!fstat(opened, &about) && (!bytes || size_t(about.st_size) == bytes))
    memory = mmap(nullptr, size_t(about.st_size), PROT_READ | PROT_WRITE,
                  MAP_SHARED | MAP_NORESERVE, opened, 0);
  close(opened);
  if (memory != MAP_FAILED) madvise(memory, size_t(about.st_size), MADV_DONTDUMP);
  return memory == MAP_FAILED ? nullptr : static_cast<char*>(memory);
}

const Peer* find_peer(int world) {
  std::lock_guard lock(peers_mutex);
  const auto found = peers.find(world);
  return found == peers.end() ? nullptr : &found->second;
}

#if defined(CPU_FAST) || defined(CPU_FAITHFUL)
cpu::Arena my_arena() { return cpu::arena(); }
// Peers can map device memory only if it is shared from the first allocation on, so it is when a
// launcher started more than one process.
[[maybe_unused]] const bool shares_device_memory = [] {
  bool several = false;
  for (const char* name : {"PMI_SIZE", "SLURM_NTASKS"})
    several |= getenv(name) && atoi(getenv(name)) > 1;
  if (several) cpu::share_device_memory();
  return several;
}();
#else
struct NoArena {
  int fd;
  char* base;
  size_t size;
};
NoArena my_arena() { return {-1, nullptr, 0}; }
#endif

}  // namespace

bool map_peer(const Member& m) {
  if (find_peer(m.world)) return true;
  Peer peer;
  const auto arena = my_arena();
  if (m.pid == getpid()) {
    peer = {region().base, arena.fd >= 0 ? arena.base : nullptr};
  } else {
    if (m.region_fd >= 0) peer.region = map_of(m.pid, m.region_fd, 0);
    if (m.arena_fd >= 0) peer.arena = map_of(m.pid, m.arena_fd, m.arena_bytes);
    if (m.arena_fd >= 0 && !peer.arena) return false;
  }
  if (region().fd < 0 || !peer.region || reinterpret_cast<Shelf*>(peer.region)->cookie != m.cookie)
    return false;
  std::lock_guard lock(peers_mutex);
  peers[m.world] = peer;
  return true;
}

void describe_me(Member& me) {
  const auto arena = my_arena();
  me.pid = getpid(), me.region_fd = region().fd, me.cookie = region().shelf()->cookie;
  me.arena_fd = arena.fd, me.arena_bytes = arena.size;
  cudaGetDevice(&me.device);
  utsname host{};
  uname(&host);
  char pids[64] = "";  // process numbers mean the same in one process namespace only
  if (readlink("/proc/self/ns/pid", pids, sizeof pids - 1) < 0) pids[0] = 0;
  me.node = std::hash<std::string>{}(sentence(host.nodename, pids));
}

Status& my_status() { return region().shelf()->status; }
const Status* status_of(const Member& m) {
  const Peer* peer = find_peer(m.world);
  return peer ? &reinterpret_cast<const Shelf*>(peer->region)->status : nullptr;
}
char* take_block(size_t bytes) { return region().take(bytes); }
void give_block(char* block, size_t bytes) { region().give(block, bytes); }

// ---- the doorbell

static void ring(const Peer& peer) {  // after a full fence: my change first, then whether it sleeps
  Shelf* shelf = reinterpret_cast<Shelf*>(peer.region);
  if (!shelf->asleep.load(std::memory_order_relaxed)) return;
  shelf->doorbell++;
  syscall(SYS_futex, &shelf->doorbell, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
}

void sleep_until_rung(const std::function<bool()>& ready) {
  Shelf* shelf = region().shelf();
  const uint32_t before = shelf->doorbell;
  struct Awake {
    Shelf* shelf;
    ~Awake() { shelf->asleep = 0; }
  } awake{shelf};
  shelf->asleep = 1;
  // that I sleep first, then what they changed
  std::atomic_thread_fence(std::memory_order_seq_cst);
  // to look after the watch and the peers' processes
  const timespec longest{0, 50'000'000};
  if (!ready()) syscall(SYS_futex, &shelf->doorbell, FUTEX_WAIT, before, &longest, nullptr, 0);
}

// ---- records and flags

namespace {

struct Post {
  std::atomic<uint64_t> number;
  Record record;
};
struct alignas(64) Channel {
  Post post[2];  // for even and odd numbers
  // counts up through 2 k - 1 (k's sums are there) and 2 k (k is done with)
  alignas(64) std::atomic<uint64_t> arrived;
};
// one rank's, for one communicator; then 2 n channels: sends to q at [q], receives from q at [n +
// q]
struct Desk {
  std::atomic<uint32_t> gave_up;
  char why[1020];
  Channel all;
  char payload[2][kInline];
};
Channel* pairs(Desk* desk) { return reinterpret_cast<Channel*>(desk + 1); }

class SharedLink final : public Link {
 public:
  explicit SharedLink(ncclComm& comm) : comm_(comm) {
    for (const Member& m : comm.members) {
      peers_.push_back(*find_peer(m.world));
      desks_.push_back(reinterpret_cast<Desk*>(peers_.back().region + m.desk));
    }
  }

  void announce(Op& op) override {
    Record& r = op.record;
    if (r.inlined) {
      if (op.send_bytes) memcpy(desks_[comm_.rank]->payload[r.number & 1], op.send, op.send_bytes);
    } else {
      r.send = locate(op.send);
    }
    r.recv = locate(op.recv);
    Post& post = mine(op).post[r.number & 1];
    post.record = r;
    post.number.store(r.number, std::memory_order_release);
    notify(op, [&](int q) { return theirs(op, q).post[r.number & 1].number.load() >= r.number; });
  }

  const Record* heard(Op& op, int q) override {
    Post& post = theirs(op, q).post[op.record.number & 1];
    return post.number.load(std::memory_order_acquire) == op.record.number ? &post.record : nullptr;
  }

  void offer(Op& op, int q, const char*, size_t) override {
    if (!op.record.inlined) op.offered.push_back(q);
  }

  const char* fetch(Op& op, int q, Side side, size_t offset, size_t bytes, char* into) override {
    const uint64_t parity = op.record.number & 1;
    const char* from = desks_[q]->payload[parity];
    if (!op.record.inlined) {
      const Record& r = theirs(op, q).post[parity].record;
      const Where& where = side == Side::send ? r.send : r.recv;
      from = (where.segment == Segment::arena ? peers_[q].arena : peers_[q].region) + where.offset;
    }
    if (q != comm_.rank) op.copied += int64_t(bytes);
    if (into) copy(into, from + offset, bytes);
    return into ? into : from + offset;
  }
  bool fetched(Op&) override { return true; }

  void arrive(Op& op) override {
    mine(op).arrived.store(stamp(op), std::memory_order_release);
    if (!op.record.inlined)
      notify(op, [&](int q) { return theirs(op, q).arrived.load() >= stamp(op); });
  }
  bool released(Op& op) override {
    for (int q : op.offered)
      if (theirs(op, q).arrived.load(std::memory_order_acquire) < stamp(op)) return false;
    return true;
  }

  void give_up(const std::string& why) override {
    Desk* desk = desks_[comm_.rank];
    snprintf(desk->why, sizeof desk->why, "%s", why.c_str());
    desk->gave_up.store(1, std::memory_order_release);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    for (const Peer& peer : peers_) ring(peer);
  }
  std::string peer_gave_up(int q) override {
    return desks_[q]->gave_up.load(std::memory_order_acquire) ? desks_[q]->why : "";
  }

  Record last_heard(int) override { return {}; }  // its status says more

  bool needs_staging(const Op& op) override {
    const bool reads_recv = op.record.call == Call::all_reduce;
    return !op.record.inlined &&
           ((op.send_bytes && locate(op.send).segment == Segment::none) ||
            (reads_recv && op.recv_bytes && locate(op.recv).segment == Segment::none));
  }

 private:
  // Where I write about `op`, and where q does: q's receive meets my send.
  Channel& mine(const Op& op) {
    return channel(op, comm_.rank, op.record.peer, op.record.call == Call::recv);
  }
  Channel& theirs(const Op& op, int q) {
    return channel(op, q, comm_.rank, op.record.call == Call::send);
  }
  Channel& channel(const Op& op, int whose, int other, bool receives) {
    return op.collective() ? desks_[whose]->all
                           : pairs(desks_[whose])[(receives ? comm_.size : 0) + other];
  }
  uint64_t stamp(const Op& op) const {
    return 2 * op.record.number - uint64_t(op.phase == 0 && op.record.call == Call::all_reduce);
  }
  // Those who sleep in a collective wait for everyone: the last to come wakes them all.
  template <class Came> void notify(const Op& op, const Came& came) {
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (!op.collective()) return ring(peers_[op.record.peer]);
    for (int q = 0; q < comm_.size; q++)
      if (!came(q)) return;
    for (const Peer& peer : peers_) ring(peer);
  }
  Where locate(const char* p) const {
    const auto arena = my_arena();
    if (arena.fd >= 0 && p >= arena.base && p < arena.base + arena.size)
      return {Segment::arena, uint64_t(p - arena.base)};
    const char* base = region().base;
    if (p >= base && p < base + region().bytes) return {Segment::region, uint64_t(p - base)};
    return {};
  }

  ncclComm& comm_;
  std::vector<Peer> peers_;
  std::vector<Desk*> desks_;
};

}  // namespace

uint64_t new_desk(int ranks) {
  return region().carve(sizeof(Desk) + 2 * size_t(ranks) * sizeof(Channel), 4096);
}
std::unique_ptr<Link> shared_link(ncclComm& comm) { return std::make_unique<SharedLink>(comm); }

}  // namespace nccl
