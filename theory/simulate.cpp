// simulate.cpp: see simulate.h.
#include "theory/simulate.h"

#include <algorithm>
#include <deque>
#include <map>
#include <tuple>

#include "support/check.h"

// ---- one walk over all lists, for checker and simulator

// The spans of what each stage gets done; lists that end early wait for each other. A stage steps
// over a computation when its input is there, and over an exchange when its peers have come to the
// facing ones. That is how an executor whose every action blocks goes ahead. The times are those of
// two queues a stage (simulate.h): each waits only for what it needs.
static Spans walk(const Schedule& s, const Durations& durations) {
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
    if (const auto output = transfer_of(s, stage, a, true))
      there[{stage, output->peer == stage ? other_end(s, stage, *output) : *output}] = end;
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
    for (size_t i = spans[stage].size(); i < s.actions[stage].size(); i++) {
      const Action& a = s.actions[stage][i];
      const auto span = a.kind == Action::exchange ? exchange(stage, a, durations[stage][i])
                                                   : compute(stage, a, durations[stage][i]);
      if (!span) break;  // until another stage has got on
      spans[stage].push_back(*span);
    }
  }
  return spans;
}

// ---- the rules of the checker: each returns what is wrong, or nothing

static std::string place(const Schedule& s, int stage, int index) {
  return sentence("stage ", stage, ", action ", index, " (", to_string(s.at(stage, index)), ")");
}

// Each part of each chunk comes once for every micro-batch, in ascending order, after what it
// needs; each transfer that they need comes once, in ascending order, after what it sends and
// before what uses it; and there is no other.
static std::string wrong_action(const Schedule& s) {
  constexpr Action::Kind kPart[] = {Action::forward, Action::input_gradient,
                                    Action::weight_gradient};
  const std::vector<int> parts_of[] = {{0}, {1, 2}, {1}, {2}};  // by kind
  for (int stage = 0; stage < s.stages; stage++) {
    // how many micro-batches are through: {part, chunk}, {send, payload, chunk}
    std::map<std::pair<int, int>, int> done;
    std::map<std::tuple<bool, int, int>, int> moved;
    const auto out_of_turn = [&](int m, int chunk, int& next) -> std::string {
      if (chunk < 0 || chunk >= s.chunks || m >= s.microbatches)
        return " is not part of this step.";
      if (m < next) return " comes twice.";
      if (m > next) return sentence(" comes before that of micro-batch ", next, ".");
      next++;
      return "";
    };
    for (int i = 0; i < int(s.actions[stage].size()); i++) {
      const auto& [kind, m, c, transfers] = s.at(stage, i);
      const auto here = [&] { return place(s, stage, i); };
      std::string wrong;
      for (const Transfer& t : transfers) {
        const int part = t.payload == Transfer::activation ? 0 : 1;
        wrong = out_of_turn(t.microbatch, t.chunk, moved[{t.send, t.payload, t.chunk}]);
        if (!wrong.empty()) return here() + wrong;
        if (t.peer == stage ||
            transfer_of(s, stage, {kPart[part], t.microbatch, t.chunk}, t.send) != t)
          return sentence(here(), ": nothing needs to ", to_string(t), ".");
        if (t.send && done[{part, t.chunk}] <= t.microbatch)
          return here() + " sends before it has computed that.";
      }
      if (kind == Action::exchange) continue;
      for (const int part : parts_of[kind]) {
        if (part > 0 && done[{part - 1, c}] <= m)
          return sentence(here(), " comes before the ", to_string({kPart[part - 1], m, c}), ".");
        if (const auto t = transfer_of(s, stage, {kPart[part], m, c}, false))
          if (m >= (t->peer == stage ? done[{part, other_end(s, stage, *t).chunk}]
                                     : moved[{false, t->payload, c}]))
            return here() + " comes before its input.";
        wrong = out_of_turn(m, c, done[{part, c}]);
        if (!wrong.empty()) return here() + wrong;
      }
    }
    for (int part = 0; part < 3; part++)
      for (int c = 0; c < s.chunks; c++) {
        const Action last{kPart[part], s.microbatches - 1, c};
        if (done[{part, c}] < s.microbatches)
          return sentence("stage ", stage, " never does the ", to_string(last), ".");
        const auto t = transfer_of(s, stage, last, true);
        if (t && t->peer != stage && moved[{true, t->payload, c}] < s.microbatches)
          return sentence("stage ", stage, " lacks a transfer: ", to_string(*t), ".");
      }
  }
  return "";
}

// Between two stages NCCL knows transfers only by their order.
static std::string wrong_order(const Schedule& s) {
  // {from, to}: as the receiver sees them; as many, by wrong_action
  std::map<std::pair<int, int>, std::vector<Transfer>> sent, received;
  for (int stage = 0; stage < s.stages; stage++)
    for (const Action& a : s.actions[stage])
      for (const Transfer& t : a.transfers)
        if (t.send) sent[{stage, t.peer}].push_back(other_end(s, stage, t));
        else received[{t.peer, stage}].push_back(t);
  for (const auto& [pair, sends] : sent)
    for (size_t k = 0; k < sends.size(); k++)
      if (const Transfer& meets = received[pair][k]; sends[k] != meets)
        return sentence("transfer ", k, " from stage ", pair.first, " to stage ", pair.second,
                        " should meet '", to_string(sends[k]), "' there, but meets '",
                        to_string(meets), "'.");
  return "";
}

static std::string deadlock(const Schedule& s) {
  const Spans spans = walk(s, durations(s, {}));
  std::string stuck;
  for (int stage = 0; stage < s.stages; stage++)
    if (spans[stage].size() < s.actions[stage].size())
      stuck += (stuck.empty() ? "deadlock: " : "; ") + place(s, stage, int(spans[stage].size())) +
               " waits";
  return stuck.empty() ? "" : stuck + ".";
}

std::string check(const Schedule& s) {
  if (int(s.actions.size()) != s.stages)
    return sentence("there are ", s.actions.size(), " lists for ", s.stages, " stages.");
  for (const auto rule : {wrong_action, wrong_order, deadlock})
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

Timeline timeline(const Schedule& s, Spans spans) {
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
    ASSERT(spans[stage].size() == s.actions[stage].size(), check(s));
  return timeline(s, std::move(spans));
}

int64_t peak_live(const Schedule& s, int stage, const std::vector<int64_t>& bytes) {
  int64_t live = 0, peak = 0;
  for (const Action& a : s.actions[stage]) {
    if (a.kind == Action::exchange || a.kind == Action::input_gradient) continue;
    const int64_t size = bytes.empty() ? 1 : bytes[a.chunk];
    live += a.kind == Action::forward ? size : -size;
    peak = std::max(peak, live);
  }
  return peak;
}

double theoretical_bubble(const Schedule& s, const Times& t) {
  const double idle = s.row->idle(s.stages, s.microbatches, t);
  return idle / (s.microbatches * s.chunks * t.all() + idle);
}
