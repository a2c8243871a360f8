// comm.h: ranks that talk: the job, the mesh of ranks with its NCCL communicators, and the ledger
// of what was sent.
//
// idea      rank r sits at one place of a grid pp x replicate x fsdp x tp (slowest to fastest);
//           along each axis it shares a communicator with the ranks that differ from it in that
//           place only. The strategies call NCCL on these communicators themselves.
// one queue a rank issues all its NCCL calls, of all axes, on `mesh.stream`, from one thread, in an
// order that the layout alone decides. CUDA
//           does not promise that two streams make progress independently, so two communicators in
//           flight could wait for each other.
// ledger    one line before each NCCL call enters what a bandwidth-optimal algorithm sends per rank
//           (n ranks, buffer of W bytes): all-gather and reduce-scatter (n-1)/n W, all-reduce
//           2(n-1)/n W, send W. These are algorithm bytes, not wire bytes.
// test      tests/test_comm.cpp
#pragma once
#include <cuda_runtime.h>
#include <mpi.h>
#include <nccl.h>

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "tensor.h"

std::string nccl_error(ncclResult_t status);  // NCCL's own last sentence where it has one

// How long the communication queue is busy with NCCL's calls, waiting for the other ranks included:
// an event before and one after each call of a step.
class CommunicationClock {
 public:
  void start_step(cudaStream_t queue) { queue_ = queue, calls_ = 0; }
  double end_step();  // seconds since start_step; waits for the queue
  template <class Call> ncclResult_t timed(const Call& call) {
    if (!queue_) return call();
    if (calls_ == work_.size()) work_.emplace_back();
    TimedWork& work = work_[calls_++];
    work.begin.record(queue_);
    const ncclResult_t status = call();
    work.end.record(queue_);
    return status;
  }

 private:
  cudaStream_t queue_ = nullptr;  // null between steps: nothing is timed
  size_t calls_ = 0;
  std::deque<TimedWork> work_;  // reused by every step
};
extern CommunicationClock communication_clock;

#define NCCL_CHECK(call)                                                                     \
  do {                                                                                       \
    const ncclResult_t status_ = communication_clock.timed([&] { return (call); });          \
    if (status_ != ncclSuccess)                                                              \
      throw Error(                                                                           \
          sentence(__FILE__, ":", __LINE__, ": ", #call, " failed: ", nccl_error(status_))); \
  } while (0)

// ---- the job: what mpiexec started

class Job {
 public:
  Job(int* argc, char*** argv);  // MPI_Init
  ~Job();                        // MPI_Finalize
  // an Error when mpiexec belongs to another MPI and started n worlds of one rank
  void check_launcher();
  int rank = 0, size = 1;
  // among the ranks of this node: local_rank is the CUDA device
  int local_rank = 0, local_size = 1;
  MPI_Comm node;  // these ranks
  // what concerns all ranks is said by rank 0; of n worlds of one, by the launcher's first
  bool speaks = true;
  // Every rank calls it with its own error or "": each learns whether all are well, and the first
  // failing rank's sentence.
  std::string agree(const std::string& error) const;
  // Ends every rank with a non-zero status; prints "rank r: why", unless another rank of this node
  // has explained the end already.
  [[noreturn]] void abort(const std::string& why) const;
  std::atomic<bool>* explained = nullptr;  // shared by the ranks of this node once there is a Watch
};

// Host-side MPI without a spinning core: the last argument of a non-blocking call,
// MPI_Ibarrier(MPI_COMM_WORLD, Finished()). At the end of the statement it waits for the call,
// yielding between tests.
class Finished {
 public:
  Finished() = default;
  ~Finished();
  Finished(const Finished&) = delete;
  operator MPI_Request*() { return &request_; }

 private:
  MPI_Request request_ = MPI_REQUEST_NULL;
};
void barrier();
std::vector<std::string> gather_text(const std::string& mine);  // of all ranks, on every rank

// ---- the mesh

struct Axis {
  const char* name = "";
  int size = 1, rank = 0;
  ncclComm_t comm = nullptr;  // null when size is 1
};

struct Layout {
  int pp = 1, replicate = 1, fsdp = 1, tp = 1;
  int64_t ranks() const { return int64_t(pp) * replicate * fsdp * tp; }
};
std::string to_string(const Layout& layout);  // "pp 2 x replicate 1 x fsdp 2 x tp 2"

struct Mesh {
  Layout layout;
  int rank = 0, size = 1;
  Axis pp, replicate, fsdp, tp, world;  // world: every rank, for sums over all axes
  cudaStream_t stream = nullptr;        // the one communication queue
};
// REQUIREs their product to be the ranks that mpiexec started
void check_ranks(const Layout& layout, int ranks);
// Collective. The communicators are split from the world's in the same order everywhere.
Mesh open_mesh(const Job& job, const Layout& layout);
// The first minute on a cluster: each axis and each kind of collective once, with known answers.
// Says what to look at when one fails; when one hangs, the watch does.
void check_mesh(const Mesh& mesh);
void close_mesh(Mesh& mesh);             // before MPI_Finalize and before the device closes
std::string draw(const Layout& layout);  // the place of each rank, a line each

// ---- the ledger

enum class Collective { all_reduce, all_gather, reduce_scatter, broadcast, send };
const char* name_of(Collective c);
// Rows of their own, so that formulas stay pure. embedding: with the head; recompute: forwards
// replayed; again: what sequence parallelism gathers a second time; partial: gradients that it
// leaves in parts.
enum class Traffic { training, embedding, loss, recompute, again, partial, norm, evaluation };
const char* name_of(Traffic t);

class Ledger {
 public:
  void all_reduce(const Axis& axis, int64_t buffer_bytes) {
    enter(axis, Collective::all_reduce, 2 * (axis.size - 1) * buffer_bytes);
  }
  void all_gather(const Axis& axis, int64_t full_bytes) {
    enter(axis, Collective::all_gather, (axis.size - 1) * full_bytes);
  }
  void reduce_scatter(const Axis& axis, int64_t full_bytes) {
    enter(axis, Collective::reduce_scatter, (axis.size - 1) * full_bytes);
  }
  void broadcast(const Axis& axis, int64_t buffer_bytes) {
    enter(axis, Collective::broadcast, int64_t(axis.size) * buffer_bytes);
  }
  void send(const Axis& axis, int64_t buffer_bytes) {
    enter(axis, Collective::send, int64_t(axis.size) * buffer_bytes);
  }

  struct Row {
    int64_t calls = 0, numerator = 0;
    int n = 1;
  };
  using Key = std::tuple<std::string, Collective, Traffic>;
  std::map<Key, Row> rows;
  // of all rows: sums of numerators, rounded down once for each size of axis
  int64_t bytes() const;
  Traffic purpose = Traffic::training;  // of what is entered now: see Purpose
  // the hang watch keeps its record through this
  std::function<void(const Axis&, Collective)> on_enter;

 private:
  // bytes sent by this rank = numerator / axis.size
  void enter(const Axis& axis, Collective c, int64_t numerator);
};
extern Ledger ledger;

// what is entered while it lives serves `purpose`; all of an evaluation is evaluation
class Purpose {
 public:
  explicit Purpose(Traffic purpose) : before_(ledger.purpose) {
    if (before_ != Traffic::evaluation) ledger.purpose = purpose;
  }
  ~Purpose() { ledger.purpose = before_; }
  Purpose(const Purpose&) = delete;
  Purpose& operator=(const Purpose&) = delete;

 private:
  Traffic before_;
};
ncclDataType_t nccl_type(Dtype dtype);

// Sums x over the ranks of one axis after the other, in place: the loss, the norm.
void sum_over(const Mesh& mesh, std::initializer_list<const Axis*> axes, const Tensor& x,
              Traffic purpose);
