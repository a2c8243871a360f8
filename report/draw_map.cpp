// draw_map.cpp: see draw_map.h.
#include "report/draw_map.h"

#include <algorithm>
#include <cmath>
#include <sstream>

namespace {

// Sizes of GPT-3 (Brown et al., 2020) and of Megatron-LM (Narayanan et al., 2021).
const ModelSize kModels[] = {{12, 768, 12, 2048, 51200},   {24, 2048, 16, 2048, 51200},
                             {32, 4096, 32, 2048, 51200},  {40, 5120, 40, 2048, 51200},
                             {48, 7168, 56, 2048, 51200},  {80, 8192, 64, 2048, 51200},
                             {96, 12288, 96, 2048, 51200}, {128, 25600, 160, 2048, 51200}};
const int64_t kDevices[] = {1, 2, 4, 8, 16, 64, 256, 1024, 4096};
constexpr int64_t kBatch = 2048, kOfNode = 8;

// The simplest first: which axes it may use, and the highest stage of ZeRO.
struct Kind {
  const char *name, *colour;
  bool fsdp, tp, pp;
  int64_t zero;
};
const Kind kKinds[] = {
    {"copies", "#dbe7f3", false, false, false, 0}, {"ZeRO-1", "#a9ceff", true, false, false, 1},
    {"ZeRO-3", "#5f9be0", true, false, false, 3},  {"with PP", "#96deb8", true, false, true, 0},
    {"with TP", "#ffcf94", true, true, false, 0},  {"TP and PP", "#e58f73", true, true, true, 0}};

struct Cell {
  int kind = -1;  // none fits
  std::string best;
};

// The fastest of a kind.
std::optional<Planned> best_of(const Cluster& cluster, const Profile& profile,
                               const GptConfig& config, const Kind& kind) {
  Wanted wanted;
  wanted.layout["fsdp"] = kind.fsdp ? 0 : 1;
  wanted.layout["replicate"] = 0;
  wanted.layout["tp"] = kind.tp ? 0 : 1;
  wanted.layout["pp"] = kind.pp ? 0 : 1;
  wanted.zero = kind.zero;
  wanted.batch = kBatch;
  const Plan found =
      plan(cluster, profile, config, wanted, int64_t(0.92 * cluster.machine.memory), 1);
  if (found.fastest.empty()) return {};
  return found.fastest[0];
}

Cell best_kind(const Cluster& cluster, const Profile& profile, const GptConfig& config) {
  const int last = int(std::size(kKinds)) - 1;  // has all layouts of the others
  const auto fastest = best_of(cluster, profile, config, kKinds[last]);
  if (!fastest) return {};
  for (int k = 0; k <= last; k++) {
    const auto best = k < last ? best_of(cluster, profile, config, kKinds[k]) : fastest;
    if (!best || best->time.seconds > 1.03 * fastest->time.seconds) continue;
    return {k, sentence(kKinds[k].name, ": ", to_string(best->job.layout),
                        format(", %.3g s a step", best->time.seconds))};
  }
  return {};
}

std::string size_of_model(const GptConfig& config) {
  const double billions = double(parameter_count(config)) / 1e9;
  return format(billions < 10 ? "%.1f B" : "%.0f B", billions);
}

}  // namespace

std::string draw_map(const Machine& machine, const Profile& profile, double slow) {
  constexpr double kLeft = 70, kWide = 56, kHigh = 34, kTop = 70;
  const int rows = int(std::size(kModels)), columns = int(std::size(kDevices));
  const double panel = kLeft + columns * kWide + 30, bottom = kTop + rows * kHigh,
               width = 2 * panel, height = bottom + 330;
  std::ostringstream svg;
  const auto text = [&](double x, double y, const char* more, const std::string& words) {
    svg << "<text x='" << x << "' y='" << y << "' " << more << ">" << words << "</text>\n";
  };
  const auto line = [&](double x, double y, double x2, double y2, const char* more) {
    svg << "<line x1='" << x << "' y1='" << y << "' x2='" << x2 << "' y2='" << y2
        << "' stroke='#1f2328' " << more << "/>\n";
  };
  svg << "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 " << width << " " << height
      << "' font-family='sans-serif' font-size='12'>\n<title>When to use what</title>\n"
      << "<rect width='" << width << "' height='" << height << "' fill='#fff'/>\n";
  for (int map = 0; map < 2; map++) {
    const double left = map * panel + kLeft;
    Cluster cluster{machine, 1, 1};
    if (map == 1) cluster.machine.between.bandwidth = slow;
    text(left, 20, "font-size='15'",
         sentence(machine.name, ", ", kOfNode, " a node; between nodes ",
                  format("%.3g", cluster.machine.between.bandwidth / 1e9), " GB/s a device"));
    double wall = bottom;
    for (int row = 0; row < rows; row++) {
      const GptConfig config{kModels[row], Dtype::bf16};
      const double y = bottom - (row + 1) * kHigh;
      text(left - 8, y + 21, "text-anchor='end'", size_of_model(config));
      for (int column = 0; column < columns; column++) {
        cluster.devices = std::min(kDevices[column], kOfNode);
        cluster.nodes = kDevices[column] / cluster.devices;
        const Cell cell = best_kind(cluster, profile, config);
        if (column == 0 && cell.kind >= 0) wall = y;
        if (cell.kind < 0) continue;
        svg << "<rect x='" << left + column * kWide << "' y='" << y << "' width='" << kWide - 1
            << "' height='" << kHigh - 1 << "' fill='" << kKinds[cell.kind].colour << "'><title>"
            << cell.best << "</title></rect>\n";
      }
    }
    line(left, wall, left + columns * kWide, wall, "stroke-width='2' stroke-dasharray='6 4'");
    text(left + 4, wall - 5, "", "one device holds what is below");
    for (int column = 0; column < columns; column++)
      text(left + (column + 0.5) * kWide, bottom + 16, "text-anchor='middle'",
           sentence(kDevices[column]));
    text(left + columns * kWide / 2, bottom + 34, "text-anchor='middle'", "devices");
  }
  for (int k = 0; k < int(std::size(kKinds)); k++) {
    svg << "<rect x='" << kLeft + k * 130 << "' y='34' width='16' height='16' fill='"
        << kKinds[k].colour << "'/>\n";
    text(kLeft + k * 130 + 22, 47, "", kKinds[k].name);
  }
  text(kLeft + 6 * 130, 47, "", "white: nothing fits");

  // inference: ms a token by tp, both logarithmic
  const double top = bottom + 80, high = 200, wide = 500;
  text(kLeft, top - 14, "font-size='15'",
       "Inference of one sequence: ms a token by ranks of tp (above 8: over two nodes and more)");
  const auto x_of = [&](double tp) { return kLeft + std::log2(tp) / 5 * wide; };
  const auto y_of = [&](double ms) { return top + high * (1 - std::log10(ms) / 3); };
  for (const double ms : {1, 10, 100, 1000}) {
    line(kLeft, y_of(ms), kLeft + wide, y_of(ms), "stroke-width='0.3'");
    text(kLeft - 8, y_of(ms) + 4, "text-anchor='end'", sentence(ms));
  }
  for (int tp = 1; tp <= 32; tp *= 2)
    text(x_of(tp), top + high + 18, "text-anchor='middle'", sentence(tp));
  for (const int row : {2, 5, 6}) {
    const GptConfig config{kModels[row], Dtype::bf16};
    std::ostringstream points;
    double ms = 0;
    for (int tp = 1; tp <= 32; tp *= 2) {
      const Cluster cluster{machine, 4, kOfNode};
      ms = 1e3 * predict_decoding(cluster, config, {{"tp", tp}}, 1, 1024).seconds();
      points << x_of(tp) << "," << y_of(ms) << " ";
    }
    svg << "<polyline points='" << points.str() << "' fill='none' stroke='#1f5fa8'/>\n";
    text(kLeft + wide + 8, y_of(ms) + 4, "", size_of_model(config));
  }
  return svg.str() + "</svg>\n";
}
