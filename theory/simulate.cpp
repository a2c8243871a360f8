// simulate.cpp: see simulate.h.
#include "theory/simulate.h"

#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "support/check.h"

// ---- parts: what a stage does, transfer by transfer and gradient by gradient

static Action exchange_of(const Transfer& t) { return {Action::exchange, -1, -1, {t}}; }

static std::vector<Action> parts_of(const Action& a) {
  if (a.kind == Action::backward)
    return {{Action::input_gradient, a.microbatch, a.chunk},
            {Action::weight_gradient, a.microbatch, a.chunk}};
  if (a.kind != Action::exchange) return {a};
  std::vector<Action> parts;
  for (const Transfer& t : a.transfers) parts.push_back(exchange_of(t));
  return parts;
}

// The parts that this stage must have done before it begins with an action.
static std::vector<Action> needs_of(const Schedule& s, int stage, const Action& a) {
  std::vector<Action> needs;
  for (const Transfer& t : a.transfers) {
    const bool activates = t.payload == Transfer::activation;
    if (t.send)
      needs.push_back(
          {activates ? Action::forward : Action::input_gradient, t.microbatch, t.chunk});
  }
  if (a.kind == Action::exchange) return needs;
  const auto parts = parts_of(a);
  for (const auto& [kind, m, c, transfers] : parts)
    if (m > 0) needs.push_back({kind, m - 1, c});  // sums are made in ascending order
  if (a.kind != Action::forward)
    needs.push_back({a.kind == Action::weight_gradient ? Action::input_gradient : Action::forward,
                     a.microbatch, a.chunk});
  if (const auto t = transfer_of(s, stage, a, false))
    needs.push_back(t->peer != stage
                        ? exchange_of(*t)
                        : Action{parts[0].kind, t->microbatch, other_end(s, stage, *t).chunk});
  return needs;
}

// ---- one walk over all lists, for checker and simulator

// The spans of what each stage gets done; lists that end early wait for each other. A stage steps
// over an action when what it needs is done, and over an exchange when its peers have come to the
// facing ones, too. That is how an executor whose every action blocks goes ahead. The times are
// those of two queues a stage (simulate.h): each waits only for what it needs.
static Spans walk(const Schedule& s, const Durations& durations) {
  std::vector<std::map<Action, double>> done(s.stages);         // [stage]: parts, and when
  std::vector<std::map<Transfer, double>> reached(s.stages);    // [stage]: when its exchange was
  std::vector<double> computed(s.stages), exchanged(s.stages);  // when each queue is free
  Spans spans(s.stages);
  bool moved = true;
  // Does the next action of a stage, if it can.
  const auto proceed = [&](int stage) {
    const size_t i = spans[stage].size();
    if (i == s.actions[stage].size()) return false;
    const Action& a = s.actions[stage][i];
    double& free = (a.kind == Action::exchange ? exchanged : computed)[stage];
    double start = free, end = 0;
    for (const Action& need : needs_of(s, stage, a)) {
      const auto when = done[stage].find(need);
      if (when == done[stage].end()) return false;
      start = std::max(start, when->second);
    }
    for (const Transfer& t : a.transfers) moved |= reached[stage].insert({t, start}).second;
    for (const Transfer& t : a.transfers) {
      const auto facing = reached[t.peer].find(other_end(s, stage, t));
      if (facing == reached[t.peer].end()) return false;
      end = std::max(end, facing->second);
    }
    end = free = std::max(start, end) + durations[stage][i];
    for (const Action& part : parts_of(a)) done[stage][part] = end;
    spans[stage].push_back({start, end});
    return true;
  };
  while (std::exchange(moved, false))
    for (int stage = 0; stage < s.stages; stage++)
      while (proceed(stage)) moved = true;
  return spans;
}

// ---- the rules of the checker: each returns what is wrong, or nothing

static std::string place(const Schedule& s, int stage, int index) {
  return sentence("stage ", stage, ", action ", index, " (", to_string(s.at(stage, index)), ")");
}

// Every part of a step is there once, and no other.
static std::string wrong_part(const Schedule& s) {
  for (int stage = 0; stage < s.stages; stage++) {
    std::set<Action> missing;
    for (int m = 0; m < s.microbatches; m++)
      for (int c = 0; c < s.chunks; c++)
        for (const auto kind : {Action::forward, Action::input_gradient, Action::weight_gradient}) {
          const Action a{kind, m, c};
          missing.insert(a);
          for (const bool send : {false, true})
            if (const auto t = transfer_of(s, stage, a, send); t && t->peer != stage)
              missing.insert(exchange_of(*t));
        }
    for (int i = 0; i < int(s.actions[stage].size()); i++)
      for (const Action& part : parts_of(s.at(stage, i)))
        if (!missing.erase(part))
          return place(s, stage, i) + " comes twice or is not part of this step.";
    for (const Action& part : missing)
      return sentence("stage ", stage, " never does this: ", to_string(part), ".");
  }
  return "";
}

// Between two stages NCCL knows transfers only by their order.
static std::string wrong_order(const Schedule& s) {
  // {from, to}: as the receiver sees them; as many, by wrong_part
  std::map<std::pair<int, int>, std::vector<Transfer>> sent, received;
  for (int stage = 0; stage < s.stages; stage++)
    for (const Action& a : s.actions[stage])
      for (const Transfer& t : a.transfers)
        if (t.send) sent[{stage, t.peer}].push_back(other_end(s, stage, t));
        else received[{t.peer, stage}].push_back(t);
  for (const auto& [pair, sends] : sent) {
    const auto [meant, meets] = std::mismatch(sends.begin(), sends.end(), received[pair].begin());
    if (meant != sends.end())
      return sentence("a transfer from stage ", pair.first, " to stage ", pair.second,
                      " should meet '", to_string(*meant), "' there, but meets '",
                      to_string(*meets), "'.");
  }
  return "";
}

static std::string deadlock(const Schedule& s) {
  const Spans spans = walk(s, durations(s, {}));
  std::string stuck;
  for (int stage = 0; stage < s.stages; stage++)
    if (spans[stage].size() < s.actions[stage].size())
      stuck +=
          (stuck.empty() ? "deadlock: " : "; ") + place(s, stage, spans[stage].size()) + " waits";
  return stuck.empty() ? "" : stuck + ".";
}

std::string check(const Schedule& s) {
  if (int(s.actions.size()) != s.stages)
    return sentence("there are ", s.actions.size(), " lists for ", s.stages, " stages.");
  for (const auto rule : {wrong_part, wrong_order, deadlock})
    if (const std::string wrong = rule(s); !wrong.empty()) return wrong;
  return "";
}

// ---- simulate

Durations durations(const Schedule& s, const Times& t) {
  const double of_kind[] = {t.forward, t.input_gradient + t.weight_gradient, t.input_gradient,
                            t.weight_gradient, t.send};
  Durations all;
  for (const auto& list : s.actions) {
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

Timeline simulate(const Schedule& s, const Durations& durations) {
  Timeline t{walk(s, durations), std::vector<double>(s.stages)};
  for (int stage = 0; stage < s.stages; stage++)
    ASSERT(t.spans[stage].size() == s.actions[stage].size(), check(s));
  for_each_computation(s, [&](int stage, int i, const Action&) {
    t.busy[stage] += t.spans[stage][i].end - t.spans[stage][i].start;
    t.makespan = std::max(t.makespan, t.spans[stage][i].end);
  });
  return t;
}

int64_t peak_live(const Schedule& s, int stage, std::vector<Kept> kept) {
  int64_t live = 0, peak = 0;
  kept.resize(s.chunks);
  for (const Action& a : s.actions[stage]) {
    if (a.kind == Action::exchange) continue;
    const auto [forward, input_gradient] = kept[a.chunk];
    if (a.kind == Action::forward) live += forward;
    else if (a.kind == Action::backward) live -= forward;
    else if (a.kind == Action::input_gradient) live += input_gradient - forward;
    else live -= input_gradient;
    peak = std::max(peak, live);
  }
  return peak;
}

double theoretical_bubble(const Schedule& s, const Times& t) {
  const double idle = s.row->idle(s.stages, s.microbatches, t);
  return idle / (s.microbatches * s.chunks * t.all() + idle);
}
