// watch.cpp: see watch.h.
#include "launch/watch.h"

#include <sys/epoll.h>
#include <sys/mman.h>

#include <csignal>
#include <set>

#include "kernels/op_times.h"
#include "launch/signals.h"
#include "support/files.h"

static int64_t now_ms() {  // CLOCK_MONOTONIC, the same clock in every process of a node
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::milliseconds(1);
}

static std::string place_of(const WatchRecord& r) {  // "step 13, all_reduce #181 (fsdp)"
  std::string s = r.step < 0 ? "starting, " : sentence("step ", r.step, ", ");
  if (r.collectives == 0) return s + "no collective entered";
  if (r.at_files) s += "at files after ";
  return s +
         sentence(name_of(Collective(r.collective.load())), " #", r.collectives, " (", r.axis, ")");
}

// ---- records that outlive their rank

// Every rank of the node maps it, and the child, too. (MPI's shared windows are private memory
// where a node has one rank only.)
static void* share(const Job& job, size_t bytes) {
  char name[] = "/dev/shm/threefold-watch-XXXXXX";  // in memory
  int fd = -1;
  void* memory = nullptr;
  std::string error = error_of([&] {
    if (job.local_rank == 0) fd = mkstemp(name);
    SYSTEM_CHECK(fd >= 0 || job.local_rank > 0, "the watch's records cannot be shared in ", name);
  });
  MPI_Ibcast(name, sizeof name, MPI_CHAR, 0, job.node, UntilDone());
  if (error.empty())
    error = error_of([&] {
      if (job.local_rank > 0) fd = open(name, O_RDWR);
      if (fd >= 0) errno = posix_fallocate(fd, 0, bytes);
      SYSTEM_CHECK(fd >= 0 && errno == 0, "the watch's records cannot be shared in ", name);
      memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
      SYSTEM_CHECK(memory != MAP_FAILED, "the watch's records cannot be mapped");
    });
  error = job.agree(error);               // every rank has opened it, or knows why not
  if (job.local_rank == 0) unlink(name);  // nobody opens it any more
  REQUIRE(error.empty(), error);
  close(fd);
  return memory;
}

Watch::Watch(Job& job, int64_t timeout_seconds) : job_(job), timeout_ms_(timeout_seconds * 1000) {
  const size_t ranks = job.local_size;
  records_ = {static_cast<WatchRecord*>(share(job, sizeof(WatchRecord) * ranks)), ranks};
  mine_ = new (&records_[job.local_rank]) WatchRecord();
  SYSTEM_CHECK(pipe2(lifeline_, O_CLOEXEC) == 0, "the watch's pipe cannot be made");
  mine_->rank = job.rank;
  mine_->pid = getpid();
  mine_->lifeline = lifeline_[0];
  mine_->heartbeat_ms = mine_->progress_ms = now_ms();
  mine_->step = -1;
  if (job.size > job.local_size) MPI_Comm_dup(MPI_COMM_WORLD, &asking_);
  barrier();  // every record is filled in
  // the records stay mapped: the job may end after the watch
  job.explained = &records_[0].explained;
  ended_by = &mine_->ended_by;
  if (job.local_rank == 0) start_child();
  ledger.on_enter = [this](const Axis& axis, Collective c) {
    strncpy(mine_->axis, axis.name.c_str(), sizeof mine_->axis - 1);
    mine_->collective = int(c);
    mine_->collectives++;
    mine_->progress_ms = now_ms();
  };
  thread_ = std::thread([this] { look(); });
}

Watch::~Watch() {
  ledger.on_enter = {};
  mine_->finished = true;
  stop_ = true;
  thread_.join();
  for (int end : lifeline_) close(end);
}

void Watch::progress() { mine_->progress_ms = now_ms(); }

void Watch::observe(const Mesh& m) {
  std::lock_guard lock(mutex_);
  observed_ = m.every_axis();
  if (m.size > 1) mine_->stage = m["pp"].rank;
}

// ---- a hang, or an error that no call returns

constexpr double kPatience = 2;  // seconds for an answer from another node

void Watch::look() {
  int64_t last = now_ms(), moved = 0;
  while (!stop_) {
    usleep(100000);
    const int64_t now = now_ms(), slept = now - last;
    last = now;
    if (slept > 1000) {
      mine_->progress_ms += slept;
      woke_ms_ = now;
    }
    if (bytes_moved + op_times.begun != moved) progress();
    moved = bytes_moved + op_times.begun;
    mine_->heartbeat_ms = now;
    ask_nccl();
    answer();
    // Alone, a rank waits for nobody.
    if (job_.size == 1 || !is_stuck(now) || stop_) continue;
    std::string stand = report();
    if (asking_ != MPI_COMM_NULL) {
      if (!records_[0].asked.exchange(true)) stand += ask_other_nodes();
      else usleep(2 * kPatience * 1e6);  // another rank of this node does, and reports
    }
    job_.abort(stand);
  }
}

bool Watch::is_stuck(int64_t now) const {
  if (!mine_->at_files) {
    // Opening a communicator takes seconds, and a cluster that is set up wrong hangs there: a tenth
    // of the time has to do, though two minutes at least, since a driver may compile first.
    const int64_t opening = std::min(timeout_ms_, std::max<int64_t>(timeout_ms_ / 10, 120000));
    return now - mine_->progress_ms >= (mine_->step < 0 ? opening : timeout_ms_);
  }
  int64_t progress = 0;
  for (const WatchRecord& r : records_) {
    progress = std::max<int64_t>(progress, r.progress_ms);
    if (!r.finished && now - std::max<int64_t>(r.heartbeat_ms, woke_ms_) >= timeout_ms_)
      return true;
  }
  return now - progress >= std::max<int64_t>(10 * timeout_ms_, 60000);
}

void Watch::ask_nccl() {
  std::lock_guard lock(mutex_);
  for (const Axis& axis : observed_) {
    ncclResult_t error = ncclSuccess;
    if (!axis.comm || ncclCommGetAsyncError(axis.comm, &error) != ncclSuccess ||
        error == ncclSuccess || error == ncclInProgress)
      continue;
    job_.abort(sentence("NCCL failed on axis ", axis.name, ": ", nccl_error(error)));
  }
}

using Entered = std::map<int, std::set<int64_t>>;  // by stage: how many collectives
static const char* is_behind(const std::set<int64_t>& entered, int64_t mine) {
  return entered.size() > 1 && mine == *entered.begin() ? "; behind the others of its stage" : "";
}

std::string standings(std::span<const WatchRecord> records, int64_t now, int64_t woke) {
  Entered entered;
  for (const WatchRecord& r : records) entered[r.stage].insert(r.collectives);
  std::string s;
  for (const WatchRecord& r : records) {
    s += sentence("\n  rank ", r.rank, ": ", place_of(r));
    if (now - std::max<int64_t>(r.heartbeat_ms, woke) > 1500)
      s += sentence("; DOES NOT RUN since ", (now - r.heartbeat_ms) / 1000,
                    " s: stopped, or its process ", r.pid, " is stuck");
    else if (r.finished) s += "; has finished";
    else s += is_behind(entered[r.stage], r.collectives);
  }
  return s;
}

std::string Watch::report() const {
  const int64_t now = now_ms();
  const std::string s =
      sentence("no progress for ", (now - mine_->progress_ms) / 1000,
               " s (--timeout); where the ranks of ", host_name(),
               " stand, by what they have issued:", standings(records_, now, woke_ms_));
  if (mine_->step >= 0) return s;
  return s +
         "\nThe mesh could not be opened or checked. Look at the network interface "
         "(NCCL_SOCKET_IFNAME), a firewall between nodes, the size of /dev/shm in a container, "
         "and GPU peer access (NCCL_P2P_DISABLE=1 avoids it). To open a communicator there is a "
         "tenth of --timeout, or two minutes of it if that is longer.";
}

// ---- other nodes

struct Standing {
  int stage;
  int64_t collectives;
  char where[192];
};
enum : int { kQuestion, kAnswer };

// Nothing here waits: the receiver may be stopped, or gone.
static void send(const void* what, size_t bytes, int to, int tag, MPI_Comm comm) {
  auto* kept = new std::string(static_cast<const char*>(what), bytes);  // until the process ends
  MPI_Request request;
  MPI_Isend(kept->data(), bytes, MPI_BYTE, to, tag, comm, &request);
  MPI_Request_free(&request);
}
// Whether a message with this tag was there to be received
static bool receive(void* to, size_t bytes, int tag, MPI_Comm comm, int& from) {
  int there = 0;
  MPI_Status status;
  MPI_Iprobe(MPI_ANY_SOURCE, tag, comm, &there, &status);
  if (!there) return false;
  from = status.MPI_SOURCE;
  MPI_Recv(to, bytes, MPI_BYTE, from, tag, comm, MPI_STATUS_IGNORE);
  return true;
}

void Watch::answer() {
  int from;
  while (asking_ != MPI_COMM_NULL && receive(nullptr, 0, kQuestion, asking_, from)) {
    Standing mine{mine_->stage, mine_->collectives, ""};
    sentence("rank ", job_.rank, " on ", host_name(), ": ", place_of(*mine_))
        .copy(mine.where, sizeof mine.where - 1);
    send(&mine, sizeof mine, from, kAnswer, asking_);
  }
}

// Who does not answer, and who of each stage is furthest behind
std::string Watch::ask_other_nodes() {
  std::set<int> silent;
  for (int r = 0; r < job_.size; r++) silent.insert(r);
  for (const WatchRecord& r : records_) silent.erase(r.rank);
  for (const int r : silent) send(nullptr, 0, r, kQuestion, asking_);
  std::vector<Standing> answers;
  Entered entered;
  Standing of;
  int from;
  for (const double end = MPI_Wtime() + kPatience; !silent.empty() && MPI_Wtime() < end;
       usleep(10000)) {
    answer();
    while (receive(&of, sizeof of, kAnswer, asking_, from)) {
      answers.push_back(of);
      entered[of.stage].insert(of.collectives);
      silent.erase(from);
    }
  }
  std::string s;
  for (const int r : silent)
    s += sentence("\n  rank ", r,
                  ", on another node, DOES NOT ANSWER: stopped, or its node or cable is gone, or "
                  "it has finished");
  for (const Standing& a : answers)
    if (const auto& all = entered[a.stage]; a.collectives == *all.begin())
      s += sentence("\n  ", a.where, is_behind(all, a.collectives));
  return s;
}

// ---- a death

// mpiexec ends the other ranks within a tenth of a second and prints a process number; this child
// outlives them and knows the rank. Whoever dies, its files close first, and what mpiexec knows of
// it is a file, too: an older one, which Linux closes after the pipe. So no rank that mpiexec ends
// can come before the one that died.
void Watch::start_child() {
  const int parent = getpid();
  const pid_t child = fork();
  SYSTEM_CHECK(child >= 0, "the process that watches the ranks cannot be started");
  if (child > 0) return;
  setsid();  // mpiexec ends the ranks' process groups; signals are blocked as in the parent
  close(lifeline_[1]);                 // the parent's alone
  const int queue = epoll_create1(0);  // lists what becomes ready in the order of its becoming so
  int left = 0;
  for (WatchRecord& r : records_) {
    epoll_event event{EPOLLIN | EPOLLONESHOT, {.ptr = &r}};
    const int pipe = open(sentence("/proc/", r.pid, "/fd/", r.lifeline).c_str(), O_RDONLY);
    left += pipe >= 0 && epoll_ctl(queue, EPOLL_CTL_ADD, pipe, &event) == 0;
  }
  epoll_event event;
  while (left > 0) {
    const int ready = epoll_wait(queue, &event, 1, -1);
    if (ready < 0 && errno != EINTR) break;
    if (ready < 1) continue;
    left--;
    const WatchRecord& r = *static_cast<WatchRecord*>(event.data.ptr);
    if (r.finished) continue;
    if (records_[0].explained.exchange(true)) break;
    const int signal = r.ended_by;
    const std::string how =
        signal ? sentence("was ended by signal ", signal, " (", strsignal(signal), ")")
               : "ended without finishing: killed, or it crashed";
    dprintf(2, "rank %d on %s (process %d) %s; last seen: %s\n", r.rank.load(), host_name().c_str(),
            r.pid.load(), how.c_str(), place_of(r).c_str());
    kill(parent, SIGKILL);  // should mpiexec have been told not to clean up
    break;
  }
  _exit(0);
}
