// nccl_internal.h: the inside of the NCCL stand-in: what its files share, and the protocol.
//
//   nccl.cpp              the API: groups, numbers, streams, staging, splitting
//   nccl_collectives.cpp  what moves, and the sums: written on a Link
//   nccl_referee.cpp      what is compared and said: records, mismatches, overlaps, checksums, the
//                         watch
//   nccl_shared.cpp       a Link between ranks of one node: peers read each other's memory in place
//   nccl_mpi.cpp          a Link over MPI messages; and how a communicator is born
//
// protocol  Every call, collective or point-to-point, is a rendezvous of those who take part in it.
//           One rank's part of one call:
//
//             issued
//               │      (the stream comes to it)
//             announce   My record is where the peers look.
//               │
//             meet       Everyone's record is there and says the same as mine; if not, the call
//               │        ends in a sentence that shows both.
//             move       Read the peers' memory, or exchange messages.
//               │
//             arrive     I have read what I need: the peers may reuse their buffers.
//               │
//             released   The peers have read what they need: my buffers are mine again.
//
//           What does not come in time, at any of the waits, ends in the watch's sentence: where
//           each rank stands.
//
//           All-reduce of large buffers goes twice through move, arrive, released: first for its
//           sums, then for its gathering. What fits into kInline bytes travels with the record, so
//           that small calls are done once everyone has met.
// numbers   Collectives of a communicator are numbered from 1, and so are the sends of each ordered
//           pair. Records of even and odd numbers lie in two places: a rank that announces k+2 has
//           met all in k+1, and they announced k+1 after they had read what belongs to k.
// order     A rank runs one NCCL task (a call or a group) at a time, in the order of issue,
//           whatever the streams: CUDA does not promise that two streams progress independently, so
//           nothing here may rely on it. In a group the collectives run one after another in the
//           order of the calls, then all sends and receives together. Ranks that disagree wait for
//           each other; the watch finds them.
// sums      One element after another, from the rank after a piece's owner round to the owner;
//           all-reduces that fit into a record in ascending rank. The same whatever the transport
//           and the timing; each sum of bf16 is rounded to it, as in NCCL's rings.
// failure   Sticky for the communicator: the peers are told, and later calls return the error at
//           once.
#pragma once
#include <mpi.h>
#include <nccl.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "nccl_referee.h"
#include "support/check.h"

#if defined(CPU_FAST) || defined(CPU_FAITHFUL)
constexpr bool kCuda = false;
#else
// device memory is elsewhere: everything is staged through pinned host memory
constexpr bool kCuda = true;
#endif

namespace nccl {

using nccl_referee::Call;
struct Task;

constexpr size_t kInline = 16384;  // bytes that travel with a record

struct Failure {  // thrown inside, becomes a result code and ncclGetLastError's sentence
  ncclResult_t code;
  std::string sentence;
};
template <class... Parts> [[noreturn]] void fail(ncclResult_t code, const Parts&... parts) {
  throw Failure{code, sentence(parts...)};
}

// ---- what a rank says about one call; lies where the peers read it, or travels to them

// of its process: device memory, or the memory that this stand-in allocates
enum class Segment : int32_t { none, arena, region };
struct Where {
  Segment segment = Segment::none;
  uint64_t offset = 0;
};

struct Record {
  Call call = Call::none;
  int32_t dtype = 0, op = 0, peer = -1;  // peer: of send and recv, or the root
  // among the collectives that its group has on this communicator
  int32_t group_index = 0, group_size = 1;
  int32_t inlined = 0;  // the send buffer's bytes came along
  uint64_t count = 0, number = 0;
  Where send, recv;
};

// ---- one call

struct Letter {
  MPI_Request request = MPI_REQUEST_NULL;
  bool here = false;
  std::unique_ptr<char[]> bytes;
};

struct Op {
  Record record;
  std::shared_ptr<ncclComm> comm;
  cudaStream_t stream = nullptr;
  // where the data is now, and what the caller gave
  const char *send = nullptr, *user_send = nullptr;
  char *recv = nullptr, *user_recv = nullptr;
  size_t send_bytes = 0, recv_bytes = 0;  // of this rank: 0 where a buffer takes no part
  char *staged_send = nullptr, *staged_recv = nullptr;

  // while it runs
  int stage = 0, phase = 0;  // of a send or recv; of an all-reduce
  std::vector<int> offered;  // peers that read from me
  std::vector<MPI_Request> requests;
  std::vector<std::unique_ptr<char[]>> messages;  // buffers of the requests
  std::map<int, Letter> letters;                  // by peer: its record, under way or here
  int64_t copied = 0;                             // bytes read from peers
  uint64_t checksum = 0;

  bool collective() const { return record.call != Call::send && record.call != Call::recv; }
};

struct Task {  // a call or a group; `ticket` is its place in the order of issue
  std::vector<Op> ops;
  std::vector<std::shared_ptr<ncclComm>> comms;  // each once
  uint64_t ticket = 0;
  ncclResult_t result = ncclSuccess;
};

// ---- how the members of a communicator reach each other

enum class Side { send, recv };  // the peer's send buffer or its receive buffer

class Link {
 public:
  virtual ~Link() = default;
  virtual void announce(Op& op) = 0;
  // q's record that meets `op`; null while it is not there
  virtual const Record* heard(Op& op, int q) = 0;
  // Give and take of data; the sizes agree because the records did. `fetch` returns where the bytes
  // are (`into`, or in place when null) once fetched() holds. `offset` counts from the start of the
  // peer's buffer.
  virtual void offer(Op& op, int q, const char* data, size_t bytes) = 0;
  virtual const char* fetch(Op& op, int q, Side side, size_t offset, size_t bytes, char* into) = 0;
  virtual bool fetched(Op& op) = 0;
  virtual void arrive(Op& op) = 0;
  virtual bool released(Op& op) = 0;
  // a peer must read a buffer that it cannot see
  virtual bool needs_staging(const Op& op) = 0;
  // tells the peers, where that costs them nothing to hear
  virtual void give_up(const std::string& why) = 0;
  virtual std::string peer_gave_up(int q) = 0;  // why, or ""
  // for reports where q's memory cannot be seen
  virtual Record last_heard(int q) = 0;
};

struct Member {  // what the others must know about a rank to reach it
  // in the communicator, in MPI_COMM_WORLD
  int32_t rank = 0, world = 0;
  int32_t pid = 0, region_fd = -1, arena_fd = -1, device = 0;
  // desk: offset of its records in its region
  uint64_t cookie = 0, node = 0, arena_bytes = 0, desk = 0;
};

std::unique_ptr<Link> shared_link(ncclComm& comm);
std::unique_ptr<Link> mpi_link(ncclComm& comm);

}  // namespace nccl

struct ncclComm : std::enable_shared_from_this<ncclComm> {
  int rank = 0, size = 1;
  // differs between the communicators that a process belongs to
  uint32_t id = 0;
  bool may_share = false;  // ranks of one node can map each other's memory
  bool shares = false;     // and all of its ranks are on this node: no messages
  std::vector<nccl::Member> members;
  std::string name, description;  // "fsdp"; "communicator 'fsdp' of ranks 0,2"
  std::unique_ptr<nccl::Link> link;

  std::atomic<ncclResult_t> error{ncclSuccess};
  std::string why;  // of the error; guarded by `mutex`
  std::mutex mutex;
  std::condition_variable idle;
  int pending = 0;  // tasks issued and not done
  nccl_referee::Traffic traffic[nccl_referee::kCalls];

  uint64_t collectives = 0;  // numbers given out
  std::vector<uint64_t> sends, receives;
  std::vector<uint64_t> sent, received;  // numbers completed

  int world(int q) const { return members[q].world; }
};

namespace nccl {

// ---- nccl_shared.cpp: memory of this process that peers can map

// this process's last task, for the others' reports; every write is small and a torn read only
// garbles a report
struct Status {
  std::atomic<uint32_t> state{0};  // 0 no call yet, 1 waiting, 2 done, 3 failed
  Record record;
  int32_t calls_in_task = 0;
  char comm[96] = "";
  int32_t peer_world = -1;
};
Status& my_status();
const Status* status_of(const Member& m);  // null where its memory cannot be mapped
uint64_t new_desk(int ranks);              // offset of zeroed records for a communicator of so many
char* take_block(size_t bytes);            // staging memory that peers can read; pinned under CUDA
void give_block(char* block, size_t bytes);
void describe_me(Member& me);
bool map_peer(const Member& m);  // false: no shared memory with it
void sleep_until_rung(const std::function<bool()>& ready);

// ---- nccl_collectives.cpp

void run_collective(Task& task, Op& op);
// of a send or receive: true when it is complete
bool advance(Op& op);
void copy(char* to, const char* from, size_t bytes);  // on several threads where cores are free
// the most ranks that one of our communicators has on this node
extern std::atomic<int> ranks_here;
int cores();

// ---- nccl_mpi.cpp

void make_id(ncclUniqueId* id);
std::shared_ptr<ncclComm> meet_by_id(int size, const ncclUniqueId& id, int rank);
// shared memory if all members are on this node, else MPI
void open_link(ncclComm& comm);
// no communicator of this process has this id or a higher one
uint32_t next_id();
void used_id(uint32_t id);

// ---- nccl_referee.cpp

std::string words(const ncclComm& comm, const Record& record);  // "all_reduce #41 (1000 f32 sum)"
std::string describe(const ncclComm& comm);                     // "communicator 'world'"
void check_arguments(const Op& op);                             // throws Failure
void check_overlaps(const std::vector<Op>& ops);
void compare(const Op& mine, int q, const Record& theirs);
void count_traffic(Op& op);
void fill_and_sum(Op& op);     // tests' mode: at the start
void check_sum(const Op& op);  // and at the completion
bool is_strict();
double watch_seconds();
size_t size_of(int dtype);  // 0: not known here
// throws Failure instead of waiting for ever
void wait_until(Task& task, const std::function<bool()>& ready);
void set_last_error(const std::string& text);

}  // namespace nccl
