// faithful.cpp: the scheduler behind faithful.h. Runs one block at a time: always the first thread
// in the chosen order that need not wait, as far as it gets, and from the first again after each
// barrier.
//
// cost      a switch between fibers takes 20 to 50 ns (a dozen lines of assembly on x86-64,
//           ucontext elsewhere)
// test      tests/test_cpu.cpp
#ifdef CPU_FAITHFUL
#include "cpu/faithful/mma.h"

#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <random>
#include <utility>
#include <vector>
#ifndef __x86_64__
#define CPU_UCONTEXT
#endif
#ifdef CPU_UCONTEXT
#include <ucontext.h>
#endif

namespace cpu {
uint3 thread_index, block_index;
dim3 block_shape, grid_shape;
void* dynamic_shared;
int running_thread;
}  // namespace cpu

namespace {
using cpu::Order;
using cpu::Site;

// ---- switching stacks

#ifdef CPU_UCONTEXT
struct Context {
  ucontext_t state;
};
void switch_to(Context& from, Context& to) { swapcontext(&from.state, &to.state); }
void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack;
  context.state.uc_stack.ss_size = bytes;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}
#else
struct Context {
  void* stack_pointer;
};
extern "C" void cpu_switch_stack(void** save, void* load);
// Pushes what a function must preserve, exchanges the stack pointers, pops the same of the other
// fiber, and returns into it.
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
void switch_to(Context& from, Context& to) {
  cpu_switch_stack(&from.stack_pointer, to.stack_pointer);
}
void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
  // from the top: a return address that is never used (functions expect the stack pointer 8 below a
  // multiple of 16), the address that `ret` jumps to, six registers
  void** top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  context.stack_pointer = top - 6;
}
#endif

// ---- the block that runs

constexpr int kMaxThreads = 1024, kMaxWarps = kMaxThreads / 32;
constexpr size_t kStack = 64 << 10, kGuard = 256;

struct Warp {
  unsigned ready, waiting;  // a bit for each lane: can run; waits for its warp
  int lanes;
  Site site;               // where it waits
  uint64_t values[2][32];  // of this exchange and, perhaps, already the next
};
struct Block {
  int threads, warps, done, at_barrier;
  Site barrier;
  Warp warp[kMaxWarps];
  Context fiber[kMaxThreads];
  uint3 index[kMaxThreads];     // threadIdx
  uint8_t parity[kMaxThreads];  // which of the warp's two sets of values a thread uses next
  bool at_block_barrier[kMaxThreads];
};
Block block;
Context launcher;  // whoever called run_grid
const std::function<void()>* thread_body;
std::mutex one_launch;

[[noreturn]] void report_thread(const char* what, const Site& site, int thread) {
  fprintf(stderr, "CUDA stand-in: %s: %s at %s:%d, block (%u,%u,%u), thread %d\n", what, site.what,
          site.file, site.line, cpu::block_index.x, cpu::block_index.y, cpu::block_index.z, thread);
  abort();
}

// A stack for each thread, with a page below it that nobody may touch.
char* stack_of(int thread) {
  static std::vector<char*> stacks;
  static const size_t page = size_t(sysconf(_SC_PAGESIZE));  // 64 KiB on some arm64 systems
  while (int(stacks.size()) <= thread) {
    void* memory = mmap(nullptr, page + kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE)) {
      perror("CUDA stand-in: no memory for the stacks of threads");
      abort();
    }
    stacks.push_back(static_cast<char*>(memory) + page);
  }
  return stacks[size_t(thread)];
}

// The thread_local variables of the program, on this thread: among them all that are __shared__.
// While a launch runs nobody else uses them; what the others held comes back when it is over.
class SharedVariables {
 public:
  SharedVariables() {
    dl_iterate_phdr(find, this);
    saved_.assign(data_, data_ + bytes_);
  }
  ~SharedVariables() { std::copy(saved_.begin(), saved_.end(), data_); }
  void fill() { memset(data_, 0xff, bytes_); }

 private:
  static int find(dl_phdr_info* program, size_t, void* self) {
    for (int i = 0; i < program->dlpi_phnum; i++)
      if (program->dlpi_phdr[i].p_type == PT_TLS) {
        static_cast<SharedVariables*>(self)->data_ = static_cast<char*>(program->dlpi_tls_data);
        static_cast<SharedVariables*>(self)->bytes_ = program->dlpi_phdr[i].p_memsz;
      }
    return 1;  // the program itself comes first; libraries are of no interest
  }
  char* data_ = nullptr;
  size_t bytes_ = 0;
  std::vector<char> saved_;
};

// ---- the order

Order order = Order::forward;
std::mt19937_64 random_bits;

int warp_order[kMaxWarps];  // the warp that is first, second, ...
int place_of[kMaxWarps];    // of a warp in that order
unsigned ready_places;      // a bit for each place whose warp has a lane that can run
int lane_rotation;

unsigned lanes_mask(const Warp& warp) { return warp.lanes == 32 ? ~0u : (1u << warp.lanes) - 1; }

// At the start of a block and after each of its barriers. Random: another order each time, so that
// now this and now that warp is far ahead.
void make_all_ready() {
  std::iota(warp_order, warp_order + block.warps, 0);
  if (order == Order::reverse) std::reverse(warp_order, warp_order + block.warps);
  if (order == Order::random) std::shuffle(warp_order, warp_order + block.warps, random_bits);
  lane_rotation = order == Order::random ? int(random_bits() % 32) : 0;
  ready_places = 0;
  for (int i = 0; i < block.warps; i++) {
    place_of[warp_order[i]] = i;
    ready_places |= 1u << i;
    block.warp[i].ready = lanes_mask(block.warp[i]);
  }
}

int first_ready() {
  if (!ready_places) return -1;
  const int warp = warp_order[__builtin_ctz(ready_places)];
  const unsigned ready = block.warp[warp].ready;
  if (order == Order::reverse) return warp * 32 + 31 - __builtin_clz(ready);
  const unsigned rotated = ready >> lane_rotation | ready << (32 - lane_rotation) % 32;
  return warp * 32 + (__builtin_ctz(rotated) + lane_rotation) % 32;
}

// ---- running

[[noreturn]] void report_deadlock() {
  for (int i = 0; i < block.warps; i++) {
    const Warp& warp = block.warp[i];
    if (!warp.waiting) continue;
    for (int lane = 0; lane < warp.lanes; lane++)
      if (!(warp.waiting >> lane & 1))
        report_thread("deadlock, a thread does not reach a warp primitive", warp.site,
                      i * 32 + lane);
  }
  for (int thread = 0; thread < block.threads; thread++)
    if (!block.at_block_barrier[thread])
      report_thread("deadlock, a thread does not reach a barrier", block.barrier, thread);
  abort();
}

void choose(int thread) {
  cpu::running_thread = thread;
  cpu::thread_index = block.index[thread];
  Warp& warp = block.warp[cpu::warp_index()];
  warp.ready &= ~(1u << cpu::lane_index());
  if (!warp.ready) ready_places &= ~(1u << place_of[cpu::warp_index()]);
}

// The running thread cannot go on, or others come first. Fibers switch to each other, always in
// this place, so that the processor predicts where `ret` will lead.
__attribute__((noinline)) void yield() {
  const int before = cpu::running_thread, next = first_ready();
  if (next >= 0) choose(next);
  else if (block.done < block.threads) report_deadlock();
  if (next != before) switch_to(block.fiber[before], next >= 0 ? block.fiber[next] : launcher);
}

void fiber_main() {
  (*thread_body)();
  if (cpu::copies_under_way())
    cpu::report("a thread ends while its copies to shared memory are under way",
                {"", "the kernel", 0});
  block.done++;
  yield();
}

void start_block() {
  block.done = block.at_barrier = 0;
  for (int i = 0; i < block.warps; i++) {
    block.warp[i].lanes = std::min(32, block.threads - i * 32);
    block.warp[i].waiting = 0;
  }
  for (int i = 0; i < block.threads; i++) {
    block.parity[i] = block.at_block_barrier[i] = false;
    // staggered, or the stacks would compete for the same sets of the caches
    prepare(block.fiber[i], stack_of(i), kStack - size_t(i % 32) * 192, fiber_main);
  }
  make_all_ready();
}

void run_block() {
  start_block();
  choose(first_ready());
  // comes back when the last thread has finished
  switch_to(launcher, block.fiber[cpu::running_thread]);
}
}  // namespace

void cpu::run_in_order(Order new_order, uint64_t seed) {
  std::lock_guard lock(one_launch);
  order = new_order;
  random_bits.seed(seed);
}

void cpu::run_grid(dim3 grid, dim3 block_dim, size_t shared_bytes,
                   const std::function<void()>& thread) {
  std::lock_guard lock(one_launch);
  grid_shape = grid;
  block_shape = block_dim;
  block.threads = int(block_dim.x * block_dim.y * block_dim.z);
  block.warps = (block.threads + 31) / 32;
  for (unsigned i = 0; i < unsigned(block.threads); i++)
    block.index[i] = {i % block_dim.x, i / block_dim.x % block_dim.y,
                      i / block_dim.x / block_dim.y};
  thread_body = &thread;
  SharedVariables variables;
  std::vector<unsigned char> shared(shared_bytes + 2 * kGuard);
  unsigned char* first =
      shared.data() + kGuard - reinterpret_cast<uintptr_t>(shared.data()) % kGuard;
  dynamic_shared = first;

  std::vector<uint64_t> blocks(uint64_t(grid.x) * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  if (order == Order::reverse) std::reverse(blocks.begin(), blocks.end());
  if (order == Order::random) std::shuffle(blocks.begin(), blocks.end(), random_bits);
  for (const uint64_t i : blocks) {
    block_index = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y),
                   unsigned(i / grid.x / grid.y)};
    std::fill(shared.begin(), shared.end(), 0xff);
    variables.fill();
    run_block();
    const auto is_written = [](unsigned char byte) { return byte != 0xff; };
    if (std::any_of(shared.data(), first, is_written) ||
        std::any_of(first + shared_bytes, shared.data() + shared.size(), is_written))
      report_thread("a write beside dynamic shared memory", {"the kernel", "the launch", 0}, 0);
  }
}

static bool different(const Site& a, const Site& b) {
  return a.line != b.line || (a.file != b.file && strcmp(a.file, b.file));
}

void cpu::wait_for_block(Site site) {
  if (block.at_barrier && different(site, block.barrier))
    report("threads wait at different barriers, the other one is", block.barrier);
  block.barrier = site;
  block.at_block_barrier[running_thread] = true;
  if (++block.at_barrier == block.threads) {
    block.at_barrier = 0;
    std::fill(block.at_block_barrier, block.at_block_barrier + block.threads, false);
    make_all_ready();
  }
  yield();
}

const uint64_t* cpu::exchange_in_warp(unsigned mask, uint64_t value, Site site) {
  Warp& warp = block.warp[warp_index()];
  const unsigned all = lanes_mask(warp), me = 1u << lane_index();
  if ((mask & all) != all) report("the mask leaves lanes out, which this stand-in has not", site);
  if (warp.waiting && different(site, warp.site))
    report("lanes wait at different warp primitives, the other one is", warp.site);
  uint64_t* values = warp.values[block.parity[running_thread]];
  block.parity[running_thread] ^= 1;
  values[lane_index()] = value;
  warp.site = site;
  warp.waiting |= me;
  if (warp.waiting == all) {
    warp.waiting = 0;
    warp.ready = all;
    ready_places |= 1u << place_of[warp_index()];
  }
  yield();
  return values;
}

void cpu::report(const char* what, Site site) { report_thread(what, site, running_thread); }
int cpu::lanes_in_warp() { return block.warp[warp_index()].lanes; }
#endif
