// report.cpp: see report.h.
// idea      every rank sends rank 0 its allocator's and its ledger's numbers; theory.cpp says what they should be
#include "report.h"

#include <cstdio>

#include "support/trace.h"
#include "theory.h"

static std::string format(const char* pattern, auto... values) {
  char text[256];
  snprintf(text, sizeof text, pattern, values...);
  return text;
}

static std::string quoted(const std::string& name) { return "\"" + name + "\""; }  // our names need no escapes
static double mib(int64_t bytes) { return double(bytes) / 1048576.0; }

// The vectors of all ranks, one after the other, on rank 0.
static std::vector<int64_t> collect(const Mesh& mesh, const std::vector<int64_t>& mine) {
  std::vector<int64_t> all(mine.size() * size_t(mesh.size));
  MPI_Request request;
  MPI_Igather(mine.data(), int(mine.size()), MPI_INT64_T, all.data(), int(mine.size()), MPI_INT64_T, 0, MPI_COMM_WORLD, &request);
  wait(request);
  return all;
}

// ---- memory

static const Memory kPersistent[] = {Memory::parameters, Memory::gradients, Memory::optimizer};

static std::string memory_table(const MemoryUse& m, const Theory& t, int64_t activations) {
  std::string s = "\nmemory of rank 0, MiB       now   predicted  at the peak\n";
  for (int i = 0; i < kMemoryCategories; i++) {
    if (!m.peak[i]) continue;
    const int64_t predicted = t.persistent[i];
    s += format("  %-18s %10.2f %11s %12.2f\n", name_of(Memory(i)), mib(m.now[i]), predicted ? format("%.2f", mib(predicted)).c_str() : "-", mib(m.at_peak[i]));
  }
  s += format("  %-18s %10.2f %11s %12.2f\n", "all", mib(m.total), "", mib(m.total_peak));
  return s + format("  activations kept for backwards at once: %.2f, predicted %.2f\n", mib(activations), mib(t.activations));
}

static std::string memory_json(const Mesh& mesh, const MemoryUse& m, const Theory& t, int64_t activations) {
  std::vector<int64_t> mine = {m.total_peak, activations, t.activations};
  for (int i = 0; i < kMemoryCategories; i++) mine.insert(mine.end(), {m.now[i], m.at_peak[i], t.persistent[size_t(i)]});
  const std::vector<int64_t> all = collect(mesh, mine);
  std::string s = "\"memory\":[";
  for (int r = 0; r < mesh.size; r++) {
    const int64_t* of = &all[size_t(r) * mine.size()];
    s += sentence(r ? "," : "", "{\"rank\":", r, ",\"peak\":", of[0], ",\"kept_activations\":{\"bytes\":", of[1], ",\"predicted_bytes\":", of[2], "}");
    for (int i = 0; i < kMemoryCategories; i++) {
      s += sentence(",", quoted(name_of(Memory(i))), ":{\"now\":", of[3 + 3 * i], ",\"at_peak\":", of[4 + 3 * i]);
      for (Memory category : kPersistent)
        if (Memory(i) == category) s += sentence(",\"predicted\":", of[5 + 3 * i]);
      s += "}";
    }
    s += "}";
  }
  return s + "]";
}

// ---- traffic

// Every row that this rank's ledger or the theory knows, measured and predicted, in a fixed order.
struct TrafficRow { Ledger::Key key; int64_t calls, bytes, predicted_calls, predicted_bytes; bool has_prediction; };

static std::vector<TrafficRow> traffic(const Theory& t, int64_t steps) {
  std::map<Ledger::Key, TrafficRow> rows;
  for (const auto& [key, row] : ledger.rows) rows[key] = {key, row.calls, row.numerator / row.n, 0, 0, false};
  for (const auto& [key, row] : t.step) {
    TrafficRow& r = rows[key];
    r.key = key, r.has_prediction = true;
    r.predicted_calls = steps * row.calls, r.predicted_bytes = steps * row.numerator / row.n;
  }
  std::vector<TrafficRow> list;
  for (const auto& [key, row] : rows) list.push_back(row);
  return list;
}

static std::string traffic_table(const std::vector<TrafficRow>& rows, int64_t steps) {
  if (rows.empty()) return "";
  std::string s = "\ntraffic of rank 0, per step    calls         bytes     predicted   purpose\n";
  for (const TrafficRow& r : rows) {
    const auto& [axis, collective, purpose] = r.key;
    if (!r.has_prediction)
      s += format("  %-9s %-15s %6.1f %13.0f %13s   %s\n", axis.c_str(), name_of(collective), double(r.calls) / double(steps),
                  double(r.bytes) / double(steps), "-", name_of(purpose));
    else
      s += format("  %-9s %-15s %6lld %13lld %13lld   %s%s\n", axis.c_str(), name_of(collective), (long long)(r.calls / steps),
                  (long long)(r.bytes / steps), (long long)(r.predicted_bytes / steps), name_of(purpose),
                  r.bytes == r.predicted_bytes && r.calls == r.predicted_calls ? "" : "   DIFFERS");
  }
  return s;
}

static std::string traffic_json(const Mesh& mesh, const std::vector<TrafficRow>& rows) {
  std::vector<int64_t> mine;
  for (const TrafficRow& r : rows) mine.insert(mine.end(), {r.calls, r.bytes});
  const std::vector<int64_t> all = collect(mesh, mine);  // every rank has the same rows: the layout alone decides them
  std::string s = "\"traffic\":[";
  for (int rank = 0; rank < mesh.size; rank++)
    for (size_t i = 0; i < rows.size(); i++) {
      const auto& [axis, collective, purpose] = rows[i].key;
      const int64_t* of = &all[(size_t(rank) * rows.size() + i) * 2];
      s += sentence(rank || i ? "," : "", "{\"rank\":", rank, ",\"axis\":", quoted(axis), ",\"collective\":", quoted(name_of(collective)),
                    ",\"purpose\":", quoted(name_of(purpose)), ",\"calls\":", of[0], ",\"bytes\":", of[1]);
      if (rows[i].has_prediction) s += sentence(",\"predicted_bytes\":", rows[i].predicted_bytes);
      s += "}";
    }
  return s + "]";
}

// ---- the pipeline

// Predicted: every forward, input gradient and weight gradient takes the mean time of its kind. Executed: each takes what it took.
static std::string pipeline_table(const Mesh& mesh, const Pipeline& pipeline, const std::string& trace, std::string& json) {
  const Schedule& s = pipeline.schedule();
  size_t most = 0;
  for (const auto& actions : s.ranks) most = std::max(most, actions.size());
  std::vector<int64_t> mine(most, 0);
  const std::vector<double> seconds = pipeline.seconds();
  for (size_t i = 0; i < seconds.size(); i++) mine[i] = int64_t(seconds[i] * 1e9);
  const std::vector<int64_t> all = collect(mesh, mine);  // nanoseconds
  if (mesh.rank != 0) return "";

  Durations took = durations(s, {0, 0, 0, 0});
  std::map<Action::Kind, std::pair<double, int>> kinds;
  for (int stage = 0; stage < s.stages; stage++)
    for (size_t i = 0; i < s.ranks[stage].size(); i++) {
      const Action::Kind kind = s.ranks[stage][i].kind;
      if (kind == Action::exchange) continue;
      const size_t rank = size_t(stage) * size_t(mesh.size / s.stages);  // the stage's first rank
      took[stage][i] = double(all[rank * most + i]) * 1e-6;
      kinds[kind].first += took[stage][i], kinds[kind].second++;
    }
  const auto mean = [&](Action::Kind kind) { return kinds[kind].second ? kinds[kind].first / kinds[kind].second : 0; };
  const double both = mean(Action::backward);
  const Times times{mean(Action::forward), both ? both / 2 : mean(Action::input_gradient), both ? both / 2 : mean(Action::weight_gradient), 0};
  const Timeline predicted = simulate(s, durations(s, times)), executed = simulate(s, took);
  json = sentence(",\"pipeline\":{\"schedule\":", quoted(s.name), ",\"bubble\":", executed.bubble(), ",\"predicted_bubble\":", predicted.bubble(),
                  ",\"most_live\":", pipeline.most_live(), "}");
  if (!trace.empty()) write_trace(trace, s, executed);
  const double unit = executed.makespan / 100;
  return sentence(format("\npipeline %s, %d stages, %d micro-batches, %d chunks a stage; the last step, in ms\n", s.name.c_str(), s.stages, s.microbatches, s.chunks),
                  format("predicted from a forward of %.2f and a backward of %.2f: %.1f, bubble %.1f%%\n", times.forward,
                         times.input_gradient + times.weight_gradient, predicted.makespan, 100 * predicted.bubble()),
                  draw_text(s, predicted, unit),
                  format("executed, rebuilt from the %s that each computation took: %.1f, bubble %.1f%%\n",
                         device().is_gpu ? "time by events" : "processor time", executed.makespan, 100 * executed.bubble()),
                  draw_text(s, executed, unit));
}

// ---- all of it

std::string compare_with_theory(const Mesh& mesh, const Trainer& trainer, const TrainerOptions& options, int64_t steps, const std::string& trace,
                                Metrics& metrics) {
  const Layout& l = mesh.layout;
  const Theory t = theory(trainer.gpt.config, l, mesh.pp.rank, mesh.tp.rank, options);
  const MemoryUse& m = device().memory;
  const std::vector<TrafficRow> rows = traffic(t, steps);
  std::string pipeline_json;
  const std::string pipeline = trainer.pipeline ? pipeline_table(mesh, *trainer.pipeline, trace, pipeline_json) : "";
  metrics.summary(sentence("\"layout\":{\"pp\":", l.pp, ",\"replicate\":", l.replicate, ",\"fsdp\":", l.fsdp, ",\"tp\":", l.tp, "},",
                           memory_json(mesh, m, t, trainer.kept_activations()), ",", traffic_json(mesh, rows), pipeline_json));
  return memory_table(m, t, trainer.kept_activations()) + traffic_table(rows, steps) + pipeline;
}
