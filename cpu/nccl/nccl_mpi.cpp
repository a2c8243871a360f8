// nccl_mpi.cpp: a Link over MPI messages, for ranks that share no memory; and how a communicator is
// born.
//
// idea      everything is started non-blocking and tested, yielding between tests, because a
//           blocking MPI call spins a core away. A record and the data that it announces have tags
//           of their own, so that messages between two ranks arrive in the order of the calls.
// birth     ncclCommInitRank: every member says hello to the rank that made the id, which answers
//           with the table of members; ranks of one node map each other's memory and say whether
//           that worked. ncclCommSplit needs no MPI: it is an all-gather on the parent.
// cost      n-1 small messages for each collective beside its data; all-gather and reduce-scatter
//           (n-1)/n W, all-reduce twice that
// test      tests/test_nccl.cpp
#include <sched.h>
#include <unistd.h>

#include <cstring>

#include "nccl_internal.h"

namespace nccl {
namespace {

// ---- the link

constexpr int kFirstTag = 1 << 20, kBirthTags = 1000;
enum TagKind { record_tag, data_tag, send_record_tag, recv_record_tag, pair_data_tag, tag_kinds };

class MpiLink final : public Link {
 public:
  explicit MpiLink(ncclComm& comm) : comm_(comm), last_(size_t(comm.size)) {
    int* highest = nullptr;
    int known = 0, threads = 0;
    MPI_Comm_get_attr(MPI_COMM_WORLD, MPI_TAG_UB, &highest, &known);
    first_tag_ = kFirstTag + kBirthTags + int(comm.id) * tag_kinds;
    if (known && first_tag_ + tag_kinds > *highest)
      fail(ncclSystemError, "MPI has no tags left for another communicator");
    MPI_Query_thread(&threads);
    bool several_threads = kCuda;
#if defined(CPU_FAST) || defined(CPU_FAITHFUL)
    several_threads = cpu::streams_are_queued;
#endif
    if (several_threads && threads < MPI_THREAD_MULTIPLE)
      fail(ncclInvalidUsage,
           "NCCL over MPI calls MPI from the streams' threads: ask MPI_Init_thread for "
           "MPI_THREAD_MULTIPLE");
  }

  void announce(Op& op) override {
    const size_t payload = op.record.inlined ? op.send_bytes : 0, bytes = sizeof(Record) + payload;
    char* message = op.messages.emplace_back(std::make_unique_for_overwrite<char[]>(bytes)).get();
    memcpy(message, &op.record, sizeof(Record));
    if (payload) memcpy(message + sizeof(Record), op.send, payload);
    if (!op.collective())
      return send(op, op.record.peer, message, bytes,
                  op.record.call == Call::send ? send_record_tag : recv_record_tag);
    for (int q = 0; q < comm_.size; q++)
      if (q != comm_.rank) send(op, q, message, bytes, record_tag);
  }

  const Record* heard(Op& op, int q) override {
    Letter& letter = op.letters[q];
    if (!letter.bytes) {
      const size_t most = sizeof(Record) + (op.record.inlined || op.collective() ? kInline : 0);
      const int tag = op.collective()                ? record_tag
                      : op.record.call == Call::send ? recv_record_tag
                                                     : send_record_tag;
      letter.bytes = std::make_unique_for_overwrite<char[]>(most);
      MPI_Irecv(letter.bytes.get(), int(most), MPI_BYTE, comm_.world(q), first_tag_ + tag,
                MPI_COMM_WORLD, &letter.request);
    }
    const Record* record = reinterpret_cast<const Record*>(letter.bytes.get());
    if (letter.here) return record;
    int done = 0;
    MPI_Test(&letter.request, &done, MPI_STATUS_IGNORE);
    if (!done) return nullptr;
    letter.here = true;
    last_[q] = *record;
    return record;
  }

  void offer(Op& op, int q, const char* data, size_t bytes) override {
    if (!op.record.inlined) send(op, q, data, bytes, op.collective() ? data_tag : pair_data_tag);
  }

  const char* fetch(Op& op, int q, Side, size_t offset, size_t bytes, char* into) override {
    if (q != comm_.rank) op.copied += int64_t(bytes);
    if (op.record.inlined) {
      const char* from = op.letters[q].bytes.get() + sizeof(Record) + offset;
      if (into) memcpy(into, from, bytes);
      return into ? into : from;
    }
    if (!into) into = op.messages.emplace_back(std::make_unique_for_overwrite<char[]>(bytes)).get();
    in_pieces(bytes, [&](size_t at, int piece) {
      MPI_Irecv(into + at, piece, MPI_BYTE, comm_.world(q),
                first_tag_ + (op.collective() ? data_tag : pair_data_tag), MPI_COMM_WORLD,
                &op.requests.emplace_back());
    });
    return into;
  }

  bool fetched(Op& op) override { return all_done(op); }
  void arrive(Op&) override {}
  bool released(Op& op) override { return all_done(op); }
  bool needs_staging(const Op&) override { return false; }
  void give_up(const std::string&) override {}  // their own watches tell them
  std::string peer_gave_up(int) override { return ""; }
  Record last_heard(int q) override { return last_[q]; }

 private:
  template <class Piece> static void in_pieces(size_t bytes, Piece piece) {  // MPI counts in int
    constexpr size_t most = 1 << 30;
    for (size_t at = 0; at < bytes; at += most) piece(at, int(std::min(most, bytes - at)));
  }
  void send(Op& op, int q, const char* data, size_t bytes, int tag) {
    in_pieces(bytes, [&](size_t at, int piece) {
      MPI_Isend(data + at, piece, MPI_BYTE, comm_.world(q), first_tag_ + tag, MPI_COMM_WORLD,
                &op.requests.emplace_back());
    });
  }
  static bool all_done(Op& op) {
    int done = 0;
    MPI_Testall(int(op.requests.size()), op.requests.data(), &done, MPI_STATUSES_IGNORE);
    if (done) op.requests.clear();
    return done;
  }

  ncclComm& comm_;
  int first_tag_ = 0;
  std::vector<Record> last_;
};

// ---- birth of a communicator

std::atomic<uint32_t> ids{0};
std::atomic<bool> share_setting{true};

struct Id {
  char magic[16];
  int32_t world, serial;
};  // the visible part of a ncclUniqueId
constexpr char kMagic[16] = "threefold nccl";

struct Hello {
  Member member;
  int32_t size;
  uint32_t next_id;
};
struct Answer {
  char why[512];
  uint32_t id;
};

// One message, or the watch's sentence.
void wait_for(MPI_Request request, MPI_Status* status,
              const std::function<std::string()>& missing) {
  const auto start = std::chrono::steady_clock::now();
  for (int turn = 0, done = 0;; turn++) {
    MPI_Test(&request, &done, status ? status : MPI_STATUS_IGNORE);
    if (done) return;
    if (turn < 2000) sched_yield();
    else usleep(50);
    if (turn % 256 ||
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() <
            watch_seconds())
      continue;
    MPI_Cancel(&request);
    MPI_Request_free(&request);
    fail(ncclRemoteError, "deadlock in ncclCommInitRank after ", watch_seconds(),
         " s: ", missing());
  }
}
void send_to(int world, const void* data, size_t bytes, int tag) {
  MPI_Request request;
  MPI_Isend(data, int(bytes), MPI_BYTE, world, tag, MPI_COMM_WORLD, &request);
  wait_for(request, nullptr, [&] { return sentence("rank ", world, " does not receive"); });
}
MPI_Status receive_from(int world, void* data, size_t bytes, int tag,
                        const std::function<std::string()>& missing) {
  MPI_Request request;
  MPI_Status status;
  MPI_Irecv(data, int(bytes), MPI_BYTE, world, tag, MPI_COMM_WORLD, &request);
  wait_for(request, &status, missing);
  return status;
}

// of those who came
const Member* same_device(const ncclComm& comm, const std::vector<bool>& came, const Member& m) {
  for (int r = 0; r < comm.size; r++)
    if (const Member& other = comm.members[r];
        came[r] && other.node == m.node && other.device == m.device)
      return &other;
  return nullptr;
}

// The rank that made the id: collects who comes, answers everyone, with a reason if the members do
// not fit together.
void host_birth(ncclComm& comm, const Hello& mine, int tag) {
  std::vector<bool> came(comm.size);
  Answer answer{{}, mine.next_id};
  const auto enter = [&](const Hello& hello) {
    const Member& m = hello.member;
    std::string why;
    if (hello.size != comm.size)
      why = sentence("rank ", m.world, " asks for ", hello.size, " ranks, rank ", mine.member.world,
                     " for ", comm.size);
    else if (m.rank < 0 || m.rank >= comm.size || came[m.rank])
      why = sentence("rank ", m.world, " comes as number ", m.rank, " of ", comm.size,
                     m.rank < comm.size ? ", which is taken" : "");
    else if (const Member* other = kCuda ? nullptr : same_device(comm, came, m))
      why = sentence("Duplicate GPU detected: rank ", other->world, " and rank ", m.world,
                     " are both on device ", m.device);
    else came[m.rank] = true, comm.members[m.rank] = m;
    if (!why.empty() && !answer.why[0])
      snprintf(answer.why, sizeof answer.why, "ncclCommInitRank: %s", why.c_str());
    answer.id = std::max(answer.id, hello.next_id);
  };
  enter(mine);
  std::vector<int> guests;
  for (Hello hello; int(guests.size()) < comm.size - 1;) {
    const auto missing = [&] {
      std::string s = sentence("rank ", mine.member.world, " made the id and misses number");
      for (int r = 0; r < comm.size; r++)
        if (!came[r]) s += sentence(" ", r);
      return sentence(s, " of ", comm.size);
    };
    try {
      guests.push_back(receive_from(MPI_ANY_SOURCE, &hello, sizeof hello, tag, missing).MPI_SOURCE);
      enter(hello);
    } catch (const Failure& f) {
      snprintf(answer.why, sizeof answer.why, "%s", f.sentence.c_str());
      break;
    }
  }
  for (int guest : guests) send_to(guest, &answer, sizeof answer, tag);
  if (answer.why[0]) fail(ncclInvalidUsage, answer.why);
  for (int guest : guests)
    send_to(guest, comm.members.data(), comm.members.size() * sizeof(Member), tag);
  comm.id = answer.id;
}

void attend_birth(ncclComm& comm, const Hello& mine, int host, int tag) {
  const auto silent = [&] {
    return sentence("rank ", host, ", which made the id, does not answer rank ", mine.member.world);
  };
  Answer answer;
  send_to(host, &mine, sizeof mine, tag);
  receive_from(host, &answer, sizeof answer, tag, silent);
  if (answer.why[0]) fail(ncclInvalidUsage, answer.why);
  receive_from(host, comm.members.data(), comm.members.size() * sizeof(Member), tag, silent);
  comm.id = answer.id;
}

// Everyone maps its neighbours; one failure anywhere, and all use messages.
bool agree_to_share(ncclComm& comm, int host, int tag) {
  int works = share_setting;
  map_peer(comm.members[comm.rank]);
  for (const Member& m : comm.members)
    if (works && m.node == comm.members[comm.rank].node) works = map_peer(m);
  const int me = comm.world(comm.rank);
  const auto silent = [] {
    return std::string("a member does not say whether it can share memory");
  };
  if (me != host) {
    send_to(host, &works, sizeof works, tag);
    receive_from(host, &works, sizeof works, tag, silent);
    return works;
  }
  for (const Member& m : comm.members)
    if (int theirs = 1; m.world != host)
      receive_from(m.world, &theirs, sizeof theirs, tag, silent), works &= theirs;
  for (const Member& m : comm.members)
    if (m.world != host) send_to(m.world, &works, sizeof works, tag);
  return works;
}

}  // namespace

std::unique_ptr<Link> mpi_link(ncclComm& comm) { return std::make_unique<MpiLink>(comm); }
uint32_t next_id() { return ids; }
void used_id(uint32_t id) { ids = std::max<uint32_t>(ids, id + 1); }

void open_link(ncclComm& comm) {
  int here = 0, world_size = 0;
  for (const Member& m : comm.members) here += m.node == comm.members[comm.rank].node;
  ranks_here = std::max<int>(ranks_here, here);
  comm.shares = comm.may_share && here == comm.size;
  comm.sends.resize(comm.size), comm.receives.resize(comm.size), comm.sent.resize(comm.size),
      comm.received.resize(comm.size);
  comm.link = comm.shares ? shared_link(comm) : mpi_link(comm);
  MPI_Comm_size(MPI_COMM_WORLD, &world_size);
  if (comm.size == world_size) comm.name = "world";
  comm.description = describe(comm);
  used_id(comm.id);
}

std::shared_ptr<ncclComm> meet_by_id(int size, const ncclUniqueId& unique, int rank) {
  Id id;
  memcpy(&id, &unique, sizeof id);
  if (memcmp(id.magic, kMagic, sizeof kMagic))
    fail(ncclInvalidArgument, "ncclCommInitRank: this is no id from ncclGetUniqueId");
  auto comm = std::make_shared<ncclComm>();
  comm->rank = rank, comm->size = size;
  comm->members.resize(size);
  Hello mine{{}, size, next_id()};
  MPI_Comm_rank(MPI_COMM_WORLD, &mine.member.world);
  mine.member.rank = rank;
  mine.member.desk = new_desk(size);
  describe_me(mine.member);
  const int tag = kFirstTag + id.serial % kBirthTags;
  if (mine.member.world == id.world) host_birth(*comm, mine, tag);
  else attend_birth(*comm, mine, id.world, tag);
  comm->may_share = agree_to_share(*comm, id.world, tag);
  open_link(*comm);
  return comm;
}

void make_id(ncclUniqueId* unique) {
  static std::atomic<int> serial{0};
  int started = 0;
  MPI_Initialized(&started);
  if (!started)
    fail(ncclInvalidUsage,
         "ncclGetUniqueId: MPI_Init comes first: ranks meet through MPI_COMM_WORLD");
  Id id{{}, 0, serial++};
  memcpy(id.magic, kMagic, sizeof kMagic);
  MPI_Comm_rank(MPI_COMM_WORLD, &id.world);
  memset(unique, 0, sizeof *unique);
  memcpy(unique, &id, sizeof id);
}

}  // namespace nccl

void nccl_referee::use_shared_memory(bool on) { nccl::share_setting = on; }
