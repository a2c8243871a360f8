// report.cpp: see report.h.
// idea      every rank gathers the allocator's and the ledger's numbers of all, and rank 0 reports
//           them; theory.cpp says what they should be
#include "report/report.h"

#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "launch/job.h"
#include "report/draw_schedule.h"
#include "theory/theory.h"

using Json = nlohmann::ordered_json;

static double mib(int64_t bytes) { return bytes / 1048576.0; }

// ---- the setup

// What each stage of a pipeline holds of the model; layers count from 1.
static std::string cuts_of(const Options& o) {
  const Schedule s = outline_of(trainer_options(o), o.layout);
  const Gpt gpt(model_config(o));  // names and shapes only
  std::vector<std::string> stages;
  for (int stage = 0; stage < s.stages; stage++) {
    std::vector<std::string> chunks;
    for (const ModelPiece& piece : pieces_of(gpt, s, stage)) {
      std::vector<std::string> parts;
      int64_t first = 0, last = 0;
      for (const ModelPart& part : piece)
        if (part.kind == ModelPart::block) last = part.layer + 1, first = first ? first : last;
      if (has_embedding(piece)) parts.push_back("embedding");
      parts.push_back(first == last ? sentence("layer ", last)
                                    : sentence("layers ", first, "-", last));
      if (has_head(piece)) parts.push_back("head");
      chunks.push_back(join(parts, ", "));
    }
    stages.push_back(sentence(stage, ": ", join(chunks, "; ")));
  }
  return "stages   " + join(stages, " | ") + "\n";
}

void print_setup(const Options& o, const Dataset& data) {
  const GptConfig g = model_config(o);
  const int64_t ranks = o.layout.ranks();
  const bool is_small = ranks > 1 && ranks <= 16;
  const std::string text =
      sentence("model    ", o.model_name, ": ", to_string(g), ": ",
               format("%.2f", parameter_count(g) / 1e6), " M parameters in ", name_of(g.dtype),
               "\ndevice   ", device().name, "\nranks    ", to_string(o.layout), "\n",
               is_small ? draw(o.layout) : "", is_small && o.layout["pp"] > 1 ? cuts_of(o) : "",
               "data     ", printable(data.describe()), "\nsteps    ", o.steps, " of ", o.batch,
               " sequences (", o.batch * g.context, " tokens), micro-batches of ", o.microbatch,
               "\n\n");
  printf("%s", text.c_str());
  fflush(stdout);
}

// ---- memory

static std::string memory_table(const MemoryUse& m, const Theory& t, int64_t activations) {
  std::string s = "\nmemory of rank 0, MiB       now     predicted  at the peak of all\n";
  for (int i = 0; i < kMemoryCategories; i++) {
    if (!m.peak[i]) continue;
    const std::string bound = Memory(i) == Memory::gather && t.gather_bound
                                  ? format("at most %.2f", mib(t.gather_bound))
                                  : "-";
    const std::string predicted = t.persistent[i] ? format("%.2f", mib(t.persistent[i])) : bound;
    s += format("  %-18s %10.2f %13s %12.2f\n", name_of(Memory(i)), mib(m.now[i]),
                predicted.c_str(), mib(m.at_peak[i]));
  }
  s += format("  %-18s %10.2f %13s %12.2f\n", "all", mib(m.total), "", mib(m.total_peak));
  return s + format("  activations kept for backwards at once: %.2f, predicted %.2f\n",
                    mib(activations), mib(t.activations));
}

static Json memory_json(int rank, const MemoryUse& m, const Theory& t, int64_t activations) {
  Json j{{"rank", rank},
         {"peak", m.total_peak},
         {"kept_activations", {{"bytes", activations}, {"predicted_bytes", t.activations}}}};
  for (int i = 0; i < kMemoryCategories; i++) {
    Json& category = j[name_of(Memory(i))] = {{"now", m.now[i]}, {"at_peak", m.at_peak[i]}};
    if (t.persistent[i]) category["predicted"] = t.persistent[i];
  }
  return j;
}

// ---- traffic

// Every row that this rank's ledger or the theory knows, in a fixed order.
static Json traffic_json(int rank, const Theory& t, int64_t steps) {
  auto sent = ledger.rows;
  for (const auto& [key, step] : t.step.rows) sent[key];
  Json rows = Json::array();
  for (const auto& [key, row] : sent) {
    const auto& [axis, collective, purpose] = key;
    Json json{{"rank", rank},
              {"axis", axis},
              {"collective", name_of(collective)},
              {"purpose", name_of(purpose)},
              {"calls", row.calls},
              {"bytes", row.bytes()}};
    if (const auto step = t.step.rows.find(key); step != t.step.rows.end())
      json.update({{"predicted_bytes", int64_t(steps * step->second.numerator / step->second.n)},
                   {"predicted_calls", steps * step->second.calls}});
    rows.push_back(json);
  }
  return rows;
}

static std::string traffic_table(const Json& rows, int64_t steps) {
  if (rows.empty()) return "";
  std::string s = "\ntraffic of rank 0, per step    calls         bytes     predicted   purpose\n";
  for (const Json& r : rows) {
    const std::string axis = r["axis"], collective = r["collective"], purpose = r["purpose"];
    const double predicted = r.value("predicted_bytes", -1.0), calls = r["calls"],
                 bytes = r["bytes"];
    const bool is_predicted = predicted >= 0,
               differs = is_predicted && (bytes != predicted || r["calls"] != r["predicted_calls"]);
    s += format("  %-9s %-15s ", axis.c_str(), collective.c_str()) +
         (is_predicted ? format("%6.0f %13.0f %13.0f   %s", calls / steps, bytes / steps,
                                predicted / steps, purpose.c_str())
                       : format("%6.0f %13.0f %13s   %s, in all steps", calls, bytes, "-",
                                purpose.c_str())) +
         (differs ? "   DIFFERS\n" : "\n");
  }
  return s;
}

// The share of a step in which the communication stream was busy, by rank.
static std::string communication_line(std::vector<double> shares) {
  if (shares.size() == 1) return "";
  const auto [least, most] = std::ranges::minmax(shares);
  return format(
      "  communicating, with waiting for other ranks: %.0f%% to %.0f%% of a step's time, by rank\n",
      100 * least, 100 * most);
}

// Names the rank whose communication stream is idle longest, since in theirs the others wait for
// it: if that is half as long again as for the middle one of them, and by a tenth of the step.
static std::string straggler_line(const std::vector<double>& idle, double step_ms,
                                  const Json& hosts) {
  std::vector<double> sorted = idle;
  std::ranges::sort(sorted);
  const double most = sorted.back(), middle = sorted[(sorted.size() - 1) / 2];
  if (most < 1.5 * middle || most - middle < 0.1 * step_ms) return "";
  const size_t slow = std::ranges::find(idle, most) - idle.begin();
  return format(
      "  the others wait for rank %zu on %s: it does not communicate for %.1f ms of a step, the "
      "middle one of all ranks for %.1f\n",
      slow, hosts[slow].get<std::string>().c_str(), most, middle);
}

// ---- the pipeline

// Predicted: every forward, input gradient and weight gradient takes the mean time of its kind on
// its chunk of its stage. Executed: each takes what it took. Ranks that differ in other axes only
// run pipelines of their own: the first is shown. Adds the pipeline's member of the metrics.
static std::string pipeline_table(const Trainer& trainer, const Durations& took, Json& summary) {
  const Schedule& s = trainer.pipeline.schedule();
  std::map<std::tuple<int, Action::Kind, int>, double> mean;  // {stage, kind, chunk}
  std::map<Action::Kind, double> mean_of_all;
  for_each_computation(s, [&](int stage, int i, const Action& a) {
    const double share = took[stage][i] / s.microbatches;
    mean[{stage, a.kind, a.chunk}] += share;
    mean_of_all[a.kind] += share / s.positions();
  });
  Durations means = took, without_replay = took;
  for_each_computation(s, [&](int stage, int i, const Action& a) {
    means[stage][i] = without_replay[stage][i] = mean[{stage, a.kind, a.chunk}];
    if (a.kind == Action::input_gradient)
      without_replay[stage][i] =
          std::max(0.0, means[stage][i] - mean[{stage, Action::forward, a.chunk}]);
  });
  const Timeline predicted = simulate(s, means), executed = simulate(s, took);
  summary["pipeline"] = {{"schedule", s.row->name},
                         {"stages", s.stages},
                         {"microbatches", s.microbatches},
                         {"chunks", s.chunks},
                         {"bubble", executed.bubble()},
                         {"predicted_bubble", predicted.bubble()},
                         {"most_live", trainer.pipeline.most_live()},
                         {"took_ms", took}};
  const double unit = executed.makespan / 100;
  std::string text = "\npipeline " + to_string(s) +
                     "; the last step, in ms\npredicted from each stage's mean times (of all: ";
  for (const auto& [kind, ms] : mean_of_all)
    text += format("%s%s %.2f", kind == Action::forward ? "" : ", ", name_of(kind), ms);
  text += format("): %.1f, bubble %.1f%%\n", predicted.makespan, 100 * predicted.bubble()) +
          draw_text(s, predicted, unit);
  text += format("executed, rebuilt from the %s that each computation took: %.1f, bubble %.1f%%\n",
                 device().is_gpu ? "time by events" : "processor time", executed.makespan,
                 100 * executed.bubble());
  text += draw_text(s, executed, unit);
  // A lower bound: it takes off the whole forward, and embedding and head are not replayed.
  if (s.row->splits_backward && trainer.gpt.config.recompute) {
    const Timeline kept = simulate(s, without_replay);
    text +=
        "--recompute replays each forward inside the input gradient, which the stage before waits "
        "for: without it ";
    text += format("%.1f at least, bubble %.1f%%\n", kept.makespan, 100 * kept.bubble());
  }
  return text;
}

// ---- all of it

void compare_with_theory(const Mesh& mesh, const Trainer& trainer, int64_t steps, StepTime time,
                         JsonLines& metrics) {
  const Theory t = theory(trainer.gpt.config, mesh.layout, mesh.rank, trainer.options);
  const MemoryUse& m = device().memory;
  const bool pipelined = trainer.pipeline.measures;
  const Json mine{{"memory", memory_json(mesh.rank, m, t, trainer.pipeline.most_live_bytes())},
                  {"traffic", traffic_json(mesh.rank, t, steps)},
                  {"communication_share", time.communicating / time.ms},
                  {"not_communicating_ms", time.ms - time.communicating},
                  {"hosts", host_name()},
                  {"took", pipelined ? trainer.pipeline.milliseconds() : std::vector<double>{}}};
  const std::vector<std::string> texts = gather_text(mine.dump());
  if (mesh.rank != 0) return;

  Json layout, by_rank, traffic = Json::array();
  for (const Axis& axis : mesh.axes) layout[axis.name] = axis.size;
  for (const std::string& text : texts) {
    const Json rank = Json::parse(text);
    for (const auto& [name, of_rank] : rank.items()) by_rank[name].push_back(of_rank);
    traffic.insert(traffic.end(), rank["traffic"].begin(), rank["traffic"].end());
  }
  const Durations took = by_rank["took"];
  by_rank.erase("took");
  by_rank["traffic"] = traffic;  // in one list
  Json summary{{"summary", true}, {"steps", steps}, {"layout", layout}};
  summary.update(by_rank);
  std::string text = memory_table(m, t, trainer.pipeline.most_live_bytes()) +
                     traffic_table(mine["traffic"], steps) +
                     communication_line(summary["communication_share"]) +
                     straggler_line(summary["not_communicating_ms"], time.ms, summary["hosts"]);
  if (pipelined) {
    const size_t pipelines = took.size() / trainer.pipeline.schedule().stages;
    Durations stages;  // stage t of the first pipeline is rank t * pipelines
    for (size_t rank = 0; rank < took.size(); rank += pipelines) stages.push_back(took[rank]);
    text += pipeline_table(trainer, stages, summary);
  }
  summary["text"] = text;
  metrics.line(summary);
  printf("%s", text.c_str());
}
