// test_trace.cpp: the file that --trace writes, for every strategy and schedule that fits the
// number of ranks: it parses, bars nest, arrows and collectives pair up, bytes equal the ledger and
// memory what the device counts. Run under mpiexec -n 1, 4, 8.
#include "report/trace.h"

#include <unistd.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

#include "tests/parity.h"

namespace {

using Json = nlohmann::json;

const GptConfig kConfig{{8, 16, 8, 8, 16}};

// The second and third of three steps, on every rank.
Json traced(Mesh& mesh, const GptConfig& config, const TrainerOptions& options, bool rebuilds,
            MemoryUse& memory) {
  char path[] = "/tmp/trace-XXXXXX";
  if (mesh.rank == 0) close(mkstemp(path));
  MPI_Ibcast(path, sizeof path, MPI_CHAR, 0, MPI_COMM_WORLD, Finished());
  Trainer trainer(mesh, config, options);
  recorder = {};
  Trace trace(mesh.rank ? "" : path, mesh, trainer, rebuilds);
  for (int step = 1; step <= 3; step++) {
    if (step == 2) ledger.rows.clear();
    if (step > 1) trace.begin_step(step);
    op_times.start(step > 1 ? OpTimes::everything : OpTimes::nothing);
    trainer.gradients(trainer.read([&](int64_t s) { return sequence(step, s, config); }));
    trainer.update(kLearningRate);
    trainer.results();
    op_times.stop();
    if (step > 1) trace.end_step();
  }
  memory = device().memory;
  trace.write();
  barrier();
  std::ifstream in(path);
  const std::string text{std::istreambuf_iterator<char>(in), {}};
  barrier();
  if (mesh.rank == 0) {
    unlink(path);
    unlink((path + std::string(".1")).c_str());  // mkstemp's
  }
  Json file = Json::parse(text);
  for (Json& e : file["traceEvents"]) e["args"];
  return file;
}

int64_t ns(const Json& us) { return llround(us.get<double>() * 1e3); }
int64_t begin(const Json& e) { return ns(e["ts"]); }
int64_t end(const Json& e) { return ns(e["ts"]) + ns(e["dur"]); }

void check_bars(const Json& events, const std::string& name) {
  std::map<std::pair<int, int>, std::vector<const Json*>> open;  // by rank and row
  std::map<std::pair<int, int>, int64_t> latest;
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
    around.push_back(&e);
  }
}

// Returns how many collectives there are.
size_t check_collectives(const Json& events, const std::string& name) {
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
    for (const Json* e : members) {
      const Json& args = (*e)["args"];
      const int64_t moves = begin(*e) + ns(args["waited_us"]);
      CHECK_LE(moves, end(*e), name, ": ends before another rank begins it: ", *e);
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
  for (const Json& e : events) {
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
  Json last;
  for (const Json& e : file["traceEvents"]) {
    if (e["pid"] != mesh.rank) continue;
    const Json& args = e["args"];
    if (e["ph"] == "C") last = args;
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

// What is gathered or reduced comes after that, each once, and what a micro-batch keeps is freed.
void check_states(const Json& events, const std::string& name) {
  const std::map<std::string, std::pair<const char*, int>> kinds{
      {"unshard", {"gather", 1}}, {"arrived", {"gather", -1}}, {"reduce", {"sum", 1}},
      {"reduced", {"sum", -1}},   {"keeps", {"live", 1}},      {"frees", {"live", -1}}};
  std::map<std::tuple<int, std::string, int, int>, int64_t> open;
  std::vector<const Json*> notes;
  for (const Json& e : events)
    if (e["ph"] == "i" && e["name"] != "reshard") notes.push_back(&e);
  std::ranges::stable_sort(notes, {}, [](const Json* e) { return begin(*e); });
  for (const Json* e : notes) {
    const Json& args = (*e)["args"];
    const auto [kind, change] = kinds.at((*e)["name"]);
    const bool live = (*e)["cat"] == "live";
    int64_t& count = open[{(*e)["pid"], kind, args.value(live ? "microbatch" : "unit", -1),
                           args.value("chunk", 0)}];
    count += change * (live ? int64_t(args["bytes"]) : 1);
    CHECK_LE(0, count, name, ": ", *e);
  }
  for (const auto& [what, count] : open) CHECK_EQ(count, 0, name, ": ", std::get<1>(what));
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
                            {"tp by rows", {{"tp", n}}, "1f1b", {}, true},
                            {"cp", {{"cp", n}}}};
  for (int zero = 1; zero <= 3; zero++)
    all.push_back({sentence("ZeRO-", zero), {{"fsdp", n}}, "1f1b", {zero}});
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
        CHECK_EQ(file["threefold"]["steps"], (Json{2, 3}), name);
        check_bars(all, name);
        collectives += check_collectives(all, name);
        arrows += check_arrows(all, name);
        check_states(all, name);
      }));
      CHECK(wrong.empty(), wrong);
      files++;
      events += all.size();
      close_mesh(mesh);
    }
  measured(files, " files, ", events, " events, ", collectives, " collectives, ", arrows,
           " arrows");
}

int main(int argc, char** argv) { return run_mpi_tests(argc, argv); }
