// test_tensor.cpp: types and shapes, views, the kernels of tensor.cu against plain loops, initial
// weights, and memory counted to the byte.
#include <algorithm>
#include <set>

#include "support/philox.h"
#include "kernels/kernels.h"
#include "tests/standstill.h"
#include "tests/tensors.h"

// ---- the host's side

static const std::vector<Dtype> kFloating = {Dtype::f32, Dtype::bf16, Dtype::f64};
// around a tile of 4096, and no multiple of anything
static const std::vector<int64_t> kSizes = {1, 7, 255, 4095, 4096, 4097, 9001};

// Numbers of many magnitudes and both signs that f64 alone holds exactly.
static std::vector<double> numbers(int64_t n, int seed) {
  std::vector<double> v(n);
  for (int64_t i = 0; i < n; i++)
    v[i] = std::sin(double(i * 7 + seed)) * std::ldexp(1.0, int(i % 23) - 11);
  return v;
}

static Tensor from_host(const std::vector<double>& values, Dtype dtype) {
  const Tensor exact({int64_t(values.size())}, Dtype::f64, Memory::data),
      t({int64_t(values.size())}, dtype, Memory::data);
  upload(exact, values.data());
  cast(t, exact);
  return t;
}

static std::vector<double> rounded(std::vector<double> values, Dtype dtype) {
  for (double& x : values) x = rounded(x, dtype);
  return values;
}

// Bytes compared, so that -0 is not 0.
static void expect_equal(const Tensor& t, const std::vector<double>& expected,
                         const std::string& what) {
  const std::vector<double> values = download(t);
  CHECK_EQ(values.size(), expected.size(), what);
  for (size_t i = 0; i < values.size(); i++)
    CHECK(!memcmp(&values[i], &expected[i], 8), what, " of ", name_of(t.dtype()),
          ", n = ", values.size(), ": element ", i, " is ", values[i], ", expected ", expected[i]);
}

// ---- types and shapes

TEST(types_have_names_and_sizes) {
  CHECK_EQ(size_of(Dtype::f32), 4);
  CHECK_EQ(size_of(Dtype::bf16), 2);
  CHECK_EQ(size_of(Dtype::f64), 8);
  CHECK_EQ(size_of(Dtype::i32), 4);
  CHECK_EQ(std::string(name_of(Dtype::bf16)), "bf16");
  CHECK_EQ(std::string(name_of(Dtype::i32)), "i32");
  CHECK(master_dtype(Dtype::f64) == Dtype::f64 && master_dtype(Dtype::bf16) == Dtype::f32 &&
        master_dtype(Dtype::f32) == Dtype::f32);
  std::set<std::string> names;
  for (int i = 0; i < kMemoryCategories; i++) names.insert(name_of(Memory(i)));
  CHECK_EQ(names.size(), size_t(kMemoryCategories));
  measured("4 dtypes, ", kMemoryCategories, " categories of memory");
}

TEST(a_tensor_knows_its_shape) {
  const Tensor t({2, 3, 5}, Dtype::bf16, Memory::data);
  CHECK_EQ(t.numel(), 30);
  CHECK_EQ(t.bytes(), 60);
  CHECK_EQ(t.dim(0), 2);
  CHECK_EQ(to_string(t.shape()), "(2, 3, 5)");
  CHECK_EQ(to_string({}), "()");
  CHECK_EQ(elements({}), 1);
  CHECK(Tensor().empty() && !t.empty());
  CHECK_SAYS(t.data<float>(), "asked a tensor of bf16 for f32");
  CHECK(t.data<__nv_bfloat16>() == t.raw());
  measured("(2, 3, 5)");
}

TEST(views_and_parts_share_memory) {
  for (Dtype dtype : kFloating) {
    const std::vector<double> host = rounded(numbers(24, 1), dtype);
    const Tensor t = from_host(host, dtype);
    CHECK(!t.shared());
    const Tensor view = t.view(0, {4, 6}), part = view.view(6, {2, 3});
    CHECK(t.shared() && view.shared() && part.shared());
    CHECK_EQ(view.raw(), t.raw());
    CHECK_EQ(static_cast<char*>(part.raw()) - static_cast<char*>(t.raw()), 6 * size_of(dtype));
    expect_equal(part, {host.begin() + 6, host.begin() + 12}, "a part");
    fill(part, 3);
    std::vector<double> expected = host;
    std::fill(expected.begin() + 6, expected.begin() + 12, 3.0);
    expect_equal(t, expected, "the whole after its part was filled");
  }
  const Tensor t({24}, Dtype::f32, Memory::data);
  CHECK_SAYS(t.view(0, {5, 5}), "(5, 5) at 0 is not inside (24)");
  CHECK_SAYS(t.view(20, {5}), "(5) at 20 is not inside (24)");
  CHECK_SAYS(t.view(-1, {5}), "is not inside");
  measured("f32, bf16, f64");
}

TEST(a_part_keeps_the_memory_alive) {
  Tensor part;
  {
    const Tensor whole = from_host({1, 2, 3, 4}, Dtype::f64);
    part = whole.view(2, {2});
  }
  CHECK(!part.shared());
  expect_equal(part, {3, 4}, "a part of a tensor that is gone");
  measured("2 of 4 elements");
}

// ---- moving and filling

TEST(fill_equals_a_loop) {
  for (Dtype dtype : kFloating)
    for (int64_t n : kSizes)
      for (double value : {0.0, -1.75, 0.1, 1e-30}) {
        const Tensor around({n + 2}, dtype, Memory::data);
        fill(around, 5);
        fill(around.view(1, {n}), value);
        std::vector<double> expected(n + 2, rounded(value, dtype));
        expected[0] = expected[n + 1] = 5;  // no neighbour is touched
        expect_equal(around, expected, "fill");
      }
  const Tensor ids({3}, Dtype::i32, Memory::data);
  fill(ids, 0);
  expect_equal(ids, {0, 0, 0}, "fill");
  CHECK_SAYS(fill(ids, 1), "no kernel for i32");
  measured(kSizes.size(), " sizes up to ", kSizes.back(), ", 3 dtypes");
}

TEST(cast_equals_a_loop) {
  for (Dtype from : kFloating)
    for (Dtype to : kFloating)
      for (int64_t n : kSizes) {
        const std::vector<double> host = numbers(n, 3), source = rounded(host, from);
        const Tensor x = from_host(host, from), y({n}, to, Memory::data);
        expect_equal(x, source, "the source of a cast");
        cast(y, x);
        expect_equal(y, rounded(source, to), sentence("cast from ", name_of(from)));
      }
  const Tensor x({4}, Dtype::f32, Memory::data), ids({4}, Dtype::i32, Memory::data);
  CHECK_SAYS(cast(x, ids), "no kernel for i32");
  CHECK_SAYS(cast(x, Tensor({5}, Dtype::f64, Memory::data)), "does not hold");
  measured("every pair of 3 dtypes, ", kSizes.size(), " sizes");
}

TEST(bf16_rounds_to_nearest_even) {
  const double step = std::ldexp(1.0, -7);  // of bf16 between 1 and 2
  const std::vector<double> x = {1 + step / 2,      1 + 1.5 * step, 1 + 0.5001 * step,
                                 1 + 0.4999 * step, -1 - step / 2,  -1 - 1.5 * step};
  expect_equal(from_host(x, Dtype::bf16), {1, 1 + 2 * step, 1 + step, 1, -1, -1 - 2 * step},
               "rounding");
  measured("ties go to the even neighbour, both signs");
}

TEST(copy_equals_a_loop) {
  for (Dtype dtype : kFloating)
    for (int64_t n : kSizes) {
      const std::vector<double> host = rounded(numbers(n, 5), dtype);
      const Tensor x = from_host(host, dtype), around({n + 2}, dtype, Memory::data);
      fill(around, 9);
      copy(around.view(1, {n}), x);
      std::vector<double> expected(n + 2, 9);
      std::copy(host.begin(), host.end(), expected.begin() + 1);
      expect_equal(around, expected, "copy");
    }
  CHECK_SAYS(copy(Tensor({4}, Dtype::f32, Memory::data), Tensor({4}, Dtype::f64, Memory::data)),
             "does not hold");
  measured(kSizes.size(), " sizes, 3 dtypes");
}

TEST(upload_takes_the_values_at_once) {
  const Tensor ids({1000}, Dtype::i32, Memory::data);
  std::vector<int> host(1000);
  std::vector<double> expected(1000);
  for (int i = 0; i < 1000; i++) expected[i] = host[i] = i * 1000003 - 500000000;
  upload(ids, host.data());
  std::fill(host.begin(), host.end(), -1);  // the caller may reuse its memory
  expect_equal(ids, expected, "upload");
  // several pieces, the last of another size
  const Tensor many({(3 << 18) + 1}, Dtype::i32, Memory::data);
  std::vector<int> more(many.numel());
  expected.resize(more.size());
  for (size_t i = 0; i < more.size(); i++) expected[i] = more[i] = int(i) * 2003 - 500000000;
  upload(many, more.data());
  std::fill(more.begin(), more.end(), -1);
  expect_equal(many, expected, "upload in pieces");
  measured(host.size(), " and ", more.size(), " i32");
}

TEST(an_event_that_is_not_reached_leaves_no_error_for_the_next_launch) {
#if defined(CPU_FAST) || defined(CPU_FAITHFUL)
  cpu::queue_streams(1);
  bool reached;
  {
    Standstill standstill(device().compute);
    Event event;
    event.record(device().compute);
    reached = event.reached();
  }
  cpu::run_streams_immediately();
  CHECK(!reached);
  CHECK_EQ(cudaGetLastError(), cudaSuccess);
#else
  skip("the CPU's streams can stand still on any machine");
#endif
}

TEST(empty_tensors_are_allowed) {
  const Tensor a({0, 4}, Dtype::f32, Memory::data), b({0}, Dtype::f32, Memory::data),
      c({0}, Dtype::f64, Memory::data);
  fill(a, 1);
  fill(a, 0);
  cast(b, c);
  add(a, a, b);
  fill_random(a, 1, 2, 0.1f, {1, 4, 4, 2, 2});
  CHECK_EQ(download(a).size(), 0u);
  CHECK_EQ(a.bytes(), 0);
  Tensor there({2}, Dtype::f32, Memory::data), nothing;
  const Tensor moved = std::move(there);
  for (const Tensor& t : {there, nothing}) {  // NOLINT: what is left of it
    CHECK_EQ(t.numel(), 0);
    CHECK(t.empty() && !t.raw() && !t.data<float>());
  }
  measured("fill, cast, add, fill_random, download");
}

// ---- initial weights

static std::vector<double> random_values(uint64_t seed, uint32_t parameter, float std,
                                         const Slice& s, Dtype dtype) {
  const Tensor t({s.outer * (s.end - s.begin) * s.inner}, dtype, Memory::data);
  fill_random(t, seed, parameter, std, s);
  return download(t);
}

TEST(fill_random_is_the_sum_of_eight_halves) {
  const uint64_t seed = 0xfedcba9876543210;
  const std::vector<double> values =
      random_values(seed, 9, 0.02f, {1, 1000, 1, 0, 1000}, Dtype::f32);
  for (size_t i = 0; i < values.size(); i++) {
    const Philox4 r = philox(uint32_t(i), 0, 9, 0, 0x76543210, 0xfedcba98);
    double sum = 0;
    for (uint32_t v : r.v) sum += (v & 0xffff) + (v >> 16);
    const double expected =
        0.02 * (sum - 4 * 65535.0) / std::sqrt(8 * (std::ldexp(1.0, 32) - 1) / 12);
    // three f32 roundings of a value below 0.1
    CHECK_LE(std::abs(values[i] - expected), 2.5e-7 * 0.1, "element ", i);
  }
  measured("1000 elements recomputed on the host");
}

TEST(a_slice_has_the_bits_of_the_whole) {
  const std::vector<Slice> slices_to_try = {
      {1, 10, 37, 3, 7}, {5, 12, 1, 0, 5}, {5, 12, 11, 4, 12}, {3, 7, 13, 6, 7}, {40, 3, 50, 1, 2}};
  int slices = 0;
  for (Dtype dtype : kFloating)
    for (const Slice& s : slices_to_try) {
      Slice all = s;
      all.begin = 0, all.end = s.split;
      const std::vector<double> whole = random_values(7, 3, 0.02f, all, dtype),
                                part = random_values(7, 3, 0.02f, s, dtype);
      size_t i = 0;
      for (int64_t o = 0; o < s.outer; o++)
        for (int64_t m = s.begin; m < s.end; m++)
          for (int64_t k = 0; k < s.inner; k++, i++)
            CHECK_EQ(part[i], whole[(o * s.split + m) * s.inner + k], "element (", o, ", ", m, ", ",
                     k, ") of ", name_of(dtype));
      CHECK_EQ(i, part.size());
      // from an element inside the slice on
      const Tensor rest({int64_t(part.size()) - 5}, dtype, Memory::data);
      fill_random(rest, 7, 3, 0.02f, s, 3);
      expect_equal(rest, {part.begin() + 3, part.end() - 2}, "part of a slice");
      slices++;
    }
  measured(slices, " slices, 3 dtypes");
}

TEST(initial_weights_are_close_to_normal) {
  const int64_t n = 100000;
  const float std = 0.02f;
  const std::vector<double> x = random_values(1, 0, std, {1, n, 1, 0, n}, Dtype::f32);
  double mean = 0, second = 0, fourth = 0, farthest = 0;
  for (double v : x) mean += v / n, farthest = std::max(farthest, std::abs(v) / std);
  for (double v : x) second += std::pow(v - mean, 2) / n, fourth += std::pow(v - mean, 4) / n;
  const double deviation = std::sqrt(second), kurtosis = fourth / (second * second);
  measured("mean ", mean / std, " std, std ", deviation / std, " of what was asked, kurtosis ",
           kurtosis, ", farthest ", farthest, " std");
  // bounds: four standard errors of n samples
  CHECK_LE(std::abs(mean / std), 4 / std::sqrt(n));
  CHECK_LE(std::abs(deviation / std - 1), 4 / std::sqrt(2.0 * n));
  // a sum of eight uniform numbers: 2.85
  CHECK_LE(std::abs(kurtosis - (3 - 6.0 / 5 / 8)), 4 * std::sqrt(24.0 / n));
  CHECK_LE(3.5, farthest);
  CHECK_LE(farthest, 4.9);
}

TEST(seeds_and_parameters_give_other_weights) {
  const Slice s{1, 500, 1, 0, 500};
  std::vector<std::vector<double>> all;
  for (uint64_t seed : {1ull, 2ull, 1ull << 32, 1ull + (1ull << 32)})
    for (uint32_t parameter : {0, 1, 70})
      all.push_back(random_values(seed, parameter, 1, s, Dtype::f32));
  double largest = 0;
  for (size_t i = 0; i < all.size(); i++)
    for (size_t j = 0; j < i; j++) {
      double correlation = 0;
      for (int k = 0; k < 500; k++) correlation += all[i][k] * all[j][k] / 500;
      largest = std::max(largest, std::abs(correlation));
    }
  measured("largest correlation of ", all.size(), " streams ", largest);
  CHECK_LE(largest, 5 / std::sqrt(500.0));
  CHECK(random_values(1, 1, 1, s, Dtype::f32) == all[1], "the same key, other bits");
}

// ---- memory

TEST(memory_is_counted_to_the_byte_by_category) {
  MemoryUse& m = device().memory;
  m.peak = m.now, m.at_peak = m.now, m.total_peak = m.total;
  const MemoryUse before = m;
  const auto grown = [&](Memory c) { return m.now[int(c)] - before.now[int(c)]; };
  {
    const Tensor a({3, 5}, Dtype::bf16, Memory::parameters);
    Tensor b({7}, Dtype::f64, Memory::gradients);
    {
      const Tensor c({1000}, Dtype::f32, Memory::workspace);
      CHECK_EQ(m.total - before.total, 30 + 56 + 4000);
      CHECK_EQ(grown(Memory::workspace), 4000);
    }
    const Tensor view = a.view(0, {15}), part = b.view(1, {2});  // these share what they look at
    CHECK_EQ(grown(Memory::parameters), 30);
    CHECK_EQ(grown(Memory::gradients), 56);
    CHECK_EQ(grown(Memory::workspace), 0);
    CHECK_EQ(m.total - before.total, 86);
    b = Tensor();
    CHECK_EQ(grown(Memory::gradients), 56, "a part is left");
    const Tensor d({1, 1}, Dtype::i32, Memory::data);
    CHECK_EQ(grown(Memory::data), 4);
  }
  CHECK(m.now == before.now && m.total == before.total, "something was not returned");
  CHECK_EQ(m.total_peak - before.total, 4086);
  CHECK_EQ(m.peak[int(Memory::workspace)] - before.now[int(Memory::workspace)], 4000);
  CHECK_EQ(m.at_peak[int(Memory::workspace)] - before.now[int(Memory::workspace)], 4000);
  // it came after the peak
  CHECK_EQ(m.at_peak[int(Memory::data)] - before.now[int(Memory::data)], 0);
  CHECK_EQ(m.peak[int(Memory::data)] - before.now[int(Memory::data)], 4);
  measured("4086 bytes at the peak");
}

TEST(the_cap_refuses_with_a_sentence_and_the_program_goes_on) {
  Device& d = device();
  const int64_t mib = 1 << 20;
  const Tensor held({mib}, Dtype::bf16, Memory::optimizer);  // 2 MiB
  const MemoryUse before = d.memory;
  d.memory_limit = before.total + mib;
  std::string said = "nothing";
  try {
    const Tensor big({mib / 4 + 1}, Dtype::f32, Memory::activations);  // one element too many
  } catch (const Error& e) {
    said = e.what();
  }
  const Tensor fits({mib / 4}, Dtype::f32, Memory::activations);  // exactly what is left
  const bool full = d.memory.total == d.memory_limit;
  d.memory_limit = 0;
  const std::string expected =
      "out of device memory: 1.0 MiB more for activations does not fit under --device-memory";
  for (const std::string& part : {expected, std::string("optimizer: 2.0 MiB now")})
    CHECK(said.find(part) != std::string::npos, "it said '", said, "', expected '", part, "'");
  CHECK(full, "an allocation of exactly what was left did not count");
  CHECK_EQ(d.memory.total, before.total + mib);
  fill(fits, 2);
  CHECK(download(fits) == std::vector<double>(mib / 4, 2));
  measured("refused 1 MiB + 4 bytes, then took 1 MiB");
}

TEST(a_full_device_refuses_with_a_sentence_and_the_program_goes_on) {
  const int64_t before = device().memory.total;
  CHECK_SAYS(Tensor({int64_t(1) << 50}, Dtype::f32, Memory::gradients),
             "more for gradients does not fit in what");
  CHECK_EQ(device().memory.total, before);
  const Tensor x({100}, Dtype::f32, Memory::data);
  fill(x, 2);  // checks the device's last error
  expect_equal(x, std::vector<double>(100, 2), "fill");
  measured("refused 4 PiB");
}

// Keep this test the last.
TEST(everything_is_returned_at_the_end) {
  const MemoryUse& m = device().memory;
  for (int i = 0; i < kMemoryCategories; i++) CHECK_EQ(m.now[i], 0, name_of(Memory(i)));
  CHECK_EQ(m.total, 0);
  CHECK_LE(1 << 20, m.total_peak);
  const std::string said = describe_memory(m);
  CHECK(said.find("all: 0.0 MiB now") != std::string::npos, said);
  measured("0 bytes held, peak ", m.total_peak);
}

int main(int argc, char** argv) {
  const int status = run_tests(argc, argv);
  close_device();
  return status;
}
