// first_minute.cpp: see first_minute.h.
#include "launch/first_minute.h"

#include <algorithm>

// Every rank of the axis contributes 1 + its rank, n times, and to sums, which are to be exact in
// f32, one of 1 to 8: what must come out is known. NCCL keeps memory for each pair of ranks that
// has ever exchanged something, half a GB on eight H100s (NVIDIA/nccl issue 1685): so only the axes
// that train with exchanges try them.
static void check_axis(const Axis& axis, bool exchanges, cudaStream_t stream) {
  if (axis.size == 1) return;
  const int n = axis.size;
  const Tensor mine({n}, Dtype::f32, Memory::workspace), all({n}, Dtype::f32, Memory::workspace);
  float *send = mine.data<float>(), *receive = all.data<float>();
  const auto contribute = [&](double value) {
    fill(mine, value);
    make_wait(stream, device().compute);
  };
  const auto expect = [&](const char* what, std::vector<double> expected) {
    make_wait(device().compute, stream);
    std::vector<double> got = download(all);
    got.resize(expected.size());
    REQUIRE(got == expected, "the first ", what, " on axis ", axis.name, " (rank ", axis.rank,
            " of ", n, ") gave ", got[0], "... where ", expected[0],
            "... was expected: check that no two ranks use one GPU, and GPU peer access "
            "(NCCL_P2P_DISABLE=1 avoids it)");
  };
  double sum = 0;
  std::vector<double> values;
  for (int rank = 0; rank < n; rank++) {
    sum += 1 + rank % 8;
    values.push_back(1 + rank);
  }
  contribute(1 + axis.rank % 8);
  NCCL_CHECK(ncclAllReduce(send, receive, n, ncclFloat32, ncclSum, axis.comm, stream));
  expect("all-reduce", std::vector<double>(n, sum));
  NCCL_CHECK(ncclReduceScatter(send, receive, 1, ncclFloat32, ncclSum, axis.comm, stream));
  expect("reduce-scatter", {sum});
  contribute(1 + axis.rank);
  NCCL_CHECK(ncclAllGather(send, receive, 1, ncclFloat32, axis.comm, stream));
  expect("all-gather", values);
  NCCL_CHECK(ncclBroadcast(send, receive, n, ncclFloat32, n - 1, axis.comm, stream));
  expect("broadcast", std::vector<double>(n, values.back()));
  if (!exchanges) return;
  // facing pairs, both directions of each
  std::vector<double> received;
  NCCL_CHECK(ncclGroupStart());
  for (const int neighbour : {(axis.rank + 1) % n, (axis.rank + n - 1) % n}) {
    NCCL_CHECK(ncclSend(send, 1, ncclFloat32, neighbour, axis.comm, stream));
    NCCL_CHECK(ncclRecv(receive + received.size(), 1, ncclFloat32, neighbour, axis.comm, stream));
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
  for (const Axis& axis : mesh.every_axis()) check_axis(axis, exchanges(axis), mesh.queue);
}
