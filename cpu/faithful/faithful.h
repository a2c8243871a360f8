// faithful.h: the FAITHFUL form of a launch, for tests. Every thread of a block is a fiber, with a
// stack of its own, that runs until it must wait for others; barriers and shuffles are real.
// Threads and blocks run in a chosen order, so that a missing barrier shows as a wrong answer in at
// least one of them (seldom in one alone: run all three, random with several seeds).
//
// reported  (with block, thread and line, then abort): a barrier or warp primitive that some thread
//           does not reach, threads that wait in different lines, writes directly beside dynamic
//           shared memory
// memory    a block of device memory ends, to 16 bytes, at a page that nobody may touch: a kernel
//           that runs past it ends with SIGSEGV. Writes beside a block are found when it is freed.
// shared    memory holds NaN when a block starts
// not here  masks that leave lanes out; kernels on two streams at a time (a launch runs alone); the
//           limit of static shared memory (ptxas checks it)
#pragma once

constexpr int kWarp = 32;
constexpr int block_threads(int threads) { return threads; }

// A thread's variables lie in one segment that can be found, saved and filled (faithful.cpp), those
// in templates, too.
#define __shared__ static thread_local

namespace cpu {

enum class Order { forward, reverse, random };
void run_in_order(Order order, uint64_t seed = 1);  // from the next launch on

extern uint3 thread_index, block_index;  // of the running fiber
extern dim3 block_shape, grid_shape;
extern void* dynamic_shared;
template <class T> inline T* dyn_shared() { return static_cast<T*>(dynamic_shared); }

struct Site {
  const char *what, *file;
  int line;
};  // where a thread waits
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);
void wait_for_block(Site site);
// Waits for the warp and returns the values of its lanes, valid until the thread waits again.
const uint64_t* exchange_in_warp(unsigned mask, uint64_t value, Site site);
// names the running thread and its block, aborts
[[noreturn]] void report(const char* what, Site site);
extern int running_thread;  // in its block
inline int warp_index() { return int(unsigned(running_thread) / 32); }
inline int lane_index() { return int(unsigned(running_thread) % 32); }
int lanes_in_warp();  // fewer than 32 in a block's last warp, perhaps

template <class... P> struct Launch {
  void (*kernel)(P...);
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
  bool legal;
  void operator()(P... arguments) const {
    if (!legal) return;
    submit(stream, [=, launch = *this] {
      run_grid(launch.grid, launch.block, launch.shared_bytes,
               [&] { launch.kernel(arguments...); });
    });
  }
};
template <class... P> Launch<P...> launch(void (*kernel)(P...), dim3 grid, dim3 block,
                                          size_t shared_bytes = 0, cudaStream_t stream = nullptr) {
  return {kernel,
          grid,
          block,
          shared_bytes,
          stream,
          legal_launch(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, stream)};
}

}  // namespace cpu

#define threadIdx cpu::thread_index
#define blockDim cpu::block_shape
#define blockIdx cpu::block_index
#define gridDim cpu::grid_shape

// The last two parameters are the caller's place.
#define CPU_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()
inline void __syncthreads(CPU_PLACE) { cpu::wait_for_block({"__syncthreads", file, line}); }
inline void __syncwarp(unsigned mask = ~0u, CPU_PLACE) {
  cpu::exchange_in_warp(mask, 0, {"__syncwarp", file, line});
}
// a lane that a shorter last warp of the block does not have is answered with the asker's value
template <class T> T __shfl_xor_sync(unsigned mask, T value, int lanes, CPU_PLACE) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  static_assert(sizeof(T) == sizeof(Bits));
  const int from = cpu::lane_index() ^ lanes;
  const uint64_t* values =
      cpu::exchange_in_warp(mask, cpu::bits_as<Bits>(value), {"__shfl_xor_sync", file, line});
  return from < cpu::lanes_in_warp() ? cpu::bits_as<T>(static_cast<Bits>(values[from])) : value;
}
