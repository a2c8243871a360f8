// comm.h: ranks that talk: the axes of the mesh, its NCCL communicators, and the ledger of what was
// sent.
//
// idea      Rank r sits at one place of a grid pp x replicate x fsdp x cp x tp. Neighbours on tp
//           have neighbouring numbers, those on pp are furthest apart. Along each axis a rank
//           shares a communicator with the ranks that differ from it in that place only. The
//           strategies call NCCL on these communicators themselves.
// axes      kAxes is the one list of them, over which options, ledger and reports iterate.
//           `mesh["fsdp"]` is this rank's place on an axis and its communicator, `layout["fsdp"]`
//           the axis's size, and a name that is not in the list does not compile.
// stream    A rank issues all its NCCL calls, of all axes, on `device().communication`, from one
//           thread, in an order that options and its place decide, never timing. CUDA does not
//           promise that two streams make progress independently, so two communicators in flight
//           could wait for each other.
// ledger    One line before each collective or send of a step enters what a bandwidth-optimal
//           algorithm sends per rank (n ranks, buffer of W bytes): all-gather and reduce-scatter
//           (n-1)/n W, all-reduce 2(n-1)/n W, send and broadcast W. These are algorithm bytes, not
//           wire bytes.
// test      tests/test_comm.cpp
#pragma once
#include <cuda_runtime.h>
#include <mpi.h>
#include <nccl.h>

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "tensor.h"

// ---- axes

struct AxisKind {
  const char* name;
  bool splits_batch = false;     // each rank computes with its own sequences
  bool splits_sequence = false;  // each rank computes with its own pieces of every sequence
  bool copies_model = false;     // each rank updates a copy of all that its neighbours update
  bool exchanges = false;        // neighbours send to each other, besides collectives
  const char* help;              // of the option --name N
};
constexpr std::array kAxes = std::to_array<AxisKind>({
    // slowest to fastest
    {.name = "pp",
     .exchanges = true,
     .help = "pipeline parallelism: the layers are cut into N stages"},
    {.name = "replicate",
     .splits_batch = true,
     .copies_model = true,
     .help = "data parallelism: copies of the model, gradients summed over them"},
    {.name = "fsdp",
     .splits_batch = true,
     .help = "fully sharded data parallelism: each rank owns 1/N of every layer"},
    {.name = "cp",
     .splits_sequence = true,
     .exchanges = true,
     .help = "context parallelism: each rank has 1/N of every sequence, and of every layer as with "
             "fsdp"},
    {.name = "tp", .help = "tensor parallelism: each layer's weights are split over N ranks"},
});

struct AxisName {
  size_t index = 0;  // in kAxes
  consteval AxisName(const char* name) {
    while (std::string_view(kAxes.at(index).name) != name) index++;
  }
};

// How many ranks each axis has: Layout{{"fsdp", 2}, {"tp", 2}}; 1 where nothing is said.
struct Layout {
  struct Size {
    AxisName axis;
    int64_t ranks;
  };
  Layout(std::initializer_list<Size> sizes = {});
  int64_t& operator[](AxisName axis) { return sizes[axis.index]; }
  int64_t operator[](AxisName axis) const { return sizes[axis.index]; }
  int64_t ranks() const;
  int64_t data_ranks() const;  // that share the batch
  std::array<int64_t, kAxes.size()> sizes;
};
std::string to_string(const Layout& layout);  // "pp 2 x replicate 1 x fsdp 2 x cp 1 x tp 2"
std::string draw(const Layout& layout);       // the place of each rank, a line each
// REQUIREs their product to be the ranks that mpiexec started
void check_ranks(const Layout& layout, int ranks);

// ---- the mesh

struct Axis {
  std::string name;
  int size = 1, rank = 0;
  ncclComm_t comm = nullptr;      // null when size is 1
  std::vector<int> members = {};  // its ranks in the world; none when size is 1
};

struct Mesh {
  // where `rank` is on each axis, still without communicators
  explicit Mesh(const Layout& layout = {}, int rank = 0);
  const Axis& operator[](AxisName axis) const { return axes[axis.index]; }
  // those of which kAxes says so, slowest to fastest: mesh.axes_where(&AxisKind::splits_batch)
  std::vector<Axis> axes_where(bool AxisKind::*holds) const;
  // the world, the axes, and `shards` where it is not one of them
  std::vector<Axis> every_axis() const;

  Layout layout;
  int rank = 0, size = 1;
  std::array<Axis, kAxes.size()> axes;
  Axis world;   // every rank
  Axis shards;  // what FSDP shards over: fsdp and cp as one axis
};
// Collective. The communicators are split from the world's in the same order everywhere; an axis
// that has all ranks uses the world's.
Mesh open_mesh(const Layout& layout);
void close_mesh(Mesh& mesh);  // before MPI_Finalize and before the device closes

// ---- NCCL

std::string nccl_error(ncclResult_t status);  // NCCL's own last sentence where it has one
#define NCCL_CHECK(call) STATUS_CHECK(#call, call, ncclSuccess, nccl_error(status_))
ncclDataType_t nccl_type(Dtype dtype);

// Host-side MPI without a spinning core: the last argument of a non-blocking call,
// MPI_Ibarrier(MPI_COMM_WORLD, UntilDone()). At the end of the statement it waits for the call,
// yielding between tests.
class UntilDone {
 public:
  UntilDone() = default;
  ~UntilDone();
  UntilDone(const UntilDone&) = delete;
  operator MPI_Request*() { return &request_; }

 private:
  MPI_Request request_ = MPI_REQUEST_NULL;
};

// ---- time

// From `const Timed timed;` to the end of its block the communication stream is timed as one op,
// waiting for other ranks included (op_times.h). The ledger's lines in the block name it; one
// without any only receives.
class Timed {
 public:
  explicit Timed(const char* function = __builtin_FUNCTION());
  ~Timed();
  Timed(const Timed&) = delete;

 private:
  bool timed_;
};
// How long the communication stream was busy in all blocks that were timed, in seconds; the host
// has waited for them.
double seconds_communicating();

// ---- the ledger

enum class Collective { all_reduce, all_gather, reduce_scatter, broadcast, send };
const char* name_of(Collective c);
// What a rank of n sends with a bandwidth-optimal algorithm, in n-ths of the buffer (n: all of it).
int64_t parts_sent(Collective c, int64_t n);
// Each purpose has rows of its own, so that a formula is compared with one number. embedding: with
// the head; recompute: forwards that are run again; gathered_again, partial_gradients: what
// sequence parallelism gathers a second time, and the sums of what it leaves in parts.
enum class Traffic {
  training,
  embedding,
  loss,
  recompute,
  gathered_again,
  partial_gradients,
  norm,
  evaluation
};
const char* name_of(Traffic t);

class Ledger {
 public:
  // One line before each collective or send. Bytes are those of the whole buffer: of all ranks
  // together where each has a part of it.
  void enter(const Axis& axis, Collective c, int64_t bytes, int64_t calls = 1);

  struct Row {  // bytes sent by this rank = numerator / n
    int64_t calls = 0;
    __int128 numerator = 0;  // a long run on many ranks needs more than 64 bits
    int n = 1;
    int64_t bytes() const { return int64_t(numerator / n); }
  };
  using Key = std::tuple<std::string, Collective, Traffic>;
  std::map<Key, Row> rows;
  // of all rows: sums of numerators, rounded down once for each size of axis
  int64_t bytes() const;
  Traffic purpose = Traffic::training;  // of what is entered now: see Purpose
  // the hang watch keeps its record through this
  std::function<void(const Axis&, Collective)> on_enter;
};
extern Ledger ledger;

// What is entered while it lives serves `purpose`; all of an evaluation is evaluation, and all of a
// forward that is run again recompute.
class Purpose {
 public:
  explicit Purpose(Traffic purpose) : before_(ledger.purpose) {
    if (before_ != Traffic::evaluation && before_ != Traffic::recompute) ledger.purpose = purpose;
  }
  ~Purpose() { ledger.purpose = before_; }
  Purpose(const Purpose&) = delete;

 private:
  const Traffic before_;
};

// Sums x over the ranks of one axis after the other, in place: the loss, the norm.
void sum_over(const std::vector<Axis>& axes, const Tensor& x, Traffic serves);
