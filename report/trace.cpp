// trace.cpp: see trace.h.
#include "report/trace.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "launch/job.h"
#include "support/metrics.h"

using Json = nlohmann::json;
namespace fs = std::filesystem;

// ---- clocks

// By how many seconds this rank's clock is ahead of the first rank's: from the fastest of some
// round trips, in whose middle the other clock was read.
static double clock_ahead(const Mesh& mesh) {
  double ahead = 0, fastest = INFINITY;
  for (int i = 20; i < 20 * mesh.size; i++) {  // 20 for each rank but the first
    const int asks = i / 20, peer = mesh.rank ? 0 : asks;
    if (mesh.rank && mesh.rank != asks) continue;
    const double begin = MPI_Wtime();
    if (mesh.rank) MPI_Isend(&begin, 1, MPI_DOUBLE, peer, 0, MPI_COMM_WORLD, Finished());
    double theirs;
    MPI_Irecv(&theirs, 1, MPI_DOUBLE, peer, 0, MPI_COMM_WORLD, Finished());
    const double end = MPI_Wtime();
    if (!mesh.rank) MPI_Isend(&end, 1, MPI_DOUBLE, peer, 0, MPI_COMM_WORLD, Finished());
    if (end - begin >= fastest) continue;
    fastest = end - begin;
    ahead = (begin + end) / 2 - theirs;
  }
  return mesh.rank ? ahead : 0;
}

// ---- a step

Trace::Trace(const std::string& path, Mesh& mesh, const Trainer& trainer, bool rebuilds)
    : path_(path), mesh_(mesh), trainer_(trainer), rebuilds_(rebuilds) {
  if (path.empty()) return;
  put_aside(path, "traces");
  SYSTEM_CHECK(std::ofstream(path, std::ios::app), "--trace: ", path,
               " cannot be opened for writing");
}

Trace::~Trace() {
  std::error_code error;
  if (fs::is_regular_file(path_, error) && !fs::file_size(path_, error)) fs::remove(path_, error);
}

void Trace::begin_step(int64_t step) {
  const bool is_first = steps_.empty();
  if (is_first) {
    recorder.memory[Recorder::end_of(-1)] = device().memory.now;
    barrier();
  }
  origins_.emplace_back(true).record(device().compute);
  synchronize();
  if (is_first) began_ = MPI_Wtime() - (rebuilds_ ? 0 : clock_ahead(mesh_));
  else began_ += origins_.back().seconds_since(origins_.front());
  if (!is_first) origins_.pop_front();
  steps_.push_back(step);
  recorder.on = true;
}

void Trace::end_step() {
  recorder.stop();
  op_times.each([&](const OpTimes::Op& op) {
    Recorder::Issued& w = recorder.works[timed_++];
    w.begin = began_ + op.begin.seconds_since(origins_.back());
    w.end = began_ + op.end.seconds_since(origins_.back());
  });
}

// ---- all ranks

// Of each axis with more than one rank: "fsdp 4, tp 2".
static std::string list_axes(const Mesh& mesh, int Axis::*number) {
  std::vector<std::string> all;
  for (const Axis& axis : mesh.axes)
    if (axis.size > 1) all.push_back(sentence(axis.name, " ", axis.*number));
  return join(all, ", ");
}

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Recorder::Issued, queue, after, event, processor, begin, end)

// Of this rank.
Json Trace::describe() const {
  const auto name = [](const char* what, int row, const std::string& name) {
    recorder.add("M", "", what, row, Recorder::end_of(-1), {{"name", name}});
  };
  const std::string place = list_axes(mesh_, &Axis::rank);
  name("process_name", 0, sentence("rank ", mesh_.rank, place.empty() ? "" : " (" + place + ")"));
  name("thread_name", Recorder::compute, "compute");
  name("thread_name", Recorder::communication, "communication");
  std::array<int64_t, kMemoryCategories> held{};
  for (const auto& [edge, changes] : recorder.memory) {
    Json bytes;
    for (int c = 0; c < kMemoryCategories; c++) bytes[name_of(Memory(c))] = held[c] += changes[c];
    recorder.add("C", "", "memory", 0, edge, bytes);
  }
  Json units;
  for (const auto& [number, unit] : trainer_.fsdp.units())
    units.push_back({{"unit", number},
                     {"name", unit.part.name},
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
  std::vector<std::vector<int>> members;  // of the collectives
  std::vector<const Json*> args;          // of each task's event, if it is a collective
  std::vector<std::vector<int>> sources;  // the sends that each task receives, in their order
  int64_t start(int i) const { return llround(spans[i].start * 1e9) + shift[tasks[i].rank]; }
  int64_t end(int i) const { return llround(spans[i].end * 1e9) + shift[tasks[i].rank]; }
  // Those that a collective waits for: in a ring of sends only the ones that it receives.
  const std::vector<int>& needs(int task) const {
    return sources[task].empty() ? members[tasks[task].collective] : sources[task];
  }
  // It may end before those that it needs begin.
  bool sends_alone(int task) const {
    return sources[task].empty() && !(*args[task])["sends"].empty();
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
    for (const int i : members) {
      all.tasks[i].collective = all.members.size();
      for (const Json& received : (*all.args[i])["receives"])
        for (const int j : members)
          if (received["from"] == all.tasks[j].rank) all.sources[i].push_back(j);
    }
    all.members.push_back(members);
  }
  return all;
}

// Moves the ranks' clocks until none ends a collective before another begins it, and none a receive
// before its send: as often as a chain of ranks is long. Clocks that drift may still contradict
// each other then.
void align(Joined& all) {
  bool moved = true;
  for (size_t pass = 0; pass < all.shift.size() && std::exchange(moved, false); pass++)
    for (const std::vector<int>& members : all.members)
      for (const int i : members) {
        if (all.sends_alone(i)) continue;
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

void rebuild(Joined& all) {
  for (const std::vector<int>& members : all.members) {
    double least = INFINITY;
    for (const int i : members) least = std::min(least, all.tasks[i].duration);
    for (const int i : members) all.tasks[i].duration = least;
  }
  all.spans = run(all.tasks);
}

}  // namespace

void Trace::write() const {
  const std::vector<Json> ranks = gather(describe());
  if (mesh_.rank) return;
  Joined all = join_works(ranks);
  rebuilds_ ? rebuild(all) : align(all);
  std::ofstream out(path_);
  out << "{\"traceEvents\":[\n";
  const char* separator = "";
  int sends = 0;
  const auto add = [&](Json event, int rank, int64_t begin, int64_t end) {
    event["pid"] = rank;
    event["ts"] = begin / 1e3;
    event["dur"] = (end - begin) / 1e3;
    if (event["cat"] == "flow") event["bp"] = "e";
    out << std::exchange(separator, ",\n") << event;
  };
  const auto add_send = [&](const char* kind, int rank, int64_t time) {
    add({{"ph", kind}, {"cat", "flow"}, {"name", "send"}, {"tid", 1}, {"id", 2 * sends + 1}}, rank,
        time, time);
  };
  Json units;
  int first = 0;  // task of the rank
  for (int rank = 0; rank < mesh_.size; rank++) {
    const auto time = [&](int edge) {
      if (edge < 0) return int64_t(0);
      return edge % 2 ? all.end(first + edge / 2) : all.start(first + edge / 2);
    };
    for (Json e : ranks[rank]["events"]) {
      const int64_t begin = time(e["ts"]), end = time(e["dur"]);
      if (e["cat"] == "flow") e["id"] = 2 * (first + e["args"]["work"].get<int>());
      if (e["cat"] == "collective") {
        const int task = first + e["ts"].get<int>() / 2;
        int64_t last = begin;  // when the last of the ranks that it needs has come
        for (const int i : all.needs(task)) last = std::max(last, all.start(i));
        // a send may end before it is received, and has waited for nobody then
        const int64_t moves = all.sends_alone(task) && last > end ? begin : std::min(last, end);
        e["args"]["id"] = all.tasks[task].collective;
        e["args"]["waited_us"] = (moves - begin) / 1e3;
        for (const int i : all.sources[task]) {
          add_send("s", all.tasks[i].rank, all.start(i));
          add_send("f", rank, moves);
          sends++;
        }
      }
      add(e, rank, begin, end);
    }
    units.push_back(ranks[rank]["units"]);
    first += ranks[rank]["works"].size();
  }
  std::string title = list_axes(mesh_, &Axis::size);
  if (title.empty()) title = "one rank";
  if (join(mesh_, "fsdp", "cp").size > 1) title += sentence(", ZeRO-", trainer_.options.fsdp.zero);
  if (mesh_["pp"].size > 1) title += sentence(", ", trainer_.pipeline.schedule().row->name);
  const Json about{{"title", title},
                   {"stages", mesh_["pp"].size},
                   {"clock", rebuilds_ ? "rebuilt" : "measured"},
                   {"steps", steps_},
                   {"units", units},
                   {"shards_parameters", trainer_.fsdp.shards_parameters()},
                   {"memory_limit", device().memory_limit}};
  out << "\n],\n\"threefold\":" << about << "}\n";
  out.close();
  std::error_code ignored;
  if (!out && fs::is_regular_file(path_, ignored)) fs::resize_file(path_, 0, ignored);
  SYSTEM_CHECK(out, "--trace: ", path_, " cannot be written");
}
