// comm.cpp: the job, the mesh and the ledger. See comm.h for the idea.
// test      tests/test_comm.cpp
#include "comm.h"

#include <sched.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <numeric>

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

// ---- time

CommunicationClock communication_clock;

double CommunicationClock::end_step() {
  CUDA_CHECK(cudaStreamSynchronize(queue_));
  double seconds = 0;
  for (size_t i = 0; i < calls_; i++) seconds += work_[i].seconds();
  queue_ = nullptr;
  return seconds;
}

// ---- MPI without a spinning core

Finished::~Finished() {
  for (int done = 0; !done;) {
    MPI_Test(&request_, &done, MPI_STATUS_IGNORE);
    if (!done) sched_yield();  // ranks may outnumber cores: whoever we wait for needs ours
  }
}

void barrier() { MPI_Ibarrier(MPI_COMM_WORLD, Finished()); }

std::vector<std::string> gather_text(const std::string& mine) {
  int ranks = 1;
  MPI_Comm_size(MPI_COMM_WORLD, &ranks);
  const int length = int(mine.size());
  std::vector<int> lengths(size_t(ranks), 0), begins(size_t(ranks), 0);
  MPI_Iallgather(&length, 1, MPI_INT, lengths.data(), 1, MPI_INT, MPI_COMM_WORLD, Finished());
  std::exclusive_scan(lengths.begin(), lengths.end(), begins.begin(), 0);
  std::string all(size_t(begins.back() + lengths.back()), ' ');
  MPI_Iallgatherv(mine.data(), length, MPI_CHAR, all.data(), lengths.data(), begins.data(),
                  MPI_CHAR, MPI_COMM_WORLD, Finished());
  std::vector<std::string> texts;
  for (size_t r = 0; r < lengths.size(); r++)
    texts.push_back(all.substr(size_t(begins[r]), size_t(lengths[r])));
  return texts;
}

// ---- the job

Job::Job(int* argc, char*** argv) {
  int provided;
  MPI_Init_thread(argc, argv, MPI_THREAD_MULTIPLE, &provided);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, rank, MPI_INFO_NULL, &node);
  MPI_Comm_rank(node, &local_rank);
  MPI_Comm_size(node, &local_size);
  speaks = rank == 0;
}

// Launchers tell their processes how many there are. If that is more than our world, mpiexec is
// another MPI's.
void Job::check_launcher() {
  static const char* variables[][2] = {{"PMI_SIZE", "PMI_RANK"},
                                       {"OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"},
                                       {"SLURM_STEP_NUM_TASKS", "SLURM_PROCID"}};
  for (const auto& [tasks, task] : variables) {
    const char *told = getenv(tasks), *number = getenv(task);
    if (!told) continue;
    if (size > 1 || atoi(told) < 2) return;
    speaks = !number || atoi(number) == 0;
    throw Error(sentence("the launcher started ", told, " processes (", tasks,
                         "), but each sees a world of 1 rank: this mpiexec belongs to "
                         "another MPI than the one that the program was built with (MPICH)"));
  }
}

Job::~Job() {
  barrier();
  MPI_Finalize();
}

std::string Job::agree(const std::string& error) const {
  for (const std::string& text : gather_text(error))
    if (!text.empty()) return text;
  return "";
}

void Job::abort(const std::string& why) const {
  const bool first = !explained || !explained->exchange(true);
  if (first) fprintf(stderr, "rank %d: %s\n", rank, why.c_str());
  // mpiexec passes the words on before it hears of the end; the others do not end the job before
  // that
  usleep(first ? 300'000 : 1'000'000);
  MPI_Abort(MPI_COMM_WORLD, 1);
  _exit(1);
}

// ---- the mesh

std::string to_string(const Layout& l) {
  return sentence("pp ", l.pp, " x replicate ", l.replicate, " x fsdp ", l.fsdp, " x tp ", l.tp);
}

void check_ranks(const Layout& l, int ranks) {
  REQUIRE(l.pp > 0 && l.replicate > 0 && l.fsdp > 0 && l.tp > 0,
          "every axis needs at least one rank: ", to_string(l));
  REQUIRE(l.ranks() == ranks, to_string(l), " needs ", l.ranks(),
          l.ranks() == 1 ? " rank" : " ranks", ", but mpiexec started ", ranks, ": mpiexec -n ",
          l.ranks());
}

// the fastest first
static std::array<Axis*, 4> axes_of(Mesh& m) { return {&m.tp, &m.fsdp, &m.replicate, &m.pp}; }

// Where `rank` is on each axis, still without communicators.
static Mesh place(const Layout& l, int rank) {
  Mesh m;
  m.layout = l, m.rank = rank, m.size = int(l.ranks());
  m.pp = {"pp", l.pp}, m.replicate = {"replicate", l.replicate}, m.fsdp = {"fsdp", l.fsdp},
  m.tp = {"tp", l.tp};
  m.world = {"world", m.size, rank};
  for (Axis* axis : axes_of(m)) axis->rank = rank % axis->size, rank /= axis->size;
  return m;
}

Mesh open_mesh(const Job& job, const Layout& l) {
  check_ranks(l, job.size);
  Mesh m = place(l, job.rank);
  CUDA_CHECK(cudaStreamCreateWithFlags(&m.stream, cudaStreamNonBlocking));
  if (job.size == 1) return m;

  ncclUniqueId id;
  if (job.rank == 0) NCCL_CHECK(ncclGetUniqueId(&id));
  MPI_Ibcast(&id, sizeof id, MPI_BYTE, 0, MPI_COMM_WORLD, Finished());
  NCCL_CHECK(ncclCommInitRank(&m.world.comm, job.size, id, job.rank));
  int stride = 1;  // between neighbours on an axis
  for (Axis* axis : axes_of(m)) {
    const int color = job.rank - axis->rank * stride;  // the first rank of this line of the grid
    if (axis->size > 1)
      NCCL_CHECK(ncclCommSplit(m.world.comm, color, axis->rank, &axis->comm, nullptr));
    stride *= axis->size;
  }
  return m;
}

// ---- the first minute

// Every rank of the axis contributes 1 + its rank, 2n values; what must come out is known.
static void check_axis(const Axis& axis, cudaStream_t stream) {
  if (axis.size == 1) return;
  const int n = axis.size;
  const size_t values = size_t(2 * n);
  const Tensor mine({2 * n}, Dtype::f32, Memory::workspace),
      all({n, 2 * n}, Dtype::f32, Memory::workspace);
  float *send = mine.data<float>(), *receive = all.data<float>();
  fill(mine, 1 + axis.rank);
  make_wait(stream, device().compute);
  const float sum = float(n * (n + 1) / 2);
  const auto expect = [&](const char* what, size_t count,
                          const std::function<double(size_t)>& value) {
    make_wait(device().compute, stream);
    const std::vector<double> got = download(all);
    for (size_t i = 0; i < count; i++)
      REQUIRE(got[i] == value(i), "the first ", what, " on axis ", axis.name, " (rank ", axis.rank,
              " of ", n, ") gave ", got[i], " where ", value(i),
              " was expected: check that no two ranks use one GPU, and GPU peer access "
              "(NCCL_P2P_DISABLE=1 avoids it)");
  };
  NCCL_CHECK(ncclAllReduce(send, receive, values, ncclFloat32, ncclSum, axis.comm, stream));
  expect("all-reduce", values, [&](size_t) { return sum; });
  NCCL_CHECK(ncclAllGather(send, receive, values, ncclFloat32, axis.comm, stream));
  expect("all-gather", values * size_t(n), [&](size_t i) { return float(1 + i / values); });
  NCCL_CHECK(ncclReduceScatter(send, receive, 2, ncclFloat32, ncclSum, axis.comm, stream));
  expect("reduce-scatter", 2, [&](size_t) { return sum; });
  NCCL_CHECK(ncclBroadcast(send, receive, values, ncclFloat32, n - 1, axis.comm, stream));
  expect("broadcast", values, [&](size_t) { return float(n); });
  // facing pairs, both directions of each
  const int neighbours[] = {(axis.rank + 1) % n, (axis.rank + n - 1) % n};
  NCCL_CHECK(ncclGroupStart());
  for (int i = 0; i < 2; i++) {
    NCCL_CHECK(ncclSend(send, values, ncclFloat32, neighbours[i], axis.comm, stream));
    NCCL_CHECK(ncclRecv(receive + size_t(i) * values, values, ncclFloat32, neighbours[i], axis.comm,
                        stream));
  }
  NCCL_CHECK(ncclGroupEnd());
  expect("send and receive", 2 * values,
         [&](size_t i) { return float(1 + neighbours[i / values]); });
}

void check_mesh(const Mesh& m) {
  for (const Axis* axis : {&m.world, &m.tp, &m.fsdp, &m.replicate, &m.pp})
    check_axis(*axis, m.stream);
}

void close_mesh(Mesh& m) {
  communication_clock = {};  // its events belong to the device
  if (m.stream) CUDA_CHECK(cudaStreamSynchronize(m.stream));
  for (Axis* axis : {&m.tp, &m.fsdp, &m.replicate, &m.pp, &m.world}) {
    if (axis->comm) NCCL_CHECK(ncclCommDestroy(axis->comm));
    axis->comm = nullptr;
  }
  if (m.stream) CUDA_CHECK(cudaStreamDestroy(m.stream));
  m.stream = nullptr;
}

std::string draw(const Layout& l) {
  std::string s = "rank     pp  replicate  fsdp  tp\n";
  for (int r = 0; r < l.ranks(); r++) {
    const Mesh m = place(l, r);
    s +=
        format("%4d  %5d  %9d  %4d  %2d\n", r, m.pp.rank, m.replicate.rank, m.fsdp.rank, m.tp.rank);
  }
  return s;
}

// ---- the ledger

ncclDataType_t nccl_type(Dtype dtype) {
  static const ncclDataType_t types[] = {ncclFloat32, ncclBfloat16, ncclFloat64, ncclInt32};
  return types[int(dtype)];
}

Ledger ledger;

int64_t Ledger::bytes() const {
  std::map<int, int64_t> numerators;
  for (const auto& [key, row] : rows) numerators[row.n] += row.numerator;
  int64_t all = 0;
  for (const auto& [n, numerator] : numerators) all += numerator / n;
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

void Ledger::enter(const Axis& axis, Collective c, int64_t numerator) {
  Row& row = rows[{axis.name, c, purpose}];
  row.calls++;
  row.numerator += numerator;
  row.n = axis.size;
  if (on_enter) on_enter(axis, c);
}

void sum_over(const Mesh& mesh, std::initializer_list<const Axis*> axes, const Tensor& x,
              Traffic serves) {
  const Purpose purpose(serves);
  make_wait(mesh.stream, device().compute);  // x must have been computed
  for (const Axis* axis : axes) {
    if (axis->size == 1) continue;
    ledger.all_reduce(*axis, x.bytes());
    NCCL_CHECK(ncclAllReduce(x.raw(), x.raw(), size_t(x.numel()), nccl_type(x.dtype()), ncclSum,
                             axis->comm, mesh.stream));
  }
  make_wait(device().compute, mesh.stream);  // the sum must have arrived
}
