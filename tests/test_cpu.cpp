// test_cpu.cpp: the stand-ins for CUDA and cuBLAS do what the originals do, and notice what the
// originals would not forgive. Kernels are in cpu_kernels.cu. What only one form of the stand-in
// can show, the other skips; a CUDA build runs what is plain CUDA.
#include "tests/test.h"

#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <random>
#include <vector>

#include "tests/cpu_kernels.h"
#include "tests/standstill.h"

#if defined(CPU_FAST) || defined(CPU_FAITHFUL)
#define CPU_STAND_IN
#include <omp.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

// ---- helpers

namespace {

template <class T> struct DeviceArray {  // device memory that is freed at the end of its scope
  explicit DeviceArray(size_t count) : count(count) {
    CUDA_CHECK(cudaMalloc(&data, count * sizeof(T)));
  }
  explicit DeviceArray(const std::vector<T>& host) : DeviceArray(host.size()) { upload(host); }
  ~DeviceArray() { cudaFree(data); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  void upload(const std::vector<T>& host) {
    CUDA_CHECK(cudaMemcpy(data, host.data(), count * sizeof(T), cudaMemcpyHostToDevice));
  }
  std::vector<T> download() const {
    CUDA_CHECK(cudaGetLastError());
    CUDA_CHECK(cudaDeviceSynchronize());
    std::vector<T> host(count);
    CUDA_CHECK(cudaMemcpy(host.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
  }
  T* data = nullptr;
  size_t count;
};

template <class T> std::vector<T> random_values(size_t count, unsigned seed) {
  std::mt19937 bits(seed);
  std::uniform_real_distribution<double> uniform(-1, 1);
  std::vector<T> values(count);
  for (T& x : values) x = T(uniform(bits));
  return values;
}

std::vector<float> rotated(const std::vector<float>& x, int rows, int width) {
  std::vector<float> y(x.size());
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < width; i++)
      y[size_t(r * width + i)] = x[size_t(r * width + (i + 1) % width)];
  return y;
}

#ifdef CPU_STAND_IN
// Runs `body` in a child process; what it wrote to stderr, and how it ended.
std::string run_in_child(void (*body)(), int* status) {
  int ends[2];
  CHECK_EQ(pipe(ends), 0);
  fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], 2);
    close(ends[0]);
    try {
      body();
    } catch (const std::exception& e) {
      fprintf(stderr, "%s", e.what());
      _exit(9);
    }
    _exit(0);
  }
  close(ends[1]);
  std::string said;
  char buffer[256];
  for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;) said.append(buffer, size_t(n));
  close(ends[0]);
  waitpid(child, status, 0);
  return said;
}

struct QueuedStreams {  // for the length of a scope
  explicit QueuedStreams(unsigned seed) { cpu::queue_streams(seed); }
  ~QueuedStreams() { cpu::run_streams_immediately(); }
};
#endif

}  // namespace

// ---- memory. The first test must run before any allocation in this process.

TEST(other_processes_can_map_device_memory_and_read_it_in_place) {
#ifdef CPU_STAND_IN
  int status = 0;
  const std::string said = run_in_child(
      [] {
        cpu::share_device_memory();
        int* x = nullptr;
        if (cudaMalloc(&x, 4096) != cudaSuccess) _exit(1);
        x[5] = 12345;
        const cpu::Arena& arena = cpu::arena();
        const auto* mapped =
            static_cast<const char*>(mmap(nullptr, 1 << 20, PROT_READ, MAP_SHARED, arena.fd, 0));
        if (mapped == MAP_FAILED) _exit(2);
        const ptrdiff_t offset = reinterpret_cast<char*>(x) - arena.base;
        _exit(*reinterpret_cast<const int*>(mapped + offset + 5 * sizeof(int)) == 12345 ? 0 : 3);
      },
      &status);
  CHECK_EQ(status, 0, said);
  measured("arena ", cpu::arena().size >> 20, " MiB reserved");
#else
  skip("the CPU stand-in's own");
#endif
}

TEST(freed_memory_is_handed_out_again_and_holds_nan) {
#ifdef CPU_STAND_IN
  cpu::poison_memory(true);
  const cpu::PoolCounts before = cpu::pool_counts();
  float *a = nullptr, *b = nullptr;
  CUDA_CHECK(cudaMalloc(&a, 100000));
#ifdef CPU_FAITHFUL
  CHECK_EQ(reinterpret_cast<uintptr_t>(a + 25000) % 4096, 0u, "it ends at a page's end");
#else
  CHECK_EQ(reinterpret_cast<uintptr_t>(a) % 256, 0u);
#endif
  CHECK(std::isnan(a[0]) && std::isnan(a[24999]));
  CHECK_LE(cpu::pool_counts().in_use - before.in_use, 112500u, "at most an eighth is wasted");
  a[0] = 1;
  CUDA_CHECK(cudaFree(a));
  for (int i = 0; i < 100; i++) {
    CUDA_CHECK(cudaMalloc(&b, 99999));
    CHECK(b == a, "the same size comes from the same place");
    CHECK(std::isnan(b[0]));
    b[0] = 1;
    CUDA_CHECK(cudaFree(b));
  }
  const cpu::PoolCounts after = cpu::pool_counts();
  CHECK_EQ(after.in_use, before.in_use);
  CHECK_EQ(after.allocations - before.allocations, 101);
  CHECK_LE(100, after.reuses - before.reuses);
  CHECK_LE(after.carved - before.carved, 112500u, "100 allocations, one block");
  measured("101 allocations, ", after.reuses - before.reuses, " from the pool");
#else
  skip("the CPU stand-in's own");
#endif
}

TEST(wrong_uses_of_memory_are_errors) {
#ifdef CPU_STAND_IN
  void* data = nullptr;
  for (const size_t bytes : {cpu::arena().size + 1, SIZE_MAX / 2 + 2, SIZE_MAX})
    CHECK_EQ(cudaMalloc(&data, bytes), cudaErrorMemoryAllocation);
  CHECK_EQ(cudaGetLastError(), cudaErrorMemoryAllocation);
  CHECK_EQ(cudaGetLastError(), cudaSuccess);
  int not_ours = 0;
  CHECK_EQ(cudaFree(&not_ours), cudaErrorInvalidValue);
  CUDA_CHECK(cudaMalloc(&data, 1000));
  CUDA_CHECK(cudaFree(data));
  CHECK_EQ(cudaFree(data), cudaErrorInvalidValue, "freed twice");
  cudaGetLastError();
  measured("too much, foreign, freed twice");
#else
  skip("the CPU stand-in's own");
#endif
}

TEST(what_touches_memory_beside_a_block_is_caught) {
#if defined(CPU_FAITHFUL) || defined(__SANITIZE_ADDRESS__)
  struct Case {
    void (*body)();
    const char* faithful_says = nullptr;  // null: SIGSEGV
  };
  static float* x;
  CUDA_CHECK(cudaMalloc(&x, 1000 * sizeof(float)));
  int caught = 0;
  for (const Case& c : {
           Case{[] { add_and_wait(x, 1001, 1, nullptr); }},
           Case{[] {
                  float* small;
                  CUDA_CHECK(cudaMalloc(&small, 7 * sizeof(float)));
                  small[7] = 0;
                  CUDA_CHECK(cudaFree(small));
                },
                "a write beside a block of 28 bytes, at 28 from its start"},
           Case{[] {
                  x[-1] = 0;
                  CUDA_CHECK(cudaFree(x));
                },
                "a write beside a block of 4000 bytes, at -4 from its start"},
#ifdef __SANITIZE_ADDRESS__
           Case{[] {
             CUDA_CHECK(cudaFree(x));
             add_and_wait(x, 1, 1, nullptr);
           }},
           Case{[] { memset(x + 990, 0, 11 * sizeof(float)); }},
#endif
       }) {
    int status = 0;
    const std::string said = run_in_child(c.body, &status);
#ifdef CPU_FAITHFUL
    const int signal = c.faithful_says ? SIGABRT : SIGSEGV;
    const std::string says = c.faithful_says ? c.faithful_says : "";
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == signal, "case ", caught, " said: ", said);
#else
    const std::string says = "AddressSanitizer: use-after-poison";
#endif
    CHECK(said.find(says) != std::string::npos, "case ", caught, " said: ", said);
    caught++;
  }
  CUDA_CHECK(cudaFree(x));
  measured(caught, " mistakes");
#else
  skip("blocks have guards in the FAITHFUL form and under AddressSanitizer only");
#endif
}

TEST(copies_and_fills_of_memory_that_is_elsewhere_are_refused) {
#ifdef CPU_STAND_IN
  DeviceArray<char> a(1000), b(1000);
  char host[2000] = {};
  struct Copy {
    void *to, *from;
    cudaMemcpyKind right;
  };
  int refused = 0;
  for (const Copy& copy :
       {Copy{a.data, b.data, cudaMemcpyDeviceToDevice}, Copy{a.data, host, cudaMemcpyHostToDevice},
        Copy{host, a.data, cudaMemcpyDeviceToHost}})
    for (const cudaMemcpyKind kind :
         {cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice}) {
      const bool right = kind == copy.right;
      CHECK_EQ(cudaMemcpy(copy.to, copy.from, 1000, kind),
               right ? cudaSuccess : cudaErrorInvalidValue);
      CHECK_EQ(cudaGetLastError(), right ? cudaSuccess : cudaErrorInvalidValue);
      refused += !right;
    }
  CHECK_EQ(cudaMemcpy(host, a.data, 1001, cudaMemcpyDeviceToHost), cudaErrorInvalidValue);
  CHECK_EQ(cudaMemcpy(a.data + 1, host, 1000, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
  CHECK_EQ(cudaMemset(a.data, 0, 1001), cudaErrorInvalidValue);
  CHECK_EQ(cudaMemset(host, 0, 1), cudaErrorInvalidValue);
  char* freed;
  CUDA_CHECK(cudaMalloc(&freed, 1000));
  CUDA_CHECK(cudaFree(freed));
  CHECK_EQ(cudaMemset(freed, 0, 1), cudaErrorInvalidValue);
  cudaGetLastError();
  CUDA_CHECK(cudaMemcpy(nullptr, nullptr, 0, cudaMemcpyDeviceToHost));
  CUDA_CHECK(cudaMemcpy(host, a.data, 1000, cudaMemcpyDeviceToHost));
  measured(refused + 5, " refused");
#else
  skip("the CPU stand-in's own");
#endif
}

TEST(big_copies_and_fills_reach_every_byte) {
  const size_t bytes = (9 << 20) + 77;
  std::vector<unsigned char> host(bytes);
  for (size_t i = 0; i < bytes; i++) host[i] = static_cast<unsigned char>(i * 2654435761u >> 13);
  DeviceArray<unsigned char> a(host), b(bytes);
  CUDA_CHECK(cudaMemset(b.data, 7, bytes));
  CUDA_CHECK(cudaMemcpy(b.data + 1, a.data, bytes - 2, cudaMemcpyDeviceToDevice));
  const std::vector<unsigned char> back = b.download();
  CHECK(back.front() == 7 && back.back() == 7, "the ends belong to the fill");
  CHECK(std::equal(back.begin() + 1, back.end() - 1, host.begin()));
  measured(bytes, " bytes");
}

// ---- launches

TEST(launches_survive_templates_macros_and_line_breaks) {
  const int rows = 5, width = 33;
  const auto x = random_values<double>(rows * width, 1);
  DeviceArray<double> in(x), out(x.size());
  scale_rows(out.data, in.data, rows, width);
  const auto y = out.download();
  for (size_t i = 0; i < x.size(); i++) CHECK_EQ(y[i], 16 * x[i]);
  measured("3 launches, factor 16 exactly");
}

TEST(every_thread_of_every_block_in_3d_has_its_place) {
  struct Shape {
    dim3 grid, block;
  };
  int blocks_seen = 0;
  for (const Shape& s : {Shape{dim3(1), dim3(1)}, Shape{dim3(5, 3, 2), dim3(4, 2, 2)},
                         Shape{dim3(1, 7, 11), dim3(3, 5, 7)}, Shape{dim3(700), dim3(32)}}) {
    const dim3 g = s.grid;
    DeviceArray<Place> places(size_t(g.x) * g.y * g.z * kTileOfBlock);
    write_places(places.data, g, s.block);
    const auto got = places.download();
    for (size_t i = 0; i < got.size(); i++) {
      const unsigned block = unsigned(i / kTileOfBlock);
      const Place& p = got[i];
      CHECK(p.x == block % g.x && p.y == block / g.x % g.y && p.z == block / g.x / g.y, "block ",
            block);
      CHECK(p.grid_x == g.x && p.grid_y == g.y && p.grid_z == g.z);
#ifdef CPU_FAST
      CHECK_EQ(p.threads, 1u);
#else
      CHECK_EQ(p.threads, s.block.x * s.block.y * s.block.z);
#endif
    }
    blocks_seen += int(g.x * g.y * g.z);
  }
  measured(blocks_seen, " blocks");
}

TEST(launches_that_cuda_refuses_are_refused) {
  CHECK_EQ(launch_with(dim3(1), dim3(1024), 0), cudaSuccess);
  CHECK_EQ(launch_with(dim3(0), dim3(32), 0), cudaErrorInvalidConfiguration);
  CHECK_EQ(launch_with(dim3(1, 65536), dim3(32), 0), cudaErrorInvalidConfiguration);
  CHECK_EQ(launch_with(dim3(1), dim3(0), 0), cudaErrorInvalidConfiguration);
  CHECK_EQ(launch_with(dim3(1), dim3(32, 33), 0), cudaErrorInvalidConfiguration);
  CHECK_EQ(launch_with(dim3(1), dim3(1, 1, 65), 0), cudaErrorInvalidConfiguration);
  CHECK_EQ(launch_with(dim3(1), dim3(32), 47 << 10), cudaSuccess);
  CHECK_EQ(launch_with(dim3(1), dim3(32), 48 << 10), cudaErrorInvalidValue,
           "with static shared memory that is more than 48 KiB");
  measured("6 refused");
}

TEST(shared_memory_carries_values_between_threads) {
  const int rows = 40, width = 201;
  const auto x = random_values<float>(rows * width, 2);
  DeviceArray<float> in(x), out(x.size());
  rotate_rows(out.data, in.data, rows, width, 96, true);
  CHECK(out.download() == rotated(x, rows, width), "dynamic");
  reverse_rows(out.data, in.data, rows, width);
  const auto y = out.download();
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < width; i++)
      CHECK_EQ(y[size_t(r * width + i)], x[size_t(r * width + width - 1 - i)], "static");
  measured(rows, " blocks, dynamic and static");
}

TEST(shared_memory_holds_nan_when_a_block_starts) {
#ifdef CPU_FAITHFUL
  const int blocks = 3;
  DeviceArray<float> out(std::vector<float>(blocks * 2 * 64, 0.0f));
  read_fresh_shared_memory(out.data, blocks);
  int nans = 0;
  for (float x : out.download()) nans += std::isnan(x);
  CHECK_EQ(nans, blocks * 2 * 64);
  measured(nans, " values, dynamic and static");
#else
  skip("shared memory is filled in the FAITHFUL form only");
#endif
}

// ---- warps

TEST(a_warp_adds_up_in_every_form) {
  const int warps = 9;
  const auto x = random_values<double>(warps * 32, 3);
  DeviceArray<double> in(x), out(warps);
  sum_of_warp(out.data, in.data, warps);
  const auto sums = out.download();
  double worst = 0;
  for (int w = 0; w < warps; w++) {
    double sum = 0;
    for (int i = 0; i < 32; i++) sum += x[size_t(w * 32 + i)];
    worst = worst_of(worst, std::abs(sums[size_t(w)] - sum));
  }
  CHECK_LE(worst, 1e-14);
  measured("max|d| = ", worst);
}

#ifndef CPU_FAST
// What cpu_kernels.cu's shuffle_all must yield.
template <class T> std::vector<T> expected_shuffles(const std::vector<T>& x) {
  std::vector<T> y;
  for (size_t lanes = 1; lanes <= kShuffles; lanes++)
    for (size_t i = 0; i < x.size(); i++) y.push_back(x[i ^ lanes]);
  return y;
}
#endif

TEST(shuffles_equal_plain_loops) {
#ifndef CPU_FAST
  const auto x = random_values<float>(64, 4);
  const auto t = random_values<double>(64, 5);
  DeviceArray<float> in(x), out(kShuffles * 64);
  DeviceArray<double> in64(t), out64(kShuffles * 64);
  shuffles(out.data, out64.data, in.data, in64.data);
  CHECK(out.download() == expected_shuffles(x), "4 bytes");
  CHECK(out64.download() == expected_shuffles(t), "8 bytes");
  measured(kShuffles, " shuffles of 4 and of 8 bytes, 2 warps");
#else
  skip("a warp of the FAST form has one lane");
#endif
}

TEST(tensor_cores_equal_a_plain_product) {
#ifndef CPU_FAST
  std::vector<__nv_bfloat16> a(256), b(256);
  const auto values = random_values<float>(512, 6);
  for (size_t i = 0; i < 256; i++) {
    a[i] = __nv_bfloat16(values[i]);
    b[i] = __nv_bfloat16(values[256 + i]);
  }
  DeviceArray<__nv_bfloat16> da(a), db(b);
  DeviceArray<float> dc(256);
  double worst = 0;
  for (int layouts = 0; layouts < 4; layouts++) {
    const bool a_by_rows = layouts & 1, b_by_rows = layouts & 2;
    tensor_core_product(dc.data, da.data, db.data, a_by_rows, b_by_rows, 3.0f);
    const auto c = dc.download();
    for (int i = 0; i < 16; i++)
      for (int j = 0; j < 16; j++) {
        double sum = 0;
        for (int k = 0; k < 16; k++)
          sum += double(float(a[size_t(a_by_rows ? i * 16 + k : k * 16 + i)])) *
                 double(float(b[size_t(b_by_rows ? k * 16 + j : j * 16 + k)]));
        worst = worst_of(worst, std::abs(double(c[size_t(i * 16 + j)]) - (3 * (1 + sum) + sum)));
      }
  }
  CHECK_LE(worst, 1e-5);
  measured("4 layouts, accumulators scaled by element: max|d| = ", worst);
#else
  skip("tensor cores have no FAST form");
#endif
}

// ---- what FAITHFUL notices

TEST(an_asynchronous_copy_arrives_at_the_wait_and_leaves_nan_before) {
#ifdef CPU_FAITHFUL
  const auto x = random_values<float>(64, 8);
  DeviceArray<float> in(x), out(3 * 64);
  async_copies(out.data, in.data);
  const auto seen = out.download();
  for (size_t when = 0; when < 3; when++)
    for (size_t i = 0; i < 64; i++) {
      const float y = seen[when * 64 + i], arrived = i < 56 ? x[i] : 0;
      if (i < 32 * when) CHECK_EQ(y, arrived, "number ", i, " after ", when, " waits");
      else CHECK(std::isnan(y), "number ", i, " is there before the wait");
    }
  measured("2 groups; 8 numbers that are not read are zeros");
#else
  skip("copies are asynchronous in the FAITHFUL form only");
#endif
}

TEST(a_missing_barrier_gives_a_wrong_answer_in_some_order) {
#ifdef CPU_FAITHFUL
  const int rows = 6, width = 96;
  const auto x = random_values<float>(rows * width, 7);
  DeviceArray<float> in(x), out(x.size());
  int right = 0, wrong = 0, runs = 0;
  for (int run = 0; run < 8; run++, runs++) {
    cpu::run_in_order(run == 0   ? cpu::Order::forward
                      : run == 1 ? cpu::Order::reverse
                                 : cpu::Order::random,
                      unsigned(run));
    rotate_rows(out.data, in.data, rows, width, width, true);
    right += out.download() == rotated(x, rows, width);
    rotate_rows(out.data, in.data, rows, width, width, false);
    wrong += out.download() != rotated(x, rows, width);
  }
  cpu::run_in_order(cpu::Order::forward);
  CHECK_EQ(right, runs, "with the barrier every order is right");
  CHECK_LE(1, wrong, "without it some order is wrong");
  measured("without the barrier ", wrong, " of ", runs, " orders are wrong, with it none");
#else
  skip("barriers are real in the FAITHFUL form only");
#endif
}

TEST(threads_that_wait_in_vain_are_reported_with_their_line) {
#ifdef CPU_FAITHFUL
  static Mistake mistake;
  struct Case {
    Mistake mistake;
    const char *says, *thread;
  };
  int reported = 0;
  for (const Case& c :
       {Case{Mistake::barrier_not_reached,
             "deadlock, a thread does not reach a barrier: __syncthreads", "thread 5"},
        Case{Mistake::two_barriers, "threads wait at different barriers", "thread 10"},
        Case{Mistake::shuffle_not_reached,
             "deadlock, a thread does not reach a warp primitive: __shfl_xor_sync", "thread 7"},
        Case{Mistake::two_primitives, "lanes wait at different warp primitives", "thread 10"},
        Case{Mistake::beyond_shared_memory, "a write beside dynamic shared memory",
             "block (0,0,0)"},
        Case{Mistake::before_shared_memory, "a write beside dynamic shared memory",
             "block (0,0,0)"}}) {
    mistake = c.mistake;
    int status = 0;
    std::string said = run_in_child([] { make_mistake(mistake); }, &status);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT, "mistake ", int(mistake),
          " said: ", said);
    CHECK(said.find(c.says) != std::string::npos && said.find(c.thread) != std::string::npos,
          "said: ", said);
    int line = 0;  // the kernel says which line it is, before it makes the mistake there
    if (sscanf(said.c_str(), "mistake in line %d", &line) == 1)
      CHECK(said.find(sentence("tests/cpu_kernels.cu:", line, ",")) != std::string::npos,
            "said: ", said);
    reported++;
  }
  measured(reported, " mistakes");
#else
  skip("waiting is real in the FAITHFUL form only");
#endif
}

// ---- numbers

TEST(bf16_rounds_to_nearest_even_and_keeps_nan) {
  int ties = 0;
  for (unsigned bits = 0; bits < 0x7f80; bits++) {
    const float x = __bfloat162float(__ushort_as_bfloat16(static_cast<unsigned short>(bits)));
    CHECK_EQ(__bfloat16_as_ushort(__float2bfloat16(x)), bits);
    if (bits + 1 == 0x7f80) continue;
    const float next =
        __bfloat162float(__ushort_as_bfloat16(static_cast<unsigned short>(bits + 1)));
    const float half = x / 2 + next / 2;
    if (bits < 0x80) continue;  // halves of the smallest are not exact
    const unsigned even = bits % 2 ? bits + 1 : bits;
    CHECK_EQ(__bfloat16_as_ushort(__float2bfloat16(half)), even);
    CHECK_EQ(__bfloat16_as_ushort(__float2bfloat16(std::nextafter(half, x))), bits);
    CHECK_EQ(__bfloat16_as_ushort(__float2bfloat16(std::nextafter(half, next))), bits + 1);
    CHECK_EQ(__bfloat16_as_ushort(__double2bfloat16(double(half))), even);
    CHECK_EQ(__bfloat16_as_ushort(__double2bfloat16(std::nextafter(double(half), double(next)))),
             bits + 1, "rounded once, not twice");
    ties++;
  }
  CHECK_EQ(__bfloat16_as_ushort(__float2bfloat16(INFINITY)), 0x7f80);
  for (const unsigned bits : {0x7fc00000u, 0xffffffffu, 0x7f800001u}) {
    float x;
    memcpy(&x, &bits, sizeof x);
    CHECK(std::isnan(__bfloat162float(__float2bfloat16(x))));
  }
  measured(ties, " ties");
}

TEST(exp_tanh_and_log_are_accurate_in_kernels) {
  const int n = 1003;  // no multiple of a vector: the last elements take another path
  std::vector<float> x(n);
  std::vector<double> t(n);
  for (int i = 0; i < n; i++) {
    t[size_t(i)] = 0.001 + 0.02 * i;
    x[size_t(i)] = float(t[size_t(i)]);
  }
  DeviceArray<float> in(x), out(3 * n);
  DeviceArray<double> in64(t), out64(3 * n);
  functions(out.data, out64.data, in.data, in64.data, n);
  const auto y = out.download();
  const auto z = out64.download();
  double worst = 0, worst64 = 0;
  for (int i = 0; i < n; i++)
    for (int f = 0; f < 3; f++) {
      const auto exact = [f](long double v) {
        return f == 0 ? std::exp(v) : f == 1 ? std::tanh(v) : std::log(v);
      };
      const long double want = exact(x[size_t(i)]), want64 = exact(t[size_t(i)]);
      worst = worst_of(worst, double(std::abs((y[size_t(f * n + i)] - want) / want)));
      worst64 = worst_of(worst64, double(std::abs((z[size_t(f * n + i)] - want64) / want64)));
    }
  CHECK_LE(worst, 4.1 * 1.2e-7);
  CHECK_LE(worst64, 4.1 * 2.3e-16);
  measured("relative ", worst, " in f32, ", worst64, " in f64");
}

// ---- streams

#ifdef CPU_STAND_IN
// A producer adds 1 to x ten times, and after each a consumer on another stream copies x, waiting
// for the producer or not. How many of the copies are right?
int right_copies(unsigned seed, bool wait) {
  const int n = 64, steps = 10;
  QueuedStreams queued(seed);
  cudaStream_t producer, consumer;
  cudaEvent_t produced, consumed;
  CUDA_CHECK(cudaStreamCreateWithFlags(&producer, cudaStreamNonBlocking));
  CUDA_CHECK(cudaStreamCreateWithFlags(&consumer, cudaStreamNonBlocking));
  CUDA_CHECK(cudaEventCreateWithFlags(&produced, cudaEventDisableTiming));
  CUDA_CHECK(cudaEventCreateWithFlags(&consumed, cudaEventDisableTiming));
  DeviceArray<float> x(std::vector<float>(n, 0.0f)), copies(n * steps);
  for (int step = 0; step < steps; step++) {
    add_and_wait(x.data, n, 1, producer);
    CUDA_CHECK(cudaEventRecord(produced, producer));
    if (wait) CUDA_CHECK(cudaStreamWaitEvent(consumer, produced));
    CUDA_CHECK(cudaMemcpyAsync(copies.data + step * n, x.data, n * sizeof(float),
                               cudaMemcpyDeviceToDevice, consumer));
    CUDA_CHECK(cudaEventRecord(consumed, consumer));
    CUDA_CHECK(cudaStreamWaitEvent(producer, consumed));
  }
  const auto got = copies.download();
  int right = 0;
  for (int step = 0; step < steps; step++)
    right += got[size_t(step * n)] == float(step + 1) &&
             got[size_t(step * n + n - 1)] == float(step + 1);
  for (cudaEvent_t event : {produced, consumed}) CUDA_CHECK(cudaEventDestroy(event));
  for (cudaStream_t stream : {producer, consumer}) CUDA_CHECK(cudaStreamDestroy(stream));
  return right;
}
#endif

TEST(a_queued_stream_runs_behind_the_host_and_in_order) {
#ifdef CPU_STAND_IN
  QueuedStreams queued(1);
  cudaStream_t stream;
  cudaEvent_t done;
  CUDA_CHECK(cudaStreamCreate(&stream));
  CUDA_CHECK(cudaEventCreate(&done));
  static std::vector<int> order;
  order.clear();
  Standstill standstill(stream);
  static int numbers[50];
  for (int i = 0; i < 50; i++) {
    numbers[i] = i;
    CUDA_CHECK(cudaLaunchHostFunc(
        stream, [](void* number) { order.push_back(*static_cast<int*>(number)); }, &numbers[i]));
  }
  CUDA_CHECK(cudaEventRecord(done, stream));
  CHECK_EQ(cudaStreamQuery(stream), cudaErrorNotReady, "the host is ahead");
  CHECK_EQ(cudaGetLastError(), cudaErrorNotReady, "which the next launch would have reported");
  CHECK_EQ(cudaEventQuery(done), cudaErrorNotReady);
  CHECK_EQ(cudaGetLastError(), cudaErrorNotReady);
  standstill.go();
  CUDA_CHECK(cudaEventSynchronize(done));
  CHECK_EQ(order.size(), 50u, "the host has waited");
  for (int i = 0; i < 50; i++) CHECK_EQ(order[size_t(i)], i);
  CUDA_CHECK(cudaStreamSynchronize(stream));
  CHECK_EQ(cudaStreamQuery(stream), cudaSuccess);
  CUDA_CHECK(cudaStreamDestroy(stream));
  CUDA_CHECK(cudaEventDestroy(done));
  measured("50 calls in order");
#else
  skip("the CPU stand-in's own");
#endif
}

TEST(destroyed_streams_and_null_events_are_refused) {
#ifdef CPU_STAND_IN
  const auto refused = [](cudaError_t error) {
    CHECK_EQ(error, cudaErrorInvalidResourceHandle);
    CHECK_EQ(cudaGetLastError(), cudaErrorInvalidResourceHandle);
  };
  DeviceArray<float> x(std::vector<float>(64, 0.0f));
  void* block = nullptr;
  cudaStream_t stream;
  cudaEvent_t event;
  float ms = 0;
  CUDA_CHECK(cudaEventCreate(&event));
  for (const bool queued : {false, true}) {
    if (queued) cpu::queue_streams(1);
    CUDA_CHECK(cudaStreamCreate(&stream));
    add_and_wait(x.data, 64, 1, stream);
    CUDA_CHECK(cudaStreamDestroy(stream));  // what is in it is done
    refused(cudaStreamDestroy(stream));
    refused(cudaStreamSynchronize(stream));
    refused(cudaStreamQuery(stream));
    refused(cudaStreamWaitEvent(stream, event));
    refused(cudaLaunchHostFunc(
        stream, [](void*) {}, nullptr));
    refused(cudaEventRecord(event, stream));
    refused(cudaMallocAsync(&block, 4, stream));
    refused(cudaFreeAsync(x.data, stream));
    refused(cudaMemsetAsync(x.data, 0, 4, stream));
    refused(cudaMemcpyAsync(x.data, x.data + 1, 4, cudaMemcpyDeviceToDevice, stream));
    add_and_wait(x.data, 64, 1, stream);
    CHECK_EQ(cudaGetLastError(), cudaErrorInvalidResourceHandle, "a launch");
    if (queued) cpu::run_streams_immediately();
  }
  CHECK(x.download() == std::vector<float>(64, 2.0f), "one launch of two");
  refused(cudaStreamDestroy(nullptr));
  refused(cudaStreamWaitEvent(nullptr, nullptr));
  refused(cudaEventRecord(nullptr));
  refused(cudaEventSynchronize(nullptr));
  refused(cudaEventQuery(nullptr));
  refused(cudaEventElapsedTime(&ms, nullptr, event));
  refused(cudaEventElapsedTime(&ms, event, nullptr));
  refused(cudaEventDestroy(nullptr));
  CUDA_CHECK(cudaEventDestroy(event));
  measured("11 calls with a destroyed stream, 8 with a null handle");
#else
  skip("the CPU stand-in's own");
#endif
}

TEST(a_stream_takes_no_more_cores_than_the_share_of_its_rank) {
#ifdef CPU_STAND_IN
  const int cores = omp_get_num_procs();
  if (cores == 1 || getenv("OMP_NUM_THREADS")) skip("one core, or OMP_NUM_THREADS is set");
  const char* set = getenv("MPI_LOCALNRANKS");
  const std::string before = set ? set : "";
  setenv("MPI_LOCALNRANKS", std::to_string(cores).c_str(), 1);
  static int threads;
  {
    QueuedStreams queued(1);
    cudaStream_t stream;
    CUDA_CHECK(cudaStreamCreate(&stream));
    CUDA_CHECK(cudaLaunchHostFunc(
        stream, [](void*) { threads = omp_get_max_threads(); }, nullptr));
    CUDA_CHECK(cudaStreamDestroy(stream));
  }
  if (set) setenv("MPI_LOCALNRANKS", before.c_str(), 1);
  else unsetenv("MPI_LOCALNRANKS");
  CHECK_EQ(threads, 1, "of ", cores, " cores that so many ranks share");
  measured("one thread for each of ", cores, " ranks");
#else
  skip("the CPU stand-in's own");
#endif
}

TEST(events_without_a_clock_are_not_timed) {
  cudaEvent_t begin, end;
  CUDA_CHECK(cudaEventCreate(&begin));
  for (const unsigned flags : {cudaEventDefault, cudaEventDisableTiming}) {
    CUDA_CHECK(cudaEventCreateWithFlags(&end, flags));
    for (cudaEvent_t event : {begin, end}) {
      CUDA_CHECK(cudaEventRecord(event));
      CUDA_CHECK(cudaEventSynchronize(event));
    }
    float ms = -1;
    CHECK_EQ(cudaEventElapsedTime(&ms, begin, end),
             flags == cudaEventDefault ? cudaSuccess : cudaErrorInvalidResourceHandle);
    CHECK_EQ(ms >= 0, flags == cudaEventDefault);
    cudaGetLastError();
    CUDA_CHECK(cudaEventDestroy(end));
  }
  CUDA_CHECK(cudaEventDestroy(begin));
}

TEST(a_forgotten_event_wait_gives_a_wrong_answer_for_some_seed) {
#ifdef CPU_STAND_IN
  int seeds = 10, right = 0, wrong_seeds = 0;
  for (int seed = 1; seed <= seeds; seed++) {
    right += right_copies(unsigned(seed), true);
    wrong_seeds += right_copies(unsigned(seed), false) < 10;
  }
  CHECK_EQ(right, 10 * seeds, "with the wait every copy is right");
  CHECK_LE(1, wrong_seeds);
  measured("without the wait ", wrong_seeds, " of ", seeds, " seeds are wrong, with it none");
#else
  skip("the CPU stand-in's own");
#endif
}

TEST(memory_freed_in_a_stream_goes_to_others_only_when_the_stream_is_there) {
#ifdef CPU_STAND_IN
  QueuedStreams queued(3);
  cudaStream_t one, other;
  CUDA_CHECK(cudaStreamCreate(&one));
  CUDA_CHECK(cudaStreamCreate(&other));
  const size_t bytes = 54321;
  char *a = nullptr, *b = nullptr, *c = nullptr, *d = nullptr, *e = nullptr;
  cudaEvent_t first_free;
  CUDA_CHECK(cudaEventCreate(&first_free));
  CUDA_CHECK(cudaMallocAsync(&a, bytes, one));
  Standstill before_first(one);
  CUDA_CHECK(cudaFreeAsync(a, one));
  CUDA_CHECK(cudaMallocAsync(&b, bytes, other));
  CHECK(b != a, "the first stream has not come to its free");
  CUDA_CHECK(cudaMallocAsync(&c, bytes, one));
  CHECK(c == a, "the stream that freed it may have it immediately");
  CUDA_CHECK(cudaEventRecord(first_free, one));
  Standstill before_second(one);
  CUDA_CHECK(cudaFreeAsync(c, one));
  before_first.go();
  CUDA_CHECK(cudaEventSynchronize(first_free));
  CUDA_CHECK(cudaMallocAsync(&d, bytes, other));
  CHECK(d != a, "the first free is done, the second is not");
  before_second.go();
  CUDA_CHECK(cudaStreamSynchronize(one));
  CUDA_CHECK(cudaMallocAsync(&e, bytes, other));
  CHECK(e == a, "now any stream may have it");
  for (char* block : {b, d, e}) CUDA_CHECK(cudaFreeAsync(block, other));
  CUDA_CHECK(cudaDeviceSynchronize());
  CUDA_CHECK(cudaStreamDestroy(one));
  CUDA_CHECK(cudaStreamDestroy(other));
  CUDA_CHECK(cudaEventDestroy(first_free));
  measured("in order of the streams");
#else
  skip("the CPU stand-in's own");
#endif
}

// ---- matrix products

namespace {

template <class T> constexpr cudaDataType type_of() {
  return std::is_same_v<T, float>    ? CUDA_R_32F
         : std::is_same_v<T, double> ? CUDA_R_64F
                                     : CUDA_R_16BF;
}

struct Product {
  bool transpose_a, transpose_b;
  int m, n, k, batch;
  bool beta;
};

// Largest difference from a plain product in f64, beyond one rounding to bf16 where the result is
// bf16, relative to the sum of the terms' sizes. Leading dims are wider than the matrices; what
// lies between and beyond must stay as it was. With beta = 0, c holds NaN before.
template <class In, class Out> double product_error(cublasHandle_t blas, const Product& p) {
  using Scalar = std::conditional_t<std::is_same_v<In, double>, double, float>;
  const int rows_a = p.transpose_a ? p.k : p.m, columns_a = p.transpose_a ? p.m : p.k;
  const int rows_b = p.transpose_b ? p.n : p.k, columns_b = p.transpose_b ? p.k : p.n;
  const int lda = rows_a + 3, ldb = rows_b + 1, ldc = p.m + 2;
  const int64_t stride_a = lda * columns_a + 5, stride_b = ldb * columns_b,
                stride_c = ldc * p.n + 1;
  std::vector<In> a, b;
  for (double x : random_values<double>(size_t(stride_a * p.batch), 8)) a.push_back(In(x));
  for (double x : random_values<double>(size_t(stride_b * p.batch), 9)) b.push_back(In(x));
  std::vector<Out> c(size_t(stride_c * p.batch), Out(double(NAN)));
  const auto inside = [&](int64_t i) {
    return i % stride_c < ldc * p.n && i % stride_c % ldc < p.m;
  };
  for (int64_t i = 0; i < int64_t(c.size()); i++)
    if (p.beta && inside(i)) c[size_t(i)] = Out(double(i % 17) / 8 - 1);
  DeviceArray<In> da(a), db(b);
  DeviceArray<Out> dc(c);
  const Scalar alpha = Scalar(0.5), beta = Scalar(p.beta);
  const auto op = [](bool transpose) { return transpose ? CUBLAS_OP_T : CUBLAS_OP_N; };
  const auto compute = std::is_same_v<In, double> ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F;
  if (p.batch == 1)
    CUBLAS_CHECK(cublasGemmEx(blas, op(p.transpose_a), op(p.transpose_b), p.m, p.n, p.k, &alpha,
                              da.data, type_of<In>(), lda, db.data, type_of<In>(), ldb, &beta,
                              dc.data, type_of<Out>(), ldc, compute, CUBLAS_GEMM_DEFAULT));
  else
    CUBLAS_CHECK(cublasGemmStridedBatchedEx(blas, op(p.transpose_a), op(p.transpose_b), p.m, p.n,
                                            p.k, &alpha, da.data, type_of<In>(), lda, stride_a,
                                            db.data, type_of<In>(), ldb, stride_b, &beta, dc.data,
                                            type_of<Out>(), ldc, stride_c, p.batch, compute,
                                            CUBLAS_GEMM_DEFAULT));
  const auto got = dc.download();
  double worst = 0;
  for (int64_t at = 0; at < int64_t(got.size()); at++) {
    if (!inside(at)) {
      CHECK(std::isnan(double(got[size_t(at)])), "wrote outside of c");
      continue;
    }
    const int64_t batch = at / stride_c, i = at % stride_c % ldc, j = at % stride_c / ldc;
    double want = p.beta ? double(c[size_t(at)]) : 0, terms = std::abs(want);
    for (int k = 0; k < p.k; k++) {
      const double term =
          0.5 *
          double(
              a[size_t(batch * stride_a + (p.transpose_a ? k + i * lda : i + k * int64_t(lda)))]) *
          double(
              b[size_t(batch * stride_b + (p.transpose_b ? j + k * int64_t(ldb) : k + j * ldb))]);
      want += term;
      terms += std::abs(term);
    }
    const double rounding = std::is_same_v<Out, __nv_bfloat16> ? std::abs(want) / 256 : 0;
    const double error =
        (std::abs(double(got[size_t(at)]) - want) - rounding) / std::max(terms, 1e-300);
    worst = worst_of(worst, error);
  }
  return worst;
}

template <class In, class Out> void check_products(double tolerance) {
  cublasHandle_t blas;
  CUBLAS_CHECK(cublasCreate(&blas));
  double worst = 0;
  int products = 0;
  for (const auto& [m, n, k] : {std::array{1, 1, 1},
                                {7, 13, 5},
                                {16, 8, 32},
                                {33, 1, 70},
                                {1, 50, 9},
                                {101, 67, 300},
                                {130, 790, 17},
                                {5, 4, 0}})
    for (int transposes = 0; transposes < 4; transposes++)
      for (const bool beta : {false, true})
        for (const int batch : {1, 3}) {
          const double error = product_error<In, Out>(
              blas, {bool(transposes & 1), bool(transposes & 2), m, n, k, batch, beta});
          CHECK_LE(error, tolerance, "m ", m, " n ", n, " k ", k, " transposes ", transposes,
                   " beta ", beta, " batch ", batch);
          worst = std::max(worst, error);
          products++;
        }
  CUBLAS_CHECK(cublasDestroy(blas));
  measured(products, " products, worst ", worst);
}

}  // namespace

TEST(products_in_f32_equal_a_plain_loop) { check_products<float, float>(5e-7); }
TEST(products_in_f64_equal_a_plain_loop) { check_products<double, double>(1e-15); }
TEST(products_of_bf16_into_f32_equal_a_plain_loop) { check_products<__nv_bfloat16, float>(5e-7); }
TEST(products_of_bf16_are_rounded_once) { check_products<__nv_bfloat16, __nv_bfloat16>(5e-7); }

TEST(products_of_bf16_round_ties_to_even_and_keep_nan) {
  // 1 x 1 products with 1.5: 1.5 (1 + i/128) lies halfway between neighbours in bf16 when i is odd
  cublasHandle_t blas;
  CUBLAS_CHECK(cublasCreate(&blas));
  const int n = 85;
  std::vector<__nv_bfloat16> b(n);
  for (int i = 0; i < n; i++) b[size_t(i)] = __nv_bfloat16(1 + float(i) / 128);
  DeviceArray<__nv_bfloat16> da(std::vector<__nv_bfloat16>{__nv_bfloat16(1.5f)}), db(b), dc(n);
  const float alpha = 1, beta = 0;
  const auto multiply = [&] {
    CUBLAS_CHECK(cublasGemmEx(blas, CUBLAS_OP_N, CUBLAS_OP_N, 1, n, 1, &alpha, da.data, CUDA_R_16BF,
                              1, db.data, CUDA_R_16BF, 1, &beta, dc.data, CUDA_R_16BF, 1,
                              CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
    return dc.download();
  };
  const auto c = multiply();
  for (int i = 0; i < n; i++) {
    const float want = 128 * 1.5f * (1 + float(i) / 128);
    const float grid = want < 256 ? 1 : 2;  // 1.5 (1 + i/128) in steps of 1/128, from 2 on of 2/128
    CHECK_EQ(128 * float(c[size_t(i)]), grid * std::nearbyint(want / grid), "i ", i);
  }
  da.upload({__ushort_as_bfloat16(0xffff)});
  for (const auto x : multiply()) CHECK(std::isnan(float(x)));
  CUBLAS_CHECK(cublasDestroy(blas));
  measured(n, " products, and NaN");
}

TEST(an_empty_product_that_scales_bf16_and_a_product_on_a_dead_stream_are_refused) {
#ifdef CPU_STAND_IN
  DeviceArray<__nv_bfloat16> c(std::vector<__nv_bfloat16>{__nv_bfloat16(3.0f)});
  cublasHandle_t blas;
  CUBLAS_CHECK(cublasCreate(&blas));
  const float alpha = 1;
  const auto scale = [&](float beta) {
    return cublasGemmEx(blas, CUBLAS_OP_N, CUBLAS_OP_N, 1, 1, 0, &alpha, c.data, CUDA_R_16BF, 1,
                        c.data, CUDA_R_16BF, 1, &beta, c.data, CUDA_R_16BF, 1, CUBLAS_COMPUTE_32F,
                        CUBLAS_GEMM_DEFAULT);
  };
  CHECK_EQ(scale(0.5f), CUBLAS_STATUS_NOT_SUPPORTED);
  CHECK_EQ(scale(1), CUBLAS_STATUS_SUCCESS);
  CHECK_EQ(float(c.download()[0]), 3.0f);
  CHECK_EQ(scale(0), CUBLAS_STATUS_SUCCESS);
  CHECK_EQ(float(c.download()[0]), 0.0f);
  cudaStream_t stream;
  CUDA_CHECK(cudaStreamCreate(&stream));
  CUBLAS_CHECK(cublasSetStream(blas, stream));
  CHECK_EQ(scale(0), CUBLAS_STATUS_SUCCESS);
  CUDA_CHECK(cudaStreamDestroy(stream));
  CHECK_EQ(scale(0), CUBLAS_STATUS_EXECUTION_FAILED);
  CUBLAS_CHECK(cublasDestroy(blas));
#else
  skip("the CPU stand-in's own");
#endif
}

TEST(sums_in_f64_do_not_depend_on_the_number_of_threads) {
#ifdef CPU_STAND_IN
  const int m = 203, n = 157, k = 301;
  DeviceArray<double> a(random_values<double>(m * k, 10)), b(random_values<double>(k * n, 11)),
      c(m * n);
  cublasHandle_t blas;
  CUBLAS_CHECK(cublasCreate(&blas));
  const double alpha = 1, beta = 0;
  std::vector<double> first;
  const int before = omp_get_max_threads();
  for (int threads = 1; threads <= 5; threads++) {
    omp_set_num_threads(threads);
    CUBLAS_CHECK(cublasGemmEx(blas, CUBLAS_OP_T, CUBLAS_OP_N, m, n, k, &alpha, a.data, CUDA_R_64F,
                              k, b.data, CUDA_R_64F, k, &beta, c.data, CUDA_R_64F, m,
                              CUBLAS_COMPUTE_64F, CUBLAS_GEMM_DEFAULT));
    const auto got = c.download();
    if (threads == 1) first = got;
    CHECK(got == first, threads, " threads");
  }
  omp_set_num_threads(before);
  CUBLAS_CHECK(cublasDestroy(blas));
  measured("the same bits with 1 to 5 threads");
#else
  skip("the CPU stand-in's own");
#endif
}

int main(int argc, char** argv) { return run_tests(argc, argv); }
