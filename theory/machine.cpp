// machine.cpp: see machine.h.
#include "theory/machine.h"

#include <omp.h>

#include <algorithm>
#include <numeric>
#include <set>
#include <sstream>

#include "autograd.h"
#include "support/files.h"
#include "support/stopwatch.h"

// ---- machines by name

// Hours of training sustain less than the best rate that a product reaches for a moment. What an
// A100 sustains, 242 inner / (inner + 192), is the one fitted constant: with it the last row of
// Narayanan's table 1, whose products are the largest, is met. (Least error over its ten rows:
// 234.) An RTX 4090 is taken to sustain the same share of its best product, 0.825; an H100 has the
// products of a moment, with which steps of seconds are predicted well, and hours perhaps too fast.
static const struct {
  const char *name, *card, *text;  // card: in its driver's name
} kMachines[] = {
    {"a100-80g", "A100-SXM", R"(
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
    {"h100", "H100 80GB", R"(
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
    {"h200", " H200", R"(
peak 989            : NVIDIA, H200 SXM data sheet
f32 66.9            : NVIDIA, H200 SXM data sheet
product 64 127      : as H100
product 256 428     : as H100
product 1024 727    : as H100
product 4096 818    : as H100
multiprocessors 132 : NVIDIA, H200 SXM data sheet
copy 4080           : 85 % of the data sheet's 4800
read 3168           : as H100's share of its copy
memory 141          : NVIDIA, H200 SXM data sheet
launch 4            : as A100
inside 360 1.65     : as H100
between 47 3.5      : as H100
)"},
    {"rtx4090", "RTX 4090", R"(
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

std::vector<std::string> machine_names() { return names_of(kMachines); }

Machine read_machine(const std::string& name) {
  for (const auto& [known, card, text] : kMachines)
    if (name == known) return parse_machine(name, text);
  REQUIRE(is_there(name), "there is no machine and no file '", name, "': choose one of ",
          join(machine_names(), ", "), ", this, or give a file of facts (theory/machine.h)");
  return parse_machine(name, read_file(name, true));
}

constexpr double kTera = 1e12, kGiga = 1e9, kMicro = 1e-6;

Machine parse_machine(const std::string& name, const std::string& text) {
  Machine m;
  m.name = name;
  m.text = text;
  double inner = 0, rate = 0;  // of a product
  struct Fact {
    const char* name;
    double *where, unit, least = 1e-9, most = 1e9;  // these before the unit
  };
  const Fact facts[] = {{"peak", &m.peak, kTera},
                        {"f32", &m.f32, kTera},
                        {"product", &inner, 1},
                        {"product", &rate, kTera},
                        {"multiprocessors", &m.multiprocessors, 1, 0},
                        {"copy", &m.copy, kGiga},
                        {"memory", &m.memory, kGiB, 1e-9, 1e6},
                        {"launch", &m.launch, kMicro, 0},
                        {"inside", &m.inside.bandwidth, kGiga},
                        {"inside", &m.inside.latency, kMicro, 0},
                        {"between", &m.between.bandwidth, kGiga},
                        {"between", &m.between.latency, kMicro, 0},
                        {"sharing", &m.sharing, 1, 1},
                        {"overlap", &m.overlap, 1, 0, 1},
                        {"read", &m.read, kGiga}};
  std::set<std::string> seen;
  std::istringstream lines(text);
  int number = 0;
  for (std::string line; std::getline(lines, line);) {
    const std::string place = sentence("machine ", name, ", line ", ++number, ": ");
    std::istringstream words(line.substr(0, line.find('#')));
    std::string fact, more;
    if (!(words >> fact)) continue;
    int count = 0;
    for (const auto& [fact_name, where, unit, least, most] : facts) {
      if (fact != fact_name) continue;
      count++;
      REQUIRE(words >> *where && least <= *where && *where <= most, place, "number ", count, " of ",
              fact, " must be there, and from ", least, " to ", most);
      *where *= unit;
    }
    REQUIRE(count > 0, place, "'", fact, "' is no fact of a machine");
    REQUIRE(!(words >> more) || more[0] == ':', place, "'", more, "' is too much");
    REQUIRE(more.size() > 1 || words >> more, place, fact,
            " needs a source: a colon, and where it comes from");
    const bool is_product = fact == "product";
    if (is_product) m.products[inner] = rate;
    const std::string known = is_product ? sentence("product ", inner) : fact;
    REQUIRE(seen.insert(known).second, place, known, " stands twice");
  }
  if (m.read == 0) m.read = m.copy;
  for (const Fact& fact : facts)
    REQUIRE(seen.count(fact.name) || *fact.where > 0, "machine ", name, " does not say its ",
            fact.name);
  REQUIRE(m.products.size() >= 2, "machine ", name, " needs the rates of two products at least");
  REQUIRE(m.f32 <= m.peak, "machine ", name, ": f32 is above the peak of ", m.peak / kTera);
  for (const auto& [k, reached] : m.products)
    REQUIRE(reached <= m.peak, "machine ", name, ": product ", k, " is above the peak of ",
            m.peak / kTera);
  return m;
}

// ---- this machine

static double best_of_four(const std::function<void()>& work) {
  double best = INFINITY;
  for (int i = 0; i < 4; i++) {
    const Stopwatch watch;
    work();
    synchronize();
    best = std::min(best, watch.seconds());
  }
  return best;
}

static Tensor filled(Dtype dtype, int64_t rows, int64_t columns) {
  const Tensor x({rows, columns}, dtype, Memory::workspace);
  fill(x, 0.5);
  return x;
}

// of (rows,inner) and (inner,columns)
static double seconds_of_product(Dtype dtype, int64_t rows, int64_t columns, int64_t inner) {
  const Tensor a = filled(dtype, rows, inner), b = filled(dtype, inner, columns),
               c = filled(dtype, rows, columns);
  return best_of_four([&] { product(c, a, false, b, false); });
}

std::string links_of(const std::string& gpu) {
  for (const auto& [name, card, text] : kMachines)
    if (gpu.find(card) != gpu.npos) return name;
  return "rtx4090";  // through host memory, as most cards
}

Machine measure_machine(int64_t ranks) {
  // the device opens as that of one of so many ranks: a team of threads for each
  setenv("MPI_LOCALNRANKS", std::to_string(ranks).c_str(), true);
  const bool gpu = device().is_gpu;
  const Dtype dtype = gpu ? Dtype::bf16 : Dtype::f32;
  const int64_t rows = gpu ? 8192 : 1024;
  const double share = gpu ? 1 : std::min(1.0, double(omp_get_num_procs()) / ranks);
  const auto rate_of = [&](Dtype dtype, int64_t inner) {
    return share * 2 * rows * rows * inner / seconds_of_product(dtype, rows, rows, inner);
  };
  std::ostringstream text;
  double peak = 0;
  for (const int64_t inner : {64, 256, 1024, 4096}) {
    const double rate = rate_of(dtype, inner);
    text << "product " << inner << " " << rate / kTera << " : measured now, " << device().name
         << "\n";
    peak = std::max(peak, rate);
  }
  const double f32 = gpu ? rate_of(Dtype::f32, 1024) : peak;
  const Tensor from = filled(dtype, rows, 2 * rows), to = filled(dtype, rows, 2 * rows);
  const double copying = share * 2 * from.bytes() / best_of_four([&] { copy(to, from); });
  const int64_t columns = 16'384, matrix = rows * columns * size_of(dtype);
  const double reading = share * matrix / seconds_of_product(dtype, 1, columns, rows);
  const Tensor one = filled(dtype, 1, 16), other = filled(dtype, 1, 16);
  const double thousand = best_of_four([&] {
    for (int i = 0; i < 1000; i++) copy(other, one);
  });
  text << "peak " << peak / kTera << " : measured now\nf32 " << f32 / kTera
       << " : measured now\ncopy " << copying / kGiga << " : measured now\nread " << reading / kGiga
       << " : measured now\nlaunch " << thousand / 1000 / share / kMicro
       << " : measured now\nsharing " << 1 / share << " : measured now\noverlap 1 : not measured\n";
  cudaDeviceProp properties;
  CUDA_CHECK(cudaGetDeviceProperties(&properties, 0));
  Machine like;  // has the same links
  if (gpu) {
    text << "multiprocessors " << properties.multiProcessorCount << " : the driver's\nmemory "
         << properties.totalGlobalMem / kGiB << " : the driver's\n";
    like = read_machine(links_of(device().name));
  } else {
    text << "multiprocessors 0 : not counted\nmemory " << properties.totalGlobalMem / kGiB / ranks
         << " : what this process may have, shared by all ranks\n";
    like.inside = like.between = {copying / 2, 10e-6 / share};
  }
  for (const auto& [name, link] : {std::pair{"inside ", like.inside}, {"between ", like.between}})
    text << name << link.bandwidth / kGiga << " " << link.latency / kMicro << " : "
         << (gpu ? "not measured: as " + like.name : "ranks of one host exchange by copying")
         << "\n";
  return parse_machine("this: " + device().name, text.str());
}

// ---- what software does

// threefold: what its kernels say that they read and write (over tp the logits once more), and the
// launches of docs/gpu.md; flash attention as bf16 reaches it on an H100, measured there, too. Its
// optimizer: weight, gradient and moments read and three written, 28 bytes, 2 of bf16's copy, and
// the gradient once more for the norm.
// threefold-cpu: the same on the stand-ins for a GPU and NCCL (cpu/); --profile shows attention at
// 24 % of a product (backward) and 32 % (forward).
// megatron-2021: the kernels of Megatron-LM's transformer layer of 2021, with its fused softmax,
// bias + GELU and bias + dropout + add, and one byte a number for a dropout's mask. Where attention
// is "flash", it is computed again in the backward (selective recomputation). A tp rank sends its
// share of an activation to the next stage, where the shares are gathered. Its optimizer reads and
// writes gradients in 16 bits, a copy in 32, master weights and two moments.
// deepspeed-2021: the same layers with DeepSpeed's ZeRO-3, whose shards travel at 16 GB/s a device:
// fitted on the second row of Narayanan's table 2 (175 B on 768 GPUs), which waits for them alone.
static constexpr Passes kForward{9, 6, 2, 2, 2, 5}, kBackward{10, 3, 4, 3, 0, 19},
    kMegatronForward{11, 2, 2, 4.5, 11, 12}, kMegatronBackward{21, 11, 4, 5.5, 7, 20};
static const SoftwareProfile kProfiles[] = {
    {"threefold", kForward, kBackward, false, true, 0, 34, 0.2, false},
    {"threefold-cpu", kForward, kBackward, false, true, 0, 32, 0.26, true},
    {"megatron-2021", kMegatronForward, kMegatronBackward, true, false, 2, 52, 0.6, false},
    {"deepspeed-2021", kMegatronForward, kMegatronBackward, true, false, 2, 52, 0.6, false, 16e9},
};

std::vector<std::string> profile_names() { return names_of(kProfiles); }

const SoftwareProfile& profile_named(const std::string& name) {
  return row_named(kProfiles, "profile", name);
}

// ---- one piece of work

// FLOP/s by the inner dim: between two that were measured, and below them, the time is a line;
// above the last the rate is the last's, and below the first at most the first's.
static double rate_at(const Machine& m, double k) {
  const auto& p = m.products;
  auto high = p.lower_bound(k);
  if (high == p.end()) return p.rbegin()->second;
  if (high == p.begin()) high++;
  const auto [low_k, low_rate] = *std::prev(high);
  const auto [high_k, high_rate] = *high;
  const double low = low_k / low_rate,
               time = std::lerp(low, high_k / high_rate, (k - low_k) / (high_k - low_k));
  return k / std::max(time, std::min(k, low_k) / low_rate);
}

double product_seconds(const Machine& m, double rows, double columns, double k, double batch,
                       int64_t bytes) {
  // rows and columns of a result's tile, and what it reaches of the largest tile's rate
  static constexpr double kTiles[][3] = {
      {256, 128, 1}, {128, 256, 1}, {128, 128, 0.9}, {64, 128, 0.7}, {128, 64, 0.7}};
  const double rate = rate_at(m, k) / m.slower(bytes),
               moving = batch * (rows * k + k * columns + rows * columns) * bytes / m.read;
  if (m.multiprocessors == 0) return 2 * batch * rows * columns * k / rate + moving + m.launch;
  double computing = INFINITY;
  for (const auto& [high, wide, reaches] : kTiles) {
    const double tiles = batch * std::ceil(rows / high) * std::ceil(columns / wide),
                 waves = std::ceil(tiles / m.multiprocessors) * m.multiprocessors;
    computing = std::min(computing, 2 * waves * high * wide * k / reaches);
  }
  return std::max(computing / rate, moving) + m.launch;
}

double move_seconds(const Machine& m, double bytes, double kernels) {
  return bytes / m.copy + kernels * m.launch;
}

Link link_of(const Cluster& c, int64_t n, int64_t stride) {
  const Link &in = c.inside, &out = c.between;
  // The group that is on most nodes, and how many of it are on each. Groups begin on ranks that are
  // each a multiple of `step` after a node's first, or up to a stride further: this one on the
  // last of these.
  const int64_t step = std::gcd(n * stride, c.devices),
                first = c.devices - step + std::min(stride, step) - 1,
                nodes = std::min({n, c.nodes,
                                  c.spread ? c.nodes / std::gcd(stride, c.nodes)
                                           : (first + (n - 1) * stride) / c.devices + 1}),
                here = n / nodes;
  if (nodes == 1) return {in.bandwidth, in.latency, n, 1, c.profile.direct};
  const double cards = c.profile.direct ? (n - 1.0) / (n - here) : here;
  return {std::min(in.bandwidth, cards * out.bandwidth), std::max(in.latency, out.latency), n,
          nodes, c.profile.direct};
}

double Link::seconds(Collective c, double bytes) const {
  if (ranks == 1) return 0;
  const bool is_ring = c == Collective::all_gather || c == Collective::reduce_scatter,
             is_one = direct || c == Collective::send;
  const double rounds = c == Collective::all_reduce ? 2 : 1,
               waits = is_one ? 1 : std::max(std::log2(ranks), is_ring ? nodes - 1.0 : 0);
  return rounds * waits * latency + bytes * parts_sent(c, ranks) / ranks / bandwidth;
}
