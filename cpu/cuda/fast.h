// fast.h: the FAST form of a launch. A block has one thread, so barriers and shuffles are nothing,
// a loop that strides over the threads of a block is a plain loop that the compiler vectorizes, and
// shared memory is a local variable. Blocks are spread over OpenMP threads.
//
// what kernels must do for it: docs/kernels.md
#pragma once
#include <omp.h>

#include <algorithm>
#include <atomic>

constexpr int kWarp = 1;
constexpr int block_threads(int) { return 1; }
#define __shared__

namespace cpu {

// of all products of tiles so far: how tests see which tiles a kernel skips
inline std::atomic<int64_t> multiply_adds = 0;

inline constexpr uint3 thread_index{0, 0, 0};
inline constexpr dim3 block_shape{1, 1, 1};
inline __thread uint3 block_index;
inline __thread const dim3* grid_shape;
inline __thread void* dynamic_shared;

// A team of threads takes 2 to 30 us to wake, longer than many launches take alone. So launches are
// timed, and one that is known to be short stays on the caller's thread. (Nothing but time depends
// on it: blocks are independent.)
class LaunchTime {
 public:
  bool worth_a_team() const { return runs_ >= kRuns && microseconds_ > 10; }
  // the least of late, so that neither first touch of memory nor a busy machine counts for long
  void took(double microseconds) {
    microseconds_ = runs_++ ? std::min(microseconds, 1.5 * microseconds_) : microseconds;
  }

 private:
  static constexpr int kRuns = 3;
  int runs_ = 0;
  double microseconds_ = 0;
};
LaunchTime& launch_time(const void* kernel, int64_t blocks);  // of this thread

// this OpenMP thread's block of dynamic shared memory: 64-byte aligned, grows, is kept
void* shared_block(size_t bytes);
template <class T> inline T* dyn_shared() {
  return static_cast<T*>(__builtin_assume_aligned(dynamic_shared, 64));
}

template <class... P> struct Launch {
  void (*kernel)(P...);
  dim3 grid;
  size_t shared_bytes;
  cudaStream_t stream;
  bool legal;

  void operator()(P... arguments) const {
    if (!legal) return;
    submit(stream, [=, launch = *this] { launch.run(arguments...); });
  }

  void run(P... arguments) const {
    const int64_t blocks = int64_t(grid.x) * grid.y * grid.z;
    if (blocks == 1 || omp_get_max_threads() == 1) return run_blocks(0, blocks, arguments...);
    LaunchTime& time = launch_time(reinterpret_cast<const void*>(kernel), blocks);
    if (!time.worth_a_team()) {
      const double start = omp_get_wtime();
      run_blocks(0, blocks, arguments...);
      return time.took(1e6 * (omp_get_wtime() - start));
    }
#pragma omp parallel
    {
      const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
      run_blocks(blocks * thread / threads, blocks * (thread + 1) / threads, arguments...);
    }
  }

  // Blocks [begin, end), x fastest.
  void run_blocks(int64_t begin, int64_t end, P... arguments) const {
    grid_shape = &grid;
    if (shared_bytes) dynamic_shared = shared_block(shared_bytes);
    uint3 index{unsigned(begin % grid.x), unsigned(begin / grid.x % grid.y),
                unsigned(begin / grid.x / grid.y)};
    for (int64_t block = begin; block < end; block++) {
      block_index = index;
      kernel(arguments...);
      if (++index.x < grid.x) continue;
      index.x = 0;
      if (++index.y < grid.y) continue;
      index.y = 0;
      index.z++;
    }
  }
};

template <class... P> Launch<P...> launch(void (*kernel)(P...), dim3 grid, dim3 block,
                                          size_t shared_bytes = 0, cudaStream_t stream = nullptr) {
  return {kernel, grid, shared_bytes, stream,
          legal_launch(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, stream)};
}

}  // namespace cpu

#define threadIdx cpu::thread_index
#define blockDim cpu::block_shape
#define blockIdx cpu::block_index
#define gridDim (*cpu::grid_shape)

inline void __syncthreads() {}
inline void __syncwarp(unsigned = ~0u) {}
template <class T> inline T __shfl_xor_sync(unsigned, T value, int) { return value; }
