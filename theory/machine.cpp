// machine.cpp: see machine.h.
#include "theory/machine.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <sstream>
#include <thread>

#include "autograd.h"
#include "support/files.h"
#include "support/stopwatch.h"

// ---- machines by name

// Hours of training sustain less than the best rate that a product reaches for a moment. What an
// A100 sustains, 242 inner / (inner + 192), is the one fitted constant: with it the last row of
// Narayanan's table 1, whose products are the largest, is met. (Least error over its ten rows:
// 234.) An RTX 4090 is taken to sustain the same share of its best product, 0.825; an H100 has the
// products of a moment, with which steps of seconds are predicted well, and hours perhaps too fast.
static const std::pair<const char*, const char*> kMachines[] = {
    {"a100-80g", R"(
peak 312            : NVIDIA, A100 80GB data sheet
f32 19.5            : NVIDIA, A100 80GB data sheet
product 128 96.8    : fitted on Narayanan et al. 2021, table 1, last row
product 8192 236.5  : the same
multiprocessors 108 : NVIDIA, A100 data sheet
copy 1733           : 85 % of the data sheet's 2039
memory 80           : NVIDIA, A100 80GB data sheet
launch 4            : between two kernels of one stream, as profilers show it
inside 232.5 1.65   : all_reduce_perf on 8 A100, NVIDIA/nccl-tests issue 175
between 24 3.5      : one HDR card, NVIDIA/nccl issues 412 and 1048
)"},
    {"h100", R"(
peak 989            : NVIDIA, H100 SXM data sheet
f32 66.9            : NVIDIA, H100 SXM data sheet
product 64 127      : measured, one H100 80GB HBM3, plan --machine this
product 256 428     : the same
product 1024 727    : the same
product 4096 818    : the same
multiprocessors 132 : NVIDIA, H100 SXM data sheet
copy 2842           : measured, the same
read 2207           : the same
memory 80           : NVIDIA, H100 SXM data sheet
launch 4            : as A100; copies of 32 bytes take 4.7
inside 360 1.65     : 80 % of the data sheet's 450 each way, as A100's share of 300
between 47 3.5      : one NDR card, NVIDIA/nccl-tests issue 290: 46 to 48
)"},
    {"h200", R"(
peak 989            : NVIDIA, H200 SXM data sheet
f32 66.9            : NVIDIA, H200 SXM data sheet
product 64 127      : as H100
product 256 428     : as H100
product 1024 727    : as H100
product 4096 818    : as H100
multiprocessors 132 : NVIDIA, H200 SXM data sheet
copy 4080           : 85 % of the data sheet's 4800
read 3169           : as H100's share of its copy
memory 141          : NVIDIA, H200 SXM data sheet
launch 4            : as A100
inside 360 1.65     : as H100
between 47 3.5      : as H100
)"},
    {"rtx4090", R"(
peak 165.2          : NVIDIA, Ada architecture paper, bf16 with sums in f32
f32 82.6            : NVIDIA, Ada architecture paper
product 128 54      : 0.825 of the peak, and as A100 by inner
product 8192 133    : the same
multiprocessors 128 : NVIDIA, Ada architecture paper
copy 857            : 85 % of the data sheet's 1008
memory 24           : NVIDIA, RTX 4090 data sheet
launch 4            : as A100
inside 10 3.5       : through host memory, half of PCIe 4.0 x16 and shared both ways (estimated)
between 1.2 10      : 10 Gbit/s Ethernet
)"},
};

std::vector<std::string> machine_names() {
  std::vector<std::string> names;
  for (const auto& [name, text] : kMachines) names.push_back(name);
  return names;
}

Machine read_machine(const std::string& name) {
  for (const auto& [known, text] : kMachines)
    if (name == known) return parse_machine(name, text);
  REQUIRE(is_there(name), "there is no machine and no file '", name, "': choose one of ",
          join(machine_names(), ", "), ", this, or give a file of such facts (theory/machine.h)");
  return parse_machine(name, read_file(name));
}

struct Fact {
  const char* name;
  std::vector<std::pair<double*, double>> numbers;  // where they go, and their unit
};
constexpr double kTera = 1e12, kGiga = 1e9, kMicro = 1e-6, kGiB = 1024.0 * 1024 * 1024;

static std::vector<Fact> facts_of(Machine& m) {
  const auto link = [](Link& l) {
    return std::vector<std::pair<double*, double>>{{&l.bandwidth, kGiga}, {&l.latency, kMicro}};
  };
  return {{"peak", {{&m.peak, kTera}}},      {"f32", {{&m.f32, kTera}}},
          {"copy", {{&m.copy, kGiga}}},      {"memory", {{&m.memory, kGiB}}},
          {"launch", {{&m.launch, kMicro}}}, {"multiprocessors", {{&m.multiprocessors, 1}}},
          {"inside", link(m.inside)},        {"between", link(m.between)},
          {"sharing", {{&m.sharing, 1}}},    {"overlap", {{&m.overlap, 1}}},
          {"read", {{&m.read, kGiga}}}};
}

Machine parse_machine(const std::string& name, const std::string& text) {
  Machine m;
  m.name = name;
  std::pair<double, double> product;
  std::vector<Fact> facts = facts_of(m);
  facts.push_back({"product", {{&product.first, 1}, {&product.second, kTera}}});
  std::istringstream lines(text);
  int number = 0;
  for (std::string line; std::getline(lines, line);) {
    const std::string place = sentence("machine ", name, ", line ", ++number, ": ");
    line = line.substr(0, line.find('#'));
    const size_t colon = line.find(':');
    std::istringstream words(line.substr(0, colon));
    std::string fact, more;
    if (!(words >> fact)) continue;
    const auto known = std::ranges::find(facts, fact, &Fact::name);
    REQUIRE(known != facts.end(), place, "'", fact, "' is no fact of a machine");
    for (const auto& [where, unit] : known->numbers) {
      REQUIRE(words >> *where && *where >= 0 && std::isfinite(*where), place, fact, " takes ",
              known->numbers.size(), known->numbers.size() > 1 ? " numbers" : " number",
              " of at least 0");
      *where *= unit;
    }
    REQUIRE(!(words >> more), place, "'", more, "' is too much");
    const size_t source = colon == line.npos ? line.npos : line.find_first_not_of(" \t", colon + 1);
    REQUIRE(source != line.npos, place, fact, " needs a source: a colon, and where it comes from");
    const bool is_new =
        m.sources.insert({fact, line.substr(source, line.find_last_not_of(" \t") + 1 - source)})
            .second;
    if (fact != "product") {
      REQUIRE(is_new, place, fact, " stands twice");
      continue;
    }
    REQUIRE(product.first > 0 && product.second > 0, place, "a product's numbers are above 0");
    REQUIRE(m.products.empty() || product.first > m.products.back().first, place,
            "products come in ascending order of their inner dim");
    m.products.push_back(product);
  }
  if (!m.sources.count("read")) {
    m.read = m.copy;
    m.sources["read"] = "as copying";
  }
  for (const Fact& fact : facts_of(m))
    REQUIRE(m.sources.count(fact.name) || *fact.numbers[0].first == 1, "machine ", name,
            " does not say its ", fact.name);
  REQUIRE(m.products.size() >= 2, "machine ", name, " needs the rates of two products at least");
  REQUIRE(m.overlap <= 1, "machine ", name, ": overlap is a share, at most 1");
  REQUIRE(m.sharing >= 1, "machine ", name, ": sharing is at least 1, a processor to a rank");
  REQUIRE(std::min({m.peak, m.f32, m.copy, m.memory, m.inside.bandwidth, m.between.bandwidth,
                    m.read}) > 0,
          "machine ", name, ": rates and memory are above 0");
  REQUIRE(m.memory < 1e6 * kGiB, "machine ", name, ": memory is in GiB, and less than 1e6");
  return m;
}

std::string to_text(Machine m) {
  std::ostringstream text;
  for (const auto& [inner, rate] : m.products)
    text << "product " << inner << " " << rate / kTera << " : " << m.sources["product"] << "\n";
  for (const Fact& fact : facts_of(m)) {
    text << fact.name;
    for (const auto& [value, unit] : fact.numbers) text << " " << *value / unit;
    text << " : " << m.sources[fact.name] << "\n";
  }
  return text.str();
}

// ---- this machine

static double best_of_three(const std::function<void()>& work) {
  work();
  double best = INFINITY;
  for (int i = 0; i < 3; i++) {
    const Stopwatch watch;
    work();
    synchronize();
    best = std::min(best, watch.seconds());
  }
  return best;
}

// FLOP/s of a product of (rows,inner) and (inner,rows)
static double rate_of_product(Dtype dtype, int64_t rows, int64_t inner) {
  const Tensor a({rows, inner}, dtype, Memory::workspace),
      b({inner, rows}, dtype, Memory::workspace), c({rows, rows}, dtype, Memory::workspace);
  fill(a, 0.5);
  fill(b, 0.5);
  return 2.0 * rows * rows * inner / best_of_three([&] { product(c, a, false, b, false, 0); });
}

std::string links_of(std::string gpu) {
  for (char& c : gpu) c = char(tolower(c));
  const auto has = [&](const std::string& word) {
    const size_t at = gpu.find(word);
    return at != gpu.npos && !isdigit(gpu[at + word.size()]);  // an A1000 is no A100
  };
  for (const std::string& name : machine_names())
    if (has(name.substr(0, name.find('-'))) && !has("pcie")) return name;
  return "rtx4090";  // through host memory, as most cards
}

// that this process may use
static int cores() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) ? std::thread::hardware_concurrency()
                                                : CPU_COUNT(&set);
}

Machine measure_machine(int64_t ranks) {
  // the device opens as that of one of so many ranks: a team of threads for each
  setenv("MPI_LOCALNRANKS", std::to_string(ranks).c_str(), true);
  Machine m;
  m.name = "this: " + device().name;
  const bool gpu = device().is_gpu;
  const Dtype dtype = gpu ? Dtype::bf16 : Dtype::f32;
  const int64_t rows = gpu ? 8192 : 1024;
  const double share = gpu ? 1 : std::min(1.0, double(cores()) / ranks);
  const auto tensor = [&](int64_t a, int64_t b) {
    const Tensor x({a, b}, dtype, Memory::workspace);
    fill(x, 0.5);
    return x;
  };
  for (const int64_t inner : {64, 256, 1024, 4096})
    m.products.push_back({double(inner), share * rate_of_product(dtype, rows, inner)});
  for (const auto& [inner, rate] : m.products) m.peak = std::max(m.peak, rate);
  m.f32 = gpu ? rate_of_product(Dtype::f32, rows, 1024) : m.peak;
  const Tensor from = tensor(rows, 2 * rows), to = tensor(rows, 2 * rows);
  const double copying = best_of_three([&] { copy(to, from); });
  m.copy = share * 2 * from.bytes() / copying;
  const Tensor row = tensor(1, rows), product_of_row = tensor(1, 16'384),
               matrix = tensor(rows, 16'384);
  const double reading =
      best_of_three([&] { product(product_of_row, row, false, matrix, false, 0); });
  m.read = share * matrix.bytes() / reading;
  const Tensor one = tensor(1, 16), other = tensor(1, 16);
  m.launch = best_of_three([&] {
               for (int i = 0; i < 1000; i++) copy(other, one);
             }) /
             1000 / share;
  m.sharing = 1 / share;
  for (const Fact& fact : facts_of(m)) m.sources[fact.name] = "measured now";
  m.sources["product"] = "measured now, " + device().name;
  m.sources["overlap"] = "not measured";
  if (gpu) {
    int ordinal = 0;
    cudaDeviceProp properties;
    CUDA_CHECK(cudaGetDevice(&ordinal));
    CUDA_CHECK(cudaGetDeviceProperties(&properties, ordinal));
    m.multiprocessors = properties.multiProcessorCount;
    m.memory = properties.totalGlobalMem;
    m.sources["multiprocessors"] = m.sources["memory"] = "the driver's";
    const Machine like = read_machine(links_of(device().name));
    m.inside = like.inside, m.between = like.between;
    m.sources["inside"] = m.sources["between"] = "not measured: as " + like.name;
  } else {
    m.memory = double(sysconf(_SC_PHYS_PAGES)) * double(sysconf(_SC_PAGE_SIZE)) / double(ranks);
    m.inside = m.between = {m.copy / 2, 10e-6 / share};
    m.sources["memory"] = "the host's, shared by all ranks";
    m.sources["inside"] = m.sources["between"] = "ranks of one host exchange by copying";
    m.sources["multiprocessors"] = "not counted";
  }
  return m;
}

// ---- one piece of work

// FLOP/s by the inner dim: between two that were measured, and below them, the time is a line.
static double rate_of(const Machine& m, double k) {
  const auto& p = m.products;
  size_t high = 1;
  while (high + 1 < p.size() && p[high].first < k) high++;
  const double low_k = p[high - 1].first, high_k = p[high].first, low = low_k / p[high - 1].second,
               up = high_k / p[high].second;
  if (k >= high_k) return p[high].second;
  const double time = low + (up - low) * (k - low_k) / (high_k - low_k);
  return k / std::max(time, std::min(k, low_k) / p[high - 1].second);
}

double product_seconds(const Machine& m, double rows, double columns, double k, double batch,
                       int64_t bytes) {
  // of a result's tile, and what it reaches of the largest tile's rate
  struct Tile {
    double rows, columns, reaches;
  };
  static constexpr Tile kTiles[] = {
      {256, 128, 1}, {128, 256, 1}, {128, 128, 0.9}, {64, 128, 0.7}, {128, 64, 0.7}};
  const double slower = bytes == 2 || m.f32 == m.peak ? 1 : m.peak / m.f32,
               rate = rate_of(m, k) / slower,
               moving = batch * (rows * k + k * columns + rows * columns) * bytes / m.copy;
  if (m.multiprocessors == 0) return 2 * batch * rows * columns * k / rate + moving + m.launch;
  double computing = INFINITY;
  for (const Tile& t : kTiles) {
    const double tiles = batch * std::ceil(rows / t.rows) * std::ceil(columns / t.columns),
                 waves = std::ceil(tiles / m.multiprocessors) * m.multiprocessors;
    computing = std::min(computing, 2 * waves * t.rows * t.columns * k / t.reaches);
  }
  return std::max(computing / rate, moving) + m.launch;
}

double move_seconds(const Machine& m, double bytes, double kernels) {
  return bytes / m.copy + kernels * m.launch;
}

Link link_of(const Cluster& c, int64_t n, int64_t stride) {
  const Link &in = c.machine.inside, &out = c.machine.between;
  // nodes that a group is on, and how many of it are on each
  const int64_t nodes = std::min(n, c.spread ? c.nodes / std::gcd(stride, c.nodes)
                                             : ceil_div(n * stride, c.devices)),
                here = std::clamp<int64_t>(n / nodes, 1, n);
  if (nodes == 1) return {in.bandwidth, in.latency, c.direct};
  const double cards = c.direct ? (n - 1.0) / std::max<int64_t>(n - here, 1) : here;
  return {std::min(in.bandwidth, cards * out.bandwidth), out.latency, c.direct, double(nodes)};
}

double Link::latency_of(int n, Collective collective) const {
  if (direct) return latency;
  const bool is_ring =
      collective == Collective::all_gather || collective == Collective::reduce_scatter;
  return latency * std::max(std::log2(n), is_ring ? nodes - 1 : 0);
}

double collective_seconds(const Link& link, int n, Collective collective, double bytes) {
  if (n == 1) return 0;
  static std::map<std::pair<int, Collective>, double> parts;  // of the buffer, that a rank sends
  double& part = parts[{n, collective}];
  if (part == 0) {
    Ledger sent;
    sent.enter({"", n}, collective, 1);
    part = double(sent.rows.begin()->second.numerator) / n;
  }
  const double rounds = collective == Collective::all_reduce ? 2 : 1;
  return rounds * link.latency_of(n, collective) + bytes * part / link.bandwidth;
}
