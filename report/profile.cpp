// profile.cpp: see profile.h.
#include "report/profile.h"

#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "launch/job.h"

void Profile::end_step(double seconds) {
  all_.steps++;
  all_.seconds += seconds;
  op_times.each([&](const OpTimes::Op& op) {
    Row& row = all_.rows[op.work.name];
    row.calls++;
    row.seconds += op.seconds();
    row.work.bytes += op.work.bytes;
    row.work.flops += op.work.flops;
    row.collective = op.collective;
  });
}

double Profile::seconds_of(bool collectives) const {
  double seconds = 0;
  for (const auto& [name, row] : all_.rows)
    if (row.collective == collectives) seconds += row.seconds;
  return seconds;
}

// ---- what the machine can do

// by events; the median of five, after one that warms up
static double seconds_of_call(const std::function<void()>& call) {
  std::vector<double> took;
  for (int i = 0; i < 6; i++) {
    TimedWork work;
    work.begin.record(device().compute);
    call();
    work.end.record(device().compute);
    synchronize();
    took.push_back(work.seconds());
  }
  std::sort(took.begin() + 1, took.end());
  return took[3];
}

// All ranks at once, since they may share cores, in memory that a step's activations had.
Profile::Machine Profile::measure(Dtype dtype) {
  const Device& d = device();
  const int64_t room = d.memory_limit ? d.memory_limit - d.memory.total : INT64_MAX,
                elements = std::min<int64_t>(32 << 20, room / 8);
  Machine machine{0, 0, d.is_gpu ? 8192 : 1024, elements * int64_t(sizeof(float))};
  while (3 * machine.width * machine.width * size_of(dtype) > room) machine.width /= 2;
  {
    const Tensor from({elements}, Dtype::f32, Memory::workspace),
        to({elements}, Dtype::f32, Memory::workspace);
    fill(from, 1);
    barrier();
    machine.copied = 2 * double(from.bytes()) / seconds_of_call([&] { copy(to, from); });
  }
  const int64_t n = machine.width;
  const auto matrix = [&] {
    const Tensor x({n, n}, dtype, Memory::workspace);
    fill_random(x, 1, 0, 1, {1, n * n, 1, 0, n * n});
    return x;
  };
  const Tensor a = matrix(), b = matrix(), c = matrix();
  const MatmulBackend backend = std::exchange(matmul_backend, MatmulBackend::cublas);
  barrier();
  machine.multiplied = 2 * double(n * n) * double(n) / seconds_of_call([&] {
                         matmul(dtype, dtype, n, n, n, {a.raw(), n}, {b.raw(), n}, {c.raw(), n});
                       });
  matmul_backend = backend;
  return machine;
}

// ---- the table

std::string Profile::table(const Machine& machine, Dtype dtype) const {
  const double steps = double(all_.steps);
  std::vector<std::pair<std::string, Row>> rows(all_.rows.begin(), all_.rows.end());
  std::ranges::stable_sort(rows,
                           [](auto& a, auto& b) { return a.second.seconds > b.second.seconds; });
  std::string s = format("%-34s %8s %10s %7s  %14s %16s\n", "op, a step", "calls", "ms", "share",
                         "at least", "reached");
  const auto line = [&](const std::string& name, const std::string& calls, double seconds,
                        const std::string& more = "") {
    s += format("  %-32s %8s %10.3f %6.1f%%", name.c_str(), calls.c_str(), seconds * 1e3 / steps,
                100 * seconds / all_.seconds) +
         more + "\n";
  };
  for (const auto& [name, row] : rows) {
    const bool multiplies = row.work.flops > 0;
    const double amount = multiplies ? row.work.flops : row.work.bytes, rate = amount / row.seconds,
                 best = multiplies ? machine.multiplied : machine.copied;
    const char* unit = multiplies ? "GFLOP" : "GB";
    std::string speed;
    if (amount > 0)
      speed = format("  %8.4g %-5s %8.4g %s/s", amount * 1e-9 / steps, unit, rate * 1e-9, unit);
    if (amount > 0 && !row.collective)
      speed += format(", %.0f%% of a %s", 100 * rate / best, multiplies ? "product" : "copy");
    line(name, format("%.4g", double(row.calls) / steps), row.seconds, speed);
  }
  const double kernels = seconds_of(false), collectives = seconds_of(true);
  const bool beside = device().is_gpu;
  line("all kernels", "", kernels);
  if (collectives > 0) line("all collectives", "", collectives, beside ? "  beside them" : "");
  line(beside ? "in no row: the device waits" : "in no row: the host's own", "",
       all_.seconds - kernels - (beside ? 0 : collectives));
  line("the step", "", all_.seconds);
  s += format("  the host %s for %.3f ms, reads the next batch for %.3f ms and waits for %.3f ms\n",
              beside ? "launches" : "computes", all_.launched * 1e3 / steps,
              (all_.read - all_.launched) * 1e3 / steps, (all_.seconds - all_.read) * 1e3 / steps);
  return s + format(
                 "  a copy of %.4g MiB: %.4g GB/s, read and written; a product of %lld x %lld x"
                 " %lld in %s: %.4g GFLOP/s\n",
                 double(machine.bytes) / (1 << 20), machine.copied * 1e-9, (long long)machine.width,
                 (long long)machine.width, (long long)machine.width, name_of(dtype),
                 machine.multiplied * 1e-9);
}

void Profile::print(const Trainer& trainer, bool prints) const {
  const GptConfig& g = trainer.gpt.config;
  const Machine machine = measure(g.dtype);
  const std::vector<nlohmann::json> ranks = gather({{"kernels", seconds_of(false)},
                                                    {"multiplied", machine.multiplied},
                                                    {"table", table(machine, g.dtype)}});
  if (!prints) return;
  const auto kernels = [](const nlohmann::json& rank) { return double(rank["kernels"]); };
  const auto [fastest, slowest] = std::ranges::minmax_element(ranks, {}, kernels);
  double multiplied = 0;
  for (const nlohmann::json& rank : ranks) multiplied += double(rank["multiplied"]);
  const double steps = double(all_.steps),
               tokens = double(trainer.options.batch * g.context) * steps,
               flops = tokens / all_.seconds * flops_per_token(g);
  std::string s = sentence("\nprofile of rank ", slowest - ranks.begin(), ", ", all_.steps,
                           all_.steps == 1 ? " step" : " steps");
  if (ranks.size() > 1)
    s += format("; its kernels take longest: %.3f ms a step, those of others at least %.3f",
                kernels(*slowest) * 1e3 / steps, kernels(*fastest) * 1e3 / steps);
  s += format(
      "\n  %.3f ms a step, %.0f tokens/s, %.4g GFLOP/s: %.1f%% of what a product reaches (MFU)\n",
      all_.seconds * 1e3 / steps, tokens / all_.seconds, flops * 1e-9, 100 * flops / multiplied);
  printf("%s%s", s.c_str(), std::string((*slowest)["table"]).c_str());
}
