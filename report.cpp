// report.cpp: see report.h.
// idea      every rank sends rank 0 its allocator's and its ledger's numbers; theory.cpp says what they should be
#include "report.h"

#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "support/trace.h"
#include "theory.h"

using Json = nlohmann::ordered_json;

static double mib(int64_t bytes) { return double(bytes) / 1048576.0; }

// The vectors of all ranks, one after the other, on rank 0.
static std::vector<int64_t> collect(const Mesh& mesh, const std::vector<int64_t>& mine) {
  std::vector<int64_t> all(mine.size() * size_t(mesh.size));
  MPI_Igather(mine.data(), int(mine.size()), MPI_INT64_T, all.data(), int(mine.size()), MPI_INT64_T, 0, MPI_COMM_WORLD, Finished());
  return all;
}

// The elements of all ranks' arrays in one, on rank 0.
static Json gather(const Json& mine) {
  Json all = Json::array();
  for (const std::string& of_rank : gather_text(mine.dump()))
    for (const Json& element : Json::parse(of_rank)) all.push_back(element);
  return all;
}

// ---- memory

static std::string memory_table(const MemoryUse& m, const Theory& t, int64_t activations) {
  std::string s = "\nmemory of rank 0, MiB       now     predicted  at the peak\n";
  for (int i = 0; i < kMemoryCategories; i++) {
    if (!m.peak[i]) continue;
    const std::string bound = Memory(i) == Memory::gather && t.gather_bound ? format("at most %.2f", mib(t.gather_bound)) : "-";
    const std::string predicted = t.persistent[i] ? format("%.2f", mib(t.persistent[i])) : bound;
    s += format("  %-18s %10.2f %13s %12.2f\n", name_of(Memory(i)), mib(m.now[i]), predicted.c_str(), mib(m.at_peak[i]));
  }
  s += format("  %-18s %10.2f %13s %12.2f\n", "all", mib(m.total), "", mib(m.total_peak));
  return s + format("  activations kept for backwards at once: %.2f, predicted %.2f\n", mib(activations), mib(t.activations));
}

static Json memory_json(int rank, const MemoryUse& m, const Theory& t, int64_t activations) {
  Json j{{"rank", rank}, {"peak", m.total_peak}, {"kept_activations", {{"bytes", activations}, {"predicted_bytes", t.activations}}}};
  for (int i = 0; i < kMemoryCategories; i++) j[name_of(Memory(i))] = {{"now", m.now[i]}, {"at_peak", m.at_peak[i]}};
  for (Memory kind : {Memory::parameters, Memory::gradients, Memory::optimizer}) j[name_of(kind)]["predicted"] = t.persistent[size_t(kind)];
  return Json::array({j});
}

// ---- traffic

// Every row that this rank's ledger or the theory knows, measured and predicted, in a fixed order.
struct TrafficRow { int64_t calls = 0, bytes = 0, predicted_calls = 0, predicted_bytes = 0; bool has_prediction = false; };
using TrafficRows = std::map<Ledger::Key, TrafficRow>;

static TrafficRows traffic(const Theory& t, int64_t steps) {
  TrafficRows rows;
  for (const auto& [key, row] : ledger.rows) rows[key] = {row.calls, row.numerator / row.n};
  for (const auto& [key, row] : t.step) {
    TrafficRow& r = rows[key];
    r = {r.calls, r.bytes, steps * row.calls, steps * row.numerator / row.n, true};
  }
  return rows;
}

static std::string traffic_table(const TrafficRows& rows, int64_t steps) {
  if (rows.empty()) return "";
  std::string s = "\ntraffic of rank 0, per step    calls         bytes     predicted   purpose\n";
  for (const auto& [key, r] : rows) {
    const auto& [axis, collective, purpose] = key;
    const bool differs = r.has_prediction && (r.bytes != r.predicted_bytes || r.calls != r.predicted_calls);
    s += format("  %-9s %-15s %6s %13.0f %13s   %s%s\n", axis.c_str(), name_of(collective),
                format(r.has_prediction ? "%.0f" : "%.1f", double(r.calls) / double(steps)).c_str(), double(r.bytes) / double(steps),
                (r.has_prediction ? format("%.0f", double(r.predicted_bytes) / double(steps)) : "-").c_str(), name_of(purpose), differs ? "   DIFFERS" : "");
  }
  return s;
}

static Json traffic_json(int rank, const TrafficRows& rows) {
  Json all = Json::array();
  for (const auto& [key, r] : rows) {
    const auto& [axis, collective, purpose] = key;
    Json& j = all.emplace_back(Json{{"rank", rank}, {"axis", axis}, {"collective", name_of(collective)}, {"purpose", name_of(purpose)},
                                    {"calls", r.calls}, {"bytes", r.bytes}});
    if (r.has_prediction) j["predicted_bytes"] = r.predicted_bytes;
  }
  return all;
}

// The share of a step in which the communication queue was busy, by rank.
static std::string communication_line(std::vector<double> shares) {
  if (shares.size() == 1) return "";
  std::sort(shares.begin(), shares.end());
  return format("  communicating, with waiting for other ranks: %.0f%% to %.0f%% of a step's time, by rank\n", 100 * shares.front(),
                100 * shares.back());
}

// ---- the pipeline

// Predicted: every forward, input gradient and weight gradient takes the mean time of its kind on its chunk of its stage. Executed: each takes
// what it took. Ranks that differ in other axes only run pipelines of their own: the first is shown, the trace has all. Rank 0 returns the table;
// it gets the timelines executed, and the pipeline's member of the metrics.
static std::string pipeline_table(const Mesh& mesh, const Trainer& trainer, std::vector<Timeline>& executed, Json& json) {
  const Schedule& s = trainer.pipeline->schedule();
  size_t most = 0;
  for (const auto& actions : s.ranks) most = std::max(most, actions.size());
  std::vector<int64_t> mine(most, 0);
  const std::vector<double> seconds = trainer.pipeline->seconds();
  for (size_t i = 0; i < seconds.size(); i++) mine[i] = int64_t(seconds[i] * 1e9);
  const std::vector<int64_t> all = collect(mesh, mine);  // nanoseconds
  if (mesh.rank != 0) return "";

  const size_t pipelines = size_t(mesh.size / s.stages);  // stage t of pipeline c is rank t * pipelines + c
  std::vector<Durations> took(pipelines, durations(s, {0, 0, 0, 0}));
  for (size_t c = 0; c < pipelines; c++) {
    for (size_t t = 0; t < size_t(s.stages); t++)
      for (size_t i = 0; i < s.ranks[t].size(); i++)
        if (s.ranks[t][i].kind != Action::exchange) took[c][t][i] = double(all[(t * pipelines + c) * most + i]) * 1e-6;
    executed.push_back(simulate(s, took[c]));
  }

  Durations means = took[0], without_replay = means;
  std::map<Action::Kind, std::pair<double, int>> kinds;
  for (size_t t = 0; t < means.size(); t++) {
    std::map<std::pair<Action::Kind, int>, std::pair<double, int>> chunks;
    for (size_t i = 0; i < means[t].size(); i++)
      for (auto* sum : {&chunks[{s.ranks[t][i].kind, s.ranks[t][i].chunk}], &kinds[s.ranks[t][i].kind]}) sum->first += means[t][i], sum->second++;
    const auto mean = [&](Action::Kind kind, int chunk) { return chunks[{kind, chunk}].first / chunks[{kind, chunk}].second; };
    for (size_t i = 0; i < means[t].size(); i++) {
      const Action& a = s.ranks[t][i];
      means[t][i] = without_replay[t][i] = mean(a.kind, a.chunk);
      if (a.kind == Action::input_gradient) without_replay[t][i] = std::max(0.0, means[t][i] - mean(Action::forward, a.chunk));
    }
  }
  const auto mean = [&](Action::Kind kind) { return kinds[kind].second ? kinds[kind].first / kinds[kind].second : 0; };
  const Timeline predicted = simulate(s, means);
  json = {{"schedule", s.name}, {"stages", s.stages}, {"microbatches", s.microbatches}, {"chunks", s.chunks}, {"bubble", executed[0].bubble()},
          {"predicted_bubble", predicted.bubble()}, {"most_live", trainer.pipeline->most_live()}};
  const bool split = mean(Action::weight_gradient) > 0;
  const double unit = executed[0].makespan / 100;
  std::string text = sentence("\npipeline ", s.name, ", ", s.stages, " stages, ", s.microbatches, " micro-batches",
                              s.chunks > 1 ? sentence(", ", s.chunks, " chunks a stage") : "", "; the last step, in ms\n");
  text += format("predicted from each stage's mean times (of all: forward %.2f, ", mean(Action::forward));
  text += split ? format("input gradient %.2f, weight gradient %.2f", mean(Action::input_gradient), mean(Action::weight_gradient))
                : format("backward %.2f", mean(Action::backward));
  text += format("): %.1f, bubble %.1f%%\n", predicted.makespan, 100 * predicted.bubble()) + draw_text(s, predicted, unit);
  text += format("executed, rebuilt from the %s that each computation took: %.1f, bubble %.1f%%\n",
                 device().is_gpu ? "time by events" : "processor time", executed[0].makespan, 100 * executed[0].bubble());
  text += draw_text(s, executed[0], unit);
  if (split && trainer.gpt.config.recompute) {  // at least: a forward's time has embedding and head in it, which are not replayed
    const Timeline kept = simulate(s, without_replay);
    text += "--recompute replays each forward inside the input gradient, which the stage before waits for: without it ";
    text += format("%.1f at least, bubble %.1f%%\n", kept.makespan, 100 * kept.bubble());
  }
  return text;
}

// ---- all of it

void compare_with_theory(const Mesh& mesh, const Trainer& trainer, const TrainerOptions& options, int64_t steps, double communication,
                         const std::string& trace, Metrics& metrics) {
  const Layout& l = mesh.layout;
  const Theory t = theory(trainer.gpt.config, l, mesh.pp.rank, mesh.tp.rank, options);
  const MemoryUse& m = device().memory;
  const TrafficRows rows = traffic(t, steps);
  std::vector<double> shares;
  for (const int64_t share : collect(mesh, {int64_t(communication * 1e4 + 0.5)})) shares.push_back(double(share) / 1e4);
  const bool pipelined = trainer.pipeline && trainer.pipeline->timed;
  std::vector<Timeline> executed;
  Json pipeline;
  const std::string timelines = pipelined ? pipeline_table(mesh, trainer, executed, pipeline) : "";
  Json summary{{"summary", true}, {"layout", {{"pp", l.pp}, {"replicate", l.replicate}, {"fsdp", l.fsdp}, {"tp", l.tp}}},
               {"memory", gather(memory_json(mesh.rank, m, t, trainer.kept_activations()))}, {"traffic", gather(traffic_json(mesh.rank, rows))},
               {"communication_share", shares}};
  if (mesh.rank != 0) return;
  if (pipelined) summary["pipeline"] = pipeline;
  metrics.line(summary);
  printf("%s%s%s%s", memory_table(m, t, trainer.kept_activations()).c_str(), traffic_table(rows, steps).c_str(), communication_line(shares).c_str(),
         timelines.c_str());
  if (pipelined && !trace.empty()) write_trace(trace, trainer.pipeline->schedule(), executed);
}
