// watch.cpp: see watch.h.
#include "launch/watch.h"

#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <set>

#include "support/progress.h"

static int64_t now_ms() {  // CLOCK_MONOTONIC, the same clock in every process of a node
  return std::chrono::duration_cast<std::chrono::milliseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

static std::string host() {
  char name[256] = "";
  gethostname(name, sizeof name - 1);
  return name;
}

static std::string place_of(const WatchRecord& r) {  // "step 13, all_reduce #181 (fsdp)"
  std::string s = r.step < 0 ? "starting, " : sentence("step ", r.step, ", ");
  if (r.collectives == 0) return s + "no collective entered";
  if (r.at_files) s += "at a checkpoint's files after ";
  return s +
         sentence(name_of(Collective(r.collective.load())), " #", r.collectives, " (", r.axis, ")");
}

// ---- records that outlive their rank

// Every rank of the node maps it, and the child, too. (MPI's shared windows are private memory
// where a node has one rank only.)
static void* share(const Job& job, size_t bytes) {
  // containers count processes by themselves
  int64_t owner[] = {getpid(), std::chrono::steady_clock::now().time_since_epoch().count()};
  MPI_Ibcast(owner, 2, MPI_INT64_T, 0, job.node, Finished());
  const std::string name = sentence("/threefold-watch-", owner[0], "-", owner[1]);
  const int fd = shm_open(name.c_str(), O_RDWR | O_CREAT, 0600);
  const int failed = fd < 0 ? errno : posix_fallocate(fd, 0, off_t(bytes));
  REQUIRE(!failed, "cannot share the watch's records in /dev/shm", name, ": ", strerror(failed));
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  ASSERT(memory != MAP_FAILED, strerror(errno));
  MPI_Ibarrier(job.node, Finished());
  if (job.local_rank == 0) shm_unlink(name.c_str());  // nobody opens it any more
  close(fd);
  return memory;
}

Watch::Watch(Job& job, double timeout_seconds)
    : job_(job), timeout_ms_(int64_t(timeout_seconds * 1000)) {
  records_ = static_cast<WatchRecord*>(share(job, sizeof(WatchRecord) * size_t(job.local_size)));
  mine_ = new (&records_[job.local_rank]) WatchRecord();
  ASSERT(pipe2(lifeline_, O_CLOEXEC) == 0, strerror(errno));
  mine_->rank = job.rank, mine_->pid = getpid(), mine_->lifeline = lifeline_[0];
  mine_->heartbeat_ms = mine_->progress_ms = now_ms();
  mine_->step = -1;
  barrier();  // every record is filled in
  // the records stay mapped: the job may end after the watch
  job.explained = &records_[0].explained;
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

void Watch::step(int64_t step) {
  mine_->step = step;
  progress();
}

void Watch::progress() { mine_->progress_ms = now_ms(); }

void Watch::observe(const Mesh& m) {
  std::lock_guard lock(mutex_);
  observed_.clear();
  for (const Axis& axis : m.every_axis())
    if (axis.comm) observed_.push_back(axis);
}

// ---- a hang, or an error that no call returns

void Watch::look() {
  int64_t last = now_ms(), moved = 0;
  while (!stop_) {
    usleep(100000);
    const int64_t now = now_ms(), slept = now - last;
    last = now;
    if (slept > 1000) mine_->progress_ms += slept, woke_ms_ = now;
    if (bytes_moved != moved) moved = bytes_moved, progress();
    mine_->heartbeat_ms = now;
    ask_nccl();
    // Alone, a rank waits for nobody.
    if (job_.size > 1 && is_stuck(now) && !stop_) job_.abort(report());
  }
}

bool Watch::is_stuck(int64_t now) const {
  int64_t progress = mine_->progress_ms;
  for (int i = 0; mine_->at_files && i < job_.local_size; i++) {
    const WatchRecord& r = records_[i];
    progress = std::max<int64_t>(progress, r.progress_ms);
    if (!r.finished && now - std::max<int64_t>(r.heartbeat_ms, woke_ms_) >= timeout_ms_)
      return true;
  }
  return now - progress >= limit_ms();
}

// Opening and checking the mesh takes seconds, and a cluster that is set up wrong hangs there: a
// tenth of the time, though a minute at least, has to do.
int64_t Watch::limit_ms() const {
  if (mine_->at_files) return std::max<int64_t>(10 * timeout_ms_, 60000);
  if (mine_->step >= 0) return timeout_ms_;
  return std::min(timeout_ms_, std::max<int64_t>(timeout_ms_ / 10, 60000));
}

void Watch::ask_nccl() {
  std::lock_guard lock(mutex_);
  for (const Axis& axis : observed_) {
    ncclResult_t error = ncclSuccess;
    if (ncclCommGetAsyncError(axis.comm, &error) != ncclSuccess || error == ncclSuccess ||
        error == ncclInProgress)
      continue;
    job_.abort(sentence("NCCL failed on axis ", axis.name, ": ", nccl_error(error)));
  }
}

std::string Watch::report() const {
  const int64_t now = now_ms();
  std::string s = sentence("no progress for ", (now - mine_->progress_ms) / 1000,
                           " s (--timeout); where the ranks of ", host(), " stand:");
  std::set<int64_t> entered;
  for (int i = 0; i < job_.local_size; i++) entered.insert(records_[i].collectives);
  for (int i = 0; i < job_.local_size; i++) {
    const WatchRecord& r = records_[i];
    s += sentence("\n  rank ", r.rank, ": ", place_of(r));
    if (now - std::max<int64_t>(r.heartbeat_ms, woke_ms_) > 1500)
      s += sentence("; DOES NOT RUN since ", (now - r.heartbeat_ms) / 1000,
                    " s: stopped, or its process ", r.pid, " is stuck");
    else if (r.finished) s += "; has finished";
    else if (r.collectives == *entered.begin() && entered.size() > 1) s += "; behind the others";
  }
  if (mine_->step >= 0) return s;
  return s +
         "\nThe mesh could not be opened or checked. Look at the network interface "
         "(NCCL_SOCKET_IFNAME), a firewall between nodes, the size of /dev/shm in a container, "
         "and GPU peer access (NCCL_P2P_DISABLE=1 avoids it).";
}

// ---- a death

// mpiexec ends the other ranks within a tenth of a second and prints a process number; this child
// outlives them and knows the rank. Whoever dies, its files close first, and what mpiexec knows of
// it is a file, too: an older one, which Linux closes after the pipe. So no rank that mpiexec ends
// can come before the one that died.
void Watch::start_child() {
  const int parent = getpid();
  const pid_t child = fork();
  REQUIRE(child >= 0, "the process that watches the ranks cannot be started: ", strerror(errno));
  if (child > 0) return;
  setsid();  // mpiexec ends the ranks' process groups; signals are blocked as in the parent
  close(lifeline_[1]);                 // the parent's alone
  const int queue = epoll_create1(0);  // lists what becomes ready in the order of its becoming so
  int left = 0;
  for (int i = 0; i < job_.local_size; i++) {
    epoll_event event{EPOLLIN | EPOLLONESHOT, {.u32 = uint32_t(i)}};
    const int pipe =
        open(sentence("/proc/", records_[i].pid, "/fd/", records_[i].lifeline).c_str(), O_RDONLY);
    left += pipe >= 0 && epoll_ctl(queue, EPOLL_CTL_ADD, pipe, &event) == 0;
  }
  epoll_event event;
  while (left > 0) {
    const int ready = epoll_wait(queue, &event, 1, -1);
    if (ready < 0 && errno != EINTR) break;
    if (ready < 1) continue;
    left--;
    const WatchRecord& r = records_[event.data.u32];
    if (r.finished) continue;
    if (records_[0].explained.exchange(true)) break;
    dprintf(2,
            "rank %d on %s (process %d) ended without finishing: killed, or it crashed; last seen: "
            "%s\n",
            r.rank.load(), host().c_str(), r.pid.load(), place_of(r).c_str());
    kill(parent, SIGKILL);  // should mpiexec have been told not to clean up
    break;
  }
  _exit(0);
}
