// test_parity.cpp: the parity matrix. Every mesh pp x replicate x fsdp x cp x tp of up to 8 ranks
// against one rank in f64, with a covering set of settings: whatever axes a mesh has, any two
// values of any two settings that matter there come together in some mesh with those axes. `make
// parity` runs all of it, one mpiexec a world size, and prints one table; `make test` runs one
// setting a mesh (test_parity first).
#include <map>
#include <set>

#include "tests/parity.h"

namespace {

const GptConfig kConfig = [] {  // 17 layers, 9 heads, 13 words: most axes divide none of them
  GptConfig g{17, 18, 9, 5, 13};
  g.dtype = Dtype::f64;
  return g;
}();
constexpr int kMostRanks = 8;

// divides by data-parallel ranks times micro-batches of any setting below
int64_t batch_of(const Layout& l) { return 4 * l.ranks() / l["cp"]; }
// with cp a sequence is cut into 2 cp pieces
int64_t context_of(const Layout& l) { return l["cp"] == 1 ? kConfig.context : 17; }

// ---- settings: a value of each factor

enum Factor {
  zero,
  reshard,
  prefetch,
  schedule,
  rows,
  recompute,
  microbatches,
  attention,
  kFactors
};
const std::vector<std::string> kSchedules = schedule_names();
const int kValues[kFactors] = {3, 2, 3, int(kSchedules.size()), 2, 2, 3, 2};
using Setting = std::array<int, kFactors>;

// A value that changes nothing in this mesh counts as absent, and only its first is tried.
bool matters(const Layout& l, const Setting& s, int factor) {
  switch (factor) {
    case zero:
    case prefetch: return l["fsdp"] * l["cp"] > 1;
    case reshard: return l["fsdp"] * l["cp"] > 1 && s[zero] == 2;
    case schedule: return l["pp"] > 1;
    case rows: return l["tp"] > 1;
    default: return true;
  }
}
// Whether the schedule takes only multiples of p micro-batches: here p or 2 p.
bool takes_multiples(const Layout& l, const Setting& s) {
  static const std::vector<bool> rings = [] {  // looked up once, not for every setting
    std::vector<bool> of;
    for (const std::string& name : kSchedules)
      of.push_back(schedule_row(name).placement == Placement::ring);
    return of;
  }();
  return l["pp"] > 1 && rings[size_t(s[schedule])];
}
bool allowed(const Layout& l, const Setting& s) {
  for (int f = 0; f < kFactors; f++)
    if (s[size_t(f)] && !matters(l, s, f)) return false;
  return !takes_multiples(l, s) || s[microbatches] > 0;
}

int64_t microbatches_of(const Layout& l, const Setting& s) {
  const int64_t m = int64_t(1) << s[microbatches];
  return takes_multiples(l, s) ? l["pp"] * m / 2 : m;
}

TrainerOptions options_of(const Layout& l, const Setting& s) {
  TrainerOptions o;
  o.batch = batch_of(l), o.microbatch = o.batch / (microbatches_of(l, s) * l.data_ranks());
  o.fsdp = {1 + s[zero], s[reshard] == 0, s[prefetch]};
  o.schedule = kSchedules[size_t(s[schedule])];
  return o;
}
GptConfig config_of(const Layout& l, const Setting& s) {
  GptConfig g = kConfig;
  g.context = context_of(l);
  g.sequence_parallel = s[rows], g.recompute = s[recompute],
  g.attention = s[attention] ? AttentionKind::flash : AttentionKind::plain;
  return g;
}
std::string name_of(const Layout& l, const Setting& s) {
  const TrainerOptions o = options_of(l, s);
  return sentence(to_string(l), ", zero ", o.fsdp.zero, o.fsdp.reshard ? "" : " without reshard",
                  ", prefetch ", o.fsdp.prefetch, ", ", o.schedule, ", ", microbatches_of(l, s),
                  " micro-batches", s[rows] ? ", sequence parallel" : "",
                  s[recompute] ? ", recompute" : "", s[attention] ? ", flash" : "");
}

// ---- the covering set

using Pair = std::array<int, 5>;  // which axes the mesh has, factor and value, factor and value
std::vector<Pair> pairs_of(const Layout& l, const Setting& s) {
  std::vector<Pair> pairs;
  int axes = 0;  // a bit each
  for (const int64_t size : l.sizes) axes = 2 * axes + (size > 1);
  for (int f = 0; f < kFactors; f++)
    for (int g = f + 1; g < kFactors; g++)
      if (matters(l, s, f) && matters(l, s, g))
        pairs.push_back({axes, f, s[size_t(f)], g, s[size_t(g)]});
  return pairs;
}

template <class Visit> void each_setting(Visit visit) {
  Setting s{};
  for (int f = 0; f < kFactors;) {
    visit(s);
    for (f = 0; f < kFactors && ++s[size_t(f)] == kValues[f]; f++) s[size_t(f)] = 0;
  }
}

struct Cell {
  Layout layout;
  std::vector<Setting> settings;
};

// Greedy: meshes take turns, each takes the setting that brings most new pairs, until none brings
// any; every mesh has at least one, and none more than so many.
std::vector<Cell> matrix(size_t settings_a_mesh = SIZE_MAX) {
  std::set<Pair> covered;
  std::vector<Cell> cells;
  for (int n = 1; n <= kMostRanks; n++)
    for (const Layout& l : layouts_of(n)) cells.push_back({l, {}});
  bool more = true;
  for (size_t turn = 0; more && turn < settings_a_mesh; turn++) {
    more = false;
    for (Cell& cell : cells) {
      Setting best{};
      int most = cell.settings.empty() ? -1 : 0;
      each_setting([&](const Setting& s) {
        if (!allowed(cell.layout, s)) return;
        int fresh = 0;
        for (const Pair& p : pairs_of(cell.layout, s)) fresh += !covered.count(p);
        if (fresh > most) most = fresh, best = s;
      });
      if (most < 0 || (most == 0 && !cell.settings.empty())) continue;
      for (const Pair& p : pairs_of(cell.layout, best)) covered.insert(p);
      cell.settings.push_back(best);
      more = true;
    }
  }
  return cells;
}

// ---- running it

struct Reference {
  Run run;
  std::vector<double> initial;
};
// by context and batch
using References = std::map<std::pair<int64_t, int64_t>, Reference>;
const Reference& reference_of(References& known, const Layout& l, int steps) {
  const auto key = std::pair(context_of(l), batch_of(l));
  if (known.count(key)) return known[key];
  GptConfig g = kConfig;
  g.context = context_of(l);
  g.attention = AttentionKind::plain;  // flash attention pads these tiny heads to whole tiles
  WholeGpt gpt(g, 1337);
  Reference& r = known[key];
  r.run = one_rank(g, batch_of(l), steps);
  for (Param* p : gpt.params()) append(r.initial, download(p->own(p->value)));
  return r;
}

void run_matrix(size_t settings_a_mesh, int steps) {
  References references;
  Difference worst;
  int settings = 0;
  for (const Cell& cell : matrix(settings_a_mesh)) {
    const Layout& l = cell.layout;
    if (l.ranks() != job().size) continue;
    const Reference& reference = reference_of(references, l, steps);
    Mesh mesh = open_mesh(l);
    Parity parity(reference.run, steps);
    for (const Setting& s : cell.settings) {
      if (&s == &cell.settings[0]) {
        Trainer trainer(mesh, config_of(l, s), options_of(l, s));
        CHECK(whole_model(mesh, trainer, WholeOf::weights) == reference.initial, name_of(l, s),
              ": initial weights differ from one rank's");
      }
      parity.check(mesh, config_of(l, s), options_of(l, s), name_of(l, s));
    }
    close_mesh(mesh);
    const Difference& of_mesh = parity.worst();
    worst.widen(of_mesh);
    settings += parity.settings();
    if (job().speaks)
      printf("  %5d %9zu   %8.1e %9.1e %8.1e %8.1e   %s\n", job().size, cell.settings.size(),
             of_mesh.loss, of_mesh.gradients, of_mesh.norm, of_mesh.weights, to_string(l).c_str()),
          fflush(stdout);
  }
  CHECK(settings > 0);
  measured(settings, " settings: loss ", worst.loss, ", gradients ", worst.gradients, ", norm ",
           worst.norm, ", weights ", worst.weights, "; the same initial bits");
}

}  // namespace

TEST(any_two_values_of_settings_meet_in_every_kind_of_mesh) {
  std::set<Pair> wanted, got;
  size_t settings = 0;
  const std::vector<Cell> cells = matrix();
  for (const Cell& cell : cells) {
    each_setting([&](const Setting& s) {
      if (allowed(cell.layout, s))
        for (const Pair& p : pairs_of(cell.layout, s)) wanted.insert(p);
    });
    for (const Setting& s : cell.settings)
      for (const Pair& p : pairs_of(cell.layout, s)) got.insert(p);
    CHECK(!cell.settings.empty(), to_string(cell.layout));
    settings += cell.settings.size();
  }
  CHECK(wanted == got, wanted.size(), " pairs, of which ", got.size(), " are covered");
  measured(cells.size(), " meshes, ", settings, " settings, ", wanted.size(), " pairs");
}

TEST(first_setting_of_every_mesh_equals_one_rank_in_f64) { run_matrix(1, kSteps); }
TEST(whole_matrix_equals_one_rank_in_f64) { run_matrix(SIZE_MAX, 5); }

int main(int argc, char** argv) { return run_mpi_tests(argc, argv); }
