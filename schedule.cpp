// schedule.cpp: the table of schedules, and the one rule that places transfers.
//
// idea      A row says only what each stage computes, in order. Everything about communication
//           follows from that (schedule.h).
// cost      O(actions log actions); nothing here runs during a training step
// test      tests/test_schedule.cpp
#include "schedule.h"

#include <algorithm>
#include <map>
#include <utility>

#include "support/check.h"

// ---- the table: stage s of p, m micro-batches, V chunks

static double idle_of_whole_backwards(int p, int, const Times& t) { return (p - 1) * t.all(); }

static const ScheduleRow kRows[] = {
    {"gpipe", Place::line, false,
     [](int, int m, int, int) -> Phases {
       return {{m, "F"}, {m, "G"}};
     },
     idle_of_whole_backwards, [](int, int m, int, int) { return m; }},

    {"1f1b", Place::line, false,
     [](int p, int m, int, int s) -> Phases {
       return {{p - 1 - s, "F"},  // one for each later stage
               {m, "F G"}};
     },
     idle_of_whole_backwards, [](int p, int m, int, int s) { return std::min(p - s, m); }},

    {"interleaved", Place::ring, false,
     [](int p, int m, int V, int s) -> Phases {
       // up to the last chunk, then twice the way: a backward takes two forwards
       return {{(V - 1) * p + 2 * (p - 1 - s), "F"}, {V * m, "F G"}};
     },
     idle_of_whole_backwards,
     [](int p, int m, int V, int s) { return std::min((V - 1) * p + 2 * (p - 1 - s) + 1, V * m); }},

    // ZB-H1 is 1F1B whose backwards pass on the input gradient at once. Stage s puts its weight
    // gradients off by s micro-batches: as many as its warm-up is shorter than stage 0's, so all
    // stages hold p micro-batches, and the later ones have work left for the end.
    {"zb", Place::line, true,
     [](int p, int m, int, int s) -> Phases {
       return {{p - 1 - s, "F"}, {s, "F B"}, {m, "F B W"}};
     },
     [](int p, int m, const Times& t) {
       const double F = t.forward, B = t.input_gradient, W = t.weight_gradient;
       return std::max((p - 1) * std::max(F, B), (p - 1) * (F + B) - (std::min(m, p) - 1) * W);
     },
     [](int p, int m, int, int) { return std::min(p, m); }},

    {"zbv", Place::vee, true,
     [](int p, int m, int, int s) -> Phases {
       return {
           // until the first micro-batch has been at the bottom and comes up again
           {2 * (p - s) - 1, "F0"},
           {s, "F1 F0"},
           // until its gradient has been at the bottom, too: 2p chunks are live
           {p - s, "F1 B1 W1"},
           // each forward takes the memory that a weight gradient gave back
           {std::max(m, 2 * p - 1) - p, "F0 B0 W0 F1 B1 W1"},
           // no forwards are left: first what other stages wait for
           {s, "B0 B1"},
           {p - s, "B0 W0"},
           {s, "W1 W0"},
       };
     },
     [](int p, int m, const Times& t) {
       const double B = t.input_gradient, W = t.weight_gradient;
       return std::max((p - 1) * std::max(B, 2 * (B - W)), 2 * (2 * p - 1 - m) * B);
     },
     [](int p, int m, int, int s) {
       return std::min({2 * m, m + 1 + s, 2 * p});
     }},
};

std::vector<std::string> schedule_names() {
  std::vector<std::string> names;
  for (const ScheduleRow& row : kRows) names.push_back(row.name);
  return names;
}

const ScheduleRow& schedule_row(const std::string& name) {
  std::string names;
  for (const ScheduleRow& row : kRows) {
    if (row.name == name) return row;
    names += sentence(" ", row.name);
  }
  throw Error(sentence("there is no schedule '", name, "': choose one of", names));
}

// What a stage computes, in order. Without a digit steps take the chunks in turn: p micro-batches
// walk through chunk 0, then through chunk 1, ...; then the next p; backwards from the last chunk.
static std::vector<Action> computations(const Schedule& s, int stage) {
  const int p = s.stages, V = s.chunks;
  std::vector<Action> order;
  std::map<std::string, int> done;  // of each step
  for (const auto& [times, steps] : s.row->phases(p, s.microbatches, V, stage))
    for (int k = 0; k < times; k++) {
      std::istringstream each(steps);
      for (std::string step; each >> step;) {
        const int n = done[step]++, round = n / (p * V), turn = n % (p * V) / p;
        const auto kind = Action::Kind(std::string("FGBW").find(step[0]));  // in their order
        Action a{kind, round * p + n % p, kind == Action::forward ? turn : V - 1 - turn};
        if (step.size() > 1) a = {kind, n, step[1] - '0'};
        if (a.microbatch < s.microbatches) order.push_back(a);
      }
    }
  return order;
}

// ---- where positions are, and what travels between them

// The stages of a chunk, in the order of its positions; and back: it is its own inverse.
static int in_chunk(const Schedule& s, int chunk, int i) {
  return s.row->place == Place::vee && chunk % 2 ? s.stages - 1 - i : i;
}
int Schedule::position(int stage, int chunk) const {
  return chunk * stages + in_chunk(*this, chunk, stage);
}
int Schedule::stage_of(int position) const {
  return in_chunk(*this, position / stages, position % stages);
}

// The position at the other end: activations are sent forward, gradients back.
static int other_position(const Schedule& s, int stage, const Transfer& t) {
  return s.position(stage, t.chunk) + ((t.payload == Transfer::activation) == t.send ? 1 : -1);
}

Transfer other_end(const Schedule& s, int stage, const Transfer& t) {
  return {!t.send, t.payload, stage, t.microbatch, other_position(s, stage, t) / s.stages};
}

std::optional<Transfer> transfer_of(const Schedule& s, int stage, const Action& a, bool send) {
  Transfer t{send, a.kind == Action::forward ? Transfer::activation : Transfer::gradient, 0,
             a.microbatch, a.chunk};
  const int other = other_position(s, stage, t);
  if (a.kind == Action::weight_gradient || other < 0 || other >= s.positions()) return {};
  t.peer = s.stage_of(other);
  return t;
}

// ---- the one rule that places transfers

// How long a transfer takes, in ticks: so short that a million in a row are less than a tick; a
// power of two, so that sums stay exact.
constexpr double kMoment = 1.0 / (1 << 30);

// From computations alone to all actions. Tick by tick: first what was computed by now is sent, in
// the order in which it was; then stages start what they have the input for.
static void place_transfers(Schedule& s) {
  using End = std::pair<int, Transfer>;  // the stage, and the transfer as it sees it
  struct Meeting {
    double when = 0;
    std::map<int, std::vector<Transfer>> of;  // by stage
  };
  const auto computations = std::exchange(s.actions, {size_t(s.stages), std::vector<Action>{}});
  std::vector<size_t> started(s.stages);
  std::vector<double> free(s.stages);                           // when the stage is
  std::map<End, double> came;                                   // inputs, and when
  std::map<int, std::vector<std::pair<double, End>>> computed;  // by tick: what is to be sent
  for (int tick = 0, last = 0; tick <= last; tick++) {
    // {lower stage, higher stage}: two that face each other are one exchange, when both are there
    std::map<std::pair<int, int>, Meeting> meetings;
    for (const auto& [when, end] : computed[tick]) {
      const auto& [stage, sent] = end;
      Meeting& m = meetings[std::minmax({stage, sent.peer})];
      m.when = std::max(m.when, when);
      m.of[stage].push_back(sent);
      m.of[sent.peer].push_back(other_end(s, stage, sent));
    }
    std::multimap<double, Meeting> in_order;
    for (const auto& [stages, m] : meetings) in_order.insert({m.when, m});
    for (const auto& [when, m] : in_order)
      for (const auto& [stage, transfers] : m.of)
        s.actions[stage].push_back({Action::exchange, -1, -1, transfers});

    for (int stage = 0; stage < s.stages; stage++) {
      if (started[stage] == computations[stage].size()) continue;
      const Action& a = computations[stage][started[stage]];
      double start = free[stage];
      if (const auto input = transfer_of(s, stage, a, false)) {
        const auto there = came.find({stage, *input});
        if (there == came.end()) continue;
        start = std::max(start, there->second);
      }
      if (start >= tick + 1) continue;
      s.actions[stage].push_back(a);
      started[stage]++;
      const double end = free[stage] = start + (a.kind == Action::backward ? 2 : 1);
      last = std::max(last, int(end));
      if (const auto sent = transfer_of(s, stage, a, true)) {
        came[{sent->peer, other_end(s, stage, *sent)}] = end + (sent->peer != stage) * kMoment;
        if (sent->peer != stage) computed[int(end)].push_back({end, {stage, *sent}});
      }
    }
  }
  for (int stage = 0; stage < s.stages; stage++)
    ASSERT(started[stage] == computations[stage].size(), s.row->name, " waits for itself");
}

Schedule make_schedule(const std::string& name, int p, int m, int V) {
  const ScheduleRow& row = schedule_row(name);
  if (V == 0) V = row.chunks();
  REQUIRE(std::min({p, m, V}) >= 1,
          "a pipeline needs at least one stage, micro-batch and chunk, not ", p, ", ", m, " and ",
          V);
  REQUIRE(V == row.chunks() || row.place == Place::ring, "schedule ", name, " has ",
          row.chunks() == 1 ? "one chunk" : "two chunks", " a stage, not ", V);
  REQUIRE(m % row.round(p) == 0, name, " needs a number of micro-batches that its ", p,
          " stages divide, not ", m);
  REQUIRE(int64_t(p) * m <= 1'000'000 / V, p, " stages, ", m, " micro-batches and ", V,
          " chunks make more than a million forwards");
  Schedule s{&row, p, m, V};
  for (int stage = 0; stage < p; stage++) s.actions.push_back(computations(s, stage));
  place_transfers(s);
  return s;
}

// ---- in words

const char* name_of(Action::Kind kind) {
  return (const char*[]){"forward", "backward", "input gradient", "weight gradient",
                         "exchange"}[kind];
}

std::string to_string(const Transfer& t) {
  return sentence(t.send ? "send " : "receive ",
                  t.payload == Transfer::activation ? "activation" : "gradient", " of micro-batch ",
                  t.microbatch, ", chunk ", t.chunk, t.send ? " to " : " from ", "stage ", t.peer);
}

std::string to_string(const Action& a) {
  if (a.kind == Action::exchange) {
    std::string text;
    for (const Transfer& t : a.transfers) text += (text.empty() ? "" : " + ") + to_string(t);
    return text;
  }
  return sentence(name_of(a.kind), " of micro-batch ", a.microbatch, ", chunk ", a.chunk);
}

std::string to_string(const Schedule& s) {
  return sentence(s.row->name, ", ", s.stages, " stages, ", s.microbatches, " micro-batches",
                  s.chunks > 1 ? sentence(", ", s.chunks, " chunks a stage") : "");
}
