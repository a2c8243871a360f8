// draw_map.cpp: see draw_map.h.
#include "report/draw_map.h"

#include <algorithm>
#include <cmath>

#include "report/svg.h"

namespace {

// Sizes of GPT-3 (Brown et al., 2020) and of Megatron-LM (Narayanan et al., 2021).
const ModelSize kModels[] = {{12, 768, 12, 2048, 51200},   {24, 2048, 16, 2048, 51200},
                             {32, 4096, 32, 2048, 51200},  {40, 5120, 40, 2048, 51200},
                             {48, 7168, 56, 2048, 51200},  {80, 8192, 64, 2048, 51200},
                             {96, 12288, 96, 2048, 51200}, {128, 25600, 160, 2048, 51200}};
const int64_t kDevices[] = {1, 2, 4, 8, 16, 64, 256, 1024, 4096};
constexpr int64_t kBatch = 2048, kOfNode = 8;

// The simplest first: how many ranks of each axis (0: as many as is best), and the stage of ZeRO
// (0: any). The last has all layouts of the others.
struct Kind {
  const char *name, *colour;
  int fsdp, tp, pp, zero;
};
const Kind kKinds[] = {
    {"copies", "fill='#dbe7f3'", 1, 1, 1, 0},  {"ZeRO-1", "fill='#a9ceff'", 0, 1, 1, 1},
    {"ZeRO-3", "fill='#5f9be0'", 0, 1, 1, 3},  {"with PP", "fill='#96deb8'", 0, 1, 0, 0},
    {"with TP", "fill='#ffcf94'", 0, 0, 1, 0}, {"TP and PP", "fill='#e58f73'", 0, 0, 0, 0}};

struct Cell {
  const Kind* kind = nullptr;  // none fits
  std::string best;
};

// The fastest of a kind; empty if none fits.
std::vector<Planned> best_of(const Cluster& cluster, const GptConfig& config, const Kind& kind) {
  Wanted wanted{
      {config, {}, {{"fsdp", kind.fsdp}, {"replicate", 0}, {"tp", kind.tp}, {"pp", kind.pp}}}};
  wanted.batch = kBatch;
  wanted.microbatch = 0;
  wanted.fsdp.zero = kind.zero;
  wanted.schedule.clear();
  return plan(cluster, wanted, 1).fastest;
}

Cell best_kind(const Cluster& cluster, const GptConfig& config) {
  Cell cell;
  double fastest = INFINITY;  // that of the last kind
  for (const Kind* kind = std::end(kKinds); kind-- != kKinds;)
    for (const Planned& best : best_of(cluster, config, *kind)) {
      fastest = std::min(fastest, best.seconds);
      if (best.seconds <= 1.03 * fastest)
        cell = {kind, sentence(kind->name, ": ", to_string(best.layout),
                               format(", %.3g s a step", best.seconds))};
    }
  return cell;
}

std::string size_of_model(const GptConfig& config) {
  const double billions = double(parameter_count(config)) / 1e9;
  return format(billions < 10 ? "%.1f B" : "%.0f B", billions);
}

}  // namespace

std::string draw_map(const Machine& machine, const Profile& profile, double slow) {
  constexpr double kLeft = 70, kWide = 56, kHigh = 34, kTop = 70;
  const double wide = std::size(kDevices) * kWide, panel = kLeft + wide + 30,
               bottom = kTop + std::size(kModels) * kHigh, width = 2 * panel, height = bottom + 330;
  Svg svg(width, height, "font-family='sans-serif' font-size='12'", "When to use what");
  const auto line = [&](double x, double y, double length, const char* more) {
    svg.out << "<line x1='" << x << "' y1='" << y << "' x2='" << x + length << "' y2='" << y
            << "' stroke='#1f2328' " << more << "/>\n";
  };
  const char *large = "font-size='15'", *middle = "text-anchor='middle'",
             *end = "text-anchor='end'";
  svg.box(0, 0, width, height, "fill='#fff'");
  for (const bool is_slow : {false, true}) {
    const double left = is_slow * panel + kLeft;
    Cluster cluster{machine, profile};
    cluster.memory *= 0.92;
    if (is_slow) cluster.between.bandwidth = slow;
    svg.text(left, 20, large, machine.name, ", ", kOfNode, " a node; between nodes ",
             format("%.3g", cluster.between.bandwidth / 1e9), " GB/s a device");
    double y = bottom, wall = bottom, x = left;
    for (const ModelSize& model : kModels) {
      const GptConfig config{model, Dtype::bf16};
      y -= kHigh;
      svg.text(left - 8, y + 21, end, size_of_model(config));
      x = left;
      for (const int64_t devices : kDevices) {
        cluster.devices = std::min(devices, kOfNode);
        cluster.nodes = devices / cluster.devices;
        if (const Cell cell = best_kind(cluster, config); cell.kind) {
          if (devices == 1) wall = y;
          svg.out << "<g><title>" << cell.best << "</title>";
          svg.box(x, y, kWide - 1, kHigh - 1, cell.kind->colour);
          svg.out << "</g>\n";
        }
        x += kWide;
      }
    }
    line(left, wall, wide, "stroke-width='2' stroke-dasharray='6 4'");
    svg.text(left + 4, wall - 5, "", "one device holds what is below");
    x = left + kWide / 2;
    for (const int64_t devices : kDevices) {
      svg.text(x, bottom + 16, middle, devices);
      x += kWide;
    }
    svg.text(left + wide / 2, bottom + 34, middle, "devices");
  }
  double x = kLeft;
  for (const Kind& kind : kKinds) {
    svg.box(x, 34, 16, 16, kind.colour);
    svg.text(x + 22, 47, "", kind.name);
    x += 130;
  }
  svg.text(x, 47, "", "white: nothing fits");

  // inference: ms a token by tp, both logarithmic
  const double top = bottom + 80, high = 200, length = 500;
  svg.text(
      kLeft, top - 14, large,
      "Inference of one sequence: ms a token by ranks of tp (above 8: over two nodes and more)");
  const auto x_of = [&](double tp) { return kLeft + std::log2(tp) / 5 * length; };
  const auto y_of = [&](double ms) { return top + high * (1 - std::log10(ms) / 3); };
  for (const int ms : {1, 10, 100, 1000}) {
    line(kLeft, y_of(ms), length, "stroke-width='0.3'");
    svg.text(kLeft - 8, y_of(ms) + 4, end, ms);
  }
  for (int tp = 1; tp <= 32; tp *= 2) svg.text(x_of(tp), top + high + 18, middle, tp);
  const Cluster cluster{machine, profile, 4, kOfNode};
  for (const int row : {2, 5, 6}) {
    const GptConfig config{kModels[row], Dtype::bf16};
    double ms = 0;
    svg.out << "<polyline fill='none' stroke='#1f5fa8' points='";
    for (int tp = 1; tp <= 32; tp *= 2) {
      ms = 1e3 * predict_decoding(cluster, config, {{"tp", tp}}, 1, 1024).seconds.sum();
      svg.out << x_of(tp) << "," << y_of(ms) << " ";
    }
    svg.out << "'/>\n";
    svg.text(kLeft + length + 8, y_of(ms) + 4, "", size_of_model(config));
  }
  return svg.out.str() + "</svg>\n";
}
