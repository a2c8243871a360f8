// machine.h: what a prediction knows of the hardware, rates, each with its source, and of software.
//
// format    A machine is a text, a line a fact: a name, its numbers, and after a colon where they
//           come from. What stands after # is a comment. The built-in machines are such texts
//           (kMachines in machine.cpp): to write another one, copy one of them. One that was
//           measured may have more lines:
//             read 2207             : measured ...
//             sharing 2             : two ranks a core
//             overlap 0.8           : measured ...
// units     peak and f32: TFLOP/s of bf16 and f32 products. product: an inner dim, and the TFLOP/s
//           that a large bf16 product of it reaches; at least two lines, in any order.
//           multiprocessors: tiles go over them in waves; 0: not counted. copy: GB/s read and
//           written together. memory: GiB. launch: us from one kernel to the next. inside and
//           between (of nodes): GB/s that a device sends in a collective, and us of a round
//           (below). sharing: ranks to a processor, each rate above being a rank's when all
//           compute; where some wait, the others are faster. overlap: what share of the time is
//           hidden that something travels beside a computation; the rest slows it down. read: GB/s
//           at which a product of one row reads its matrix, and others theirs. Where these three
//           are left out, sharing and overlap are 1, and read is as copy.
// rounds    A round waits once for each doubling of the ranks. A ring (all-gather, reduce-scatter)
//           that goes over more nodes than that waits once for each hop between two of them, as in
//           NCCL's own model (src/graph/tuning.cc), which adds the hops inside: left out here.
//           Where each rank sends to every other directly, a round waits once.
// test      tests/test_plan.cpp
#pragma once
#include <cmath>
#include <map>

#include "comm.h"

inline constexpr double kGiB = 1 << 30;

// Between the ranks of a group.
struct Link {
  double bandwidth = 0, latency = 0;  // bytes/s that a device sends; seconds
  int64_t ranks = 1, nodes = 1;       // of the group; that its ranks are on
  bool direct = false;                // SoftwareProfile's
  // of a collective on a buffer of so many bytes: the ledger's bytes, in one round or, of an
  // all-reduce, in two
  double seconds(Collective collective, double bytes) const;
};
struct Machine {
  std::string name;
  double peak = 0, f32 = 0;                                      // FLOP/s
  std::map<double, double> products;                             // inner dim: FLOP/s reached
  double multiprocessors = 0, copy = 0, memory = 0, launch = 0;  // -, bytes/s, bytes, seconds
  double read = 0;                                               // bytes/s
  Link inside, between;
  double sharing = 1, overlap = 1;
  std::string text;  // that it was read from
  // than products of bf16, in a dtype of so many bytes
  double slower(int64_t bytes) const { return bytes == 2 ? 1 : peak / f32; }
};
std::vector<std::string> machine_names();
// A built-in machine, or that of a file; an Error names the line that is wrong.
Machine read_machine(const std::string& name_or_file);
Machine parse_machine(const std::string& name, const std::string& text);
// The built-in machine whose links a GPU of that name, as its driver has it, is taken to have
std::string links_of(const std::string& gpu);
// This one: products and copies are timed now. Ranks beyond its cores share them: each of `ranks`
// gets as large a part.
Machine measure_machine(int64_t ranks);

// Numbers of the compute dtype read or written in a block, for each number in: an activation of
// width C of this rank's rows; one of its part of the width, of all rows; one between the MLP's
// products; the scores. In the head: the logits. kernels: launches besides those of products and
// attention.
struct Passes {
  double rows, columns, hidden, scores, logits, kernels;
};
// What software does with the hardware.
struct SoftwareProfile {
  const char* name;
  Passes forward, backward;
  bool stores_scores;  // attention as whole matrices, with plain products
  // tp: a backward's sum travels beside the weight gradient; sums of gradients run beside the
  // backward; exchanges between stages, where each tp rank then sends all that it has
  bool overlaps;
  double gradient_bytes;   // on the wire; 0: those of the master dtype
  double optimizer_bytes;  // read and written a parameter of the shard, in all
  double flash_share;      // of a large product's rate
  bool direct;             // in collectives each rank sends to every other; else in a ring
  double fsdp_bandwidth = INFINITY;  // bytes/s that a device sends over fsdp at most
};
const SoftwareProfile& profile_named(const std::string& name);
std::vector<std::string> profile_names();

// So many of a machine; its memory is what a rank may have.
struct Cluster : Machine {
  SoftwareProfile profile;
  int64_t nodes = 1, devices = 1;  // of a node
  bool spread = false;             // rank r is on node r mod nodes; else the first are on node 0
};

// ---- how long one piece of work takes

// c (m,n) = a (m,k) b (k,n), `batch` of them, in a dtype of `bytes`. Tiles of the result go over
// the multiprocessors in waves, and the last wave takes as long as a full one (NVIDIA, "Matrix
// multiplication background user's guide", 2023, sections 3.1 and 3.2); smaller tiles reach less.
// Matrices are read and written meanwhile or, where no multiprocessors are counted, besides: there
// it is a surcharge, since the rates have these bytes of large products in them.
double product_seconds(const Machine& machine, double m, double n, double k, double batch,
                       int64_t bytes);
// `kernels` that read and write so many bytes together
double move_seconds(const Machine& machine, double bytes, double kernels);

// The link of n ranks whose neighbours are `stride` ranks apart: of all such groups, of that which
// is on most nodes, since the others wait for it. Ranks of one group that share a node send over as
// many of its network cards at the same time; where each rank sends to every other directly, only
// what is for other nodes goes over a card.
Link link_of(const Cluster& cluster, int64_t n, int64_t stride);
