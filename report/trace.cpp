// trace.cpp: see trace.h.
#include "report/trace.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "kernels/op_times.h"
#include "launch/job.h"

using Json = nlohmann::json;

// ---- clocks

// By how many seconds this rank's clock is ahead of the first rank's, which tells its time when all
// have met: from the fastest of some such rounds, in whose middle it told it.
static double clock_ahead(const Mesh& mesh) {
  double ahead = 0, fastest = INFINITY;
  for (int i = 0; i < 20; i++) {
    const double begin = MPI_Wtime();
    barrier();
    double first = MPI_Wtime();
    MPI_Ibcast(&first, 1, MPI_DOUBLE, 0, MPI_COMM_WORLD, UntilDone());
    const double end = MPI_Wtime();
    if (end - begin >= fastest) continue;
    fastest = end - begin;
    ahead = (begin + end) / 2 - first;
  }
  return mesh.rank ? ahead : 0;
}

// ---- a step

Trace::Trace(const std::string& path, const Mesh& mesh, const Trainer& trainer, bool rebuilds)
    : file_(path, 0, "traces"), mesh_(mesh), trainer_(trainer), rebuilds_(rebuilds) {}

void Trace::begin_step() {
  recorder.on = true;
  if (empty()) {
    for (int c = 0; c < kMemoryCategories; c++)
      recorder.allocated(name_of(Memory(c)), -1, device().memory.now[c]);
    barrier();
    origin_.record(device().compute);
    synchronize();
    began_ = MPI_Wtime();
    if (!rebuilds_) began_ -= clock_ahead(mesh_);
  }
}

void Trace::end_step() {
  recorder.enter("");
  recorder.on = false;
  op_times.each([&](const OpTimes::Op& op) {
    Recorder::Issued& w = recorder.works[timed_++];
    if (rebuilds_) return;
    w.begin = began_ + op.begin.seconds_since(origin_);
    w.end = began_ + op.end.seconds_since(origin_);
  });
}

// ---- all ranks

// What it is of, and of each axis with more than one rank the place or the size: "rank 3, fsdp 1,
// tp 1", "training of ..., fsdp 4, tp 2".
static std::string list_axes(std::string all, const Mesh& mesh, int Axis::*number) {
  for (const Axis& axis : mesh.axes)
    if (axis.size > 1) all += sentence(", ", axis.name, " ", axis.*number);
  return all;
}

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Recorder::Issued, queue, after, name, args, resharded, begin,
                                   end)

namespace {

// The works of all ranks, those of the first rank first. Their times are compared in whole
// nanoseconds, as the file has them: what is aligned is equal.
struct Joined {
  std::vector<Task> tasks;
  std::vector<Span> spans;                // a collective's begins where its rank has come to it
  std::vector<int64_t> shift;             // of each rank's clock, in nanoseconds
  std::vector<Json> args;                 // of each task, or null
  std::vector<std::vector<int>> sources;  // the sends that each task receives, in their order
  int64_t start(int i) const { return llround(spans[i].start * 1e9) + shift[tasks[i].rank]; }
  int64_t end(int i) const { return llround(spans[i].end * 1e9) + shift[tasks[i].rank]; }
};

Joined join_works(const std::vector<Json>& ranks) {
  Joined all;
  all.shift.resize(ranks.size());
  std::map<std::pair<std::string, int>, std::vector<int>> collectives;  // the k-th of some ranks
  for (size_t r = 0; r < ranks.size(); r++) {
    const int first = all.tasks.size();
    std::map<std::string, int> calls;
    for (const Recorder::Issued w : ranks[r]["works"]) {
      const int i = all.tasks.size();
      all.tasks.push_back({int(r), w.queue, w.end - w.begin, w.after < 0 ? -1 : first + w.after});
      all.spans.push_back({w.begin, w.end});
      all.args.push_back(w.args < 0 ? Json() : ranks[r]["args"][w.args]);
      if (w.queue == Recorder::compute || w.args < 0) continue;
      const std::string who = sentence(all.args[i]["axis"], all.args[i]["ranks"]);
      collectives[{who, calls[who]++}].push_back(i);
    }
  }
  all.sources.resize(all.tasks.size());
  for (const auto& [call, members] : collectives) {
    double least = INFINITY;  // on the rank that comes last
    for (const int i : members) least = std::min(least, all.tasks[i].duration);
    for (const int i : members) {
      all.tasks[i].duration = least;
      all.args[i]["id"] = members[0];
      for (const Json& received : all.args[i]["receives"])
        for (const int j : members)
          if (received["from"] == all.tasks[j].rank) all.sources[i].push_back(j);
      // in a ring of sends a rank waits only for those that it receives
      all.tasks[i].with = all.sources[i].empty() ? members : all.sources[i];
    }
  }
  return all;
}

// Moves the ranks' clocks until none ends a collective before another begins it, and none a receive
// before its send: as often as a chain of ranks is long. Clocks that drift may still contradict
// each other then.
void align(Joined& all) {
  std::vector<int64_t> before;
  for (size_t pass = 0; pass < all.shift.size() && std::exchange(before, all.shift) != all.shift;
       pass++)
    for (size_t i = 0; i < all.tasks.size(); i++) {
      // what only sends may end before those that it needs begin
      const std::vector<int>& needs = all.tasks[i].with;
      if (all.sources[i].empty() && !needs.empty() && !all.args[i]["sends"].empty()) continue;
      for (const int j : needs)
        all.shift[all.tasks[j].rank] += std::min<int64_t>(0, all.end(i) - all.start(j));
    }
  int64_t first = INT64_MAX;
  for (size_t i = 0; i < all.tasks.size(); i++) first = std::min(first, all.start(i));
  for (int64_t& shift : all.shift) shift -= first;
}

}  // namespace

std::string Trace::write() {
  Json units;
  for (const auto& [number, unit] : trainer_.fsdp.units())
    units.push_back({{"name", unit.name},
                     {"bytes", unit.padded * size_of(unit.shard.dtype())},
                     {"shard_bytes", unit.shard.bytes()}});
  std::map<std::pair<int, std::string>, std::map<std::string, int64_t>> changes;
  for (const auto& [edge, curve, of, bytes] : recorder.changes) changes[{edge, curve}][of] += bytes;
  const auto units_of_ranks = gather(units);
  const auto ranks = gather({{"name", list_axes(sentence("rank ", mesh_.rank), mesh_, &Axis::rank)},
                             {"works", recorder.works},
                             {"args", recorder.args},
                             {"changes", changes}});
  if (mesh_.rank) return "";
  Joined all = join_works(ranks);
  if (rebuilds_) all.spans = run(all.tasks);
  else align(all);
  std::vector<Json> events;
  // kind: "X" a bar, "i" a mark, "C" a curve's next value, "s" and "f" an arrow's ends, "M" a name
  const auto add = [&](const char* kind, const char* category, const std::string& name, int rank,
                       int row, int64_t begin, int64_t end, const Json& args = Json::object()) {
    events.push_back({{"ph", kind},
                      {"cat", category},
                      {"name", name},
                      {"pid", rank},
                      {"tid", row},
                      {"ts", begin / 1e3},
                      {"dur", (end - begin) / 1e3},
                      {"args", args}});
  };
  int arrows = 0;
  const auto add_arrow = [&](const char* name, int from, int to) {
    const int64_t begin = all.start(from), end = std::max(begin, all.start(to));
    for (const auto& [kind, task, time] : {std::tuple{"s", from, begin}, {"f", to, end}}) {
      add(kind, "flow", name, all.tasks[task].rank, all.tasks[task].queue, time, time);
      events.back()["id"] = arrows;
      events.back()["bp"] = "e";
    }
    arrows++;
  };
  int task = 0;
  for (int rank = 0; rank < mesh_.size; rank++) {
    add("M", "", "process_name", rank, 0, 0, 0, {{"name", ranks[rank]["name"]}});
    for (const int row : {0, 1})
      add("M", "", "thread_name", rank, row, 0, 0, {{"name", row ? "communication" : "compute"}});
    const int first = task;
    int next = first;                     // the first task that no op has waited for yet
    Json part;                            // args of the part that is computed
    size_t bar = 0;                       // its event, since it last waited
    int64_t bar_begin = 0, computed = 0;  // computed: the end of the last op
    for (const Recorder::Issued w : ranks[rank]["works"]) {
      const int64_t begin = all.start(task), end = all.end(task);
      Json& args = all.args[task];
      if (w.queue == Recorder::compute) {
        if (w.args >= 0) part = args;
        if (part["pass"] == "sum") part["microbatch"] = -1;  // of an earlier one than is computed
        // a part that waits before one of its ops is two bars
        if (w.args >= 0 || (w.after >= 0 && begin > computed)) {
          bar = events.size();
          bar_begin = begin;
          add("X", "part", part["name"], rank, w.queue, begin, end, part);
        }
        for (; next <= all.tasks[task].after; next++)
          if (!all.tasks[next].with.empty()) add_arrow("use", next, task);
        events[bar]["dur"] = (end - bar_begin) / 1e3;
        computed = end;
        add("X", "op", w.name, rank, w.queue, begin, end);
      } else if (w.args >= 0) {
        int64_t last = begin;  // when the last of the ranks that it needs has come
        for (const int i : all.tasks[task].with) last = std::max(last, all.start(i));
        // a send may end before it is received, and has waited for nobody then
        const int64_t moves = last > end ? begin : last;
        args["waited_us"] = (moves - begin) / 1e3;
        for (const int i : all.sources[task]) add_arrow("send", i, task);
        add("X", "collective", args["name"], rank, w.queue, begin, end, args);
      }
      for (const auto& unit : w.resharded) {
        add("i", "unit", "reshard", rank, Recorder::compute, computed, computed, {{"unit", unit}});
        events.back()["s"] = "p";  // of the process: an arrow to the next op would end at it
      }
      task++;
    }
    std::map<std::string, int64_t> held;  // by category, and by micro-batch
    for (const Json& change : ranks[rank]["changes"]) {
      const int edge = change[0][0], at = first + edge / 2;
      const int64_t time = edge < 0 ? 0 : edge % 2 ? all.end(at) : all.start(at);
      Json bytes;  // of what changes: a step may have thousands of micro-batches
      for (const auto& [of, more] : change[1].items()) bytes[of] = held[of] += more.get<int64_t>();
      add("C", "", change[0][1], rank, 0, time, time, bytes);
    }
  }
  const GptConfig& model = trainer_.gpt.config;
  const FsdpOptions& fsdp = trainer_.options.fsdp;
  const Schedule& schedule = trainer_.pipeline.schedule();
  std::string title =
      list_axes(sentence("training of ", model.layers, " layers of width ", model.width), mesh_,
                &Axis::size);
  if (model.sequence_parallel && mesh_["tp"].size > 1) title += ", sequence parallel";
  if (mesh_.shards.size > 1) title += sentence(", ZeRO-", fsdp.zero);
  if (mesh_.shards.size > 1 && fsdp.prefetch != 1) title += sentence(", prefetch ", fsdp.prefetch);
  if (model.recompute) title += ", recompute";
  if (mesh_["pp"].size > 1) title += sentence(", ", schedule.row->name);
  if (schedule.microbatches > 1) title += sentence(", ", schedule.microbatches, " micro-batches");
  return error_of([&] {
    file_.line({{"traceEvents", std::move(events)},
                {"threefold",
                 {{"title", title},
                  {"stages", mesh_["pp"].size},
                  {"clock", rebuilds_ ? "rebuilt" : "measured"},
                  {"units", units_of_ranks},
                  {"shards_parameters", trainer_.fsdp.shards_parameters()}}}});
  });
}
