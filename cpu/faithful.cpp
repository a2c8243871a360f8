// faithful.cpp: the scheduler behind faithful.h. Runs one block at a time: always the first thread in the chosen order that need not wait,
// as far as it gets, and from the first again after each barrier.
//
// cost      a switch between fibers takes about 20 ns (a dozen lines of assembly on x86-64, ucontext elsewhere)
// test      tests/test_cpu.cpp
#ifdef CPU_FAITHFUL
#include <cuda_runtime.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <random>
#include <utility>
#include <vector>
#if !defined(__x86_64__) || defined(CPU_UCONTEXT)
#include <ucontext.h>
#define CPU_UCONTEXT
#endif

// Every __shared__ variable of the program. The linker defines the names if there is one.
extern "C" {
extern char __start_cuda_shared[] __attribute__((weak));
extern char __stop_cuda_shared[] __attribute__((weak));
}

namespace cpu {
uint3 thread_index, block_index;
dim3 block_shape, grid_shape;
void* dynamic_shared;
}  // namespace cpu

namespace {
using cpu::Order;
using cpu::Site;

// ---- switching stacks

#ifdef CPU_UCONTEXT
struct Context { ucontext_t state; };
void switch_to(Context& from, Context& to) { swapcontext(&from.state, &to.state); }
void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack;
  context.state.uc_stack.ss_size = bytes;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}
#else
struct Context { void* stack_pointer; };
extern "C" void cpu_switch_stack(void** save, void* load);
// Pushes what a function must preserve, exchanges the stack pointers, pops the same of the other fiber, and returns into it.
asm(R"(
.text
cpu_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
void switch_to(Context& from, Context& to) { cpu_switch_stack(&from.stack_pointer, to.stack_pointer); }
void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
  // from the top: a return address that is never used (functions expect the stack pointer 8 below a multiple of 16), the address that
  // `ret` jumps to, six registers
  void** top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  context.stack_pointer = top - 6;
}
#endif

// ---- the block that runs

constexpr int kMaxThreads = 1024, kMaxWarps = kMaxThreads / 32;
constexpr size_t kPage = 4096, kStack = 64 << 10, kGuard = 256;

struct Warp {
  unsigned ready, waiting;  // a bit for each lane: can run; waits for its warp
  int lanes;
  Site site;                // where it waits
  uint64_t values[2][32];   // of this exchange and, perhaps, already the next
};
struct Block {
  int threads, warps, done, at_barrier;
  Site barrier;
  Warp warp[kMaxWarps];
  Context fiber[kMaxThreads];
  uint8_t parity[kMaxThreads];  // which of the warp's two sets of values a thread uses next
  bool at_block_barrier[kMaxThreads], finished[kMaxThreads];
};
Block block;
Context scheduler;
int running;  // the thread
const std::function<void()>* thread_body;
std::mutex one_launch;

[[noreturn]] void report_thread(const char* what, const Site& site, int thread) {
  fprintf(stderr, "CUDA stand-in: %s: %s at %s:%d, block (%u,%u,%u), thread %d\n", what, site.what, site.file, site.line, cpu::block_index.x,
          cpu::block_index.y, cpu::block_index.z, thread);
  abort();
}

void yield() { switch_to(block.fiber[running], scheduler); }

void fiber_main() {
  (*thread_body)();
  block.finished[running] = true;
  block.done++;
  yield();
}

// A stack for each thread, with a page below it that nobody may touch.
char* stack_of(int thread) {
  static std::vector<char*> stacks;
  while (int(stacks.size()) <= thread) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE)) {
      perror("CUDA stand-in: no memory for the stacks of threads");
      abort();
    }
    stacks.push_back(static_cast<char*>(memory));
  }
  return stacks[size_t(thread)];
}

// ---- the order

Order order = Order::forward;
std::mt19937_64 random_bits;

struct OrderFromEnvironment {
  OrderFromEnvironment() {
    const std::string value = getenv("THREEFOLD_ORDER") ? getenv("THREEFOLD_ORDER") : "";
    const auto colon = value.find(':');
    if (value == "reverse") order = Order::reverse;
    if (value.substr(0, 6) == "random") order = Order::random;
    random_bits.seed(colon == std::string::npos ? 1 : strtoull(value.c_str() + colon + 1, nullptr, 10));
  }
} order_from_environment;

int warp_order[kMaxWarps];
int lane_rotation;

// Random: drawn again after each barrier of the block, so that now this and now that warp is far ahead of the others.
void draw_order() {
  std::iota(warp_order, warp_order + block.warps, 0);
  if (order == Order::reverse) std::reverse(warp_order, warp_order + block.warps);
  if (order == Order::random) std::shuffle(warp_order, warp_order + block.warps, random_bits);
  lane_rotation = order == Order::random ? int(random_bits() % 32) : 0;
}

int first_ready() {
  for (int i = 0; i < block.warps; i++) {
    const unsigned ready = block.warp[warp_order[i]].ready;
    if (!ready) continue;
    if (order == Order::reverse) return warp_order[i] * 32 + 31 - __builtin_clz(ready);
    const unsigned rotated = lane_rotation ? ready >> lane_rotation | ready << (32 - lane_rotation) : ready;
    return warp_order[i] * 32 + (__builtin_ctz(rotated) + lane_rotation) % 32;
  }
  return -1;
}

// ---- running

unsigned lanes_mask(const Warp& warp) { return warp.lanes == 32 ? ~0u : (1u << warp.lanes) - 1; }

[[noreturn]] void report_deadlock() {
  for (int i = 0; i < block.warps; i++) {
    const Warp& warp = block.warp[i];
    if (!warp.waiting) continue;
    for (int lane = 0; lane < warp.lanes; lane++)
      if (!(warp.waiting >> lane & 1)) report_thread("deadlock, a thread does not reach a warp primitive", warp.site, i * 32 + lane);
  }
  for (int thread = 0; thread < block.threads; thread++)
    if (!block.at_block_barrier[thread]) report_thread("deadlock, a thread does not reach a barrier", block.barrier, thread);
  abort();
}

void start_block() {
  block.done = block.at_barrier = 0;
  for (int i = 0; i < block.warps; i++) {
    Warp& warp = block.warp[i];
    warp.lanes = std::min(32, block.threads - i * 32);
    warp.ready = lanes_mask(warp);
    warp.waiting = 0;
  }
  for (int i = 0; i < block.threads; i++) {
    block.parity[i] = block.at_block_barrier[i] = block.finished[i] = false;
    // staggered, or the stacks would compete for the same sets of the caches
    prepare(block.fiber[i], stack_of(i), kStack - size_t(i % 32) * 192, fiber_main);
  }
  if (__start_cuda_shared) memset(__start_cuda_shared, 0xff, size_t(__stop_cuda_shared - __start_cuda_shared));
  draw_order();
}

void run_block() {
  start_block();
  while (block.done < block.threads) {
    running = first_ready();
    if (running < 0) report_deadlock();
    const unsigned x = cpu::block_shape.x, y = cpu::block_shape.y, thread = unsigned(running);
    cpu::thread_index = {thread % x, thread / x % y, thread / x / y};
    block.warp[running / 32].ready &= ~(1u << running % 32);
    switch_to(scheduler, block.fiber[running]);
  }
}
}  // namespace

void cpu::run_in_order(Order new_order, uint64_t seed) {
  std::lock_guard lock(one_launch);
  order = new_order;
  random_bits.seed(seed);
}

void cpu::run_grid(dim3 grid, dim3 block_dim, size_t shared_bytes, const std::function<void()>& thread) {
  std::lock_guard lock(one_launch);
  grid_shape = grid;
  block_shape = block_dim;
  block.threads = int(block_dim.x * block_dim.y * block_dim.z);
  block.warps = (block.threads + 31) / 32;
  thread_body = &thread;
  std::vector<unsigned char> shared(shared_bytes + 2 * kGuard);
  unsigned char* first = shared.data() + kGuard - reinterpret_cast<uintptr_t>(shared.data()) % kGuard;
  dynamic_shared = first;

  std::vector<uint64_t> blocks(uint64_t(grid.x) * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  if (order == Order::reverse) std::reverse(blocks.begin(), blocks.end());
  if (order == Order::random) std::shuffle(blocks.begin(), blocks.end(), random_bits);
  for (const uint64_t i : blocks) {
    block_index = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
    std::fill(shared.begin(), shared.end(), 0xff);
    run_block();
    for (unsigned char* end = first + shared_bytes; end < shared.data() + shared.size(); end++)
      if (*end != 0xff) report_thread("a write beyond dynamic shared memory", {"the kernel", "the launch", 0}, 0);
  }
}

void cpu::wait_for_block(Site site) {
  if (block.at_barrier && (site.line != block.barrier.line || strcmp(site.file, block.barrier.file)))
    report("threads wait at different barriers, the other one is", block.barrier);
  block.barrier = site;
  block.at_block_barrier[running] = true;
  if (++block.at_barrier == block.threads) {
    block.at_barrier = 0;
    std::fill(block.at_block_barrier, block.at_block_barrier + block.threads, false);
    for (int i = 0; i < block.warps; i++) block.warp[i].ready = lanes_mask(block.warp[i]);
    draw_order();
  }
  yield();
}

const uint64_t* cpu::exchange_in_warp(unsigned mask, uint64_t value, Site site) {
  Warp& warp = block.warp[running / 32];
  if ((mask & lanes_mask(warp)) != lanes_mask(warp)) report("the mask leaves lanes out, which this stand-in has not", site);
  if (warp.waiting && (site.line != warp.site.line || strcmp(site.file, warp.site.file)))
    report("lanes wait at different warp primitives, the other one is", warp.site);
  uint64_t* values = warp.values[block.parity[running]];
  block.parity[running] ^= 1;
  values[running % 32] = value;
  warp.site = site;
  warp.waiting |= 1u << running % 32;
  if (warp.waiting == lanes_mask(warp)) {
    warp.waiting = 0;
    warp.ready = lanes_mask(warp);
  }
  yield();
  return values;
}

void cpu::report(const char* what, Site site) { report_thread(what, site, running); }
int cpu::warp_index() { return running / 32; }
int cpu::lane_index() { return running % 32; }
int cpu::lanes_in_warp() { return block.warp[running / 32].lanes; }
#endif
