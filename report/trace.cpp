// trace.cpp: see trace.h.
#include "report/trace.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

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
    MPI_Ibcast(&first, 1, MPI_DOUBLE, 0, MPI_COMM_WORLD, Finished());
    const double end = MPI_Wtime();
    if (end - begin >= fastest) continue;
    fastest = end - begin;
    ahead = (begin + end) / 2 - first;
  }
  return mesh.rank ? ahead : 0;
}

// ---- a step

Trace::Trace(const std::string& path, Mesh& mesh, const Trainer& trainer, bool rebuilds)
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
    w.begin = began_ + op.begin.seconds_since(origin_);
    w.end = began_ + op.end.seconds_since(origin_);
  });
}

// ---- all ranks

// What it is of, and its part in each axis with more than one rank: "training, fsdp 4, tp 2".
static std::string list_axes(const std::string& first, const Mesh& mesh, int Axis::*number) {
  std::vector<std::string> all{first};
  for (const Axis& axis : mesh.axes)
    if (axis.size > 1) all.push_back(sentence(axis.name, " ", axis.*number));
  return join(all, ", ");
}

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Recorder::Issued, queue, after, event, processor, begin, end)

// Of this rank.
Json Trace::describe() const {
  const auto name = [](const char* what, int row, const std::string& name) {
    recorder.add("M", "", what, row, -1, {{"name", name}});
  };
  name("process_name", 0, list_axes(sentence("rank ", mesh_.rank), mesh_, &Axis::rank));
  name("thread_name", Recorder::compute, "compute");
  name("thread_name", Recorder::communication, "communication");
  for (const auto& [counter, edges] : recorder.changes) {
    std::map<std::string, int64_t> held;
    for (const auto& [edge, changes] : edges) {
      Json bytes;  // of what changes: a step may have thousands of micro-batches
      for (const auto& [of, change] : changes) bytes[of] = held[of] += change;
      recorder.add("C", "", counter, 0, edge, bytes);
    }
  }
  Json units;
  for (const auto& [number, unit] : trainer_.fsdp.units())
    units.push_back({{"name", unit.name},
                     {"bytes", unit.padded * size_of(unit.shard.dtype())},
                     {"shard_bytes", unit.shard.bytes()}});
  return {{"works", recorder.works}, {"events", recorder.events}, {"units", units}};
}

namespace {

// The works of all ranks, those of the first rank first. Their times are compared in whole
// nanoseconds, as the file has them: what is aligned is equal.
struct Joined {
  std::vector<Task> tasks;
  std::vector<Span> spans;                // a collective's begins where its rank has come to it
  std::vector<int64_t> shift;             // of each rank's clock, in nanoseconds
  std::vector<const Json*> args;          // of each task's event, if it is a collective
  std::vector<std::vector<int>> sources;  // the sends that each task receives, in their order
  int64_t start(int i) const { return llround(spans[i].start * 1e9) + shift[tasks[i].rank]; }
  int64_t end(int i) const { return llround(spans[i].end * 1e9) + shift[tasks[i].rank]; }
  // Those that a collective waits for: in a ring of sends only the ones that it receives.
  const std::vector<int>& needs(int task) const {
    return sources[task].empty() ? tasks[task].with : sources[task];
  }
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
      all.tasks.push_back({int(r), w.queue, w.processor, w.after < 0 ? -1 : first + w.after});
      all.spans.push_back({w.begin, w.end});
      all.args.push_back(w.event < 0 ? nullptr : &ranks[r]["events"][w.event]["args"]);
      if (w.event < 0) continue;
      const std::string who = sentence((*all.args[i])["axis"], (*all.args[i])["ranks"]);
      collectives[{who, calls[who]++}].push_back(i);
    }
  }
  all.sources.resize(all.tasks.size());
  for (const auto& [call, members] : collectives) {
    double least = INFINITY;  // on the rank that comes last
    for (const int i : members) least = std::min(least, all.tasks[i].duration);
    for (const int i : members) {
      all.tasks[i].duration = least;
      all.tasks[i].with = members;
      for (const Json& received : (*all.args[i])["receives"])
        for (const int j : members)
          if (received["from"] == all.tasks[j].rank) all.sources[i].push_back(j);
    }
  }
  return all;
}

// Moves the ranks' clocks until none ends a collective before another begins it, and none a receive
// before its send: as often as a chain of ranks is long. Clocks that drift may still contradict
// each other then.
void align(Joined& all) {
  bool moved = true;
  for (size_t pass = 0; pass < all.shift.size() && std::exchange(moved, false); pass++)
    for (size_t i = 0; i < all.tasks.size(); i++) {
      // what only sends may end before those that it needs begin
      if (all.sources[i].empty() && all.args[i] && !(*all.args[i])["sends"].empty()) continue;
      for (const int j : all.needs(i)) {
        const int64_t early = all.end(i) - all.start(j);
        if (early >= 0) continue;
        all.shift[all.tasks[j].rank] += early;
        moved = true;
      }
    }
  int64_t first = INT64_MAX;
  for (size_t i = 0; i < all.tasks.size(); i++) first = std::min(first, all.start(i));
  for (int64_t& shift : all.shift) shift -= first;
}

}  // namespace

void Trace::write() {
  const std::vector<Json> ranks = gather(describe());
  if (mesh_.rank) return;
  Joined all = join_works(ranks);
  if (rebuilds_) all.spans = run(all.tasks);
  else align(all);
  Json events;
  int arrows = 0;
  const auto add = [&](Json event, int rank, int64_t begin, int64_t end) {
    event["pid"] = rank;
    event["ts"] = begin / 1e3;
    event["dur"] = (end - begin) / 1e3;
    events.push_back(std::move(event));
  };
  const auto add_arrow = [&](const char* name, int from, int to) {
    const int64_t begin = all.start(from), end = std::max(begin, all.start(to));
    for (const auto& [kind, task, time] : {std::tuple{"s", from, begin}, {"f", to, end}})
      add({{"ph", kind},
           {"cat", "flow"},
           {"name", name},
           {"tid", all.tasks[task].queue},
           {"id", arrows},
           {"bp", "e"}},
          all.tasks[task].rank, time, time);
    arrows++;
  };
  Json units;
  int first = 0;  // task of the rank
  for (int rank = 0; rank < mesh_.size; rank++) {
    const auto time = [&](int edge) {
      if (edge < 0) return int64_t(0);
      return edge % 2 ? all.end(first + edge / 2) : all.start(first + edge / 2);
    };
    int next = first;  // the first task that no op has waited for yet
    for (Json e : ranks[rank]["events"]) {
      const int64_t begin = time(e["ts"]), end = time(e["dur"]);
      const int task = first + e["ts"].get<int>() / 2;
      if (e["cat"] == "op")
        for (; next <= all.tasks[task].after; next++)
          if (!all.tasks[next].with.empty()) add_arrow("use", next, task);
      if (e["cat"] == "collective") {
        int64_t last = begin;  // when the last of the ranks that it needs has come
        for (const int i : all.needs(task)) last = std::max(last, all.start(i));
        // a send may end before it is received, and has waited for nobody then
        const int64_t moves = last > end ? begin : last;
        e["args"]["id"] = all.tasks[task].with[0];
        e["args"]["waited_us"] = (moves - begin) / 1e3;
        for (const int i : all.sources[task]) add_arrow("send", i, task);
      }
      add(e, rank, begin, end);
    }
    units.push_back(ranks[rank]["units"]);
    first += ranks[rank]["works"].size();
  }
  std::string title = list_axes("training", mesh_, &Axis::size);
  if (join(mesh_, "fsdp", "cp").size > 1) title += sentence(", ZeRO-", trainer_.options.fsdp.zero);
  if (mesh_["pp"].size > 1) title += sentence(", ", trainer_.pipeline.schedule().row->name);
  file_.line({{"traceEvents", events},
              {"threefold",
               {{"title", title},
                {"stages", mesh_["pp"].size},
                {"clock", rebuilds_ ? "rebuilt" : "measured"},
                {"units", units},
                {"shards_parameters", trainer_.fsdp.shards_parameters()}}}});
}
