// test_trace.cpp: the file that --trace writes, for every strategy and schedule that fits the
// number of ranks: it parses, bars nest, arrows and collectives pair up, bytes equal the ledger and
// memory what the device counts. Run under mpiexec -n 1, 4, 8.
#include "report/trace.h"

#include <unistd.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

#include "kernels/op_times.h"
#include "tests/parity.h"

namespace {

using Json = nlohmann::json;

const GptConfig kConfig{{8, 16, 8, 8, 16}};

// The second and third of three steps, on every rank.
Json traced(Mesh& mesh, const GptConfig& config, const TrainerOptions& options, bool rebuilds,
            MemoryUse& memory) {
  char path[] = "/tmp/trace-XXXXXX";
  if (mesh.rank == 0) close(mkstemp(path));
  MPI_Ibcast(path, sizeof path, MPI_CHAR, 0, MPI_COMM_WORLD, UntilDone());
  Trainer trainer(mesh, config, options);
  recorder = {};
  Trace trace(mesh.rank ? "" : path, mesh, trainer, rebuilds);
  for (int step = 1; step <= 3; step++) {
    if (step == 2) ledger.rows.clear();
    if (step > 1) trace.begin_step();
    op_times.start(step > 1 ? OpTimes::everything : OpTimes::nothing);
    trainer.gradients(trainer.read([&](int64_t s) { return sequence(step, s, config); }));
    trainer.update(kLearningRate);
    trainer.results();
    op_times.stop();
    if (step > 1) trace.end_step();
    else trainer.evaluate(options.batch, [&](int64_t s) { return sequence(0, s, config); });
  }
  memory = device().memory;
  CHECK_EQ(trace.write(), "");
  barrier();
  std::ifstream in(path);
  const std::string text{std::istreambuf_iterator<char>(in), {}};
  barrier();
  if (mesh.rank == 0) {
    unlink(path);
    unlink((path + std::string(".1")).c_str());  // mkstemp's
  }
  return Json::parse(text);
}

int64_t ns(const Json& us) { return llround(us.get<double>() * 1e3); }
int64_t begin(const Json& e) { return ns(e["ts"]); }
int64_t end(const Json& e) { return ns(e["ts"]) + ns(e["dur"]); }

void check_bars(const Json& events, bool rebuilds, const std::string& name) {
  std::map<std::pair<int, int>, std::vector<const Json*>> open;  // by rank and row
  std::map<std::pair<int, int>, int64_t> latest, computed;
  for (const Json& e : events) {
    const std::pair<int, int> row{e["pid"], e["tid"]};
    if (e["ph"] != "X") continue;
    CHECK_LE(latest[row], begin(e), name, ": bars are not in order: ", e);
    latest[row] = begin(e);
    auto& around = open[row];
    // an op that takes no time may stand at the end of its part
    while (!around.empty() &&
           end(*around.back()) < begin(e) + (e["cat"] != "op" || (*around.back())["cat"] == "op"))
      around.pop_back();
    if (!around.empty())
      CHECK(row.second == 0 && end(e) <= end(*around.back()), name, ": ", e, " overlaps ",
            *around.back());
    CHECK(e["cat"] != "op" || (!around.empty() && (*around.back())["cat"] == "part"), name, ": ", e,
          " is in no part");
    CHECK(e["cat"] != "part" || e["args"]["pass"] != "", name, ": ", e, " has no name");
    for (const char* of_none : {"begin", "sum"})
      CHECK(e["cat"] != "part" || e["args"]["pass"] != of_none || e["args"]["microbatch"] == -1,
            name, ": ", e);
    if (e["cat"] == "op") {
      const bool is_first = begin(e) == begin(*around.back());
      CHECK(!rebuilds || is_first || begin(e) == computed[row], name, ": waits in its part: ", e);
      computed[row] = end(e);
    }
    around.push_back(&e);
  }
}

// Returns how many collectives there are.
size_t check_collectives(const Json& events, bool rebuilds, const std::string& name) {
  std::map<int, std::vector<const Json*>> by_id;
  for (const Json& e : events)
    if (e["cat"] == "collective") by_id[e["args"]["id"]].push_back(&e);
  for (const auto& [id, members] : by_id) {
    const Json& first = (*members[0])["args"];
    std::vector<int> ranks;
    int64_t last = 0;
    for (const Json* e : members) {
      ranks.push_back((*e)["pid"]);
      last = std::max(last, begin(*e));
      for (const char* same : {"op", "axis", "ranks"})
        CHECK_EQ((*e)["args"][same], first[same], name, ": collective ", id);
      if (first["op"] != "exchange")
        CHECK_EQ((*e)["args"]["bytes"], first["bytes"], name, ": ", id);
    }
    std::ranges::sort(ranks);
    CHECK_EQ(Json(ranks), first["ranks"], name, ": who takes part in ", first);
    const int64_t moved = end(*members[0]) - begin(*members[0]) - ns(first["waited_us"]);
    for (const Json* e : members) {
      const Json& args = (*e)["args"];
      const int64_t moves = begin(*e) + ns(args["waited_us"]);
      CHECK_LE(moves, end(*e), name, ": ends before another rank begins it: ", *e);
      if (rebuilds)  // what is no waiting is moving, for all ranks as long
        CHECK_LE(std::abs(end(*e) - moves - moved), 2, name, ": ", *e);
      const bool sends = args["op"] == "exchange" && args["receives"].empty();
      if (sends && end(*e) < last)
        CHECK_EQ(moves, begin(*e), name, ": a send that waited for none");
      // in a ring of sends a rank waits for the one before it alone
      else if (args["op"] != "exchange" || members.size() == 2)
        CHECK_EQ(moves, last, name, ": ", *e);
    }
  }
  return by_id.size();
}

// Returns how many arrows there are.
size_t check_arrows(const Json& events, const std::string& name) {
  std::map<int, std::vector<const Json*>> by_id;
  std::multiset<std::tuple<int, int, int64_t>> expected, found;  // receiver, sender, bytes
  std::set<std::pair<int, int64_t>> begun;                       // collectives, by rank
  for (const Json& e : events) {
    if (e["cat"] == "collective") begun.emplace(e["pid"], begin(e));
    if (e["cat"] == "flow") by_id[e["id"]].push_back(&e);
    if (e["cat"] != "collective" || e["args"]["op"] != "exchange") continue;
    for (const Json& r : e["args"]["receives"]) expected.emplace(e["pid"], r["from"], r["bytes"]);
    for (const Json& s : e["args"]["sends"]) found.emplace(s["to"], e["pid"], s["bytes"]);
  }
  CHECK(expected == found, name, ": sends and receives differ");
  size_t sends = 0;
  for (const auto& [id, two] : by_id) {
    CHECK_EQ(two.size(), size_t(2), name, ": arrow ", id);
    const bool turned = (*two[0])["ph"] == "f";
    const Json &from = *two[turned], &to = *two[!turned];
    CHECK(from["ph"] == "s" && to["ph"] == "f", name, ": arrow ", id);
    CHECK_LE(begin(from), begin(to), name, ": an arrow back in time ", from);
    CHECK(begun.contains({from["pid"], begin(from)}), name, ": an arrow from nothing ", from);
    if (from["name"] == "send") sends++;
    else CHECK(from["pid"] == to["pid"] && from["tid"] == 1 && to["tid"] == 0, name, ": ", from);
  }
  CHECK_EQ(sends, expected.size(), name, ": arrows of sends");
  return by_id.size();
}

// Of this rank: what it sent, by purpose, is what the ledger counted, and memory ends as it is.
void check_sums(const Json& file, const Mesh& mesh, const MemoryUse& memory,
                const std::string& name) {
  std::map<std::tuple<std::string, std::string, std::string>, double> sent, counted;
  Json last = Json::object();
  for (const Json& e : file["traceEvents"]) {
    if (e["pid"] != mesh.rank) continue;
    const Json& args = e["args"];
    if (e["name"] == "memory") last.update(args);
    if (e["cat"] != "collective" || args["bytes"] == 0) continue;
    const std::string op = args["op"];
    sent[{args["axis"], op == "exchange" ? "send" : op, args["purpose"]}] += double(args["bytes"]);
  }
  for (const auto& [key, row] : ledger.rows)
    counted[{std::get<0>(key), name_of(std::get<1>(key)), name_of(std::get<2>(key))}] =
        double(row.numerator) / row.n;
  for (const auto& [key, bytes] : counted)
    CHECK_EQ(sent[key], bytes, name, ": ", std::get<0>(key), " ", std::get<1>(key), " for ",
             std::get<2>(key));
  CHECK_EQ(sent.size(), counted.size(), name, ": rows of the ledger");
  for (int c = 0; c < kMemoryCategories; c++)
    CHECK_EQ(last[name_of(Memory(c))], memory.now[c], name, ": ", name_of(Memory(c)));
}

// What micro-batches keep is freed; it is all of the activations, but for what was there before and
// the tied gradient that the last stage of a pipeline sends to the first.
void check_activations(const Json& file, const std::string& name) {
  std::map<std::pair<int, int64_t>, int64_t> kept, all;  // by rank and time
  std::map<std::pair<int, std::string>, int64_t> parts;  // of a rank's micro-batches
  std::map<int, int64_t> sums;                           // of them
  for (const Json& e : file["traceEvents"]) {
    if (e["ph"] != "C") continue;
    const std::pair<int, int64_t> at{e["pid"], begin(e)};
    if (e["name"] == "memory" && e["args"].contains("activations"))
      all[at] = e["args"]["activations"];
    if (e["name"] != "activations") continue;
    for (const auto& [of, bytes] : e["args"].items()) {
      CHECK_LE(0, int64_t(bytes), name, ": ", e);
      sums[e["pid"]] += int64_t(bytes) - std::exchange(parts[{e["pid"], of}], int64_t(bytes));
    }
    kept[at] = sums[e["pid"]];
  }
  CHECK(!kept.empty(), name);
  for (const auto& [at, bytes] : kept) {
    const int64_t before = all.lower_bound({at.first, INT64_MIN})->second;
    const int64_t more = all.at(at) - before - bytes;
    CHECK(more == 0 || (more > 0 && file["threefold"]["stages"] > 1), name, ": ", more,
          " bytes more on rank ", at.first, " at ", at.second);
  }
  for (const auto& [rank, bytes] : sums) CHECK_EQ(bytes, 0, name, ": rank ", rank);
}

// A sharded unit is gathered and resharded in turn, and is not whole in the end.
void check_units(const Json& file, const std::string& name) {
  if (!file["threefold"]["shards_parameters"].get<bool>()) return;
  std::map<std::pair<int, std::string>, std::vector<const Json*>> changes;  // of a rank's unit
  for (const Json& e : file["traceEvents"]) {
    if (e["cat"] == "unit") changes[{e["pid"], e["args"]["unit"]}].push_back(&e);
    else if (e["cat"] == "collective" && e["args"]["function"] == "start_unshard")
      changes[{e["pid"], e["args"]["for"]}].push_back(&e);
  }
  CHECK(!changes.empty(), name);
  for (auto& [unit, all] : changes) {
    std::ranges::stable_sort(all, {}, [](const Json* e) { return begin(*e); });
    for (size_t i = 0; i < all.size(); i++)
      CHECK_EQ((*all[i])["cat"], i % 2 ? "unit" : "collective", name, ": ", *all[i]);
    CHECK_EQ(all.size() % 2, size_t(0), name, ": ", unit.second, " is whole in the end");
  }
}

// Where parameters and gradients stay whole, later stages gather before their first exchange of a
// step and sum after the last one, but for that of the tied gradient.
void check_what_stands_before_exchanges(const Json& file, const Mesh& mesh,
                                        const std::string& name) {
  if (mesh["pp"].size == 1 || mesh["fsdp"].size == 1 ||
      file["threefold"]["shards_parameters"].get<bool>())
    return;
  std::map<int, std::string> orders;  // of a rank; its events stand in the order of the queue
  for (const Json& e : file["traceEvents"]) {
    if (e["cat"] != "collective") continue;
    const std::string function = e["args"]["function"];
    std::string& order = orders[e["pid"]];
    const std::string kind = e["args"]["op"] == "exchange" ? "x"
                             : function == "start_unshard" ? "g"
                             : function == "start_reduce"  ? "s"
                                                           : "";
    if (!order.ends_with(kind)) order += kind;
  }
  for (int rank = mesh.size / mesh["pp"].size; rank < mesh.size; rank++)
    CHECK_EQ(orders[rank], "gxsxgxsx", name, ": rank ", rank, ", two steps");
}

struct Strategy {
  std::string name;
  Layout layout;
  std::string schedule = "1f1b";
  FsdpOptions fsdp = {};
  bool by_rows = false;
};
std::vector<Strategy> strategies(int n) {
  if (n == 1) return {{"serial", {}}};
  if (n == 8)
    return {{"3d", {{"pp", 2}, {"fsdp", 2}, {"tp", 2}}, "zb", {}, true},
            {"hybrid", {{"replicate", 2}, {"fsdp", 2}, {"cp", 2}}}};
  std::vector<Strategy> all{{"replicate", {{"replicate", n}}},
                            {"tp", {{"tp", n}}},
                            {"tp, sequence parallel", {{"tp", n}}, "1f1b", {}, true},
                            {"cp", {{"cp", n}}}};
  for (int zero = 1; zero <= 3; zero++)
    all.push_back({sentence("ZeRO-", zero), {{"fsdp", n}}, "1f1b", {zero}});
  if (n == 4)
    for (const std::string schedule : {"1f1b", "interleaved"})
      all.push_back({"pp of ZeRO-1 " + schedule, {{"pp", 2}, {"fsdp", 2}}, schedule, {1}});
  for (const std::string& schedule : schedule_names())
    all.push_back({"pp " + schedule, {{"pp", n}}, schedule});
  return all;
}

}  // namespace

TEST(a_trace_of_every_strategy_nests_pairs_and_adds_up) {
  size_t files = 0, events = 0, collectives = 0, arrows = 0;
  for (const Strategy& s : strategies(job().size))
    for (const bool rebuilds : {true, false}) {
      GptConfig config = kConfig;
      config.sequence_parallel = s.by_rows;
      config.recompute = s.by_rows;
      TrainerOptions options;
      options.microbatch = 1;
      const bool staged = s.layout["pp"] > 1;
      if (!staged) config.layers = 2;
      options.batch = (staged ? 4 : 2) * s.layout.data_ranks();
      options.schedule = s.schedule;
      options.fsdp = s.fsdp;
      Mesh mesh = open_mesh(s.layout);
      const std::string name = s.name + (rebuilds ? ", rebuilt" : ", measured");
      MemoryUse memory;
      const Json file = traced(mesh, config, options, rebuilds, memory);
      const Json& all = file["traceEvents"];
      const std::string wrong = job().agree(error_of([&] {
        check_sums(file, mesh, memory, name);
        if (mesh.rank) return;
        CHECK_EQ(file["threefold"]["clock"], rebuilds ? "rebuilt" : "measured", name);
        const std::string title = file["threefold"]["title"];
        CHECK_EQ(title.find("sequence parallel") != title.npos, s.by_rows, name, ": ", title);
        CHECK(title.find(staged ? "4 micro-batches" : "2 micro-batches") != title.npos, title);
        CHECK_EQ(std::ranges::count(all, "read a batch", [](const Json& e) { return e["name"]; }),
                 2 * mesh.size, name, ": two steps of each rank");
        check_bars(all, rebuilds, name);
        collectives += check_collectives(all, rebuilds, name);
        arrows += check_arrows(all, name);
        check_activations(file, name);
        check_units(file, name);
        check_what_stands_before_exchanges(file, mesh, name);
      }));
      CHECK(wrong.empty(), wrong);
      files++;
      events += all.size();
      close_mesh(mesh);
    }
  measured(files, " files, ", events, " events, ", collectives, " collectives, ", arrows,
           " arrows");
}

// ---- overlap

// How many ops the host issues after each collective of a step and before the first that waits for
// it; by operation and axis.
std::map<std::string, std::vector<int>> ops_beside(const Layout& layout, GptConfig config,
                                                   const TrainerOptions& options) {
  Mesh mesh = open_mesh(layout);
  std::map<std::string, std::vector<int>> beside;
  {
    Trainer trainer(mesh, config, options);
    const Batch batch = trainer.read([&](int64_t s) { return sequence(1, s, config); });
    recorder = {};
    recorder.on = true;
    op_times.start(OpTimes::everything);
    trainer.gradients(batch);
    op_times.stop();
    recorder.on = false;
    const auto& works = recorder.works;
    for (int i = 0; i < std::ssize(works); i++) {
      if (works[i].queue == Recorder::compute) continue;
      int ops = 0;
      for (int j = i + 1; j < std::ssize(works); j++) {
        if (works[j].queue != Recorder::compute) continue;
        if (works[j].after >= i) break;
        ops++;
      }
      const Json& args = recorder.args.at(works[i].args);
      beside[args["op"].get<std::string>() + " " + args["axis"].get<std::string>()].push_back(ops);
    }
  }
  close_mesh(mesh);
  return beside;
}

TEST(what_travels_has_ops_beside_it) {
  const int n = job().size, layers = 3, m = 8;
  if (n == 1 || n == 8) skip("with 2 or 4 ranks");
  int travels = 0;
  for (const Strategy& s : strategies(n))
    for (const int prefetch : {0, 1}) {
      const bool staged = s.layout["pp"] > 1;
      if (staged && s.layout["fsdp"] > 1) continue;
      GptConfig config = kConfig;
      config.layers = staged ? 8 : layers;
      config.sequence_parallel = s.by_rows;
      TrainerOptions options;
      options.microbatch = 1;
      options.batch = (staged ? m : 1) * s.layout.data_ranks();
      options.schedule = s.schedule;
      options.fsdp = s.fsdp;
      options.fsdp.prefetch = prefetch;
      const auto beside = ops_beside(s.layout, config, options);
      // how many of them have at least so many ops beside them
      const auto count = [&](const char* what, int ops) {
        const auto found = beside.find(what);
        return found == beside.end()
                   ? 0
                   : std::ranges::count_if(found->second, [&](int k) { return k >= ops; });
      };
      const std::string name = sentence(s.name, ", prefetch ", prefetch);
      const std::string wrong = job().agree(error_of([&] {
        // while a block computes, its neighbour's weights and gradients travel
        const int gathers = s.layout["fsdp"] == 1 ? 0
                            : s.fsdp.zero == 3    ? 2 * (layers - 1)
                                                  : layers - 1;
        const char* sum = s.layout["fsdp"] > 1 ? "reduce_scatter fsdp" : "all_reduce replicate";
        if (s.layout.data_ranks() > 1) {
          CHECK_LE(prefetch ? gathers : 0, count("all_gather fsdp", 10), name);
          CHECK_LE(prefetch ? layers - 1 : 0, count(sum, 10), name);
          if (prefetch == 0) CHECK_EQ(count("all_gather fsdp", 1) + count(sum, 1), 0, name);
        }
        // in the backward an input gradient's sum has the weight gradient beside it
        if (s.layout["tp"] > 1)
          CHECK_EQ(count(s.by_rows ? "reduce_scatter tp" : "all_reduce tp", 1), 2 * layers + 1,
                   name);
        // all keys and gradients travel beside attention, but for the gradients that come home
        if (s.layout["cp"] > 1)
          CHECK_EQ(count("exchange cp", 1), 2 * layers * (n - 1) + layers * (n > 2), name);
        // warming up, the first stage sends while it computes the next forward
        if (staged && job().rank == 0)
          CHECK_LE(s.schedule == "gpipe" ? m - 1 : n - 1, count("exchange pp", 1), name);
      }));
      CHECK(wrong.empty(), wrong);
      for (const auto& [what, ops] : beside) travels += ops.size();
    }
  measured(travels, " collectives and exchanges of rank 0");
}

int main(int argc, char** argv) { return run_mpi_tests(argc, argv); }
