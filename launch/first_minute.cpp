// first_minute.cpp: see first_minute.h.
#include "launch/first_minute.h"

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

void check_mesh(const Mesh& mesh) {
  for (const Axis& axis : mesh.every_axis()) check_axis(axis, mesh.stream);
}
