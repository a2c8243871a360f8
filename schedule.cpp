// schedule.cpp: one generator for the four schedules, one rule that places transfers, and what
// reads the lists: checker and simulator.
//
// idea      the generator says only what each stage computes, in order. Everything about
//           communication follows from that (schedule.h).
// cost      O(actions log actions) for everything here; nothing here runs during a training step
// test      tests/test_schedule.cpp
#include "schedule.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <map>
#include <set>
#include <tuple>

#include "support/check.h"

// ---- the schedules: what stage s of p computes for m micro-batches on V chunks

// All of them warm up with some forwards, then do one forward (while there are any) and one
// backward in turn. With several chunks, p micro-batches walk through chunk 0, then through chunk
// 1, ...; then the next p. Backwards visit the chunks from the last.
static std::vector<Action> computations(const std::string& name, int p, int s, int m, int V) {
  const auto step = [&](Action::Kind kind, int k) {
    const int round = k / (p * V), chunk = k % (p * V) / p;
    return Action{kind, round * p + k % p, kind == Action::forward ? chunk : V - 1 - chunk};
  };
  const int all = m * V;
  // 1f1b, zb: a forward for each later stage
  int warm = p - 1 - s;
  // all forwards, then all backwards
  if (name == "gpipe") warm = all;
  // up to the last chunk, then twice the way: a backward takes two forwards
  if (name == "interleaved") warm = 2 * (p - 1 - s) + (V - 1) * p;
  std::vector<Action> order;
  for (int k = -warm; k < all + s; k++) {  // k: the backward, below 0 during the warm-up
    if (warm + k < all) order.push_back(step(Action::forward, warm + k));
    if (k >= 0 && k < all)
      order.push_back(step(name == "zb" ? Action::input_gradient : Action::backward, k));
    // ZB-H1 is 1F1B whose backwards pass on the input gradient at once. Stage s puts its weight
    // gradients off by s micro-batches: as many as its warm-up is shorter than stage 0's, so all
    // stages hold p micro-batches, and the later ones have work left for the end.
    if (name == "zb" && k >= s) order.push_back(step(Action::weight_gradient, k - s));
  }
  return order;
}

// ---- what computations need of each other

// From this end's position to the other's: activations are sent forward, gradients back.
static int direction(const Transfer& t) {
  return (t.payload == Transfer::activation) == t.send ? 1 : -1;
}

// The same transfer as the stage at its other end sees it.
static Transfer other_end(const Schedule& s, int stage, const Transfer& t) {
  return {!t.send, t.payload, stage, t.microbatch,
          (s.position(stage, t.chunk) + direction(t)) / s.stages};
}

std::optional<Transfer> transfer_of(const Schedule& s, int stage, const Action& a, bool send) {
  Transfer t{send, a.kind == Action::forward ? Transfer::activation : Transfer::gradient, 0,
             a.microbatch, a.chunk};
  const int other = s.position(stage, a.chunk) + direction(t);
  if (s.stages == 1 || a.kind == Action::weight_gradient || other < 0 || other >= s.positions())
    return {};
  t.peer = other % s.stages;
  return t;
}

// ---- one walk over all lists: where transfers are placed, what the checker and the simulator see

using Spans = std::vector<std::vector<Span>>;  // [stage][action]

// The spans of what each stage gets done; lists that end early wait for each other. A stage steps
// over a computation when its input is there, and over an exchange when its peers have come to the
// facing ones. That is how an executor whose every action blocks goes ahead. The times are those of
// two queues a stage (schedule.h): each waits only for what it needs. wire: the lists have no
// exchanges yet, and each result is at the other stage so much time after it was computed.
static Spans walk(const Schedule& s, const Durations& durations, std::optional<double> wire = {}) {
  using End = std::pair<int, Transfer>;  // the stage, and the transfer as it sees it
  // when what is sent was computed, or what is received had come; when its exchange was reached
  std::map<End, double> there, reached;
  // when each queue finished the action before
  std::vector<double> computed(s.stages, 0.0), exchanged(s.stages, 0.0);
  // stages that may get on: somebody has done what they may wait for
  std::deque<int> ready;
  const auto compute = [&](int stage, const Action& a, double duration) -> std::optional<Span> {
    double start = computed[stage];
    if (const auto input = transfer_of(s, stage, a, false)) {
      const auto came = there.find({stage, *input});
      if (came == there.end()) return {};
      start = std::max(start, came->second);
    }
    const double end = computed[stage] = start + duration;
    if (const auto output = transfer_of(s, stage, a, true)) {
      there[{stage, *output}] = end;
      if (wire)
        there[{output->peer, other_end(s, stage, *output)}] = end + *wire,
                                                 ready.push_back(output->peer);
    }
    return Span{start, end};
  };
  const auto exchange = [&](int stage, const Action& a, double duration) -> std::optional<Span> {
    double start = exchanged[stage];
    for (const Transfer& t : a.transfers)
      if (t.send) start = std::max(start, there.at({stage, t}));
    for (const Transfer& t : a.transfers)
      if (reached.insert({{stage, t}, start}).second) ready.push_back(t.peer);
    double end = start;
    for (const Transfer& t : a.transfers) {
      const auto facing = reached.find({t.peer, other_end(s, stage, t)});
      if (facing == reached.end()) return {};
      end = std::max(end, std::max(start, facing->second) + duration);
    }
    for (const Transfer& t : a.transfers)
      if (!t.send) there[{stage, t}] = end;
    exchanged[stage] = end;
    return Span{start, end};
  };
  Spans spans(s.stages);
  for (int stage = 0; stage < s.stages; stage++) ready.push_back(stage);
  for (; !ready.empty(); ready.pop_front()) {
    const int stage = ready.front();
    for (size_t i = spans[stage].size(); i < s.ranks[stage].size(); i++) {
      const Action& a = s.ranks[stage][i];
      const auto span = a.kind == Action::exchange ? exchange(stage, a, durations[stage][i])
                                                   : compute(stage, a, durations[stage][i]);
      if (!span) break;  // until another stage has got on
      spans[stage].push_back(*span);
    }
  }
  return spans;
}

// ---- the one rule that places transfers

// How long a transfer takes, in ticks: so short that a million in a row are less than a tick; a
// power of two, so that sums stay exact.
constexpr double kMoment = 1.0 / (1 << 30);

// Lists every transfer on both its stages, at the time when what it sends exists. Two that face
// each other at one tick become one exchange, at the later of their times. Exchanges of a tick come
// before the computations that start at it.
static void place_transfers(Schedule& s) {
  struct Meeting {
    double when = 0;
    std::vector<Transfer> of_low, of_high;
  };
  const Spans spans = walk(s, durations(s, {}), kMoment);
  // {tick, lower stage, higher stage}
  std::map<std::tuple<double, int, int>, Meeting> meetings;
  // {tick, computes, when, stage, peer}
  std::map<std::tuple<double, bool, double, int, int>, Action> events;
  for_each_computation(s, [&](int stage, int i, const Action& a) {
    ASSERT(i < int(spans[stage].size()), s.name, " waits for itself on stage ", stage);
    const auto [start, end] = spans[stage][i];
    events[{std::floor(start), true, start, stage, stage}] = a;
    const auto sent = transfer_of(s, stage, a, true);
    if (!sent) return;
    const auto [low, high] = std::minmax({stage, sent->peer});
    Meeting& m = meetings[{std::floor(end), low, high}];
    m.when = std::max(m.when, end);
    (stage == low ? m.of_low : m.of_high).push_back(*sent);
    (stage == low ? m.of_high : m.of_low).push_back(other_end(s, stage, *sent));
  });
  for (const auto& [key, m] : meetings) {
    const auto [tick, low, high] = key;
    events[{tick, false, m.when, low, high}] = {Action::exchange, -1, -1, m.of_low};
    events[{tick, false, m.when, high, low}] = {Action::exchange, -1, -1, m.of_high};
  }
  for (auto& list : s.ranks) list.clear();
  for (const auto& [key, action] : events) s.ranks[std::get<3>(key)].push_back(action);
}

// ---- the rules of the checker: each returns what is wrong, or nothing

static std::string place(const Schedule& s, int stage, int index) {
  return sentence("stage ", stage, ", action ", index, " (", to_string(s.at(stage, index)), ")");
}
static std::string describe(const Transfer& t) {
  return sentence(t.send ? "send " : "receive ",
                  t.payload == Transfer::activation ? "activation" : "gradient", " of micro-batch ",
                  t.microbatch, ", chunk ", t.chunk, t.send ? " to " : " from ", "stage ", t.peer);
}

// On each stage every micro-batch goes once through the three parts of each chunk, gradients in
// ascending order; each transfer that they need is there once, after what it sends and before what
// uses it; and there is no other.
static std::string wrong_action(const Schedule& s) {
  constexpr Action::Kind kPart[] = {Action::forward, Action::input_gradient,
                                    Action::weight_gradient};
  const std::vector<int> parts_of[] = {{0}, {1, 2}, {1}, {2}};  // by kind
  const auto in_step = [&](int m, int c) {
    return m >= 0 && m < s.microbatches && c >= 0 && c < s.chunks;
  };
  for (int stage = 0; stage < s.stages; stage++) {
    std::map<std::pair<int, int>, int> done[3];  // of each part {micro-batch, chunk}: the action
    std::set<Transfer> moved;
    for (int i = 0; i < int(s.ranks[stage].size()); i++) {
      const auto& [kind, m, c, transfers] = s.at(stage, i);
      for (const Transfer& t : transfers) {
        const int part = t.payload == Transfer::activation ? 0 : 1;
        if (!in_step(t.microbatch, t.chunk) ||
            transfer_of(s, stage, {kPart[part], t.microbatch, t.chunk}, t.send) != t)
          return sentence(place(s, stage, i), ": nothing needs to ", describe(t), ".");
        if (!moved.insert(t).second) return place(s, stage, i) + " comes twice.";
        const auto computation = done[part].find({t.microbatch, t.chunk});
        if (t.send && computation == done[part].end())
          return place(s, stage, i) + " sends before it has computed that.";
        if (!t.send && computation != done[part].end())
          return sentence(place(s, stage, i), " receives after ",
                          to_string(s.at(stage, computation->second)), ".");
      }
      if (kind == Action::exchange) continue;
      if (!in_step(m, c)) return place(s, stage, i) + " is not part of this step.";
      for (const int part : parts_of[kind]) {
        if (part > 0 && !done[part - 1].count({m, c}))
          return sentence(place(s, stage, i), " comes before the ",
                          to_string({kPart[part - 1], m, c}), ".");
        if (const int from = c + (part ? 1 : -1); s.stages == 1 && part < 2 && from >= 0 &&
                                                  from < s.chunks && !done[part].count({m, from}))
          return sentence(place(s, stage, i), " comes before its input from chunk ", from, ".");
        if (part > 0 && m > 0 && !done[part].count({m - 1, c}))
          return sentence(place(s, stage, i), " comes before that of micro-batch ", m - 1,
                          ": gradients are summed in ascending order.");
        if (!done[part].insert({{m, c}, i}).second) return place(s, stage, i) + " comes twice.";
      }
    }
    for (int part = 0; part < 3; part++)
      for (int c = 0; c < s.chunks; c++)
        for (int m = 0; m < s.microbatches; m++) {
          const Action a{kPart[part], m, c};
          if (!done[part].count({m, c}))
            return sentence("stage ", stage, " never does the ", to_string(a), ".");
          for (const bool send : {true, false})
            if (const auto t = transfer_of(s, stage, a, send); t && !moved.count(*t))
              return sentence(place(s, stage, done[part][{m, c}]),
                              " lacks its transfer: ", describe(*t), ".");
        }
  }
  return "";
}

// Between two stages NCCL knows transfers only by their order.
static std::string wrong_order(const Schedule& s) {
  // {from, to}: as the receiver sees them; as many, by wrong_action
  std::map<std::pair<int, int>, std::vector<Transfer>> sent, received;
  for (int stage = 0; stage < s.stages; stage++)
    for (const Action& a : s.ranks[stage])
      for (const Transfer& t : a.transfers)
        if (t.send) sent[{stage, t.peer}].push_back(other_end(s, stage, t));
        else received[{t.peer, stage}].push_back(t);
  for (const auto& [pair, sends] : sent)
    for (size_t k = 0; k < sends.size(); k++)
      if (const Transfer& meets = received[pair][k]; sends[k] != meets)
        return sentence("transfer ", k, " from stage ", pair.first, " to stage ", pair.second,
                        " should meet '", describe(sends[k]), "' there, but meets '",
                        describe(meets), "'.");
  return "";
}

static std::string deadlock(const Schedule& s) {
  const Spans spans = walk(s, durations(s, {}));
  std::string stuck;
  for (int stage = 0; stage < s.stages; stage++)
    if (spans[stage].size() < s.ranks[stage].size())
      stuck += (stuck.empty() ? "deadlock: " : "; ") + place(s, stage, int(spans[stage].size())) +
               " waits";
  return stuck.empty() ? "" : stuck + ".";
}

// ---- generate, name, check

Schedule make_schedule(const std::string& name, int p, int m, int V) {
  REQUIRE((std::set<std::string>{"gpipe", "1f1b", "interleaved", "zb"}.count(name)),
          "there is no schedule '", name, "': choose gpipe, 1f1b, interleaved or zb");
  REQUIRE(p >= 1, "a pipeline needs at least one stage, not ", p);
  REQUIRE(m >= 1, "a pipeline needs at least one micro-batch, not ", m);
  REQUIRE(V >= 1, "a stage needs at least one chunk, not ", V);
  REQUIRE(V == 1 || name == "interleaved", "schedule ", name, " has one chunk a stage, not ", V,
          ": choose interleaved");
  REQUIRE(m % p == 0 || name != "interleaved",
          "interleaved needs a number of micro-batches that its ", p, " stages divide, not ", m);
  REQUIRE(int64_t(p) * m <= 1'000'000 / V, p, " stages, ", m, " micro-batches and ", V,
          " chunks make more than a million forwards");
  Schedule s{name, p, m, V, {}};
  for (int stage = 0; stage < p; stage++) s.ranks.push_back(computations(name, p, stage, m, V));
  place_transfers(s);
  return s;
}

const char* name_of(Action::Kind kind) {
  return (const char*[]){"forward", "backward", "input gradient", "weight gradient",
                         "exchange"}[kind];
}

std::string to_string(const Action& a) {
  if (a.kind == Action::exchange) {
    std::string text;
    for (const Transfer& t : a.transfers) text += (text.empty() ? "" : " + ") + describe(t);
    return text;
  }
  return sentence(name_of(a.kind), " of micro-batch ", a.microbatch, ", chunk ", a.chunk);
}

std::string to_string(const Schedule& s) {
  return sentence(s.name, ", ", s.stages, " stages, ", s.microbatches, " micro-batches",
                  s.chunks > 1 ? sentence(", ", s.chunks, " chunks a stage") : "");
}

std::string check(const Schedule& s) {
  if (int(s.ranks.size()) != s.stages)
    return sentence("there are ", s.ranks.size(), " lists for ", s.stages, " stages.");
  for (const auto rule : {wrong_action, wrong_order, deadlock})
    if (const std::string wrong = rule(s); !wrong.empty()) return wrong;
  return "";
}

// ---- simulate

Durations durations(const Schedule& s, const Times& t) {
  const double of_kind[] = {t.forward, t.input_gradient + t.weight_gradient, t.input_gradient,
                            t.weight_gradient, t.send};
  Durations all;
  for (const auto& list : s.ranks) {
    all.emplace_back();
    for (const Action& a : list) all.back().push_back(of_kind[a.kind]);
  }
  return all;
}

double Timeline::bubble() const {
  double sum = 0;
  for (double b : busy) sum += b;
  return makespan > 0 ? 1 - sum / (makespan * busy.size()) : 0;
}

Timeline timeline(const Schedule& s, std::vector<std::vector<Span>> spans) {
  Timeline t{std::move(spans), std::vector<double>(s.stages, 0.0), 0};
  for_each_computation(s, [&](int stage, int i, const Action&) {
    t.busy[stage] += t.spans[stage][i].end - t.spans[stage][i].start;
    t.makespan = std::max(t.makespan, t.spans[stage][i].end);
  });
  return t;
}

Timeline simulate(const Schedule& s, const Durations& durations) {
  Spans spans = walk(s, durations);
  for (int stage = 0; stage < s.stages; stage++)
    ASSERT(spans[stage].size() == s.ranks[stage].size(), check(s));
  return timeline(s, std::move(spans));
}

int64_t peak_live(const Schedule& s, int stage, const std::vector<int64_t>& bytes) {
  int64_t live = 0, peak = 0;
  for (const Action& a : s.ranks[stage]) {
    if (a.kind == Action::exchange || a.kind == Action::input_gradient) continue;
    const int64_t size = bytes.empty() ? 1 : bytes[a.chunk];
    live += a.kind == Action::forward ? size : -size;
    peak = std::max(peak, live);
  }
  return peak;
}

// ---- theory

double theoretical_idle(const Schedule& s, const Times& t) {
  const int p = s.stages, m = s.microbatches;
  const double F = t.forward, B = t.input_gradient, W = t.weight_gradient;
  if (s.name != "zb") return (p - 1) * (F + B + W);
  return std::max((p - 1) * std::max(F, B), (p - 1) * (F + B) - (std::min(m, p) - 1) * W);
}

double theoretical_bubble(const Schedule& s, const Times& t) {
  const double idle = theoretical_idle(s, t),
               work =
                   s.microbatches * s.chunks * (t.forward + t.input_gradient + t.weight_gradient);
  return idle / (work + idle);
}

int64_t theoretical_live(const Schedule& s, int stage) {
  const int p = s.stages, m = s.microbatches, V = s.chunks;
  if (s.name == "gpipe") return m;
  if (s.name == "1f1b") return std::min(p - stage, m);
  if (s.name == "zb") return std::min(p, m);
  return std::min(2 * (p - 1 - stage) + (V - 1) * p + 1, V * m);
}
