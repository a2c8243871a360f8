// simulate.cpp: see simulate.h.
#include "theory/simulate.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <utility>

#include "support/check.h"

// ---- parts: what a stage does, transfer by transfer and gradient by gradient

static Action exchange_of(const Transfer& t) { return {Action::exchange, -1, -1, {t}}; }
static Action maker_of(const Transfer& t) {
  const bool activates = t.payload == Transfer::activation;
  return {activates ? Action::forward : Action::input_gradient, t.microbatch, t.chunk};
}

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
  if (a.kind == Action::exchange) {
    for (const Transfer& t : a.transfers)
      if (t.from == stage) needs.push_back(maker_of(t));
    return needs;
  }
  for (const auto& [kind, m, c, transfers] : parts_of(a))
    if (m > 0) needs.push_back({kind, m - 1, c});  // sums are made in ascending order
  if (a.kind != Action::forward)
    needs.push_back({a.kind == Action::weight_gradient ? Action::input_gradient : Action::forward,
                     a.microbatch, a.chunk});
  if (const auto t = input_of(s, stage, a))
    needs.push_back(t->from == stage ? maker_of(*t) : exchange_of(*t));
  return needs;
}

// ---- for checker and simulator

std::vector<Task> tasks_of(const Schedule& s, const Durations& durations, bool one_queue) {
  std::vector<Task> tasks;
  std::vector<std::map<Action, int>> does(s.stages);  // [stage]: which task does a part
  for (int stage = 0; stage < s.stages; stage++)
    for (size_t i = 0; i < s.actions[stage].size(); i++) {
      const Action& a = s.actions[stage][i];
      for (const Action& part : parts_of(a)) does[stage][part] = tasks.size();
      const bool exchanges = a.kind == Action::exchange && !one_queue;
      tasks.push_back(
          {stage, exchanges ? Queue::communication : Queue::compute, durations[stage][i]});
    }
  auto task = tasks.begin();
  for (int stage = 0; stage < s.stages; stage++)
    for (const Action& a : s.actions[stage]) {
      for (const Action& need : needs_of(s, stage, a)) {
        const int number = does[stage].at(need);
        // a queue has done what was issued to it before
        if (tasks[number].queue != task->queue || number > task - tasks.begin())
          task->after = std::max(task->after, number);
      }
      for (const Transfer& t : a.transfers)
        task->with.push_back(does[t.from == stage ? t.to : t.from].at(exchange_of(t)));
      task++;
    }
  return tasks;
}

// By stage, from those of the tasks.
static Spans by_stage(const Schedule& s, const std::vector<Span>& spans) {
  Spans of_stages;
  auto next = spans.begin();
  for (const auto& list : s.actions) {
    of_stages.emplace_back(next, next + list.size());
    next += list.size();
  }
  return of_stages;
}

// ---- the rules of the checker: each returns what is wrong, or nothing

static std::string place(const Schedule& s, int stage, int index) {
  return sentence("stage ", stage, ", action ", index, " (", to_string(s.actions[stage][index]),
                  ")");
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
          for (const auto& t : {input_of(s, stage, a), output_of(s, stage, a)})
            if (t && t->from != t->to) missing.insert(exchange_of(*t));
        }
    for (int i = 0; i < int(s.actions[stage].size()); i++)
      for (const Action& part : parts_of(s.actions[stage][i]))
        if (!missing.erase(part))
          return place(s, stage, i) + " comes twice or is not part of this step.";
    for (const Action& part : missing)
      return sentence("stage ", stage, " never does this: ", to_string(part), ".");
  }
  return "";
}

// Between two stages NCCL knows transfers only by their order.
static std::string wrong_order(const Schedule& s) {
  // {from, to}: as many, by wrong_part
  std::map<std::pair<int, int>, std::vector<Transfer>> sent, received;
  for (int stage = 0; stage < s.stages; stage++)
    for (const Action& a : s.actions[stage])
      for (const Transfer& t : a.transfers)
        (t.from == stage ? sent : received)[{t.from, t.to}].push_back(t);
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
  std::string stuck;
  int stage = 0;
  for (const auto& spans : by_stage(s, run(tasks_of(s, durations(s, {}), true), true))) {
    const auto waits = std::ranges::find_if(spans, [](const Span& x) { return x.end == INFINITY; });
    if (waits != spans.end())
      stuck +=
          (stuck.empty() ? "deadlock: " : "; ") + place(s, stage, waits - spans.begin()) + " waits";
    stage++;
  }
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
  Timeline t{by_stage(s, run(tasks_of(s, durations))), std::vector<double>(s.stages)};
  for_each_computation(s, [&](int stage, int i, const Action&) {
    t.busy[stage] += t.spans[stage][i].end - t.spans[stage][i].start;
    t.makespan = std::max(t.makespan, t.spans[stage][i].end);
  });
  return t;
}

double extended_makespan(const Schedule& s, const std::function<double(int m)>& of) {
  const int step = s.row->divisor(s.stages);
  // found by running all up to 16 stages; a ring of few stages settles late
  const int steady =
      s.row->placement == Placement::ring ? std::max(28, 3 * s.stages) : 2 * s.stages;
  for (int first = (steady + step - 1) / step * step;; first *= 2) {
    const int rest = s.microbatches - (first + 2 * step);
    if (rest <= 0) return of(s.microbatches);
    const double a = of(first), b = of(first + step), c = of(first + 2 * step);
    if (std::abs((c - b) - (b - a)) > 1e-9 * c) continue;
    return c + (c - b) * rest / step;
  }
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
