// schedule.cpp: the table of schedules, and the one rule that places transfers.
//
// idea      A row says only what each stage computes, in order. Everything about communication
//           follows from that (schedule.h).
// cost      O(actions log actions); nothing here runs during a training step
// test      tests/test_schedule.cpp
#include "schedule.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <sstream>
#include <utility>

#include "support/check.h"

// ---- the table: stage s of p, m micro-batches, v chunks

static double idle_of_whole_backwards(int p, int, const Times& t) { return (p - 1) * t.all(); }
static bool are_equal(const Times& t) {
  return t.forward == t.input_gradient && t.input_gradient == t.weight_gradient;
}

static const ScheduleRow kRows[] = {
    {.name = "gpipe",
     .placement = Placement::line,
     .splits_backward = false,
     .phases = [](int, int m, int, int) -> Phases {
       return {{m, "F"}, {m, "G"}};
     },
     .idle = idle_of_whole_backwards,
     .live = [](int, int m, int, int) { return m; }},

    {.name = "1f1b",
     .placement = Placement::line,
     .splits_backward = false,
     .phases = [](int p, int m, int, int s) -> Phases {
       return {{p - 1 - s, "F"},  // one for each later stage
               {m, "F G"}};
     },
     .idle = idle_of_whole_backwards,
     .live = [](int p, int m, int, int s) { return std::min(p - s, m); }},

    {.name = "interleaved",
     .placement = Placement::ring,
     .splits_backward = false,
     .phases = [](int p, int m, int v, int s) -> Phases {
       // p of each chunk but the last; then one for each hop to the last stage and back: half of
       // these would do if transfers took no time
       return {{(v - 1) * p + 2 * (p - 1 - s), "F"}, {v * m, "F G"}};
     },
     .idle =
         [](int p, int, const Times& t) {
           const double F = t.forward, G = t.input_gradient + t.weight_gradient;
           const bool holds = p == 1 || (F <= 2 * G && G <= 2 * F);
           return holds ? (p - 1) * t.all() : NAN;
         },
     .live =
         [](int p, int m, int v, int s) {
           // the warm-up's, and one
           return std::min((v - 1) * p + 2 * (p - 1 - s) + 1, v * m);
         }},

    // ZB-H1 is 1F1B whose backwards pass on the input gradient immediately. The warm-up of stage s
    // is s forwards shorter than stage 0's, and it puts its weight gradients off by as many
    // micro-batches. So all stages hold p micro-batches, and the later ones have work left for the
    // end.
    {.name = "zb",
     .placement = Placement::line,
     .splits_backward = true,
     .phases = [](int p, int m, int, int s) -> Phases {
       return {{p - 1 - s, "F"}, {s, "F B"}, {m, "F B W"}};
     },
     .idle =
         [](int p, int m, const Times& t) {
           const double F = t.forward, B = t.input_gradient, W = t.weight_gradient;
           if (m < p && !are_equal(t)) return double(NAN);
           return std::max((p - 1) * std::max(F, B), (p - 1) * (F + B) - (std::min(m, p) - 1) * W);
         },
     .live = [](int p, int m, int, int) { return std::min(p, m); }},

    {.name = "zbv",
     .placement = Placement::vee,
     .splits_backward = true,
     .phases = [](int p, int m, int, int s) -> Phases {
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
     .idle =
         [](int p, int m, const Times& t) {
           const double F = t.forward, B = t.input_gradient, W = t.weight_gradient;
           const bool holds =
               p == 1 || (m >= 2 * p && B >= std::max(F, W) && (B <= F + W || p == 2));
           if (!holds && !are_equal(t)) return double(NAN);
           return std::max((p - 1) * std::max(B, 2 * (B - W)), 2 * (2 * p - 1 - m) * B);
         },
     .live =
         [](int p, int m, int, int s) {
           return std::min({2 * m, m + 1 + s, 2 * p});
         }},
};

std::vector<std::string> schedule_names() { return names_of(kRows); }

const ScheduleRow& schedule_row(std::string_view name) {
  return row_named(kRows, "schedule", name);
}

// A stage's n-th computation of a kind, where the chunks take turns: p micro-batches walk through
// chunk 0, then through chunk 1, ...; then the next p. Backwards begin with the last chunk. With
// two stages and two chunks, micro-batch and chunk of the forwards: 0 0, 1 0, 0 1, 1 1, 2 0, 3 0,
// 2 1, 3 1, ...; of the backwards: 0 1, 1 1, 0 0, 1 0, 2 1, ...
static Action in_turn(Action::Kind kind, int n, int p, int v) {
  const int round = n / (p * v), turn = n % (p * v) / p;
  return {kind, round * p + n % p, kind == Action::forward ? turn : v - 1 - turn};
}

// What a stage computes, in order. A code is a letter of Phases, with or without a digit.
std::vector<Action> computations(const Schedule& s, int stage) {
  std::vector<Action> order;
  std::map<std::string, int> done;  // of each code
  for (const auto& [times, codes] : s.row->phases(s.stages, s.microbatches, s.chunks, stage))
    for (int k = 0; k < times; k++) {
      std::istringstream each(codes);
      for (std::string code; each >> code;) {
        const int n = done[code]++;
        const size_t letter = std::string("FGBW").find(code[0]);  // in the order of Kind
        ASSERT(letter < 4 && (code.size() == 1 || code[1] - '0' < s.chunks), code);
        const auto kind = Action::Kind(letter);
        const Action a =
            code.size() > 1 ? Action{kind, n, code[1] - '0'} : in_turn(kind, n, s.stages, s.chunks);
        if (a.microbatch < s.microbatches) order.push_back(a);
      }
    }
  return order;
}

// ---- where positions are, and what travels between them; from here on s is the schedule

// The stage of a chunk's i-th position, and the other way round. zbv comes back up: in its odd
// chunks position i is on stage p - 1 - i.
static int mirrored_if_odd(const Schedule& s, int chunk, int i) {
  return s.row->placement == Placement::vee && chunk % 2 ? s.stages - 1 - i : i;
}
int Schedule::position(int stage, int chunk) const {
  return chunk * stages + mirrored_if_odd(*this, chunk, stage);
}
int Schedule::stage_of(int position) const {
  return mirrored_if_odd(*this, position / stages, position % stages);
}
std::vector<int> Schedule::stages_of_positions() const {
  std::vector<int> all;
  for (int i = 0; i < positions(); i++) all.push_back(stage_of(i));
  return all;
}

// Activations go to the next position, gradients back.
static std::optional<Transfer> transfer_of(const Schedule& s, int stage, const Action& a,
                                           bool send) {
  const bool forward = a.kind == Action::forward;
  const int here = s.position(stage, a.chunk), step = forward ? 1 : -1;
  const int from = send ? here : here - step, to = from + step;  // positions
  if (a.kind == Action::weight_gradient || std::min(from, to) < 0 ||
      std::max(from, to) == s.positions())
    return {};
  return Transfer{forward ? Transfer::activation : Transfer::gradient, s.stage_of(from),
                  s.stage_of(to), a.microbatch, from / s.stages};
}
std::optional<Transfer> input_of(const Schedule& s, int stage, const Action& a) {
  return transfer_of(s, stage, a, false);
}
std::optional<Transfer> output_of(const Schedule& s, int stage, const Action& a) {
  return transfer_of(s, stage, a, true);
}

// ---- the one rule that places transfers

// How long a transfer takes, in ticks: so short that a million in a row are less than a tick; a
// power of two, so that sums stay exact.
constexpr double kMoment = 1.0 / (1 << 30);

// From computations alone to all actions. NCCL matches sends and receives by their order alone, and
// a stream waits in each: if every stage sent when it is done and received when it needs, two
// neighbours could wait for each other. So both get their order here, from times of one tick for
// F, B and W each; in a step these may differ, and the order holds. Tick by tick: first what was
// computed by now is sent, in the order in which it was; then stages start what they have the input
// for.
static void place_transfers(Schedule& s) {
  struct PlannedExchange {
    double when = 0;
    std::vector<Transfer> transfers;  // between the same two stages
  };
  const auto lists = std::exchange(s.actions, std::vector<std::vector<Action>>(s.stages));
  std::vector<size_t> started(s.stages);
  std::vector<double> idle_from(s.stages);
  std::map<Transfer, double> came;  // when
  // By tick and {lower stage, higher stage}. Two sends that face each other are one exchange, when
  // both results are there.
  std::map<int, std::map<std::pair<int, int>, PlannedExchange>> exchanges;
  for (int tick = 0, last = 0; tick <= last; tick++) {
    std::vector<PlannedExchange> in_order;
    for (const auto& [stages, exchange] : exchanges[tick]) in_order.push_back(exchange);
    std::ranges::stable_sort(in_order, {}, &PlannedExchange::when);
    for (const PlannedExchange& exchange : in_order)
      for (const int stage : {exchange.transfers[0].from, exchange.transfers[0].to})
        s.actions[stage].push_back({Action::exchange, -1, -1, exchange.transfers});

    for (int stage = 0; stage < s.stages; stage++) {
      if (started[stage] == lists[stage].size()) continue;
      const Action& a = lists[stage][started[stage]];
      double start = idle_from[stage];
      if (const auto input = input_of(s, stage, a)) {
        const auto there = came.find(*input);
        if (there == came.end()) continue;
        start = std::max(start, there->second);
      }
      if (start >= tick + 1) continue;
      s.actions[stage].push_back(a);
      started[stage]++;
      const double end = idle_from[stage] = start + (a.kind == Action::backward ? 2 : 1);
      last = std::max(last, int(end));
      if (const auto sent = output_of(s, stage, a)) {
        came[*sent] = end + (sent->to != stage) * kMoment;
        if (sent->to == stage) continue;  // in memory
        PlannedExchange& exchange = exchanges[int(end)][std::minmax({stage, sent->to})];
        exchange.when = std::max(exchange.when, end);
        exchange.transfers.push_back(*sent);
      }
    }
  }
  for (int stage = 0; stage < s.stages; stage++)
    ASSERT(started[stage] == lists[stage].size(), s.row->name, " waits for itself");
}

Schedule make_schedule(const std::string& name, int p, int m, int v) {
  const ScheduleRow& row = schedule_row(name);
  if (v == 0) v = row.chunks();
  REQUIRE(std::min({p, m, v}) >= 1,
          "a pipeline needs at least one stage, micro-batch and chunk, not ", p, ", ", m, " and ",
          v);
  REQUIRE(v == row.chunks() || row.placement == Placement::ring, "schedule ", name, " has ",
          row.chunks() == 1 ? "one chunk" : "two chunks", " a stage, not ", v);
  REQUIRE(m % row.divisor(p) == 0, name, " needs a number of micro-batches that its ", p,
          " stages divide, not ", m);
  REQUIRE(int64_t(p) * m <= kMostForwards / v, p, " stages, ", m, " micro-batches and ", v,
          " chunks make more than a million forwards");
  Schedule s{&row, p, m, v};
  for (int stage = 0; stage < p; stage++) s.actions.push_back(computations(s, stage));
  place_transfers(s);
  return s;
}

Schedule forwards_of(const Schedule& of, int microbatches) {
  Schedule s{of.row, of.stages, microbatches, of.chunks};
  for (int stage = 0; stage < s.stages; stage++) {
    std::vector<Action>& actions = s.actions.emplace_back(computations(s, stage));
    std::erase_if(actions, [](const Action& a) { return a.kind != Action::forward; });
  }
  place_transfers(s);
  return s;
}

// ---- in words

const char* name_of(Action::Kind kind) {
  static const char* names[] = {"forward", "backward", "input gradient", "weight gradient",
                                "exchange"};
  return names[kind];
}

std::string to_string(const Transfer& t) {
  return sentence(name_of(t.payload), " of micro-batch ", t.microbatch, ", chunk ", t.chunk,
                  ", from stage ", t.from, " to stage ", t.to);
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
