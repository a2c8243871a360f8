// bench_kernels.cpp: how fast each kernel is on GPT-2's shapes, beside what the machine can do.
//
//   build/cpu/tests/bench_kernels [f32|bf16|f64] [part of a name]
//
// memory    GB/s of the bytes that the contract cannot avoid (each argument read or written once),
//           beside a copy that moves as many bytes. Arguments come from memory, not from a cache:
//           calls rotate through sets of them until 256 MB have passed.
// products  GFLOP/s beside the best product of the library (cuBLAS, oneDNN) in the same run;
//           attention counts its causal half
// time      median of several rounds, each round all sets, by events on the stream; on the CPU with
//           1 thread and with all
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <memory>
#ifdef CPU_FAST
#include <omp.h>
#endif

#include "kernels/kernels.h"
#include "optimizer.h"
#include "tests/test.h"

constexpr int64_t kB = 1, kT = 1024, kR = kB * kT, kC = 768, kH = 12, kV = 50257,
                  kWeights = 40'000'000;
constexpr double kRotate = 256e6;  // bytes

using Call = std::function<void()>;

struct Row {
  std::string name;
  double bytes = 0, flops = 0;  // one of them
  std::function<Call()> make;   // a fresh set of arguments
  bool library = false;         // a product of the library: sets the standard
};

// ---- time

struct Mark {  // a moment on the compute stream
  cudaEvent_t event;
  Mark() { CUDA_CHECK(cudaEventCreate(&event)); }
  ~Mark() { cudaEventDestroy(event); }
  void record() const { CUDA_CHECK(cudaEventRecord(event, device().compute)); }
};

static double seconds_of_round(const std::vector<Call>& calls) {
  const Mark start, stop;
  start.record();
  for (const Call& call : calls) call();
  stop.record();
  CUDA_CHECK(cudaEventSynchronize(stop.event));
  float ms = 0;
  CUDA_CHECK(cudaEventElapsedTime(&ms, start.event, stop.event));
  return ms * 1e-3 / double(calls.size());
}

static double median(std::vector<double> v) {
  std::nth_element(v.begin(), v.begin() + v.size() / 2, v.end());
  return v[v.size() / 2];
}

struct Times {
  double call, copy;
};  // seconds

// Rounds of the calls and of copies of as many bytes in turn, so that both meet the same machine.
static Times measure(const std::vector<Call>& calls, const std::vector<Call>& copies) {
  std::vector<double> call, copy;
  double spent = 0;
  // first touch; cpu/cuda/fast.h learns which launches are worth a team
  for (int i = 0; i < 4 && spent < 1; i++) spent += seconds_of_round(calls) * double(calls.size());
  spent = 0;
  while (call.size() < 3 || (call.size() < 7 && spent < 3) || (spent < 0.3 && call.size() < 100)) {
    call.push_back(seconds_of_round(calls));
    if (!copies.empty()) copy.push_back(seconds_of_round(copies));
    spent += call.back() * double(calls.size());
  }
  return {median(call), copies.empty() ? 0 : median(copy)};
}

// `bytes` counts what is read and what is written
static std::vector<Call> copies_of(double bytes, size_t sets) {
  std::vector<Call> calls;
  for (size_t i = 0; i < sets; i++) {
    const int64_t n = int64_t(bytes / 8);
    const Tensor from({n}, Dtype::f32, Memory::data), to({n}, Dtype::f32, Memory::data);
    fill(from, 1);
    fill(to, 2);
    calls.push_back([=] { copy(to, from); });
  }
  return calls;
}

// ---- arguments

static Tensor random(Shape shape, Dtype dtype, float scale = 1) {
  const Tensor t(shape, dtype, Memory::data);
  static uint32_t parameter = 0;
  fill_random(t, 1, parameter++, scale, Slice{1, t.numel(), 1, 0, t.numel()});
  return t;
}
static Tensor constant(Shape shape, Dtype dtype, double value) {
  const Tensor t(shape, dtype, Memory::data);
  fill(t, value);
  return t;
}
static Tensor integers(const std::vector<int>& v) {
  const Tensor t({int64_t(v.size())}, Dtype::i32, Memory::data);
  upload(t, v.data());
  synchronize();
  return t;
}
static std::vector<int> tokens() {
  static uint64_t state = 1;
  std::vector<int> v(kR);
  for (int& x : v)
    x = int(((state = state * 6364136223846793005u + 1442695040888963407u) >> 33) % kV);
  return v;
}

// ---- the table's rows

static std::vector<Row> elementwise_rows(Dtype d) {
  const Dtype acc = master_dtype(d);
  const double rc = double(kR * kC * int64_t(size_of(d))), acc_size = double(size_of(acc));
  const Shape rows{kR, kC}, wide{kR, 4 * kC};
  return {
      {"add", 3 * rc, 0,
       [=] {
         auto y = random(rows, d), a = random(rows, d), b = random(rows, d);
         return [=] { add(y, a, b); };
       }},
      {"add with bias", 3 * rc, 0,
       [=] {
         auto y = random(rows, d), a = random(rows, d), b = random(rows, d), c = random({kC}, d);
         return [=] { add(y, a, b, c); };
       }},
      {"add_bias", 2 * rc, 0,
       [=] {
         auto y = random(rows, d), b = random({kC}, d, 1e-3f);
         return [=] { add_bias(y, b); };
       }},
      {"bias_backward", rc, 0,
       [=] {
         auto db = random({kC}, acc), dy = random(rows, d);
         return [=] { bias_backward(db, dy); };
       }},
      {"gelu_forward", 8 * rc, 0,
       [=] {
         auto y = random(wide, d), x = random(wide, d), b = random({4 * kC}, d);
         return [=] { gelu_forward(y, x, b); };
       }},
      {"gelu_backward", 12 * rc, 0,
       [=] {
         auto dx = random(wide, d), dy = random(wide, d), x = random(wide, d),
              b = random({4 * kC}, d);
         return [=] { gelu_backward(dx, dy, x, b); };
       }},
      {"cast to f64", rc + double(kR * kC * 8), 0,
       [=] {
         auto y = random(rows, d == Dtype::f64 ? Dtype::f32 : Dtype::f64), x = random(rows, d);
         return [=] { cast(y, x); };
       }},
      {"layernorm_forward", 2 * rc, 0,
       [=] {
         auto x = random(rows, d), y = random(rows, d), m = random({kR}, acc),
              s = random({kR}, acc), g = random({kC}, d), b = random({kC}, d);
         return [=] { layernorm_forward(y, m, s, x, g, b); };
       }},
      {"add_layernorm_forward", 4 * rc, 0,
       [=] {
         auto x = random(rows, d), h = random(rows, d), sum = random(rows, d), y = random(rows, d),
              m = random({kR}, acc), s = random({kR}, acc), g = random({kC}, d),
              b = random({kC}, d);
         return [=] { add_layernorm_forward(sum, y, m, s, x, h, b, g, b); };
       }},
      {"layernorm_backward", 4 * rc, 0,
       [=] {
         auto x = random(rows, d), dy = random(rows, d), r = random(rows, d), dx = random(rows, d),
              m = random({kR}, acc), s = random({kR}, acc), g = random({kC}, d),
              dg = random({kC}, acc), db = random({kC}, acc);
         return [=] { layernorm_backward(dx, dg, db, dy, r, x, m, s, g); };
       }},
      {"embedding_forward", 3 * rc, 0,
       [=, wte = std::make_shared<Tensor>(constant({kV, kC}, d, 1))] {
         auto x = random(rows, d), wpe = random({kT, kC}, d), t = integers(tokens());
         return [=] { embedding_forward(x, t, *wte, wpe, kT); };
       }},
      {"embedding_backward", rc + 4 * kR * kC * acc_size, 0,
       [=, dwte = std::make_shared<Tensor>(constant({kV, kC}, acc, 1))] {
         const std::vector<int> all = tokens();
         auto dx = random(rows, d), dwpe = random({kT, kC}, acc), t = integers(all),
              order = integers(sort_rows(all));
         return [=] { embedding_backward(*dwte, dwpe, dx, t, order, {{0, kT}}); };
       }},
  };
}

static ParamShard one_parameter(Dtype d) {
  static const Param param;
  ParamShard s;
  for (Tensor* x : {&s.weights, &s.m, &s.v, &s.gradient})
    *x = constant({kWeights}, master_dtype(d), x == &s.weights ? 1 : 0.1);
  if (d == Dtype::bf16) s.compute = constant({kWeights}, d, 1);
  s.param = &param;
  return s;
}

static std::vector<Row> loss_and_optimizer_rows(Dtype d) {
  const Dtype acc = master_dtype(d);
  const double rv = double(kR * kV * int64_t(size_of(d))),
               n = double(kWeights) * double(size_of(acc));
  return {
      {"cross_entropy", 2 * rv, 0,
       [=] {
         auto x = random({kR, round_up(kV, 128)}, d, 3), l = random({kR}, acc),
              t = integers(tokens());
         return [=] { cross_entropy(l, x, t, kV, 1, true); };
       }},
      {"cross_entropy_loss", rv, 0,
       [=] {
         auto x = random({kR, round_up(kV, 128)}, d, 3), l = random({kR}, acc),
              t = integers(tokens());
         return [=] { cross_entropy(l, x, t, kV, 1, false); };
       }},
      {"adamw", 7 * n + (d == Dtype::bf16 ? n / 2 : 0), 0,
       [=] {
         auto shard = one_parameter(d);
         auto table = update_table({shard});
         auto clip = constant({1}, Dtype::f64, 1);
         return [shard, table, clip] { adamw(table, clip, AdamW{.lr = 1e-4}); };
       }},
      {"sum_of_squares", n, 0,
       [=] {
         auto shard = one_parameter(d);
         auto table = update_table({shard});
         auto out = random({1}, Dtype::f64);
         return [shard, table, out] { sum_of_squares(out, table); };
       }},
  };
}

// Decoding: weights and the cache are read once
static std::vector<Row> decoding_rows(Dtype d) {
  const double size = double(size_of(d));
  std::vector<Row> rows;
  const auto product = [&](const std::string& name, int64_t K, int64_t N, bool transposed) {
    rows.push_back({"matvec " + name, double(K * N) * size, 0, [=] {
                      auto x = random({1, K}, d),
                           w = random(transposed ? Shape{N, K} : Shape{K, N}, d),
                           y = random({1, N}, d);
                      return [=] { matvec(y, x, w, transposed); };
                    }});
  };
  product("(C,3C)", kC, 3 * kC, false);
  product("(C,C)", kC, kC, false);
  product("(C,4C)", kC, 4 * kC, false);
  product("(4C,C)", 4 * kC, kC, false);
  product("(V,C) transposed", kC, kV, true);
  rows.push_back({"attention_decode, 1024 positions", double(2 * kT * kC) * size, 0, [=] {
                    auto cache = random({1, 2, kH, kT, kC / kH}, d), qkv = random({1, 3 * kC}, d),
                         out = random({1, kC}, d), length = integers({int(kT - 1)});
                    return [=] { attention_decode(out, cache, qkv, length, kH); };
                  }});
  return rows;
}

static std::vector<Row> product_rows(Dtype d) {
  const Dtype acc = master_dtype(d);
  std::vector<Row> rows;
  const auto product = [&](const std::string& name, int64_t m, int64_t n, int64_t k,
                           bool a_transposed, bool b_transposed, Dtype out, bool add) {
    for (MatmulBackend backend : {MatmulBackend::cublas, MatmulBackend::own})
      rows.push_back({sentence("matmul ", backend == MatmulBackend::own ? "own " : "cublas ", name),
                      0, 2.0 * double(m) * double(n) * double(k),
                      [=] {
                        auto a = random({m, k}, d), b = random({k, n}, d), c = random({m, n}, out);
                        const Matrix A{a.raw(), a_transposed ? m : k, a_transposed},
                            B{b.raw(), b_transposed ? k : n, b_transposed}, C{c.raw(), n};
                        return [=, keep = std::vector{a, b, c}] {
                          matmul_backend = backend;
                          matmul(d, out, m, n, k, A, B, C, 1, add);
                          matmul_backend = MatmulBackend::cublas;
                        };
                      },
                      backend == MatmulBackend::cublas});
  };
  product("forward (R,C)(C,4C)", kR, 4 * kC, kC, false, false, d, false);
  product("input gradient (R,4C)(4C,C)", kR, kC, 4 * kC, false, true, d, false);
  product("weight gradient (C,R)(R,4C)", kC, 4 * kC, kR, true, false, acc, true);

  // multiply-adds of one product, half of them masked: 2/2
  const double half = double(kB * kH) * double(kT) * double(kT) * double(kC / kH);
  const auto qkv = [=] { return random({kR, 3 * kC}, d); };
  rows.push_back({"attention_plain_forward", 0, 2 * half, [=] {
                    auto x = qkv(), out = random({kR, kC}, d), p = random({kB, kH, kT, kT}, d);
                    return [=] {
                      attention_plain_forward(out, {}, p, whole_sequences(x, kB, kT, kH));
                    };
                  }});
  rows.push_back(
      {"attention_plain_backward", 0, 4 * half, [=] {
         auto x = qkv(), out = random({kR, kC}, d), p = random({kB, kH, kT, kT}, d), dx = qkv();
         auto delta = random({kB, kH, kT}, acc);
         attention_plain_forward(out, {}, p, whole_sequences(x, kB, kT, kH));
         return [=] {
           attention_plain_backward(dx, dx, out, delta, {}, p, whole_sequences(x, kB, kT, kH));
         };
       }});
  rows.push_back({"attention_flash_forward", 0, 2 * half, [=] {
                    auto x = qkv(), out = random({kR, kC}, d), lse = random({kB, kH, kT}, acc);
                    return
                        [=] { attention_flash_forward(out, lse, whole_sequences(x, kB, kT, kH)); };
                  }});
  rows.push_back({"attention_flash_backward", 0, 5 * half, [=] {
                    auto x = qkv(), out = random({kR, kC}, d), lse = random({kB, kH, kT}, acc),
                         dx = qkv(), dout = random({kR, kC}, d), delta = random({kB, kH, kT}, acc);
                    attention_flash_forward(out, lse, whole_sequences(x, kB, kT, kH));
                    return [=] {
                      attention_delta(delta, dout, out);
                      attention_flash_backward(dx, dx, dout, delta, lse,
                                               whole_sequences(x, kB, kT, kH));
                    };
                  }});

  // context parallelism: what a rank of a ring of 4 has to attend to in all its rounds, forward;
  // pieces r and 7 - r, and the cut that it does not make, 2 r and 2 r + 1
  const auto piece = [](int64_t i) { return Range{i * kT / 8, (i + 1) * kT / 8}; };
  for (const bool zigzag : {true, false})
    for (const int rank : {0, 1, 2, 3}) {
      const auto of = [=](int r) {
        return zigzag ? Positions{piece(r), piece(7 - r)}
                      : Positions{piece(2 * r), piece(2 * r + 1)};
      };
      double pairs = 0;
      for (const Range& p : {of(rank).low, of(rank).high})
        pairs += double(p.begin + p.end) / 2 * double(p.size());
      rows.push_back({sentence(zigzag ? "zigzag" : "plain cut", ", ring rank ", rank), 0,
                      4 * double(kB * kC) * pairs, [=] {
                        auto q = random({kR / 4, 3 * kC}, d), kv = random({kR / 4, 2 * kC}, d),
                             out = random({kR / 4, kC}, acc), lse = random({kB, kH, kT / 4}, acc);
                        return [=] {
                          for (int r = 0; r < 4; r++)
                            attention_flash_forward(out, lse, {q, kv, kB, kH, of(rank), of(r)});
                        };
                      }});
    }
  return rows;
}

// ---- the table

static const std::vector<int>& thread_counts() {
#ifdef CPU_FAST
  static const int most = omp_get_max_threads();  // before use_threads changes it
  static const std::vector<int> counts = most > 1 ? std::vector<int>{1, most} : std::vector<int>{1};
#else
  static const std::vector<int> counts = {0};  // a GPU
#endif
  return counts;
}
static void use_threads(int threads) {
#ifdef CPU_FAST
  omp_set_num_threads(threads);
#else
  (void)threads;
#endif
}

static void heading(Dtype d, const char* amount, const char* rate, const char* beside) {
  printf("\n%-44s %9s", sentence(name_of(d)).c_str(), amount);
  for (int threads : thread_counts()) {
    const std::string who = threads == 0   ? "GPU"
                            : threads == 1 ? "1 thread"
                                           : sentence(threads, " threads");
    printf("  | %10s %9s %10s", (who + ":  ms").c_str(), rate, beside);
  }
  printf("\n");
}

static bool wanted(const Row& row, const char* filter) {
  return !filter || row.name.find(filter) != std::string::npos;
}

static void memory_table(Dtype d, const std::vector<Row>& rows, const char* filter) {
  heading(d, "MB", "GB/s", "of a copy");
  for (const Row& row : rows) {
    if (!wanted(row, filter)) continue;
    const size_t sets = size_t(std::clamp(kRotate / row.bytes, 1.0, 200.0));
    std::vector<Call> calls;
    for (size_t i = 0; i < sets; i++) calls.push_back(row.make());
    const std::vector<Call> copies = copies_of(row.bytes, sets);
    printf("%-44s %9.1f", row.name.c_str(), row.bytes * 1e-6);
    for (int threads : thread_counts()) {
      use_threads(threads);
      const Times t = measure(calls, copies);
      printf("  | %10.3f %9.1f %9.0f%%", t.call * 1e3, row.bytes / t.call * 1e-9,
             100 * t.copy / t.call);
      fflush(stdout);
    }
    printf("\n");
  }
}

static void product_table(Dtype d, const std::vector<Row>& rows, const char* filter) {
  if (std::none_of(rows.begin(), rows.end(), [=](const Row& row) { return wanted(row, filter); }))
    return;
  std::vector<std::vector<double>> seconds(rows.size());
  std::vector<double> best(thread_counts().size());
  for (size_t i = 0; i < rows.size(); i++) {
    if (!wanted(rows[i], filter) && !rows[i].library) continue;
    const std::vector<Call> calls{rows[i].make()};
    for (size_t k = 0; k < best.size(); k++) {
      use_threads(thread_counts()[k]);
      seconds[i].push_back(measure(calls, {}).call);
      if (rows[i].library) best[k] = std::max(best[k], rows[i].flops / seconds[i][k]);
    }
  }
  heading(d, "GFLOP", "GFLOP/s", "of library");
  for (size_t i = 0; i < rows.size(); i++) {
    if (!wanted(rows[i], filter)) continue;
    printf("%-44s %9.2f", rows[i].name.c_str(), rows[i].flops * 1e-9);
    for (size_t k = 0; k < best.size(); k++)
      printf("  | %10.3f %9.0f %9.0f%%", seconds[i][k] * 1e3, rows[i].flops / seconds[i][k] * 1e-9,
             100 * rows[i].flops / seconds[i][k] / best[k]);
    printf("\n");
  }
}

static void bench(Dtype d, const char* filter) {
  std::vector<Row> memory = elementwise_rows(d);
  for (Row& row : loss_and_optimizer_rows(d)) memory.push_back(std::move(row));
  for (Row& row : decoding_rows(d)) memory.push_back(std::move(row));
  memory_table(d, memory, filter);
  memory.clear();
  product_table(d, product_rows(d), filter);
}

// Reading memory, nothing written: what decoding a token is bound by. On a GPU as fast as copying
static void bench_read() {
#ifndef CPU_FAST
  const double seconds = measure(copies_of(kRotate, 4), {}).call;
  printf("read of %.0f MB: %.1f GB/s\n", kRotate * 1e-6, kRotate / seconds * 1e-9);
#else
  const Tensor x = constant({int64_t(kRotate) / 4}, Dtype::f32, 1);
  const float* const p = x.data<float>();
  const int64_t n = x.numel();
  for (int threads : thread_counts()) {
    use_threads(threads);
    std::vector<double> times;
    float all = 0;
    for (int i = 0; i < 9; i++) {
      const auto began = std::chrono::steady_clock::now();
      float sum = 0;
#pragma omp parallel for simd reduction(+ : sum)
      for (int64_t j = 0; j < n; j++) sum += p[j];
      all += sum;
      times.push_back(
          std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count());
    }
    if (threads == thread_counts().back() && all > 0)
      printf("read of %.0f MB, %d threads: %.1f GB/s\n", kRotate * 1e-6, threads,
             kRotate / median(times) * 1e-9);
  }
#endif
}

int main(int argc, char** argv) {
  std::vector<Dtype> dtypes = thread_counts()[0] ? std::vector<Dtype>{Dtype::f32}
                                                 : std::vector<Dtype>{Dtype::f32, Dtype::bf16};
  const char* filter = nullptr;
  for (int i = 1; i < argc; i++) {
    const std::string word = argv[i];
    if (word == "f32") dtypes = {Dtype::f32};
    else if (word == "bf16") dtypes = {Dtype::bf16};
    else if (word == "f64") dtypes = {Dtype::f64};
    else filter = argv[i];
  }
  try {
    printf(
        "kernels on %s: R = B T = %d rows, C = %d, H = %d, V = %d, optimizer on %.0f M weights\n",
        device().name.c_str(), int(kR), int(kC), int(kH), int(kV), kWeights * 1e-6);
    {
      const std::vector<Call> copies = copies_of(2 * kRotate, 1);
      printf("copy of %.0f MB, read and written:", kRotate * 1e-6);
      for (int threads : thread_counts()) {
        use_threads(threads);
        printf("  %.1f GB/s", 2 * kRotate / measure(copies, {}).call * 1e-9);
        if (threads) printf(" (%d thread%s)", threads, threads > 1 ? "s" : "");
      }
      printf("\n");
    }
    if (!filter || std::string(filter) == "read") bench_read();
    for (Dtype d : dtypes) bench(d, filter);
    close_device();
  } catch (const std::exception& e) {
    fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
