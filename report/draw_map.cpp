// draw_map.cpp: see draw_map.h.
#include "report/draw_map.h"

#include <algorithm>

#include "report/svg.h"

namespace {

// Sizes of GPT-3 (Brown et al., 2020) and of Megatron-LM (Narayanan et al., 2021).
const ModelSize kModels[] = {{12, 768, 12},  {24, 2048, 16}, {32, 4096, 32},  {40, 5120, 40},
                             {48, 7168, 56}, {80, 8192, 64}, {96, 12288, 96}, {128, 25600, 160}};
const std::vector<int64_t> kDevices{1, 2, 4, 8, 16, 64, 256, 1024, 4096}, kTp{1, 2, 4, 8, 16, 32};
constexpr int64_t kBatch = 2048, kOfNode = 8;
constexpr double kSlow = 1.25e9;  // bytes/s: 10 Gbit/s

// The simplest first: how many ranks of each axis (0: as many as is best), and the stage of ZeRO
// (0: any). The last has all layouts of the others.
struct Kind {
  const char *name, *colour;
  int fsdp, tp, pp, zero;
};
const Kind kKinds[] = {
    {"copies", "fill='#dbe7f3'", 1, 1, 1, 0}, {"ZeRO-1", "fill='#a9ceff'", 0, 1, 1, 1},
    {"ZeRO-3", "fill='#5f9be0'", 0, 1, 1, 3}, {"PP", "fill='#96deb8'", 0, 1, 0, 0},
    {"TP", "fill='#ffcf94'", 0, 0, 1, 0},     {"TP, PP", "fill='#e58f73'", 0, 0, 0, 0}};

struct Cell {
  std::string colour, title, text = "";  // no colour: white
};

Cell best_kind(const Cluster& cluster, const GptConfig& config) {
  Cell cell;
  double fastest = INFINITY;  // that of the last kind
  for (const Kind* kind = std::end(kKinds); kind != kKinds;) {
    kind--;
    Wanted wanted{
        {config, {}, {{"fsdp", kind->fsdp}, {"replicate", 0}, {"tp", kind->tp}, {"pp", kind->pp}}}};
    wanted.batch = kBatch;
    wanted.microbatch = 0;
    wanted.fsdp.zero = kind->zero;
    wanted.schedule.clear();
    for (const Planned& best : plan(cluster, wanted, 1).fastest) {
      fastest = std::min(fastest, best.seconds);
      if (best.seconds <= 1.03 * fastest)
        cell = {kind->colour,
                sentence(kind->name, ": ", to_string(best.layout),
                         format(", %.3g s a step", best.seconds)),
                kind->name};
    }
  }
  return cell;
}

Cell decoding(const Cluster& cluster, const GptConfig& config, int64_t tp) {
  if (tp > config.heads) return {};
  const DecodePrediction d = predict_decoding(cluster, config, {{"tp", tp}}, 1, 1024);
  if (d.memory > cluster.memory) return {};
  return {"fill='#eee'", format("%.3g GiB a rank", d.memory / kGiB),
          format("%.3g", 1e3 * d.seconds.sum())};
}

constexpr double kLeft = 70, kWide = 56, kHigh = 34, kTop = 70, kPanel = 604,
                 kBottom = kTop + std::size(kModels) * kHigh, kHeight = kBottom + 50;

// A row for each model, the largest above, and a column for each number, of what: the cells.
template <class CellOf> void draw_table(Svg& svg, double left, double top, const std::string& title,
                                        const std::vector<int64_t>& numbers, const char* what,
                                        const CellOf& cell_of) {
  const char* middle = "text-anchor='middle'";
  svg.out << "<g transform='translate(" << left << " " << top << ")'>\n";
  svg.text(kLeft, 20, "font-size='15'", title);
  svg.text(2, kTop - 8, "", "parameters");
  double x = kLeft, y = kBottom, wall = kBottom;
  for (const ModelSize& model : kModels) {
    y -= kHigh;
    x = kLeft;
    GptConfig config{model, Dtype::bf16};
    config.context = 2048;
    config.vocab = 51200;
    const double billions = parameter_count(config) / 1e9;
    svg.text(x - 8, y + 21, "text-anchor='end'",
             format(billions < 10 ? "%.1f B" : "%.0f B", billions));
    for (const int64_t number : numbers) {
      if (&model == kModels) svg.text(x + kWide / 2, kBottom + 16, middle, number);
      if (const Cell cell = cell_of(config, number); !cell.colour.empty()) {
        if (number == 1) wall = y;
        svg.out << "<g><title>" << cell.title << "</title>";
        svg.box(x, y, kWide - 1, kHigh - 1, cell.colour);
        svg.text(x + kWide / 2, y + 21, middle, cell.text);
        svg.out << "</g>\n";
      }
      x += kWide;
    }
  }
  svg.box(kLeft, wall - 1, x - kLeft, 1, "");
  svg.text((kLeft + x) / 2, kBottom + 34, middle, what, " (one holds what is below the line)");
  svg.out << "</g>\n";
}

}  // namespace

std::string draw_map(Cluster cluster) {
  Svg svg(2 * kPanel, 2 * kHeight, "font-family='sans-serif' font-size='12'", "When to use what");
  svg.box(0, 0, 2 * kPanel, 2 * kHeight, "fill='#fff'");
  svg.text(kLeft, 47, "", "white: nothing fits, or more ranks than heads");
  cluster.nodes = 4;
  cluster.devices = kOfNode;
  draw_table(
      svg, 0, kHeight,
      "Inference of one sequence: ms a token by ranks of tp (above 8: over two nodes and more)",
      kTp, "ranks of tp",
      [&](const GptConfig& config, int64_t tp) { return decoding(cluster, config, tp); });
  for (const double left : {0.0, kPanel}) {
    const std::string machine = cluster.name.substr(cluster.name.rfind('/') + 1),  // of a path
        title = sentence(machine, ", ", kOfNode, " a node; between nodes ",
                         cluster.between.bandwidth / 1e9, " GB/s a device");
    draw_table(svg, left, 0, title, kDevices, "devices",
               [&](const GptConfig& config, int64_t devices) {
                 cluster.devices = std::min(devices, kOfNode);
                 cluster.nodes = devices / cluster.devices;
                 return best_kind(cluster, config);
               });
    cluster.between.bandwidth = std::min(kSlow, cluster.between.bandwidth);
  }
  return svg.out.str() + "</svg>\n";
}
