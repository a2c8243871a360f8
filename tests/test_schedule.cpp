// test_schedule.cpp: schedules, checker, simulator and drawer against formulas, cases by hand and
// an interpreter that moves tokens.
//
// idea      everything here is integers: times are whole numbers, which doubles hold exactly, and
//           shares are compared by cross products.
// range     stages 1..8, micro-batches 1..32, chunks 1..4 wherever it says "all"
#include "report/draw_schedule.h"

#include <algorithm>
#include <array>
#include <functional>
#include <map>
#include <random>
#include <set>

#include "report/svg.h"
#include "tests/test.h"

namespace {

// The numbers of chunks to try.
std::vector<int> chunks_of(const std::string& name) {
  const ScheduleRow& row = schedule_row(name);
  return row.placement == Placement::ring ? std::vector{1, 2, 3, 4} : std::vector{row.chunks()};
}

// Calls f(name, p, m, v) for all that is allowed.
void for_all(const std::function<void(const std::string&, int, int, int)>& f) {
  for (const std::string& name : schedule_names())
    for (int p = 1; p <= 8; p++)
      for (int m = 1; m <= 32; m++)
        for (int v : chunks_of(name))
          if (schedule_row(name).placement != Placement::ring || m % p == 0) f(name, p, m, v);
}

std::string label(const Schedule& s) {
  return sentence(s.row->name, " p=", s.stages, " m=", s.microbatches, " v=", s.chunks);
}

int64_t whole(double x) {
  CHECK_EQ(double(std::llround(x)), x, "a time that should be a whole number");
  return std::llround(x);
}

// A few schedules to break: every kind, with stages in the middle, rings, and facing pairs.
std::vector<Schedule> some() {
  std::vector<Schedule> all;
  for (int p : {2, 3, 4})
    for (int m : {p, 2 * p + (p == 3 ? 3 : 0)}) {
      for (const std::string& name : schedule_names())
        for (int v : chunks_of(name))
          if (v <= 3) all.push_back(make_schedule(name, p, m, v));
    }
  return all;
}

// ---- an independent reading of a schedule
// It moves tokens and never looks at schedule.cpp's rules.

// Two queues a stage, as the executor has: computations wait for their input, exchanges for what
// they send; the k-th send from a to b meets the k-th receive of b from a when both stages have
// reached them. Stages take turns in random order. Returns what went wrong.
struct Interpreter {
  using Token = std::array<int, 3>;  // {payload, micro-batch, position that computed it}
  struct End {
    int stage, index;
    Transfer transfer;
  };
  const Schedule& s;
  std::vector<int> computing, exchanging;
  std::vector<std::set<Token>> has, made;  // [stage]: received, computed here
  // {from, to}: what has been reached so far
  std::map<std::pair<int, int>, std::vector<End>> sent, received;
  std::map<std::pair<int, int>, size_t> met;
  // {stage, index}: transfers of a reached exchange not yet done
  std::map<std::pair<int, int>, int> open;
  // [stage][chunk]: micro-batches in the order of the sums
  std::vector<std::vector<std::vector<int>>> input_order, weight_order;
  std::string wrong;

  explicit Interpreter(const Schedule& schedule)
      : s(schedule),
        computing(s.stages, 0),
        exchanging(s.stages, 0),
        has(s.stages),
        made(s.stages),
        input_order(s.stages, std::vector<std::vector<int>>(s.chunks)),
        weight_order(input_order) {}

  bool available(int stage, const Token& token) const {
    return has[stage].count(token) || made[stage].count(token);
  }

  bool compute(int stage) {
    int& i = computing[stage];
    while (i < int(s.actions[stage].size()) && s.actions[stage][i].kind == Action::exchange) i++;
    if (i == int(s.actions[stage].size())) return false;
    const Action& a = s.actions[stage][i];
    const int at = s.position(stage, a.chunk), last = s.positions() - 1, m = a.microbatch;
    if (a.kind == Action::forward) {
      if (at > 0 && !available(stage, {Transfer::activation, m, at - 1})) return false;
      made[stage].insert({Transfer::activation, m, at});
    } else if (a.kind == Action::weight_gradient) {
      if (!made[stage].count({Transfer::gradient, m, at}))
        wrong = "weight gradient without its input gradient";
    } else {
      if (!made[stage].count({Transfer::activation, m, at})) wrong = "backward without forward";
      if (at < last && !available(stage, {Transfer::gradient, m, at + 1})) return false;
      made[stage].insert({Transfer::gradient, m, at});
      input_order[stage][a.chunk].push_back(m);
    }
    if (a.kind == Action::backward || a.kind == Action::weight_gradient)
      weight_order[stage][a.chunk].push_back(m);
    i++;
    return true;
  }

  bool exchange(int stage) {
    int& i = exchanging[stage];
    while (i < int(s.actions[stage].size()) && s.actions[stage][i].kind != Action::exchange) i++;
    if (i == int(s.actions[stage].size())) return false;
    if (const auto now = open.find({stage, i}); now != open.end()) {
      if (now->second > 0) return false;
      i++;
      return true;
    }
    for (const Transfer& t : s.actions[stage][i].transfers)
      if (t.from == stage &&
          !made[stage].count({t.payload, t.microbatch, s.position(stage, t.chunk)}))
        return false;
    open[{stage, i}] = int(s.actions[stage][i].transfers.size());
    for (const Transfer& t : s.actions[stage][i].transfers) {
      const std::pair<int, int> pair{t.from, t.to};
      (t.from == stage ? sent : received)[pair].push_back({stage, i, t});
      size_t& k = met[pair];
      for (; k < std::min(sent[pair].size(), received[pair].size()); k++)
        meet(sent[pair][k], received[pair][k]);
    }
    return true;
  }

  void meet(const End& from, const End& to) {
    const Transfer& t = from.transfer;
    has[to.stage].insert({t.payload, t.microbatch, s.position(from.stage, t.chunk)});
    if (t != to.transfer) wrong = "a receive got what another one should get";
    open[{from.stage, from.index}]--;
    open[{to.stage, to.index}]--;
  }

  std::string run(std::mt19937& random) {
    std::vector<int> order(s.stages * 2);
    for (size_t k = 0; k < order.size(); k++) order[k] = int(k);
    for (bool moved = true; moved && wrong.empty();) {
      moved = false;
      std::shuffle(order.begin(), order.end(), random);
      for (int k : order) moved = (k % 2 ? compute(k / 2) : exchange(k / 2)) || moved;
    }
    std::vector<int> ascending(s.microbatches);
    for (int m = 0; m < s.microbatches; m++) ascending[m] = m;
    for (int stage = 0; stage < s.stages && wrong.empty(); stage++) {
      if (compute(stage) || computing[stage] < int(s.actions[stage].size()))
        wrong = "hang: a computation never ran";
      if (exchanging[stage] < int(s.actions[stage].size())) wrong = "hang: an exchange never ended";
      for (int c = 0; c < s.chunks; c++)
        if (wrong.empty() &&
            (input_order[stage][c] != ascending || weight_order[stage][c] != ascending))
          wrong = "gradients summed in another order";
    }
    return wrong;
  }
};
std::string interpret(const Schedule& s, int seed) {
  std::mt19937 random(seed);
  return Interpreter(s).run(random);
}

// When everything would end if each transfer had a wire of its own: what the one communication
// queue is compared with.
double makespan_without_queues(const Schedule& s, const Times& times) {
  const Durations d = durations(s, times);
  std::map<std::array<int, 3>, double> done;
  std::vector<size_t> next(s.stages, 0);
  std::vector<double> now(s.stages, 0.0);
  for (bool moved = true; moved;) {
    moved = false;
    for (int stage = 0; stage < s.stages; stage++)
      for (; next[stage] < s.actions[stage].size(); next[stage]++, moved = true) {
        const Action& a = s.actions[stage][next[stage]];
        if (a.kind == Action::exchange) continue;
        const int forward = a.kind == Action::forward, at = s.position(stage, a.chunk),
                  from = at + (forward ? -1 : 1);
        double start = now[stage];
        if (a.kind != Action::weight_gradient && from >= 0 && from < s.positions()) {
          if (!done.count({forward, a.microbatch, from})) break;
          start = std::max(start, done[{forward, a.microbatch, from}] +
                                      (s.stage_of(from) != stage ? times.send : 0));
        }
        now[stage] = start + d[stage][next[stage]];
        if (a.kind != Action::weight_gradient) done[{forward, a.microbatch, at}] = now[stage];
      }
  }
  return *std::max_element(now.begin(), now.end());
}

std::string marks(const std::string& name, int p, int m, int v = 0) {
  const Schedule s = make_schedule(name, p, m, v);
  return draw_text(s, simulate(s, durations(s, {})), 1);
}

}  // namespace

// ---- generators

TEST(the_checker_accepts_every_schedule) {
  int schedules = 0;
  int64_t actions = 0;
  for_all([&](const std::string& name, int p, int m, int v) {
    const Schedule s = make_schedule(name, p, m, v);
    CHECK_EQ(check(s), "", label(s));
    schedules++;
    for (const auto& list : s.actions) actions += list.size();
    for_each_computation(s, [&](int, int, const Action& a) {
      if (a.kind != Action::forward)
        CHECK_EQ(a.kind == Action::backward, !s.row->splits_backward, label(s));
    });
  });
  int expected = 0;
  for (const std::string& name : schedule_names())
    expected += schedule_row(name).placement == Placement::ring
                    ? 4 * (32 + 16 + 10 + 8 + 6 + 5 + 4 + 4)
                    : 8 * 32;
  CHECK_EQ(schedules, expected);
  measured(schedules, " schedules, ", actions, " actions");
}

TEST(every_schedule_runs_on_two_queues_a_stage) {
  int runs = 0;
  for_all([&](const std::string& name, int p, int m, int v) {
    if (m > 12 && m % 8) return;
    const Schedule s = make_schedule(name, p, m, v);
    CHECK_EQ(interpret(s, ++runs), "", label(s));
  });
  measured(runs, " schedules, stages in random order");
}

TEST(bubbles_equal_the_formulas) {
  int cases = 0;
  for_all([&](const std::string& name, int p, int m, int v) {
    const Schedule s = make_schedule(name, p, m, v);
    const Timeline t = simulate(s, durations(s, {}));
    // times of a chunk: all of a stage's work is 3 m v
    const int64_t idle = name == "zb"    ? p - 1 + std::max(p - m, 0)
                         : name == "zbv" ? std::max(p - 1, 2 * (2 * p - 1 - m))
                                         : 3 * (p - 1);
    CHECK_EQ(whole(t.makespan), 3 * m * v + idle, label(s));
    for (int stage = 0; stage < p; stage++) CHECK_EQ(whole(t.busy[stage]), 3 * m * v, label(s));
    CHECK_EQ(whole(s.row->idle(p, m, {})), idle, label(s));
    // the textbook's shares, as cross products
    const int64_t all = 3 * m * v + idle;
    if (name == "gpipe" || name == "1f1b") CHECK_EQ(idle * (m + p - 1), all * (p - 1), label(s));
    if (name == "interleaved") CHECK_EQ(idle * (v * m + p - 1), all * (p - 1), label(s));
    CHECK_LE(std::fabs(t.bubble() - theoretical_bubble(s)), 1e-15);
    cases++;
  });
  measured(cases, " cases, exact");
}

TEST(zero_bubble_idles_for_a_third_of_1f1b) {
  int cases = 0;
  for (int p = 1; p <= 8; p++)
    for (int m = p; m <= 32; m++, cases++) {
      const auto idle = [&](const char* name) {
        const Schedule s = make_schedule(name, p, m);
        const Timeline t = simulate(s, durations(s, {}));
        return whole(t.makespan) - whole(t.busy[0]);
      };
      CHECK_EQ(3 * idle("zb"), idle("1f1b"));
      CHECK_EQ(idle("zb"), p - 1);
    }
  measured(cases, " cases with m >= p, exact");
}

TEST(zbv_idles_for_half_of_zb) {
  int cases = 0;
  for (int p = 1; p <= 8; p++)
    for (int m = 2 * p; m <= 32; m++, cases++) {
      // a chunk of zb, with all of the stage's layers, takes twice as long
      const Schedule zb = make_schedule("zb", p, m), zbv = make_schedule("zbv", p, m);
      const Timeline one = simulate(zb, durations(zb, {2, 2, 2, 0})),
                     other = simulate(zbv, durations(zbv, {}));
      CHECK_EQ(whole(one.busy[0]), whole(other.busy[0]));
      CHECK_EQ(whole(one.makespan - one.busy[0]), 2 * whole(other.makespan - other.busy[0]));
      // all of it before a stage's first computation or after its last: what the paper calls zero
      for (int stage = 0; stage < p; stage++) {
        double first = other.makespan, last = 0;
        for_each_computation(zbv, [&](int of, int i, const Action&) {
          if (of != stage) return;
          first = std::min(first, other.spans[of][i].start);
          last = std::max(last, other.spans[of][i].end);
        });
        CHECK_EQ(last - first, other.busy[stage], label(zbv), " stage ", stage);
      }
    }
  measured(cases, " cases with m >= 2 p, exact");
}

TEST(bubbles_equal_the_formulas_for_other_times) {
  int cases = 0;
  const Times all[] = {{10, 10, 8, 0}, {10, 12, 5, 0}, {8, 12, 10, 0}, {6, 12, 10, 0},
                       {10, 8, 12, 0}, {20, 10, 5, 0}, {3, 4, 20, 0},  {4, 12, 3, 0},
                       {20, 4, 4, 0},  {20, 5, 5, 0}};
  for (const Times& times : all)
    for_all([&](const std::string& name, int p, int m, int v) {
      const double F = times.forward, B = times.input_gradient, W = times.weight_gradient;
      if (m > 8 && m % 8) return;
      const Schedule s = make_schedule(name, p, m, v);
      const bool holds =
          p == 1 ||
          (name == "zbv" ? m >= 2 * p && std::max(F, W) <= B && (B <= F + W || p == 2)
                         : !(name == "zb" && m < p) &&
                               !(name == "interleaved" && (B + W > 2 * F || F > 2 * (B + W))));
      if (!holds) {
        CHECK(std::isnan(s.row->idle(p, m, times)), label(s));
        return;
      }
      const Timeline t = simulate(s, durations(s, times));
      const double idle = (p - 1) * (name == "zb"    ? std::max({F, B, F + B - W})
                                     : name == "zbv" ? std::max(B, 2 * (B - W))
                                                     : F + B + W);
      CHECK_EQ(whole(t.makespan) - whole(t.busy[0]), whole(idle), label(s));
      CHECK_EQ(s.row->idle(p, m, times), idle, label(s));
      cases++;
    });
  measured(cases, " cases, exact");
}

TEST(live_micro_batches_equal_the_formulas) {
  int cases = 0;
  for_all([&](const std::string& name, int p, int m, int v) {
    const Schedule s = make_schedule(name, p, m, v);
    for (int stage = 0; stage < p; stage++) {
      int64_t expected = m;
      if (name == "1f1b") expected = std::min(p - stage, m);
      if (name == "zb") expected = std::min(p, m);
      if (name == "zbv") expected = std::min({2 * m, m + 1 + stage, 2 * p});
      if (name == "interleaved") expected = std::min(2 * (p - stage - 1) + (v - 1) * p + 1, v * m);
      CHECK_EQ(peak_live(s, stage), expected, label(s), " stage ", stage);
      CHECK_EQ(s.row->live(p, m, v, stage), expected, label(s), " stage ", stage);
      cases++;
    }
  });
  measured(cases, " stages, exact");
}

TEST(each_cut_carries_each_micro_batch_once_each_way) {
  int64_t transfers = 0;
  for_all([&](const std::string& name, int p, int m, int v) {
    const Schedule s = make_schedule(name, p, m, v);
    std::map<std::pair<int, int>, int> sends;  // {payload, position that sends}
    for (int stage = 0; stage < p; stage++)
      for (const Action& a : s.actions[stage])
        for (const Transfer& t : a.transfers)
          if (t.from == stage) sends[{t.payload, s.position(stage, t.chunk)}]++;
    // the middle cut of a V lies inside the last stage
    const int cuts = p == 1 ? 0 : s.row->placement == Placement::vee ? 2 * p - 2 : p * v - 1;
    CHECK_EQ(int(sends.size()), 2 * cuts, label(s));
    for (const auto& [from, count] : sends) {
      CHECK_EQ(count, m, label(s));
      transfers += count;
    }
  });
  measured(transfers, " transfers");
}

TEST(facing_sends_share_a_group) {
  int groups = 0;
  for_all([&](const std::string& name, int p, int m, int v) {
    if (m > 12 && m % 8) return;
    const Schedule s = make_schedule(name, p, m, v);
    const Timeline t = simulate(s, durations(s, {}));
    // {stage, payload, micro-batch, chunk}: when
    std::map<std::array<int, 4>, double> made;
    // {when, between whom}: sends of one that are not in a group
    std::map<std::pair<double, std::pair<int, int>>, int> alone;
    for (int stage = 0; stage < p; stage++)
      for (size_t i = 0; i < s.actions[stage].size(); i++)
        if (const Action& a = s.actions[stage][i];
            a.kind != Action::exchange && a.kind != Action::weight_gradient) {
          const int what = a.kind == Action::forward ? Transfer::activation : Transfer::gradient;
          made[{stage, what, a.microbatch, a.chunk}] = t.spans[stage][i].end;
        }
    for (int stage = 0; stage < p; stage++)
      for (const Action& a : s.actions[stage])
        for (const Transfer& transfer : a.transfers) {
          if (transfer.from != stage) continue;
          const auto both = std::minmax(stage, transfer.to);
          const double when =
              made.at({stage, transfer.payload, transfer.microbatch, transfer.chunk});
          CHECK_LE(int(a.transfers.size()), 2, label(s));
          if (a.transfers.size() == 1)
            CHECK_EQ((++alone[{when, {both.first, both.second}}]), 1, label(s), " time ", when);
          if (a.transfers.size() == 1) continue;
          const Transfer& other = a.transfers[&transfer == &a.transfers[0]];
          CHECK_EQ(made.at({other.from, other.payload, other.microbatch, other.chunk}), when,
                   label(s));
          CHECK(a.transfers[0].from == a.transfers[1].to &&
                    a.transfers[0].to == a.transfers[1].from,
                label(s));
          groups++;
        }
  });
  CHECK(groups > 0);
  measured(groups / 2, " pairs that exist at the same time are grouped, no other transfer is");
}

TEST(what_a_schedule_does_not_allow_is_refused) {
  CHECK_SAYS(make_schedule("2f2b", 4, 8),
             "there is no schedule '2f2b': choose one of " + join(schedule_names(), ", "));
  CHECK_SAYS(make_schedule("1f1b", 0, 8),
             "at least one stage, micro-batch and chunk, not 0, 8 and 1");
  CHECK_SAYS(make_schedule("gpipe", 4, 0), "not 4, 0 and 1");
  CHECK_SAYS(make_schedule("interleaved", 4, 8, -1), "not 4, 8 and -1");
  CHECK_SAYS(make_schedule("zb", 4, 8, 2), "schedule zb has one chunk a stage, not 2");
  CHECK_SAYS(make_schedule("zbv", 4, 8, 1), "schedule zbv has two chunks a stage, not 1");
  CHECK_SAYS(make_schedule("zb", 1 << 20, 1 << 20), "more than a million");
  int refused = 0;
  for (int p = 1; p <= 8; p++)
    for (int m = 1; m <= 32; m++)
      if (m % p) {
        CHECK_SAYS(make_schedule("interleaved", p, m, 2),
                   sentence("micro-batches that its ", p, " stages divide, not ", m));
        refused++;
      }
  measured(refused, " uneven interleaved schedules and 7 others");
}

// ---- the checker

TEST(a_missing_action_is_rejected) {
  int mutants = 0;
  for (const Schedule& s : some())
    for (int stage = 0; stage < s.stages; stage++)
      for (size_t i = 0; i < s.actions[stage].size(); i++, mutants++) {
        Schedule broken = s;
        broken.actions[stage].erase(broken.actions[stage].begin() + i);
        CHECK(check(broken) != "", label(s), " without ", to_string(s.actions[stage][i]),
              " on stage ", stage);
      }
  measured(mutants, " mutants, each action of ", some().size(), " schedules in turn");
}

TEST(a_doubled_action_is_rejected) {
  int mutants = 0;
  for (const Schedule& s : some())
    for (int stage = 0; stage < s.stages; stage++)
      for (size_t i = 0; i < s.actions[stage].size(); i++)
        for (size_t to : {i, s.actions[stage].size()}) {  // immediately, and at the end
          Schedule broken = s;
          const Action again = s.actions[stage][i];
          broken.actions[stage].insert(broken.actions[stage].begin() + to, again);
          CHECK(check(broken).find("comes twice") != std::string::npos, label(s), " doubled ",
                to_string(again), ": ", check(broken));
          mutants++;
        }
  Schedule twice = make_schedule("1f1b", 3, 4);
  twice.actions[2].push_back({Action::backward, 3, 0});
  CHECK_EQ(check(twice),
           "stage 2, action 14 (backward of micro-batch 3, chunk 0) comes twice or is not part of "
           "this step.");
  measured(mutants, " mutants");
}

TEST(a_send_without_its_receive_is_rejected) {
  int mutants = 0;
  for (const Schedule& s : some())
    for (int stage = 0; stage < s.stages; stage++)
      for (size_t i = 0; i < s.actions[stage].size(); i++)
        for (size_t k = 0; k < s.actions[stage][i].transfers.size(); k++) {
          Schedule broken = s;
          auto& transfers = broken.actions[stage][i].transfers;
          transfers.erase(transfers.begin() + k);
          CHECK(check(broken).find("never does this: ") != std::string::npos, label(s), ": ",
                check(broken));
          mutants++;
          for (int change = 0; change < 4; change++) {  // there, but not the right one
            broken = s;
            Transfer& t = broken.actions[stage][i].transfers[k];
            int& peer = t.from == stage ? t.to : t.from;
            if (change == 0) peer = (peer + 1) % s.stages;
            if (change == 1) t.microbatch = (t.microbatch + 1) % s.microbatches;
            if (change == 2) std::swap(t.from, t.to);
            if (change == 3) t.chunk++;
            CHECK(check(broken) != "", label(s), " change ", change);
            mutants++;
          }
        }
  measured(mutants, " mutants");
}

TEST(a_swapped_pair_is_rejected) {
  int mutants = 0;
  const auto rejected = [&](Schedule s, int stage, size_t i, size_t j) {
    std::swap(s.actions[stage][i], s.actions[stage][j]);
    CHECK(check(s) != "", label(s), " with actions ", i, " and ", j, " of stage ", stage,
          " swapped");
    mutants++;
  };
  for (const Schedule& s : some())
    for (int stage = 0; stage < s.stages; stage++) {
      const auto& list = s.actions[stage];
      for (size_t i = 0; i < list.size(); i++)
        for (size_t j = i + 1; j < list.size(); j++) {
          const Action &a = list[i], &b = list[j];
          const bool both_compute = a.kind != Action::exchange && b.kind != Action::exchange;
          // gradients of one chunk in another order, or the steps of one micro-batch
          if (both_compute && a.chunk == b.chunk &&
              ((a.kind != Action::forward && a.kind == b.kind) || a.microbatch == b.microbatch))
            rejected(s, stage, i, j);
          // two transfers with the same stage in the same direction
          if (a.transfers.size() == 1 && b.transfers.size() == 1 &&
              a.transfers[0].from == b.transfers[0].from && a.transfers[0].to == b.transfers[0].to)
            rejected(s, stage, i, j);
          // what is sent and its computation, a computation and what it receives
          const auto belongs = [](const Transfer& t, const Action& c) {
            return c.kind != Action::exchange && c.kind != Action::weight_gradient &&
                   c.chunk == t.chunk && c.microbatch == t.microbatch &&
                   (c.kind == Action::forward) == (t.payload == Transfer::activation);
          };
          for (const Transfer& t : b.transfers)
            if (t.from == stage && belongs(t, a)) rejected(s, stage, i, j);
          for (const Transfer& t : a.transfers)
            if (b.kind != Action::exchange && input_of(s, stage, b) == t) rejected(s, stage, i, j);
        }
    }
  Schedule early = make_schedule("1f1b", 2, 4);
  std::swap(early.actions[1][0], early.actions[1][1]);
  CHECK(check(early).find("deadlock: ") == 0 &&
            check(early).find("stage 1, action 0 (forward of micro-batch 0, chunk 0) waits") !=
                std::string::npos,
        check(early));
  measured(mutants, " mutants");
}

TEST(receives_in_another_order_than_the_sends_are_rejected) {
  // an activation and a gradient from one stage, or of two chunks, where both come early enough
  int mutants = 0;
  std::string said;
  for (const Schedule& s : some())
    for (int stage = 0; stage < s.stages; stage++)
      for (size_t i = 0; i < s.actions[stage].size(); i++)
        for (size_t j = i + 1; j < s.actions[stage].size(); j++) {
          const auto &a = s.actions[stage][i].transfers, &b = s.actions[stage][j].transfers;
          if (a.size() != 1 || b.size() != 1 || a[0].to != stage || b[0].to != stage ||
              a[0].from != b[0].from)
            continue;
          Schedule broken = s;
          std::swap(broken.actions[stage][i], broken.actions[stage][j]);
          if (check(broken).find("a transfer ") != 0) continue;  // rejected for another reason
          CHECK(!interpret(broken, 1).empty(), label(s));
          said = check(broken);
          mutants++;
        }
  CHECK(mutants > 0);
  measured(mutants, " mutants; ", said);
}

TEST(a_facing_pair_ungrouped_is_rejected) {
  int mutants = 0;
  for (const Schedule& s : some())
    for (int stage = 0; stage < s.stages; stage++)
      for (size_t i = 0; i < s.actions[stage].size(); i++) {
        const Action& group = s.actions[stage][i];
        if (group.transfers.size() < 2) continue;
        const Transfer& one = group.transfers[0];
        const int peer = one.from == stage ? one.to : one.from;
        if (peer < stage) continue;
        // the group on the other side: the one that comes after as many exchanges between the two
        const auto with = [](const Action& a, int other) {
          return a.kind == Action::exchange &&
                 (a.transfers[0].from == other || a.transfers[0].to == other);
        };
        int count = 0;
        for (size_t k = 0; k < i; k++) count += with(s.actions[stage][k], peer);
        size_t facing = 0;
        for (int seen = 0;; facing++)
          if (with(s.actions[peer][facing], stage) && seen++ == count) break;
        for (const bool send_first : {true, false}) {
          Schedule broken = s;
          for (const auto& [where, index] : {std::pair{stage, i}, std::pair{peer, facing}}) {
            auto& list = broken.actions[where];
            Transfer first = list[index].transfers[0], second = list[index].transfers[1];
            if ((first.from == where) != send_first) std::swap(first, second);
            list[index].transfers = {first};
            list.insert(list.begin() + index + 1, {Action::exchange, -1, -1, {second}});
          }
          CHECK(check(broken).find("deadlock: ") == 0, label(s), ": ", check(broken));
          CHECK(interpret(broken, 1).find("hang") == 0, label(s), ": ", interpret(broken, 1));
          mutants++;
        }
      }
  CHECK(mutants > 0);
  measured(mutants, " mutants, all deadlocks");
}

TEST(a_ring_of_ungrouped_sends_is_rejected) {
  // three stages; each sends to the next and then receives from the one before: no two face each
  // other, yet all wait
  Schedule s = make_schedule("interleaved", 3, 3, 2);
  for (auto& list : s.actions) list.clear();
  const auto forward = [&](int stage, int m, int c) {
    s.actions[stage].push_back({Action::forward, m, c});
  };
  const auto move = [&](int stage, Transfer::Payload what, int m, int from) {  // a position
    const int to = from + (what == Transfer::activation ? 1 : -1);
    s.actions[stage].push_back({Action::exchange, -1, -1, {{what, from % 3, to % 3, m, from / 3}}});
  };
  for (int stage = 0; stage < 3; stage++) {
    for (int m = 0; m < 3; m++) {
      if (stage > 0) move(stage, Transfer::activation, m, stage - 1);
      forward(stage, m, 0);
      move(stage, Transfer::activation, m, stage);
    }
    for (int m = 0; m < 3; m++) {
      move(stage, Transfer::activation, m, stage + 2);
      forward(stage, m, 1);
      if (stage < 2) move(stage, Transfer::activation, m, stage + 3);
    }
    for (int c : {1, 0})
      for (int m = 0; m < 3; m++) {
        const int here = 3 * c + stage;
        if (here < 5) move(stage, Transfer::gradient, m, here + 1);
        s.actions[stage].push_back({Action::backward, m, c});
        if (here > 0) move(stage, Transfer::gradient, m, here);
      }
  }
  CHECK(check(s).find("deadlock: stage 0") == 0, check(s));
  CHECK(interpret(s, 1).find("hang") == 0, interpret(s, 1));
  measured(check(s).substr(0, 90), "...");
}

TEST(what_the_checker_accepts_runs) {
  // random damage: whatever the checker lets through must run in the interpreter and add up
  // gradients in order
  std::mt19937 random(7);
  int accepted = 0, rejected = 0, hangs = 0;
  const auto schedules = some();
  for (int round = 0; round < 8000; round++) {
    Schedule s = schedules[random() % schedules.size()];
    auto& list = s.actions[random() % s.stages];
    const size_t i = random() % list.size(), j = std::min(list.size() - 1, i + 1 + random() % 3);
    switch (random() % 4) {
      case 0: std::swap(list[i], list[j]); break;
      // later
      case 1: std::rotate(list.begin() + i, list.begin() + i + 1, list.begin() + j + 1); break;
      // earlier
      case 2: std::rotate(list.begin() + i, list.begin() + j, list.begin() + j + 1); break;
      case 3: {  // join two exchanges, or part one
        if (list[i].transfers.size() == 2) {
          const Transfer second = list[i].transfers[1];
          list[i].transfers.pop_back();
          list.insert(list.begin() + i + random() % 2, {Action::exchange, -1, -1, {second}});
        } else if (i != j && list[i].kind == Action::exchange && list[j].kind == Action::exchange) {
          list[i].transfers.insert(list[i].transfers.end(), list[j].transfers.begin(),
                                   list[j].transfers.end());
          list.erase(list.begin() + j);
        }
      }
    }
    const bool fine = check(s).empty();
    (fine ? accepted : rejected)++;
    const std::string run = interpret(s, round);
    hangs += !run.empty();
    if (fine) {
      CHECK_EQ(run, "", label(s), " round ", round);
      CHECK(simulate(s, durations(s, {1, 1, 1, 0.25})).makespan > 0);
    }
  }
  CHECK(accepted > 500 && hangs > 500);
  measured(accepted, " mutants accepted and run, ", rejected, " rejected, of which ", hangs,
           " hang or sum wrongly");
}

TEST(one_stage_hands_over_in_memory) {
  for (int v = 1; v <= 4; v++) {
    const Schedule s = make_schedule("interleaved", 1, 5, v);
    for (const Action& a : s.actions[0]) CHECK(a.kind != Action::exchange);
    CHECK_EQ(simulate(s, durations(s, {})).bubble(), 0.0);
  }
  // forward 0, forward 1, backward 1, backward 0
  Schedule s = make_schedule("interleaved", 1, 1, 2);
  std::swap(s.actions[0][2], s.actions[0][3]);
  CHECK_EQ(check(s), "deadlock: stage 0, action 2 (backward of micro-batch 0, chunk 0) waits.");
}

// ---- the simulator

TEST(the_simulator_equals_three_cases_by_hand) {
  const auto spans = [](const Schedule& s, const Timeline& t, int stage) {
    std::string text;
    for (size_t i = 0; i < s.actions[stage].size(); i++)
      text += sentence(t.spans[stage][i].start, "-", t.spans[stage][i].end, " ");
    return text;
  };
  // 1f1b, two stages, sends that take 1:    F0 x0 F1 x1 g0 B0 g1 B1   |   x0 F0 x1 B0 g0 F1 B1 g1
  Schedule s = make_schedule("1f1b", 2, 2);
  Timeline t = simulate(s, durations(s, {2, 3, 1, 1}));
  CHECK_EQ(spans(s, t, 0), "0-2 2-3 2-4 4-5 5-10 10-14 10-16 16-20 ");
  CHECK_EQ(spans(s, t, 1), "0-3 3-5 3-5 5-9 9-10 9-11 11-15 15-16 ");
  CHECK(t.makespan == 20 && t.busy[0] == 12 && t.busy[1] == 12 && t.bubble() == 0.4 &&
        t.bubble(1) == 0.4);
  // three micro-batches: activation 2 and gradient 1 face each other and leave as one group when
  // both exist, at 9
  s = make_schedule("1f1b", 2, 3);
  t = simulate(s, durations(s, {1, 1, 1, 1}));
  CHECK_EQ(spans(s, t, 0), "0-1 1-2 1-2 2-3 3-6 6-8 8-9 9-10 10-12 10-14 14-16 ");
  CHECK_EQ(spans(s, t, 1), "0-2 2-3 2-3 3-5 5-6 5-6 6-8 8-10 10-11 11-13 13-14 ");
  // zb, free sends; then stage 1 twice as slow
  s = make_schedule("zb", 2, 2);
  t = simulate(s, durations(s, {2, 2, 1, 0}));
  CHECK(t.makespan == 13 && t.busy[0] == 10 && t.busy[1] == 10);
  Durations d = durations(s, {2, 2, 1, 0});
  for (double& x : d[1]) x *= 2;
  t = simulate(s, d);
  CHECK(t.makespan == 22 && t.busy[0] == 10 && t.busy[1] == 20);
  CHECK_EQ(t.bubble(0), 1 - 10 / 22.0);
}

TEST(peak_bytes_are_weighed_by_chunk) {
  // stage 0: F0 F0' in turn; all four chunk activations live
  const Schedule s = make_schedule("interleaved", 2, 2, 2);
  CHECK_EQ(peak_live(s, 0), 4);
  CHECK_EQ(peak_live(s, 0, {{100}, {10}}), 220);
  // at most 3 at once on stage 1: chunk 0 twice, chunk 1 once
  CHECK_EQ(peak_live(s, 1, {{1000}, {1}}), 2001);
  CHECK_EQ(peak_live(make_schedule("gpipe", 3, 7), 2, {{7}}), 49);
  // F0 B0 F1 B1 W0 W1
  const Schedule zb = make_schedule("zb", 2, 2);
  CHECK_EQ(peak_live(zb, 1, {{10, 3}}), 13);
  CHECK_EQ(peak_live(zb, 1, {{3, 10}}), 20);
}

TEST(forwards_alone_keep_the_line_full) {
  int tried = 0;
  for (const std::string& name : schedule_names())
    for (int p = 1; p <= 8; p++) {
      const Schedule whole = make_schedule(name, p, p);
      for (int m = 1; m <= 4 * p; m++, tried++) {
        const Schedule s = forwards_of(whole, m);
        const Timeline t = simulate(s, durations(s, {}));
        const int v = s.chunks, each = m * v;
        for (int stage = 0; stage < p; stage++) CHECK_EQ(t.busy[stage], each, label(s));
        // a ring has whole rounds
        const bool ring = s.row->placement == Placement::ring;
        const int most = ring ? (m + p - 1) / p * p * v + p - 1 : each + v * (p - 1);
        CHECK_LE(t.makespan, most, label(s));
      }
    }
  measured(tried, " lists");
}

TEST(the_one_queue_costs_next_to_nothing) {
  // against transfers with a wire each. Lists are made for F = B = W = 1; other times must not make
  // exchanges wait in the wrong order.
  const auto worst_of = [](const std::vector<Times>& all, const std::set<std::string>& names) {
    double worst = 0;
    for (const Times& times : all)
      for_all([&](const std::string& name, int p, int m, int v) {
        if (!names.count(name) || p == 1 || (m > 6 && m % 8)) return;
        const Schedule s = make_schedule(name, p, m, v);
        worst = std::max(worst, simulate(s, durations(s, times)).makespan /
                                        makespan_without_queues(s, times) -
                                    1);
      });
    return worst;
  };
  const std::vector<std::string> names = schedule_names();
  const std::set<std::string> every(names.begin(), names.end());
  const std::vector<Times> free{{1, 1, 1, 0}, {5, 6, 4, 0}, {5, 5, 3, 0}, {10, 7, 7, 0}};
  CHECK_EQ(worst_of(free, every), 0.0);
  CHECK_EQ(worst_of({{1, 2, 1, 0}}, {"gpipe", "1f1b", "zb"}), 0.0);
  const double recompute = worst_of({{1, 2, 1, 0}}, {"interleaved"});
  const double slow = worst_of({{20, 20, 20, 1}}, every);
  CHECK_LE(recompute, 0.02);
  CHECK_LE(slow, 0.02);
  measured("free sends: 0; interleaved with B + W = 3 F: ", recompute, "; sends of F/20: ", slow);
}

// ---- the drawer

TEST(the_drawing_of_1f1b_is_the_one_in_the_books) {
  CHECK_EQ(marks("1f1b", 4, 8),
           "time      0         10        20        30\n"
           "stage  0 |0123......aa4bb5cc6dd7ee.ff.gg.hh| idle 27.3 %\n"
           "stage  1 |.012....aa3bb4cc5dd6ee7ff.gg.hh..| idle 27.3 %\n"
           "stage  2 |..01..aa2bb3cc4dd5ee6ff7gg.hh....| idle 27.3 %\n"
           "stage  3 |...0aa1bb2cc3dd4ee5ff6gg7hh......| idle 27.3 %\n"
           "          0-9 forward of micro-batch 0-9   a-j its backward   . idle\n");
}

TEST(the_drawing_of_zb_is_the_papers_figure) {
  CHECK_EQ(marks("zb", 4, 8),
           "time      0         10        20\n"
           "stage  0 |0123...aA4bB5cC6dD7eEfFgGhH| idle 11.1 %\n"
           "stage  1 |.012..a3bA4cB5dC6eD7fEgFhGH| idle 11.1 %\n"
           "stage  2 |..01.a2b3cA4dB5eC6fD7gEhFGH| idle 11.1 %\n"
           "stage  3 |...0a1b2c3dA4eB5fC6gD7hEFGH| idle 11.1 %\n"
           "          0-9 forward of micro-batch 0-9   a-j its input gradient   "
           "A-J its weight gradient   . idle\n");
}

TEST(the_drawing_of_interleaved_shows_chunks) {
  CHECK_EQ(marks("interleaved", 2, 4, 2),
           "time      0         10        20\n"
           "stage  0 |01012.aa3bb2aa3bb.cc.ddccdd| idle 11.1 %\n"
           "   chunk |00110 11011100100 11 110000|\n"
           "stage  1 |.010aa1bb2aa3bb2cc3ddccdd..| idle 11.1 %\n"
           "   chunk | 001111110000001111110000  |\n"
           "          0-9 forward of micro-batch 0-9   a-j its backward   . idle\n");
}

TEST(the_drawing_of_zbv_goes_down_and_up) {
  CHECK_EQ(
      marks("zbv", 2, 4),
      "time      0         10        20\n"
      "stage  0 |0120aA1bB3aA2cCbB3dDcCdD.| idle 4.0 %\n"
      "   chunk |000111111000111001110000 |\n"
      "stage  1 |.0011aA2aA2bB3bB3cCcddCDD| idle 4.0 %\n"
      "   chunk | 010111000111000111010010|\n"
      "          0-9 forward of micro-batch 0-9   a-j its input gradient   A-J its weight gradient "
      "  . idle\n");
}

TEST(the_axis_of_a_drawing_has_three_digits) {
  const Schedule s = make_schedule("gpipe", 2, 3);
  const std::string text =
      draw_text(s, simulate(s, durations(s, {0.1234567, 0.1234567, 0.1234567, 0})), 0.1234567 / 3);
  CHECK_EQ(text.substr(0, text.find('\n')), "time      0         0.412     0.823     1.23");
}

TEST(words_in_an_svg_may_have_any_signs) {
  Svg svg(1, 1, "", "a<b");
  svg.text(0, 0, "", "R&D ", 1.5);
  CHECK(svg.out.str().find("<title>a&lt;b</title>") != std::string::npos);
  CHECK(svg.out.str().find(">R&amp;D 1.5</text>") != std::string::npos);
}

TEST(the_svg_is_whole_and_stands_alone) {
  const Schedule s = make_schedule("zb", 3, 4);
  const std::string svg =
      draw_svg(s, simulate(s, durations(s, {})), "zb on three stages", "forwards");
  const auto count = [&](const std::string& part) {
    int n = 0;
    for (size_t at = svg.find(part); at != std::string::npos; at = svg.find(part, at + 1)) n++;
    return n;
  };
  const int computations = 3 * 4 * 3, legend = 3, ticks = 8;  // 14 units of time, a tick every 2
  CHECK_EQ(count("<rect "), 1 + legend + computations + ticks);
  CHECK_EQ(count("<g>"), computations);
  CHECK_EQ(count("<text "), count("</text>"));
  CHECK_EQ(count("<title>zb on three stages</title>"), 1);
  CHECK_EQ(count(">time in forwards</text>"), 1);
  CHECK_EQ(count("prefers-color-scheme:dark"), 1);
  CHECK_EQ(count("http"), 1, "only the namespace");
  CHECK_EQ(count("<title>weight gradient of micro-batch 3, chunk 0: 13 to 14</title>"), 3);
  measured(svg.size(), " bytes");
}

int main(int argc, char** argv) { return run_tests(argc, argv); }
