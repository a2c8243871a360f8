// comm.cpp: the axes, the mesh and the ledger. See comm.h for the idea.
// test      tests/test_comm.cpp
#include "comm.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <set>

#include "kernels/op_times.h"

// ---- time

Timed::Timed(const char* function) : timed_(op_times.times(OpTimes::collectives)) {
  if (!timed_) return;
  op_times.begin(device().communication, true, {"receive"});
  recorder.function = function;
  recorder.purpose = name_of(ledger.purpose);
}

Timed::~Timed() {
  if (timed_) op_times.end(device().communication);
}

double seconds_communicating() {
  double seconds = 0;
  op_times.each([&](const OpTimes::Op& op) {
    if (op.collective) seconds += op.seconds();
  });
  return seconds;
}

// ---- axes

Layout::Layout(std::initializer_list<Size> given) {
  sizes.fill(1);
  for (const Size& size : given) (*this)[size.axis] = size.ranks;
}

int64_t Layout::ranks() const {
  int64_t n = 1;
  for (const int64_t size : sizes)
    if (__builtin_mul_overflow(n, size, &n)) return INT64_MAX;
  return n;
}

int64_t Layout::data_ranks() const {
  int64_t n = 1;
  for (size_t a = 0; a < kAxes.size(); a++)
    if (kAxes[a].splits_batch) n *= sizes[a];
  return n;
}

std::string to_string(const Layout& l) {
  std::string s;
  for (size_t a = 0; a < kAxes.size(); a++)
    s += sentence(a ? " x " : "", kAxes[a].name, " ", l.sizes[a]);
  return s;
}

std::string draw(const Layout& l) {
  std::string s = "rank";
  for (const AxisKind& kind : kAxes) s += sentence("  ", kind.name);
  for (int r = 0; r < l.ranks(); r++) {
    s += format("\n%4d", r);
    for (const Axis& axis : Mesh(l, r).axes) s += format("  %*d", int(axis.name.size()), axis.rank);
  }
  return s + "\n";
}

void check_ranks(const Layout& l, int ranks) {
  for (const int64_t size : l.sizes)
    REQUIRE(size > 0, "every axis needs at least one rank: ", to_string(l));
  REQUIRE(l.ranks() == ranks, to_string(l), " needs ", l.ranks(),
          l.ranks() == 1 ? " rank" : " ranks", ", but mpiexec started ", ranks, ": mpiexec -n ",
          l.ranks(),
          l.ranks() == 1 ? sentence(", or name axes whose sizes multiply to ", ranks) : "");
}

// ---- the mesh

// These axes, neighbours in kAxes, as one, with its communicator once the world has one.
static Axis open_axis(const Mesh& m, size_t slowest, size_t fastest) {
  Axis axis;
  int stride = 1;  // between neighbours on the axis
  for (size_t a = fastest + 1; a < kAxes.size(); a++) stride *= m.axes[a].size;
  for (size_t a = slowest; a <= fastest; a++) {
    axis.name += sentence(a > slowest ? " x " : "", kAxes[a].name);
    axis.rank = axis.rank * m.axes[a].size + m.axes[a].rank;
    axis.size *= m.axes[a].size;
  }
  if (axis.size == 1) return axis;
  const int first = m.rank - axis.rank * stride;  // of this line of the grid
  for (int r = 0; r < axis.size; r++) axis.members.push_back(first + r * stride);
  if (axis.size == m.size) axis.comm = m.world.comm;
  else if (m.world.comm) {
    // ranks that give the same number form a communicator, in the order of axis.rank
    NCCL_CHECK(ncclCommSplit(m.world.comm, first, axis.rank, &axis.comm, nullptr));
    op_times.begun++;  // on many GPUs it may take a minute: the watch sees that this rank got on
  }
  return axis;
}

// Gradients are summed over these two, and over copies: no other axis may share out the tokens.
static_assert(std::ranges::all_of(kAxes, [](const AxisKind& a) {
  const std::string_view name = a.name;
  return name == "fsdp" || name == "cp" || a.copies_model || !(a.splits_batch || a.splits_sequence);
}));
static_assert(AxisName("cp").index == AxisName("fsdp").index + 1);
static Axis shards_of(const Mesh& m) {
  const AxisName fsdp = "fsdp", cp = "cp";
  if (m[cp].size == 1) return m[fsdp];
  if (m[fsdp].size == 1) return m[cp];
  return open_axis(m, fsdp.index, cp.index);
}

Mesh::Mesh(const Layout& l, int rank)
    : layout(l), rank(rank), size(l.ranks()), world{"world", size, rank} {
  int slower = rank;  // its place on the axes that are left, which are the slower ones
  for (size_t a = kAxes.size(); a-- > 0; slower /= axes[a].size) {
    const int n = l.sizes[a];
    axes[a] = {kAxes[a].name, n, slower % n};
  }
  shards = shards_of(*this);
}

std::vector<Axis> Mesh::axes_where(bool AxisKind::*holds) const {
  std::vector<Axis> some;
  for (size_t a = 0; a < kAxes.size(); a++)
    if (kAxes[a].*holds) some.push_back(axes[a]);
  return some;
}

std::vector<Axis> Mesh::every_axis() const {
  std::vector<Axis> all{world};
  all.insert(all.end(), axes.begin(), axes.end());
  if ((*this)["fsdp"].size > 1 && (*this)["cp"].size > 1) all.push_back(shards);
  return all;
}

Mesh open_mesh(const Layout& layout) {
  int rank, ranks;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &ranks);
  check_ranks(layout, ranks);
  Mesh m(layout, rank);
  if (ranks == 1) return m;

  ncclUniqueId id;
  if (rank == 0) NCCL_CHECK(ncclGetUniqueId(&id));
  MPI_Ibcast(&id, sizeof id, MPI_BYTE, 0, MPI_COMM_WORLD, UntilDone());
  NCCL_CHECK(ncclCommInitRank(&m.world.comm, ranks, id, rank));
  op_times.begun++;
  for (int r = 0; r < ranks; r++) m.world.members.push_back(r);
  for (size_t a = 0; a < kAxes.size(); a++) m.axes[a] = open_axis(m, a, a);
  m.shards = shards_of(m);
  return m;
}

void close_mesh(Mesh& m) {
  CUDA_CHECK(cudaStreamSynchronize(device().communication));
  std::set<ncclComm_t> comms;
  for (const Axis& axis : m.every_axis())
    if (axis.comm && comms.insert(axis.comm).second) NCCL_CHECK(ncclCommDestroy(axis.comm));
  m = Mesh(m.layout, m.rank);
}

// ---- NCCL and MPI

std::string nccl_error(ncclResult_t status) {
  const char* last = ncclGetLastError(nullptr);
  std::string text =
      sentence(ncclGetErrorString(status), last && *last ? ": " : "", last ? last : "");
  if (text.find("Duplicate GPU") != std::string::npos)
    text +=
        ". NCCL gives each rank a GPU of its own: start fewer ranks, or build with COMM=mpi (ranks "
        "share GPUs) or BACKEND=cpu";
  return text;
}

ncclDataType_t nccl_type(Dtype dtype) {
  static const ncclDataType_t types[] = {ncclFloat32, ncclBfloat16, ncclFloat64, ncclInt32};
  return types[int(dtype)];
}

// Ranks may outnumber cores, and whoever we wait for needs ours: it yields, and where that takes
// long it sleeps, for no longer than it has waited.
UntilDone::~UntilDone() {
  for (int turn = 0, done = 0; !done; turn++) {
    MPI_Test(&request_, &done, MPI_STATUS_IGNORE);
    if (turn < 100) sched_yield();
    else if (!done) usleep(std::min(turn, 1000));
  }
}

// ---- the ledger

Ledger ledger;

int64_t Ledger::bytes() const {
  std::map<int, __int128> numerators;
  for (const auto& [key, row] : rows) numerators[row.n] += row.numerator;
  int64_t all = 0;
  for (const auto& [n, numerator] : numerators) all += int64_t(numerator / n);
  return all;
}

const char* name_of(Collective c) {
  static const char* names[] = {"all_reduce", "all_gather", "reduce_scatter", "broadcast", "send"};
  return names[int(c)];
}

const char* name_of(Traffic t) {
  static const char* names[] = {"training",       "embedding",         "loss", "recompute",
                                "gathered again", "partial gradients", "norm", "evaluation"};
  return names[int(t)];
}

int64_t parts_sent(Collective c, int64_t n) {
  const int64_t parts[] = {2 * (n - 1), n - 1, n - 1, n, n};
  return parts[int(c)];
}

void Ledger::enter(const Axis& axis, Collective c, int64_t bytes, int64_t calls) {
  const int64_t n = axis.size;
  const __int128 numerator = __int128(calls) * parts_sent(c, n) * bytes;
  const double sent = double(numerator) / n;
  if (OpTimes::Op* op = op_times.open()) {
    op->work.name = sentence(name_of(c), " (", axis.name, ")");
    op->work.bytes += sent;
  }
  recorder.call(name_of(c), axis.name, axis.members, sent);
  Row& row = rows[{axis.name, c, purpose}];
  row.calls += calls;
  row.numerator += numerator;
  row.n = axis.size;
  if (on_enter) on_enter(axis, c);
}

void sum_over(const std::vector<Axis>& axes, const Tensor& x, Traffic serves) {
  const Purpose purpose(serves);
  communicate_after_compute();  // x must have been computed
  for (const Axis& axis : axes) {
    if (axis.size == 1) continue;
    const Timed timed;
    ledger.enter(axis, Collective::all_reduce, x.bytes());
    NCCL_CHECK(ncclAllReduce(x.raw(), x.raw(), x.numel(), nccl_type(x.dtype()), ncclSum, axis.comm,
                             device().communication));
  }
  compute_after_communication();  // the sum must have arrived
}
