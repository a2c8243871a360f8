// show_schedule.cpp: prints, checks, measures and draws a pipeline schedule, next to what theory says about it. Needs no GPU and no MPI.
//
//   build/show_schedule 1f1b --stages 4 --microbatches 8 --svg 1f1b.svg
//
// test      tests/test_schedule.cpp
#include <charconv>
#include <cstdio>
#include <fstream>

#include "schedule.h"
#include "support/check.h"

namespace {

const char* kHelp =
    "show_schedule NAME [options]\n"
    "  NAME                  gpipe, 1f1b, interleaved or zb\n"
    "  --stages P            stages (4)\n"
    "  --microbatches M      micro-batches of a step (8)\n"
    "  --chunks V            chunks a stage, interleaved only (2 for interleaved)\n"
    "  --times F,B,W,SEND    of one chunk: forward, input gradient, weight gradient, transfer (1,1,1,0)\n"
    "  --svg FILE            draw the timeline there, too\n"
    "  --actions             list what each stage does\n";

struct Options {
  std::string name, svg;
  int stages = 4, microbatches = 8, chunks = 0;
  Times times;
  bool actions = false, help = false, default_times = true;
};

int whole_number(const std::string& option, const std::string& text) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  REQUIRE(error == std::errc() && end == text.data() + text.size(), option, " needs a whole number, not '", text, "'");
  return value;
}

Times parse_times(const std::string& text) {
  Times t;
  int used = 0;
  REQUIRE(sscanf(text.c_str(), "%lf,%lf,%lf,%lf%n", &t.forward, &t.input_gradient, &t.weight_gradient, &t.send, &used) == 4 &&
              used == int(text.size()),
          "--times needs four numbers F,B,W,SEND, not '", text, "'");
  REQUIRE(t.forward > 0 && t.input_gradient > 0 && t.weight_gradient > 0 && t.send >= 0 &&
              t.forward + t.input_gradient + t.weight_gradient + t.send < 1e9,
          "--times: F, B and W must be positive, SEND at least 0, and their sum below 1e9, not '", text, "'");
  return t;
}

Options parse(int argc, char** argv) {
  Options o;
  for (int i = 1; i < argc; i++) {
    const std::string option = argv[i];
    const auto value = [&]() -> std::string {
      REQUIRE(i + 1 < argc, option, " needs a value");
      return argv[++i];
    };
    if (option == "--help") o.help = true;
    else if (option == "--actions") o.actions = true;
    else if (option == "--stages") o.stages = whole_number(option, value());
    else if (option == "--microbatches") o.microbatches = whole_number(option, value());
    else if (option == "--chunks") REQUIRE((o.chunks = whole_number(option, value())) >= 1, "--chunks must be at least 1");
    else if (option == "--times") o.times = parse_times(value()), o.default_times = false;
    else if (option == "--svg") o.svg = value();
    else if (option[0] != '-' && o.name.empty()) o.name = option;
    else throw Error(sentence("cannot make sense of '", option, "'; --help lists the options"));
  }
  REQUIRE(o.help || !o.name.empty(), "say which schedule: gpipe, 1f1b, interleaved or zb; --help lists the options");
  if (o.chunks == 0) o.chunks = o.name == "interleaved" ? 2 : 1;
  return o;
}

void print_lists(const Schedule& s) {
  for (int stage = 0; stage < s.stages; stage++) {
    printf("stage %d\n", stage);
    for (const Action& a : s.ranks[stage]) printf("  %s%s\n", a.kind == Action::exchange ? "  " : "", to_string(a).c_str());
  }
}

void show(const Options& o) {
  const Schedule s = make_schedule(o.name, o.stages, o.microbatches, o.chunks);
  const std::string wrong = check(s);
  REQUIRE(wrong.empty(), "the checker refuses this schedule: ", wrong);
  const Timeline t = simulate(s, durations(s, o.times));
  const std::string title = sentence(s.name, ": ", s.stages, " stages, ", s.microbatches, " micro-batches",
                                     s.chunks > 1 ? sentence(", ", s.chunks, " chunks a stage") : "");
  const std::string times = sentence("F = ", o.times.forward, ", B = ", o.times.input_gradient, ", W = ", o.times.weight_gradient,
                                     ", send = ", o.times.send, s.chunks > 1 ? " (of a chunk)" : "");
  printf("%s; %s\n", title.c_str(), times.c_str());
  printf("%s", draw_text(s, t, o.default_times && t.makespan <= 110 ? 1 : 0).c_str());

  size_t actions = 0, transfers = 0, groups = 0;
  for (const auto& list : s.ranks)
    for (const Action& a : list) actions++, transfers += a.transfers.size(), groups += a.transfers.size() > 1;
  printf("checked   accepted: complete, in order, no deadlock (%zu actions, %zu transfers, %zu facing pairs grouped)\n", actions,
         transfers / 2, groups / 2);
  printf("bubble    %.2f %% simulated, %.2f %% by formula%s\n", 100 * t.bubble(), 100 * theoretical_bubble(s, o.times),
         o.times.send > 0 ? " (of free sends)" : "");
  std::string walked, formula;
  const auto live = peak_live(s);
  for (int stage = 0; stage < s.stages; stage++) {
    walked += sentence(" ", double(live[stage]) / s.chunks);
    formula += sentence(" ", double(theoretical_live(s, stage)) / s.chunks);
  }
  printf("live     %s micro-batches on stages 0 to %d, by formula%s\n", walked.c_str(), s.stages - 1, formula.c_str());
  if (o.actions) print_lists(s);
  if (o.svg.empty()) return;
  std::ofstream file(o.svg);
  file << draw_svg(s, t, title, o.default_times ? "forwards of one chunk" : "the unit of --times");
  REQUIRE(file.flush().good(), "cannot write ", o.svg);
  printf("drawn     %s\n", o.svg.c_str());
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const Options o = parse(argc, argv);
    if (o.help) printf("%s", kHelp);
    else show(o);
  } catch (const Error& e) {
    fprintf(stderr, "show_schedule: %s\n", e.what());
    return 1;
  }
  return 0;
}
