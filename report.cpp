// report.cpp: see report.h.
// idea      every rank sends rank 0 its allocator's and its ledger's numbers; theory.cpp says what they should be
#include "report.h"

#include <cstdio>

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
  return s + format("  activations kept for the backward of a micro-batch: %.2f, predicted %.2f\n", mib(activations), mib(t.activations));
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

// ---- both

std::string compare_with_theory(const Mesh& mesh, const Trainer& trainer, const TrainerOptions& options, int64_t steps, Metrics& metrics) {
  const Layout& l = mesh.layout;
  const int64_t microbatches = options.batch / (options.microbatch * l.replicate * l.fsdp);
  const Theory t = theory(trainer.gpt.config, l, mesh.tp.rank, options.fsdp, options.microbatch, microbatches);
  const MemoryUse& m = device().memory;
  const std::vector<TrafficRow> rows = traffic(t, steps);
  metrics.summary(sentence("\"layout\":{\"pp\":", l.pp, ",\"replicate\":", l.replicate, ",\"fsdp\":", l.fsdp, ",\"tp\":", l.tp, "},",
                           memory_json(mesh, m, t, trainer.kept_activations()), ",", traffic_json(mesh, rows)));
  return memory_table(m, t, trainer.kept_activations()) + traffic_table(rows, steps);
}
