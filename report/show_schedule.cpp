// show_schedule.cpp: prints, checks, measures and draws a pipeline schedule, next to what theory
// says about it. Needs no GPU and no MPI.
//
//   build/show_schedule 1f1b --stages 4 --microbatches 8 --svg 1f1b.svg
//   build/show_schedule all
//
// test      tests/test_schedule.cpp
#include <algorithm>
#include <cstdio>
#include <fstream>

#include "report/draw_schedule.h"
#include "launch/options.h"
#include "support/metrics.h"

namespace {

struct ShowOptions {
  std::string name, svg;
  int64_t stages = 4, microbatches = 8, chunks = 0;
  Times times;
  bool actions = false, help = false;
};

// "F,B,W,SEND"
Takes four_times(Times& t) {
  return {"four numbers F,B,W,SEND: the first three from 1e-9, SEND from 0, their sum below 1e9",
          [&t] {
            return sentence(t.forward, ",", t.input_gradient, ",", t.weight_gradient, ",", t.send);
          },
          [&t](const std::string& word) {
            int used = 0;
            const int read = sscanf(word.c_str(), "%lf,%lf,%lf,%lf%n", &t.forward,
                                    &t.input_gradient, &t.weight_gradient, &t.send, &used);
            return read == 4 && used == int(word.size()) && t.send >= 0 &&
                   std::min({t.forward, t.input_gradient, t.weight_gradient}) >= 1e-9 &&
                   t.all() + t.send < 1e9;
          }};
}

OptionTable table(ShowOptions& o) {
  return {
      {"Options",
       {
           {"stages", "P", whole(&o.stages, 1, 10'000), "stages"},
           {"microbatches", "M", whole(&o.microbatches, 1, 1'000'000), "micro-batches of a step"},
           {"chunks", "N", whole(&o.chunks, 1, 1000), "with interleaved: chunks a stage", "2"},
           {"times", "F,B,W,SEND", four_times(o.times),
            "of one chunk: forward, input gradient, weight gradient, transfer"},
           {"svg", "FILE", text(&o.svg), "draw the timeline there, too", "none"},
           {"actions", "", flag(&o.actions), "list what each stage does"},
           {"help", "", flag(&o.help), "print this"},
       }}};
}

ShowOptions parse_words(int argc, char** argv) {
  ShowOptions o;
  const bool named = argc > 1 && argv[1][0] != '-';
  if (named) o.name = argv[1];
  parse(argc - named, argv + named, table(o));
  REQUIRE(o.help || named, "say first which schedule: ", join(schedule_names(), "|"),
          ", or all; --help lists the options");
  REQUIRE(o.help || o.name != "all" || argc == 2, argv[2],
          " is about one schedule: name it in place of all");
  return o;
}

void print_lists(const Schedule& s) {
  for (int stage = 0; stage < s.stages; stage++) {
    printf("stage %d\n", stage);
    for (const Action& a : s.actions[stage])
      printf("  %s%s\n", a.kind == Action::exchange ? "  " : "", to_string(a).c_str());
  }
}

void show(const ShowOptions& o) {
  const Schedule s = make_schedule(o.name, o.stages, o.microbatches, o.chunks);
  const std::string wrong = check(s);
  REQUIRE(wrong.empty(), "the checker refuses this schedule: ", wrong);
  const Timeline t = simulate(s, durations(s, o.times));
  const bool units = o.times == Times{};
  const std::string times = sentence("; F = ", o.times.forward, ", B = ", o.times.input_gradient,
                                     ", W = ", o.times.weight_gradient, ", send = ", o.times.send);
  printf("%s%s%s\n%s", to_string(s).c_str(), times.c_str(), s.chunks > 1 ? " (of a chunk)" : "",
         draw_text(s, t, units && t.makespan <= 110 ? 1 : 0).c_str());

  size_t actions = 0, transfers = 0, groups = 0;
  for (const auto& list : s.actions)
    for (const Action& a : list) {
      actions++;
      transfers += a.transfers.size();
      groups += a.transfers.size() > 1;
    }
  printf(
      "checked   accepted: complete, in order, no deadlock (%zu actions, %zu transfers, %zu facing "
      "pairs grouped)\n",
      actions, transfers / 2, groups / 2);
  const double share = 100 * theoretical_bubble(s, o.times);
  const std::string by_formula = std::isnan(share)
                                     ? "no formula holds for these times"
                                     : sentence(format("%.2f %% by formula", share),
                                                o.times.send > 0 ? " (of free sends)" : "");
  printf("bubble    %.2f %% simulated, %s\n", 100 * t.bubble(), by_formula.c_str());
  std::string walked, formula;
  for (int stage = 0; stage < s.stages; stage++) {
    const double live = s.row->live(s.stages, s.microbatches, s.chunks, stage);
    walked += sentence(" ", double(peak_live(s, stage)) / s.chunks);
    formula += sentence(" ", live / s.chunks);
  }
  printf("live     %s micro-batches on stages 0 to %d, by formula%s\n", walked.c_str(),
         s.stages - 1, formula.c_str());
  if (o.actions) print_lists(s);
  if (o.svg.empty()) return;
  put_aside(o.svg, "drawings");
  write_file(o.svg, draw_svg(s, t, to_string(s) + (units ? "" : times),
                             units ? "forwards of one chunk" : "the unit of --times"));
  printf("drawn     %s\n", o.svg.c_str());
}

// Every schedule side by side, F = B = W.
void show_all() {
  printf("bubble, and micro-batches that the fullest stage keeps activations of; F = B = W\n");
  printf("%6s %4s", "stages", "m");
  for (const std::string& name : schedule_names()) printf("%18s", name.c_str());
  for (const int p : {2, 4, 8})
    for (const int m : {p, 2 * p, 4 * p, 8 * p}) {
      printf("\n%6d %4d", p, m);
      for (const std::string& name : schedule_names()) {
        const Schedule s = make_schedule(name, p, m);
        int64_t live = 0;
        for (int stage = 0; stage < p; stage++) live = std::max(live, peak_live(s, stage));
        printf("%8.2f %% %7.2f", 100 * simulate(s, durations(s, {})).bubble(),
               double(live) / s.chunks);
      }
    }
  printf("\n");
}

}  // namespace

int main(int argc, char** argv) {
  return run_main("show_schedule", [&] {
    const ShowOptions o = parse_words(argc, argv);
    ShowOptions defaults;
    if (o.help)
      printf("%s", help_text(sentence("usage: build/show_schedule ", join(schedule_names(), "|"),
                                      "|all [options]"),
                             table(defaults))
                       .c_str());
    else if (o.name == "all") show_all();
    else show(o);
  });
}
