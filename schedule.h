// schedule.h: a pipeline schedule is data. One function writes down what every stage does, in
// order; others check, simulate and draw it.
//
// idea      the model is cut into p*V pieces. Piece (position) v belongs to stage v % p and is that
//           stage's chunk v / p, so that a micro-batch walks round the ring of stages V times. A
//           schedule is one list of actions for each stage; the executor (pipeline.cpp) is a loop
//           with one switch over `kind`.
// backward  is one action, or two: the input gradient (what the previous stage waits for) now and
//           the weight gradient (what nobody waits for) later, where the stage would idle. Both run
//           in ascending micro-batch order on every chunk in all schedules, so that all of them add
//           up gradients in one order and agree bit for bit.
// transfers are placed by one rule. Run the computations with F = B = W = 1: what ends at time t is
// sent at tick t, and within a tick
//           in the order in which it would exist if a transfer took a moment. Two sends that face
//           each other at one tick are one exchange (one NCCL group), so that neither waits for the
//           other. So each list is a part of one order of all events (exchanges of a tick, then the
//           computations that start at it). The first unfinished event never waits for a later one:
//           nothing can deadlock, not with one communication queue a stage, not when every action
//           blocks its stage. Collectives of the other axes join ranks that run the same list, so
//           they keep to that order too.
//
// cost      p stages, m micro-batches, V chunks a stage, s this stage (0 first), F = B = W = 1 for
//           all layers of a stage, free sends
//                        idle time of a stage   share of the time   live micro-batches on stage s          sends (2 (pieces - 1) m)
//           gpipe        3 (p-1)                (p-1)/(m+p-1)       m                                      2 (p-1) m
//           1f1b         3 (p-1)                (p-1)/(m+p-1)       min(p-s, m)                            2 (p-1) m
//           interleaved  3 (p-1)/V              (p-1)/(Vm+p-1)      min(2(p-s-1) + (V-1)p + 1, Vm) / V     2 (pV-1) m
//           zb           p-1, for m >= p        (p-1)/(3m+p-1)      min(p, m)                              2 (p-1) m
//           Idle time for other F, B, W of a chunk: (p-1)(F+B+W), zb (p-1) max(F, B, F+B-W). zb
//           with m < p and F = B = W = 1: 2p-1-m. A micro-batch is live on a chunk from its forward
//           to the end of its backward (zb: of its weight gradient). A send is one activation or
//           gradient (B T C elements) between different stages.
//
// sources   GPipe (Huang et al., 2019); 1F1B (Narayanan et al., "PipeDream", SOSP 2019; its
//           flushing form in "Memory-efficient pipeline-parallel DNN training", 2021); interleaved
//           (Narayanan et al., "Efficient large-scale language model training on GPU clusters using
//           Megatron-LM", SC 2021); zb is ZB-H1 (Qi et al., "Zero bubble pipeline parallelism",
//           2023)
// not here  ZB-H2 and ZB-V, uneven chunks a stage, schedules found by search
// test      tests/test_schedule.cpp; build/show_schedule draws any of them (draw_schedule.h)
#pragma once
#include <compare>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

// ---- the data

// One end of one transfer, as the stage that holds this end sees it.
struct Transfer {
  enum Payload { activation, gradient };
  bool send;        // or receive
  Payload payload;  // activations travel to the next position, their gradients back
  int peer;         // the stage at the other end
  int microbatch;
  // of this stage: the one that computed what is sent, or that will use what is received
  int chunk;
  auto operator<=>(const Transfer&) const = default;
};

struct Action {
  enum Kind {
    forward,
    backward,         // both gradients at once
    input_gradient,   // or in two parts: what travels to the previous position,
    weight_gradient,  // and what is added to this chunk's parameters
    exchange,         // all of `transfers` at once, as one group on the communication queue
  };
  Kind kind;
  int microbatch = -1, chunk = -1;       // of a computation
  std::vector<Transfer> transfers = {};  // of an exchange
};

struct Schedule {
  std::string name;
  int stages = 1, microbatches = 1, chunks = 1;  // p, m, V
  std::vector<std::vector<Action>> ranks;        // ranks[s]: what stage s does, in order
  int positions() const { return stages * chunks; }
  // of a chunk in the model: 0 holds the first layers
  int position(int stage, int chunk) const { return chunk * stages + stage; }
  const Action& at(int stage, int index) const { return ranks[stage][index]; }
};

// How a computation's input comes to its stage, or how its result leaves (send). Nothing at the
// ends of the model, where one stage has all of it, and for weight gradients.
std::optional<Transfer> transfer_of(const Schedule& s, int stage, const Action& computation,
                                    bool send);

// Calls f(stage, index, action) for each.
template <class F> void for_each_computation(const Schedule& s, const F& f) {
  for (int stage = 0; stage < s.stages; stage++)
    for (int i = 0; i < int(s.ranks[stage].size()); i++)
      if (s.at(stage, i).kind != Action::exchange) f(stage, i, s.at(stage, i));
}

// name: gpipe, 1f1b, interleaved or zb. Refuses what a schedule does not allow with a sentence.
// With one stage there are no transfers; pipeline.cpp then runs one chunk only.
Schedule make_schedule(const std::string& name, int stages, int microbatches, int chunks = 1);

const char* name_of(Action::Kind kind);
std::string to_string(const Action& action);      // "forward of micro-batch 3, chunk 0"
std::string to_string(const Schedule& schedule);  // "1f1b, 4 stages, 8 micro-batches"

// ---- the checker

// Empty, or a sentence that says what is wrong and where: every micro-batch once forward and once
// backward on each chunk, in an order that respects dependencies and sums gradients in ascending
// order; every transfer that this needs once, after what it sends and before what uses it; the
// receives of each pair of stages in the order of the sends; no deadlock, even when each action
// blocks its stage and a send waits for its receive. An executor that overlaps transfers with
// computation waits for less: it is safe, too.
std::string check(const Schedule& schedule);

// ---- the simulator

// of one chunk; `backward` takes both gradients'
struct Times {
  double forward = 1, input_gradient = 1, weight_gradient = 1, send = 0;
};
// [stage][action]; of an exchange: how long each of its transfers takes
using Durations = std::vector<std::vector<double>>;
Durations durations(const Schedule& schedule, const Times& times);

struct Span {
  double start, end;
};
struct Timeline {
  std::vector<std::vector<Span>> spans;  // [stage][action]; from 0
  std::vector<double> busy;              // [stage]: time spent computing
  double makespan = 0;                   // when the last computation ends
  double bubble(int stage) const { return makespan > 0 ? 1 - busy[stage] / makespan : 0; }
  double bubble() const;  // idle share of all stages together
};
// Adds up spans that were measured (or simulated).
Timeline timeline(const Schedule& schedule, std::vector<std::vector<Span>> spans);

// The timeline of an executor with two queues a stage. Computations run in list order, each when
// the exchange that receives its input has completed. Exchanges run in list order, each when what
// it sends has been computed; a transfer starts when both its ends have been reached, and an
// exchange completes with its last transfer. The schedule must have passed `check`.
Timeline simulate(const Schedule& schedule, const Durations& durations);

// The most that is live at once on a stage: chunks' activations of one micro-batch, weighed with
// bytes[chunk], or counted when `bytes` is empty.
int64_t peak_live(const Schedule& schedule, int stage, const std::vector<int64_t>& bytes = {});

// ---- theory: the table above

// How long each stage idles if sends are free. Exact for gpipe and 1f1b; for zb with m >= p or F =
// B = W; for interleaved while a backward takes at most two forwards.
double theoretical_idle(const Schedule& schedule, const Times& times = {});
// that as a share of the time
double theoretical_bubble(const Schedule& schedule, const Times& times = {});
// in chunks' activations: V a micro-batch
int64_t theoretical_live(const Schedule& schedule, int stage);
