// trace.cpp: see trace.h.
#include "report/trace.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>

#include "launch/job.h"
#include "support/metrics.h"

using Json = nlohmann::ordered_json;

// ---- clocks

static double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// By how many seconds this rank's clock is ahead of the first rank's: from the fastest of some
// round trips, in whose middle the other clock was read.
static double clock_ahead(const Mesh& mesh) {
  double ahead = 0;
  for (int rank = 1; rank < mesh.size; rank++) {
    double fastest = INFINITY, theirs = 0;
    for (int i = 0; i < 20 && (mesh.rank == 0 || mesh.rank == rank); i++) {
      const int peer = mesh.rank ? 0 : rank;
      const auto send = [&] {
        theirs = now();
        MPI_Isend(&theirs, 1, MPI_DOUBLE, peer, 0, MPI_COMM_WORLD, Finished());
      };
      const double begin = now();
      if (mesh.rank) send();
      MPI_Irecv(&theirs, 1, MPI_DOUBLE, peer, 0, MPI_COMM_WORLD, Finished());
      const double end = now();
      if (!mesh.rank) send();
      if (end - begin >= fastest) continue;
      fastest = end - begin;
      ahead = (begin + end) / 2 - theirs;
    }
  }
  return mesh.rank ? ahead : 0;
}

// ---- a step

Trace::Trace(const std::string& path, Mesh& mesh, const Trainer& trainer, bool rebuilds)
    : path_(path), mesh_(mesh), trainer_(trainer), rebuilds_(rebuilds) {
  if (path.empty()) return;
  put_aside(path, "traces");
  REQUIRE(std::ofstream(path, std::ios::app), "--trace: ", path,
          " cannot be opened for writing: ", strerror(errno));
}

void Trace::begin_step(int64_t step) {
  if (steps_.empty()) {
    held_ = device().memory.now;
    origin_.emplace(true);
    barrier();
    origin_->record(device().compute);
    synchronize();
    began_ = now();
    if (!rebuilds_) began_ -= clock_ahead(mesh_);
  }
  steps_.push_back(step);
  recorder.stage = mesh_["pp"].rank;
  recorder.on = true;
}

void Trace::end_step() {
  recorder.stop();
  op_times.each([&](const OpTimes::Op& op) {
    spans_.push_back(
        {began_ + op.begin.seconds_since(*origin_), began_ + op.end.seconds_since(*origin_)});
  });
}

// ---- all ranks

std::string Trace::describe() const {
  Json works = Json::array(), marks = Json::array(), arrows = recorder.arrows, units, held;
  for (size_t i = 0; i < spans_.size(); i++) {
    const Recorder::Issued& w = recorder.works[i];
    works.push_back(
        {w.queue, w.after, w.processor, spans_[i].start, spans_[i].end, w.ranks, w.sources});
  }
  for (const Recorder::Mark& m : recorder.marks)
    marks.push_back({m.last < 0 ? "i" : "X", m.row, m.work, m.edge, m.last, m.event});
  auto now = held_;
  for (const auto& [place, changes] : recorder.memory) {
    std::string event;
    for (int c = 0; c < kMemoryCategories; c++)
      event += sentence(c ? ",\"" : "\"name\":\"memory\",\"args\":{\"", name_of(Memory(c)),
                        "\":", now[c] += changes[c]);
    marks.push_back({"C", 0, place.first, place.second, -1, event});
  }
  for (int c = 0; c < kMemoryCategories; c++) held[name_of(Memory(c))] = held_[c];
  const Schedule& schedule = trainer_.pipeline.schedule();
  const int64_t shards = join(mesh_, "fsdp", "cp").size;
  for (const auto& [unit, params] :
       units_of(params_of(pieces_of(trainer_.gpt, schedule, recorder.stage)))) {
    const int64_t bytes = padded_unit(params, shards) * size_of(trainer_.gpt.config.dtype);
    units.push_back({{"unit", unit},
                     {"name", name_of_unit(unit)},
                     {"bytes", bytes},
                     {"shard_bytes", bytes / shards},
                     {"zero", shards > 1 ? trainer_.options.fsdp.zero : 0}});
  }
  std::string places;
  for (const Axis& axis : mesh_.axes)
    if (axis.size > 1) places += sentence(places.empty() ? " (" : ", ", axis.name, " ", axis.rank);
  return Json{{"works", works},
              {"marks", marks},
              {"arrows", arrows},
              {"units", units},
              {"held", held},
              {"name", sentence("rank ", mesh_.rank, places, places.empty() ? "" : ")")}}
      .dump();
}

namespace {

// The works of all ranks, those of the first rank first.
struct Joined {
  std::vector<Task> tasks;
  std::vector<Span> spans;                // a collective's begins where its rank has come to it
  std::vector<std::vector<int>> members;  // of the collectives
  std::vector<std::vector<int>> sources;  // of each task: see Recorder
  bool only_sends(int task) const {
    return sources[task].empty() && std::ranges::any_of(members[tasks[task].collective],
                                                        [&](int i) { return !sources[i].empty(); });
  }
  // Those that a collective waits for: in a ring of sends only its sources.
  std::vector<int> needs(int task) const {
    std::vector<int> needed = members[tasks[task].collective];
    const std::vector<int>& from = sources[task];
    if (needed.size() > 2 && !from.empty())
      std::erase_if(needed, [&](int i) {
        return i != task && std::ranges::find(from, tasks[i].rank) == from.end();
      });
    return needed;
  }
};

Joined join_works(const std::vector<Json>& ranks) {
  Joined all;
  std::map<std::pair<std::string, int>, int> numbers;  // of the collectives
  for (size_t r = 0; r < ranks.size(); r++) {
    const int first = int(all.tasks.size());
    std::map<std::string, int> calls;
    for (const Json& w : ranks[r]["works"]) {
      const int after = w[1];
      Task task{int(r), Queue(w[0].get<int>()), w[2], after < 0 ? -1 : first + after};
      if (const std::string who = w[5]; !who.empty()) {
        const int next = int(all.members.size());
        task.collective = numbers.try_emplace({who, calls[who]++}, next).first->second;
        if (task.collective == next) all.members.emplace_back();
        all.members[task.collective].push_back(int(all.tasks.size()));
      }
      all.tasks.push_back(task);
      all.spans.push_back({w[3], w[4]});
      all.sources.push_back(w[6]);
    }
  }
  return all;
}

// Moves the ranks' clocks until none ends a collective before another begins it, and none a receive
// before its send: as often as a chain of ranks is long. Clocks that drift may still contradict
// each other then.
void align(Joined& all, size_t ranks) {
  std::vector<double> shift(ranks);
  bool moved = true;
  for (size_t pass = 0; pass < ranks && std::exchange(moved, false); pass++)
    for (const std::vector<int>& members : all.members)
      for (const int i : members) {
        if (all.only_sends(i)) continue;  // and may end before it is received
        for (const int j : all.needs(i)) {
          double& mine = shift[all.tasks[j].rank];
          const double latest = shift[all.tasks[i].rank] + all.spans[i].end - all.spans[j].start;
          if (mine <= latest + 1e-9) continue;
          mine = latest;
          moved = true;
        }
      }
  double zero = INFINITY;
  for (size_t i = 0; i < all.spans.size(); i++)
    zero = std::min(zero, all.spans[i].start + shift[all.tasks[i].rank]);
  for (size_t i = 0; i < all.spans.size(); i++) {
    const double later = shift[all.tasks[i].rank] - zero;
    all.spans[i] = {all.spans[i].start + later, all.spans[i].end + later};
  }
}

void rebuild(Joined& all, size_t ranks) {
  for (const std::vector<int>& members : all.members) {
    double least = INFINITY;
    for (const int i : members) least = std::min(least, all.tasks[i].duration);
    for (const int i : members) all.tasks[i].duration = least;
  }
  all.spans = run(all.tasks);
  std::vector<double> free(2 * ranks);
  for (size_t i = 0; i < all.tasks.size(); i++) {
    const Task& task = all.tasks[i];
    double& until = free[2 * task.rank + int(task.queue)];
    if (task.collective >= 0)
      all.spans[i].start = std::max(until, task.after < 0 ? 0 : all.spans[task.after].end);
    until = all.spans[i].end;
  }
}

double microseconds(double seconds) { return std::round(seconds * 1e9) * 1e-3; }

// The events as text, in the order of rank, row and time; of two that begin together, the longer
// one first. An event ends among its arguments: its two braces are closed here.
class Lines {
 public:
  void add(const std::string& kind, size_t rank, int row, double begin, double end,
           const std::string& event) {
    const double from = microseconds(begin), lasts = microseconds(end) - from;
    lines_.insert({{rank, kind == "M" ? -1 : row, from, -lasts},
                   format("{\"ph\":\"%s\",\"pid\":%zu,\"tid\":%d,\"ts\":%.3f,", kind.c_str(), rank,
                          row, from) +
                       (kind == "X" ? format("\"dur\":%.3f,", lasts) : "") + event + "}}"});
  }
  void arrow(const char* name, size_t from, double begin, size_t to, int to_row, double end) {
    const std::string event = sentence("\"cat\":\"flow\",\"bp\":\"e\",\"name\":\"", name,
                                       "\",\"id\":", ++arrows_, ",\"args\":{");
    add("s", from, 1, begin, begin, event);
    add("f", to, to_row, end, end, event);
  }
  std::string text() const {
    std::string all;
    for (const auto& [place, line] : lines_) all += (all.empty() ? "" : ",\n") + line;
    return all;
  }

 private:
  std::multimap<std::tuple<size_t, int, double, double>, std::string> lines_;
  int arrows_ = 0;
};

}  // namespace

void Trace::write() const {
  std::vector<Json> ranks;
  for (const std::string& text : gather_text(describe())) ranks.push_back(Json::parse(text));
  if (mesh_.rank) return;
  Joined all = join_works(ranks);
  rebuilds_ ? rebuild(all, ranks.size()) : align(all, ranks.size());
  const auto moves = [&](int task) {  // when the last of the ranks that it needs has come
    double last = 0;
    for (const int i : all.needs(task)) last = std::max(last, all.spans[i].start);
    return last;
  };
  Lines lines;
  Json layout, units, held;
  int first = 0;  // task of the rank
  for (size_t r = 0; r < ranks.size(); r++) {
    const Json& rank = ranks[r];
    const auto name = [&](const char* what, int row, const std::string& name) {
      lines.add("M", r, row, 0, 0,
                sentence("\"name\":\"", what, "\",\"args\":{\"name\":\"", name, "\""));
    };
    name("process_name", 0, rank["name"]);
    name("thread_name", 0, "compute");
    name("thread_name", 1, "communication");
    const int count = int(rank["works"].size());
    const auto time = [&](int work, int edge) {
      return work < 0 ? 0 : edge ? all.spans[first + work].end : all.spans[first + work].start;
    };
    for (const Json& m : rank["marks"]) {
      const int row = m[1], work = m[2], edge = m[3], last = m[4];
      std::string event = m[5];
      if (row && last >= 0) {
        const int task = first + work;
        const auto [start, end] = all.spans[task];
        // a send may end before it is received, and has waited for nobody then
        const double last_came = moves(task), moved = last_came > end ? start : last_came;
        event += format(",\"id\":%d,\"waited_us\":%.3f", all.tasks[task].collective,
                        microseconds(moved) - microseconds(start));
        for (const int from : rank["works"][work][6])
          for (const int i : all.needs(task))
            if (all.tasks[i].rank == from)
              lines.arrow("send", from, all.spans[i].start, r, 1, (moved + end) / 2);
      }
      lines.add(m[0], r, row, time(work, edge), last < 0 ? 0 : time(last, 1), event);
    }
    for (const Json& arrow : rank["arrows"]) {
      int use = arrow[1];
      while (use < count && rank["works"][use][0] != Recorder::compute) use++;
      if (use < count)
        lines.arrow("gather", r, moves(first + arrow[0].get<int>()), r, 0, time(use, 0));
    }
    units[std::to_string(r)] = rank["units"];
    held[std::to_string(r)] = rank["held"];
    first += count;
  }
  std::string title;
  for (const Axis& axis : mesh_.axes) {
    layout[axis.name] = axis.size;
    if (axis.size > 1) title += sentence(title.empty() ? "" : ", ", axis.name, " ", axis.size);
  }
  const Fsdp& fsdp = trainer_.fsdp;
  const int64_t limit = device().memory_limit;
  const Json about{{"layout", layout},
                   {"ranks", mesh_.size},
                   {"title", title.empty() ? "one rank" : title},
                   {"schedule", trainer_.pipeline.schedule().row->name},
                   {"clock", rebuilds_ ? "rebuilt" : "measured"},
                   {"steps", steps_},
                   {"units", units},
                   {"shards_parameters", fsdp.shards_parameters()},
                   {"shards_gradients", fsdp.shards_gradients()},
                   {"memory_limit", limit ? Json(limit) : Json()},
                   {"held", held}};
  std::ofstream out(path_);
  out << "{\"traceEvents\":[\n" << lines.text() << "\n],\n\"threefold\":" << about << "}\n";
  out.close();
  REQUIRE(out, "--trace: ", path_, " cannot be written: ", strerror(errno));
}
