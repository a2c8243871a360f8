// draw_schedule.cpp: see draw_schedule.h.
#include "report/draw_schedule.h"

#include <algorithm>
#include <cmath>

#include "report/svg.h"

namespace {

// 1, 2 or 5 times a power of ten, at least x.
double round_up(double x) {
  const double power = std::pow(10, std::floor(std::log10(x)));
  for (const double factor : {1, 2, 5})
    if (factor * power >= x * (1 - 1e-9)) return factor * power;
  return 10 * power;
}
std::string percent(double share) { return format("%.1f %%", 100 * share); }
// By kind of computation: its colour in kStyle, and what a column of text shows of micro-batch 0.
struct {
  const char* colour;
  char mark;
} const kLooks[] = {{"class='f'", '0'}, {"class='b'", 'a'}, {"class='b'", 'a'}, {"class='w'", 'A'}};
// Colours of a light page, and of a dark one; the numbers' look says the same.
const char* kStyle = R"(<style>
.schedule{font:11px sans-serif} .schedule .head{font-size:15px}
.schedule .mid{text-anchor:middle}
.schedule text{fill:#1f2328} .schedule .paper{fill:#fff}
.schedule .line{fill:#8c959f}
.schedule .b+text{text-decoration:underline} .schedule .w+text{font-style:italic}
.schedule .f{fill:#a9ceff} .schedule .b{fill:#5fbf8f} .schedule .w{fill:#ffcf94}
@media (prefers-color-scheme:dark){
.schedule text{fill:#f0f3f6} .schedule .paper{fill:#0d1117}
.schedule .line{fill:#656d76}
.schedule .f{fill:#1f5fa8} .schedule .b{fill:#1d7248} .schedule .w{fill:#94550a}
}
</style>
)";

}  // namespace

std::string draw_text(const Schedule& s, const Timeline& t, double unit) {
  ASSERT(t.makespan > 0, "there is nothing to draw");
  if (unit <= 0) unit = round_up(t.makespan / 100);
  const int columns = std::ceil(t.makespan / unit - 1e-9);
  std::vector<std::string> marks(s.stages, std::string(columns, '.')),
      chunks(s.stages, std::string(columns, ' '));
  for_each_computation(s, [&](int stage, int i, const Action& a) {
    const auto [start, end] = t.spans[stage][i];
    const int64_t begin = std::lround(start / unit), width = std::lround(end / unit) - begin;
    std::fill_n(&marks[stage][begin], width, kLooks[a.kind].mark + a.microbatch % 10);
    std::fill_n(&chunks[stage][begin], width, '0' + a.chunk % 10);
  });
  std::string text = "time      ";
  for (int c = 0; c <= columns; c += 10)
    (text += sentence(std::stod(format("%.3g", c * unit)))).resize(c + 20, ' ');
  text = text.substr(0, text.find_last_not_of(' ') + 1) + "\n";
  for (int stage = 0; stage < s.stages; stage++) {
    text += sentence("stage ", stage < 10 ? " " : "", stage, " |", marks[stage], "| idle ",
                     percent(t.bubble(stage)), "\n");
    if (s.chunks > 1) text += sentence("   chunk |", chunks[stage], "|\n");
  }
  return text +
         sentence("          0-9 forward of micro-batch 0-9",
                  s.microbatches > 10 ? ", 10-19, ..." : "", "   a-j its ",
                  s.row->splits_backward ? "input gradient   A-J its weight gradient" : "backward",
                  "   . idle\n");
}

std::string draw_svg(const Schedule& s, const Timeline& t, const std::string& title,
                     const std::string& unit_name, double longest) {
  ASSERT(t.makespan > 0, "there is nothing to draw");
  const double whole =
      longest > 0 ? 1080 : std::clamp(72.0 * s.microbatches * s.chunks, 640.0, 2400.0);
  const double scale = whole / std::max(t.makespan, longest), span_px = t.makespan * scale;
  const double left = 70, top = 64, row = 30, width = left + whole + 90,
               bottom = top + row * s.stages, height = bottom + 50;
  const char* middle = "class='mid'";
  Svg svg(width, height,
          sentence("class='schedule' width='", width, "' height='", height, "' role='img'"), title);
  svg.out << kStyle;
  svg.box(0, 0, width, height, "class='paper'");
  svg.text(10, 20, "class='head'", title);
  std::vector<Action::Kind> kinds{Action::forward, Action::backward};
  if (s.row->splits_backward)
    kinds = {Action::forward, Action::input_gradient, Action::weight_gradient};
  double x = 10;
  for (const Action::Kind kind : kinds) {
    svg.box(x, 32, 16, 16, kLooks[kind].colour);
    svg.text(x + 21, 44, "", name_of(kind));
    x += 120;
  }
  svg.text(x, 44, "", "number: micro-batch", s.chunks > 1 ? ", fainter: later chunk" : "");
  for (int stage = 0; stage < s.stages; stage++) {
    const double y = top + row * stage + 18;
    svg.text(10, y, "", "stage ", stage);
    svg.text(left + span_px + 8, y, "", "idle ", percent(t.bubble(stage)));
  }
  for_each_computation(s, [&](int stage, int i, const Action& a) {
    const auto [start, end] = t.spans[stage][i];
    const double from = left + start * scale, wide = (end - start) * scale, y = top + row * stage;
    svg.out << "<g><title>" << to_string(a) << ": " << start << " to " << end << "</title>";
    svg.box(from, y + 2, std::max(wide - 1, 0.75 * wide), row - 4,
            sentence(kLooks[a.kind].colour, " fill-opacity='", 1 - 0.7 * a.chunk / s.chunks, "'"));
    if (wide >= 14) svg.text(from + wide / 2, y + 19, middle, a.microbatch);
    svg.out << "</g>\n";
  });
  const double step = round_up(60 / scale);
  for (int k = 0; k * step <= t.makespan * (1 + 1e-9); k++) {
    svg.box(left + k * step * scale, bottom + 2, 1, 6, "class='line'");
    svg.text(left + k * step * scale, bottom + 22, middle, k * step);
  }
  svg.text(left + span_px / 2, bottom + 40, middle, "time in ", unit_name);
  return svg.out.str() + "</svg>\n";
}
