// cuda_pipeline.h: copies from memory to shared memory that go on while their thread computes
// (cp.async), for the FAITHFUL form.
//
// stricter  a copy happens when its thread waits for it, at the latest moment that CUDA allows:
//           what is read too early is still NaN
// test      tests/test_matmul.cpp (the tensor core kernel)
#pragma once
#include <cuda_runtime.h>

#include <array>
#include <vector>

#ifndef CPU_FAITHFUL
#error "asynchronous copies have no FAST form: leave such kernels out with #ifndef CPU_FAST"
#endif

namespace cpu {

struct AsyncCopies {  // of one thread
  struct Copy {
    void* to;
    const void* from;
    size_t bytes;
  };
  std::vector<std::vector<Copy>> groups;  // committed and not yet waited for
  std::vector<Copy> open;
};
inline std::array<AsyncCopies, 1024> async_copies;  // of each thread of the running block
inline AsyncCopies& my_async_copies() { return async_copies[warp_index() * 32 + lane_index()]; }

}  // namespace cpu

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, CPU_PLACE) {
  if (bytes != 4 && bytes != 8 && bytes != 16)
    cpu::report("an asynchronous copy of other than 4, 8 or 16 bytes", {__func__, file, line});
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes)
    cpu::report("an asynchronous copy that is not aligned to its size", {__func__, file, line});
  cpu::my_async_copies().open.push_back({to, from, bytes});
}
inline void __pipeline_commit() {
  cpu::AsyncCopies& mine = cpu::my_async_copies();
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}
// All groups but the last `prior` are complete.
inline void __pipeline_wait_prior(size_t prior) {
  auto& groups = cpu::my_async_copies().groups;
  if (groups.size() <= prior) return;
  const auto end = groups.end() - ptrdiff_t(prior);
  for (auto group = groups.begin(); group != end; group++)
    for (const auto& copy : *group) memcpy(copy.to, copy.from, copy.bytes);
  groups.erase(groups.begin(), end);
}
