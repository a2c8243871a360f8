// schedule.cpp: one generator for the four schedules, one rule that places transfers, and what reads the lists: checker, simulator, drawer.
//
// idea      the generator says only what each stage computes, in order. Everything about communication follows from that (schedule.h).
// cost      O(actions log actions) for everything here; nothing here runs during a training step
// test      tests/test_schedule.cpp
#include "schedule.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <set>

#include "support/check.h"

namespace {

// ---- the schedules: what stage s of p computes for m micro-batches on V chunks

// All of them warm up with some forwards, then do one forward (while there are any) and one backward in turn. With several chunks, p
// micro-batches walk through chunk 0, then through chunk 1, ...; then the next p. Backwards visit the chunks from the last.
std::vector<Action> computations(const std::string& name, int p, int s, int m, int V) {
  const auto step = [&](Action::Kind kind, int k) {
    const int round = k / (p * V), chunk = k % (p * V) / p;
    return Action{kind, round * p + k % p, kind == Action::forward ? chunk : V - 1 - chunk};
  };
  const int all = m * V;
  int warm = p - 1 - s;                                             // 1f1b, zb: a forward for each later stage
  if (name == "gpipe") warm = all;                                  // all forwards, then all backwards
  if (name == "interleaved") warm = 2 * (p - 1 - s) + (V - 1) * p;  // up to the last chunk, then twice the way: a backward takes two forwards
  std::vector<Action> order;
  for (int k = 0; k < std::min(warm, all); k++) order.push_back(step(Action::forward, k));
  for (int k = 0; k < all; k++) {
    if (warm + k < all) order.push_back(step(Action::forward, warm + k));
    order.push_back(step(name == "zb" ? Action::input_gradient : Action::backward, k));
    // ZB-H1 is 1F1B whose backwards pass on the input gradient at once. Stage s puts its weight gradients off by s micro-batches: as many
    // as its warm-up is shorter than stage 0's, so all stages hold p micro-batches, and the later ones have work left for the end.
    if (name == "zb" && k >= s) order.push_back(step(Action::weight_gradient, k - s));
  }
  for (int k = std::max(all - s, 0); name == "zb" && k < all; k++) order.push_back(step(Action::weight_gradient, k));
  return order;
}

// ---- what computations need of each other

// From this end's position to the other's: activations are sent forward, gradients back.
int direction(const Transfer& t) { return (t.payload == Transfer::activation) == t.send ? 1 : -1; }

// The same transfer as the stage at its other end sees it.
Transfer other_end(const Schedule& s, int stage, const Transfer& t) {
  return {!t.send, t.payload, stage, t.microbatch, (s.position(stage, t.chunk) + direction(t)) / s.stages};
}

// Every transfer that the stage's computations need, with the index of the one that produces or uses it.
std::map<Transfer, int> transfers_needed(const Schedule& s, int stage) {
  std::map<Transfer, int> needed;
  for (int i = 0; i < int(s.ranks[stage].size()); i++) {
    const Action& a = s.at(stage, i);
    if (a.kind == Action::exchange || a.kind == Action::weight_gradient) continue;
    for (const bool send : {false, true}) {
      Transfer t{send, a.kind == Action::forward ? Transfer::activation : Transfer::gradient, 0, a.microbatch, a.chunk};
      const int other = s.position(stage, a.chunk) + direction(t);
      if (s.stages == 1 || other < 0 || other == s.positions()) continue;
      t.peer = other % s.stages;
      needed[t] = i;
    }
  }
  return needed;
}

// ---- the one rule that places transfers

// When F = B = W = 1 and a transfer takes a moment: ticks first, then the moments spent on the way.
struct Instant {
  int tick = 0, moments = 0;
  auto operator<=>(const Instant&) const = default;
};
int ticks(Action::Kind kind) { return kind == Action::backward ? 2 : 1; }

// When each computation ends if every stage does its next one as soon as the input exists.
std::vector<std::vector<Instant>> earliest_ends(const Schedule& s) {
  std::vector<std::vector<Instant>> end(s.stages);
  std::map<std::array<int, 3>, Instant> done;  // {is a forward, micro-batch, position}: when that result exists
  for (bool moved = true; moved;) {
    moved = false;
    for (int stage = 0; stage < s.stages; stage++)
      for (size_t i = end[stage].size(); i < s.ranks[stage].size(); i++, moved = true) {
        const Action& a = s.ranks[stage][i];
        const bool forward = a.kind == Action::forward, local = a.kind == Action::weight_gradient;
        const int position = s.position(stage, a.chunk), from = position + (forward ? -1 : 1);
        Instant start = i ? end[stage].back() : Instant{};
        if (!local && from >= 0 && from < s.positions()) {
          const auto input = done.find({forward, a.microbatch, from});
          if (input == done.end()) break;  // come back when another stage has moved
          start = std::max(start, Instant{input->second.tick, input->second.moments + 1});
        }
        end[stage].push_back({start.tick + ticks(a.kind), start.moments});
        if (!local) done[{forward, a.microbatch, position}] = end[stage].back();
      }
  }
  return end;
}

// Lists every transfer on both its stages, at the time when what it sends exists. Two that face each other at one tick become one
// exchange, at the later of their times. Exchanges of a tick come before the computations that start at it.
void place_transfers(Schedule& s) {
  using Key = std::array<int, 5>;  // {tick, 0, moments, two stages} of an exchange, {tick, 1, index} of a computation's start
  struct Meeting { Instant when; std::vector<Transfer> of_low, of_high; };
  const auto end = earliest_ends(s);
  std::map<std::array<int, 3>, Meeting> meetings;  // {tick, lower stage, higher stage}
  std::vector<std::map<Key, Action>> lists(s.stages);
  for (int stage = 0; stage < s.stages; stage++) {
    ASSERT(end[stage].size() == s.ranks[stage].size(), s.name, " waits for itself on stage ", stage);
    for (int i = 0; i < int(s.ranks[stage].size()); i++)
      lists[stage][{end[stage][i].tick - ticks(s.at(stage, i).kind), 1, i}] = s.at(stage, i);
    for (const auto& [t, i] : transfers_needed(s, stage)) {
      if (!t.send) continue;
      const int low = std::min(stage, t.peer), high = std::max(stage, t.peer);
      Meeting& m = meetings[{end[stage][i].tick, low, high}];
      m.when = std::max(m.when, end[stage][i]);
      (stage == low ? m.of_low : m.of_high).push_back(t);
      (stage == low ? m.of_high : m.of_low).push_back(other_end(s, stage, t));
    }
  }
  for (const auto& [key, m] : meetings) {
    const auto [tick, low, high] = key;
    lists[low][{tick, 0, m.when.moments, low, high}] = {Action::exchange, -1, -1, m.of_low};
    lists[high][{tick, 0, m.when.moments, low, high}] = {Action::exchange, -1, -1, m.of_high};
  }
  for (int stage = 0; stage < s.stages; stage++) {
    s.ranks[stage].clear();
    for (const auto& [key, action] : lists[stage]) s.ranks[stage].push_back(action);
  }
}

// ---- the rules of the checker: each returns what is wrong, or nothing

std::string place(const Schedule& s, int stage, int index) {
  return sentence("stage ", stage, ", action ", index, " (", to_string(s.at(stage, index)), ")");
}
std::string describe(const Transfer& t) {
  return sentence(t.send ? "send " : "receive ", t.payload == Transfer::activation ? "activation" : "gradient", " of micro-batch ",
                  t.microbatch, ", chunk ", t.chunk, t.send ? " to " : " from ", "stage ", t.peer);
}

// Every micro-batch goes once through forward and backward on each chunk; gradients in ascending order.
std::string wrong_computation(const Schedule& s) {
  const std::vector<int> parts_of[] = {{0}, {1, 2}, {1}, {2}};  // by kind
  const char* names[] = {"forward", "input gradient", "weight gradient"};
  for (int stage = 0; stage < s.stages; stage++) {
    std::set<std::pair<int, int>> done[3];  // by part: {chunk, micro-batch}
    for (int i = 0; i < int(s.ranks[stage].size()); i++) {
      const auto& [kind, m, c, transfers] = s.at(stage, i);
      if (kind == Action::exchange) continue;
      if (c < 0 || c >= s.chunks || m < 0 || m >= s.microbatches) return place(s, stage, i) + " is not part of this step.";
      for (const int part : parts_of[kind]) {
        if (part > 0 && !done[part - 1].count({c, m})) return sentence(place(s, stage, i), " comes before its ", names[part - 1], ".");
        if (const int from = c + (part ? 1 : -1); s.stages == 1 && part < 2 && from >= 0 && from < s.chunks && !done[part].count({from, m}))
          return sentence(place(s, stage, i), " comes before its input from chunk ", from, ".");
        if (part > 0 && m > 0 && !done[part].count({c, m - 1}))
          return sentence(place(s, stage, i), " comes before that of micro-batch ", m - 1, ": gradients are summed in ascending order.");
        if (!done[part].insert({c, m}).second) return place(s, stage, i) + " comes twice.";
      }
    }
    for (int part = 0; part < 3; part++)
      for (int c = 0; c < s.chunks; c++)
        for (int m = 0; m < s.microbatches; m++)
          if (!done[part].count({c, m}))
            return sentence("stage ", stage, " never does the ", names[part], " of micro-batch ", m, ", chunk ", c, ".");
  }
  return "";
}

// Each transfer that the computations need is there once, after what it sends and before what uses it, and there is no other.
std::string wrong_transfer(const Schedule& s) {
  for (int stage = 0; stage < s.stages; stage++) {
    const auto needed = transfers_needed(s, stage);
    std::set<Transfer> found;
    for (int i = 0; i < int(s.ranks[stage].size()); i++)
      for (const Transfer& t : s.at(stage, i).transfers) {
        const auto need = needed.find(t);
        if (need == needed.end()) return sentence(place(s, stage, i), ": nothing needs to ", describe(t), ".");
        if (!found.insert(t).second) return sentence(place(s, stage, i), " comes twice.");
        if (t.send && i < need->second) return sentence(place(s, stage, i), " sends before ", to_string(s.at(stage, need->second)), ".");
        if (!t.send && i > need->second) return sentence(place(s, stage, i), " receives after ", to_string(s.at(stage, need->second)), ".");
      }
    for (const auto& [t, i] : needed)
      if (!found.count(t)) return sentence(place(s, stage, i), " lacks its transfer: ", describe(t), ".");
  }
  return "";
}

// Between two stages NCCL knows transfers only by their order.
std::string wrong_order(const Schedule& s) {
  std::map<std::pair<int, int>, std::vector<Transfer>> sends, receives;  // {from, to}: as the receiver sees them
  for (int stage = 0; stage < s.stages; stage++)
    for (const Action& a : s.ranks[stage])
      for (const Transfer& t : a.transfers)
        if (t.send) sends[{stage, t.peer}].push_back(other_end(s, stage, t));
        else receives[{t.peer, stage}].push_back(t);
  for (const auto& [pair, sent] : sends)
    for (size_t k = 0; k < sent.size(); k++)
      if (const auto& received = receives[pair]; k >= received.size() || sent[k] != received[k])
        return sentence("transfer ", k, " from stage ", pair.first, " to stage ", pair.second, " should meet '", describe(sent[k]),
                        "' there, but meets ", k < received.size() ? "'" + describe(received[k]) + "'." : "nothing.");
  return "";
}

// ---- one walk over all lists: the checker looks where it ends, the simulator at the times

struct Walk {
  std::vector<std::vector<Span>> spans;  // [stage][action]; kUnknown for what was not reached
  std::vector<int> head;                 // [stage]: the action that the stage has come to
};
constexpr double kUnknown = -1;

// A stage steps over a computation at once, and over an exchange when its peers have come to the facing ones. That is how an executor whose
// every action blocks goes ahead. The times are those of two queues a stage (schedule.h): each waits only for what it needs.
Walk walk(const Schedule& s, const Durations& durations) {
  Walk w{{}, std::vector<int>(s.stages, 0)};
  std::vector<std::map<Transfer, int>> needed, where;  // [stage]: the computation and the exchange of each transfer
  std::vector<std::vector<double>> input;              // [stage][action]: when what a computation receives has come
  std::vector<double> computed(s.stages, 0.0), exchanged(s.stages, 0.0);  // when each queue finished the action before
  for (int stage = 0; stage < s.stages; stage++) {
    w.spans.emplace_back(s.ranks[stage].size(), Span{kUnknown, kUnknown});
    input.emplace_back(s.ranks[stage].size(), 0.0);
    needed.push_back(transfers_needed(s, stage));
    where.emplace_back();
    for (int i = 0; i < int(s.ranks[stage].size()); i++)
      for (const Transfer& t : s.at(stage, i).transfers) where[stage][t] = i;
  }
  const auto exchange = [&](int stage, int i) {  // false while a peer is missing
    Span& span = w.spans[stage][i];
    span.start = exchanged[stage];
    for (const Transfer& t : s.at(stage, i).transfers)
      if (t.send) span.start = std::max(span.start, w.spans[stage][needed[stage].at(t)].end);
    double end = span.start;
    for (const Transfer& t : s.at(stage, i).transfers) {
      const int facing = where[t.peer].at(other_end(s, stage, t));
      const double there = w.spans[t.peer][facing].start;
      if (there == kUnknown) return false;
      end = std::max(end, std::max(span.start, there) + (t.send ? durations[stage][i] : durations[t.peer][facing]));
    }
    for (const Transfer& t : s.at(stage, i).transfers)
      if (!t.send) input[stage][needed[stage].at(t)] = end;
    span.end = exchanged[stage] = end;
    return true;
  };
  const auto step = [&](int stage) {  // false while the stage waits, or at the end of its list
    const int i = w.head[stage];
    if (i == int(s.ranks[stage].size())) return false;
    if (s.at(stage, i).kind != Action::exchange) {
      const double start = std::max(computed[stage], input[stage][i]);
      computed[stage] = start + durations[stage][i];
      w.spans[stage][i] = {start, computed[stage]};
    } else if (!exchange(stage, i)) {
      return false;
    }
    w.head[stage]++;
    return true;
  };
  for (bool moved = true; moved;) {
    moved = false;
    for (int stage = 0; stage < s.stages; stage++)
      while (step(stage)) moved = true;
  }
  return w;
}

std::string deadlock(const Schedule& s) {
  const Walk w = walk(s, durations(s, {}));
  std::string stuck;
  for (int stage = 0; stage < s.stages; stage++)
    if (w.head[stage] < int(s.ranks[stage].size()))
      stuck += (stuck.empty() ? "deadlock: " : "; ") + place(s, stage, w.head[stage]) + " waits";
  return stuck.empty() ? "" : stuck + ".";
}

}  // namespace

// ---- generate, name, check

Schedule make_schedule(const std::string& name, int p, int m, int V) {
  REQUIRE((std::set<std::string>{"gpipe", "1f1b", "interleaved", "zb"}.count(name)),
          "there is no schedule '", name, "': choose gpipe, 1f1b, interleaved or zb");
  REQUIRE(p >= 1, "a pipeline needs at least one stage, not ", p);
  REQUIRE(m >= 1, "a pipeline needs at least one micro-batch, not ", m);
  REQUIRE(V >= 1, "a stage needs at least one chunk, not ", V);
  REQUIRE(V == 1 || name == "interleaved", "schedule ", name, " has one chunk a stage, not ", V, ": choose interleaved");
  REQUIRE(m % p == 0 || name != "interleaved", "interleaved needs a number of micro-batches that its ", p, " stages divide, not ", m);
  REQUIRE(int64_t(p) * m <= 1'000'000 / V, p, " stages, ", m, " micro-batches and ", V, " chunks make more than a million forwards");
  Schedule s{name, p, m, V, {}};
  for (int stage = 0; stage < p; stage++) s.ranks.push_back(computations(name, p, stage, m, V));
  place_transfers(s);
  return s;
}

std::string to_string(const Action& a) {
  if (a.kind == Action::exchange) {
    std::string text;
    for (const Transfer& t : a.transfers) text += (text.empty() ? "" : " + ") + describe(t);
    return text;
  }
  const char* of_kind[] = {"forward", "backward", "input gradient", "weight gradient"};
  return sentence(of_kind[a.kind], " of micro-batch ", a.microbatch, ", chunk ", a.chunk);
}

std::string check(const Schedule& s) {
  if (int(s.ranks.size()) != s.stages) return sentence("there are ", s.ranks.size(), " lists for ", s.stages, " stages.");
  for (const auto rule : {wrong_computation, wrong_transfer, wrong_order, deadlock})
    if (const std::string wrong = rule(s); !wrong.empty()) return wrong;
  return "";
}

// ---- simulate

Durations durations(const Schedule& s, const Times& t) {
  const double of_kind[] = {t.forward, t.input_gradient + t.weight_gradient, t.input_gradient, t.weight_gradient, t.send};
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
  for (int stage = 0; stage < s.stages; stage++)
    for (size_t i = 0; i < s.ranks[stage].size(); i++) {
      if (s.at(stage, i).kind == Action::exchange) continue;
      t.busy[stage] += t.spans[stage][i].end - t.spans[stage][i].start;
      t.makespan = std::max(t.makespan, t.spans[stage][i].end);
    }
  return t;
}

Timeline simulate(const Schedule& s, const Durations& durations) {
  Walk w = walk(s, durations);
  for (int stage = 0; stage < s.stages; stage++) ASSERT(w.head[stage] == int(s.ranks[stage].size()), check(s));
  return timeline(s, std::move(w.spans));
}

std::vector<int64_t> peak_live(const Schedule& s, const std::vector<std::vector<int64_t>>& bytes) {
  std::vector<int64_t> peak(s.stages, 0);
  for (int stage = 0; stage < s.stages; stage++) {
    int64_t live = 0;
    for (const Action& a : s.ranks[stage]) {
      if (a.kind == Action::exchange || a.kind == Action::input_gradient) continue;
      const int64_t size = bytes.empty() ? 1 : bytes[stage][a.chunk];
      live += a.kind == Action::forward ? size : -size;
      peak[stage] = std::max(peak[stage], live);
    }
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
  const double idle = theoretical_idle(s, t), work = s.microbatches * s.chunks * (t.forward + t.input_gradient + t.weight_gradient);
  return idle / (work + idle);
}

int64_t theoretical_live(const Schedule& s, int stage) {
  const int p = s.stages, m = s.microbatches, V = s.chunks;
  if (s.name == "gpipe") return m;
  if (s.name == "1f1b") return std::min(p - stage, m);
  if (s.name == "zb") return std::min(p, m);
  return std::min(2 * (p - 1 - stage) + (V - 1) * p + 1, V * m);
}

// ---- draw

namespace {

// 1, 2 or 5 times a power of ten, at least x.
double round_up(double x) {
  const double power = std::pow(10, std::floor(std::log10(x)));
  for (const double factor : {1, 2, 5})
    if (factor * power >= x * (1 - 1e-9)) return factor * power;
  return 10 * power;
}
std::string percent(double share) { return format("%.1f %%", 100 * share); }
// Colours of a light page, and of a dark one.
const char* kStyle = R"(<style>
.schedule{font:11px sans-serif} .schedule .head{font-size:15px} .schedule .mid{text-anchor:middle}
.schedule text{fill:#1f2328} .schedule .paper{fill:#fff} .schedule g rect{stroke:#fff} .schedule .line{fill:#8c959f}
.schedule .f{fill:#a9ceff} .schedule .b{fill:#96deb8} .schedule .w{fill:#ffcf94}
@media (prefers-color-scheme:dark){
.schedule text{fill:#f0f3f6} .schedule .paper{fill:#0d1117} .schedule g rect{stroke:#0d1117} .schedule .line{fill:#656d76}
.schedule .f{fill:#1f5fa8} .schedule .b{fill:#1d7248} .schedule .w{fill:#94550a}
}
</style>
)";
// Calls draw(stage, action, span) for each computation.
template <class Draw> void for_each_computation(const Schedule& s, const Timeline& t, const Draw& draw) {
  for (int stage = 0; stage < s.stages; stage++)
    for (int i = 0; i < int(s.ranks[stage].size()); i++)
      if (s.at(stage, i).kind != Action::exchange) draw(stage, s.at(stage, i), t.spans[stage][i]);
}

}  // namespace

std::string draw_text(const Schedule& s, const Timeline& t, double unit) {
  ASSERT(t.makespan > 0, "there is nothing to draw");
  if (unit <= 0) unit = round_up(t.makespan / 100);
  const int columns = int(std::ceil(t.makespan / unit - 1e-9));
  std::vector<std::string> marks(s.stages, std::string(columns, '.')), chunks(s.stages, std::string(columns, ' '));
  for_each_computation(s, t, [&](int stage, const Action& a, const Span& span) {
    const char first = a.kind == Action::forward ? '0' : a.kind == Action::weight_gradient ? 'A' : 'a';
    for (int c = int(std::lround(span.start / unit)); c < std::min(int(std::lround(span.end / unit)), columns); c++) {
      marks[stage][c] = char(first + a.microbatch % 10);
      chunks[stage][c] = char('0' + a.chunk % 10);
    }
  });
  std::string text = "time      ";
  for (int c = 0; c <= columns; c += 10) (text += sentence(std::stod(format("%.3g", c * unit)))).resize(c + 20, ' ');
  text = text.substr(0, text.find_last_not_of(' ') + 1) + "\n";
  for (int stage = 0; stage < s.stages; stage++) {
    text += sentence("stage ", stage < 10 ? " " : "", stage, " |", marks[stage], "| idle ", percent(t.bubble(stage)), "\n");
    if (s.chunks > 1) text += sentence("   chunk |", chunks[stage], "|\n");
  }
  return text + sentence("          0-9 forward of micro-batch 0-9", s.microbatches > 10 ? ", 10-19, ..." : "", "   a-j its ",
                         s.name == "zb" ? "input gradient   A-J its weight gradient" : "backward", "   . idle\n");
}

std::string draw_svg(const Schedule& s, const Timeline& t, const std::string& title, const std::string& unit_name) {
  ASSERT(t.makespan > 0, "there is nothing to draw");
  const double span_px = std::clamp(72.0 * s.microbatches * s.chunks, 640.0, 2400.0), scale = span_px / t.makespan;
  const double left = 70, top = 64, row = 30, width = left + span_px + 90, bottom = top + row * s.stages, height = bottom + 50;
  std::ostringstream svg;
  const auto text = [&](double x, double y, const char* css, const auto&... words) {
    (svg << "<text x='" << x << "' y='" << y << "' class='" << css << "'>" << ... << words) << "</text>";
  };
  const auto box = [&](double x, double y, double w, double h, const char* css, double opacity) {
    svg << "<rect x='" << x << "' y='" << y << "' width='" << w << "' height='" << h << "' class='" << css << "'";
    svg << (opacity < 1 ? sentence(" fill-opacity='", opacity, "'") : "") << "/>";
  };
  svg << "<svg xmlns='http://www.w3.org/2000/svg' class='schedule' viewBox='0 0 " << width << " " << height << "' width='" << width
      << "' height='" << height << "' role='img'>\n<title>" << title << "</title>\n" << kStyle;
  box(0, 0, width, height, "paper", 1);
  text(10, 20, "head", title);
  const bool split = s.name == "zb";
  std::vector<std::pair<const char*, const char*>> legend{{"f", "forward"}, {"b", split ? "input gradient" : "backward"}};
  if (split) legend.push_back({"w", "weight gradient"});
  double x = 10;
  for (const auto& [css, word] : legend) {
    box(x, 32, 16, 16, css, 1);
    text(x + 21, 44, "", word);
    x += 120;
  }
  text(x, 44, "", "number: micro-batch", s.chunks > 1 ? ", fainter: later chunk" : "");
  for (int stage = 0; stage < s.stages; stage++) {
    text(10, top + row * stage + 18, "", "stage ", stage);
    text(left + span_px + 8, top + row * stage + 18, "", "idle ", percent(t.bubble(stage)));
  }
  for_each_computation(s, t, [&](int stage, const Action& a, const Span& span) {
    const double from = left + span.start * scale, wide = (span.end - span.start) * scale, y = top + row * stage;
    svg << "\n<g><title>" << to_string(a) << ": " << span.start << " to " << span.end << "</title>";
    const char* css = a.kind == Action::forward ? "f" : a.kind == Action::weight_gradient ? "w" : "b";
    box(from, y + 2, wide, row - 4, css, 1 - 0.7 * a.chunk / s.chunks);
    if (wide >= 14) text(from + wide / 2, y + 19, "mid", a.microbatch);
    svg << "</g>";
  });
  const double step = round_up(60 / scale);
  for (int k = 0; k * step <= t.makespan * (1 + 1e-9); k++) {
    box(left + k * step * scale, bottom + 2, 1, 6, "line", 1);
    text(left + k * step * scale, bottom + 22, "mid", k * step);
  }
  text(left + span_px / 2, bottom + 40, "mid", "time in ", unit_name);
  return svg.str() + "\n</svg>\n";
}
