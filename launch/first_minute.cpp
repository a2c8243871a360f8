// first_minute.cpp: see first_minute.h.
#include "launch/first_minute.h"

#include <algorithm>
#include <set>

// Every rank of the axis contributes n times `each` elements of 1 + its rank, and to sums, which
// are to be exact in f32, of one of 1 to 8: what must come out is known. NCCL keeps memory for each
// pair of ranks that has ever exchanged something, half a GB on eight H100s (NVIDIA/nccl issue
// 1685): so only the axes that train with exchanges try them.
static void check_axis(const Axis& axis, int64_t each) {
  const cudaStream_t stream = device().communication;
  const int n = axis.size;
  const Tensor mine({n * each}, Dtype::f32, Memory::workspace),
      all({n * each}, Dtype::f32, Memory::workspace);
  float *send = mine.data<float>(), *receive = all.data<float>();
  const auto contribute = [&](double value) {
    fill(mine, value);
    communicate_after_compute();
  };
  // each of these so many times
  const auto expect = [&](const char* what, const std::vector<float>& expected) {
    compute_after_communication();
    std::vector<float> got(expected.size() * each);
    download(all.view(0, {int64_t(got.size())}), got.data());
    for (size_t i = 0; i < got.size(); i++)
      REQUIRE(got[i] == expected[i / each], "the first ", what, " on axis ", axis.name, " (rank ",
              axis.rank, " of ", n, ") gave ", got[i], " where ", expected[i / each],
              " was expected: check that no two ranks use one GPU, and GPU peer access "
              "(NCCL_P2P_DISABLE=1 avoids it)");
  };
  float sum = 0;
  std::vector<float> values;
  for (int rank = 0; rank < n; rank++) {
    sum += 1 + rank % 8;
    values.push_back(1 + rank);
  }
  contribute(1 + axis.rank % 8);
  NCCL_CHECK(ncclAllReduce(send, receive, n * each, ncclFloat32, ncclSum, axis.comm, stream));
  expect("all-reduce", std::vector<float>(n, sum));
  NCCL_CHECK(ncclReduceScatter(send, receive, each, ncclFloat32, ncclSum, axis.comm, stream));
  expect("reduce-scatter", {sum});
  contribute(1 + axis.rank);
  NCCL_CHECK(ncclAllGather(send, receive, each, ncclFloat32, axis.comm, stream));
  expect("all-gather", values);
  NCCL_CHECK(ncclBroadcast(send, receive, n * each, ncclFloat32, n - 1, axis.comm, stream));
  expect("broadcast", std::vector<float>(n, values.back()));
  if (!exchanges(axis)) return;
  // facing pairs, both directions of each
  std::vector<float> received;
  NCCL_CHECK(ncclGroupStart());
  for (const int neighbour : {(axis.rank + 1) % n, (axis.rank + n - 1) % n}) {
    NCCL_CHECK(ncclSend(send, each, ncclFloat32, neighbour, axis.comm, stream));
    NCCL_CHECK(ncclRecv(receive + received.size() * each, each, ncclFloat32, neighbour, axis.comm,
                        stream));
    received.push_back(1 + neighbour);
  }
  NCCL_CHECK(ncclGroupEnd());
  expect("send and receive", received);
}

bool exchanges(const Axis& axis) {
  const auto kind = std::ranges::find(kAxes, axis.name, &AxisKind::name);
  return kind != kAxes.end() && kind->exchanges;  // the world and joined axes do not
}

void check_mesh(const Mesh& mesh) {
  Device& d = device();
  // without a GPU, what NCCL's stand-in does not send with its record
  int64_t large = (d.is_gpu ? 16 << 20 : 256 << 10) / sizeof(float);
  if (d.memory_limit) large = std::min<int64_t>(large, d.memory_limit / 64);
  for (const Axis& axis : mesh.every_axis()) {
    if (axis.size == 1) continue;
    check_axis(axis, 1);
    if (axis.name != mesh.world.name) check_axis(axis, ceil_div(large, axis.size));
  }
  // of what is trained, from here on
  d.memory.peak = d.memory.at_peak = d.memory.now;
  d.memory.total_peak = d.memory.total;
}

std::string advice_on_nodes(const Mesh& mesh, const Job& job) {
  const int tp = mesh["tp"].size;
  if (job.local_size == job.size || tp == 1) return "";
  int node = job.rank;  // its first rank
  MPI_Ibcast(&node, 1, MPI_INT, 0, job.node, UntilDone());
  const std::vector<std::string> nodes = gather_text(std::to_string(node));
  bool apart = false;
  size_t blocks = 1;  // of ranks on one node
  for (int r = 0; r < job.size; r++) {
    apart |= nodes[r] != nodes[r - r % tp];
    blocks += r > 0 && nodes[r] != nodes[r - 1];
  }
  const bool in_turn = blocks > std::set(nodes.begin(), nodes.end()).size();
  if (!apart || !in_turn || job.local_size < tp) return "";
  return sentence("ranks of --tp ", tp, " are on several nodes, though a node has ", job.local_size,
                  " ranks: every layer's sums cross the network; number the ranks node by node "
                  "(mpiexec -ppn ",
                  job.local_size, ", srun -m block)");
}
