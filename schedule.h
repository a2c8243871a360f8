// schedule.h: a pipeline schedule is data: what every stage does, in order. Others check, simulate
// (theory/simulate.h), draw and execute it.
//
// idea      The model is cut into p*v pieces, v chunks a stage; a piece's number is its position in
//           the model. A schedule is one row of a table (schedules()) and, for so many stages and
//           micro-batches, one list of actions for each stage, which pipeline.cpp executes.
// backward  One action, or two: the input gradient (what the previous stage waits for) now and the
//           weight gradient (what nobody waits for) later, where the stage would idle. Both run in
//           ascending micro-batch order on every chunk in all schedules, so that all of them add up
//           gradients in one order.
// sends     One rule places them. Run the computations with F = B = W = 1 (a whole backward takes
//           2) and a tiny transfer delay. A result that ends at time t is sent at tick floor(t);
//           results of one tick are sent in the order in which they ended. Two sends that face each
//           other in one tick are one exchange (one NCCL group); so an exchange has one transfer,
//           or two between the same two stages. Where times differ much, a finished
//           result may wait for an unfinished one before it: interleaved of 8 stages and 16
//           micro-batches with F, B, W = 1, 3, 3 takes 5 % longer than in the order of its own
//           times; gpipe, 1f1b and zb lose nothing where all stages take equally long.
// safety    All stages' lists are cut from one global order of events: the exchanges of a tick,
//           then the computations that start at it. The earliest unfinished event of that order
//           waits only for earlier ones, so it can always proceed: nothing deadlocks, not with one
//           communication stream a stage, not when every action blocks its stage. Collectives of
//           the other axes join ranks that run the same list, so they keep to that order, too.
//           Those that join stages (tied gradient, loss, norm) come after all lists.
//           `check` (theory/simulate.h) proves of a schedule that it cannot deadlock. The tests
//           and build/show_schedule call it; a training run does not.
//
// cost      p stages that take equally long, m micro-batches (interleaved: a multiple of p), v
//           chunks a stage, s this stage (0 first); times of a chunk, F = B = W = 1 and free sends.
//           A micro-batch is live on a chunk from its forward to the
//           end of its backward (split: of its weight gradient); counted in chunks of this stage:
//                        idle time    share of the time   live on stage s
//           gpipe        3(p-1)       (p-1) / (m+p-1)     m
//           1f1b         3(p-1)       (p-1) / (m+p-1)     min(p-s, m)
//           interleaved  3(p-1)       (p-1) / (vm+p-1)    min(2(p-s-1) + (v-1)p + 1, vm)
//           zb           p-1 (a)      (p-1) / (3m+p-1)    min(p, m)
//           zbv          p-1 (b)      (p-1) / (6m+p-1)    min(2m, m+1+s, 2p)
//           (a) for m >= p, else 2p-1-m     (b) for 2m >= 3p-1, else 2(2p-1-m); v is 2
//           For other F, B, W: (p-1)(F+B+W) where a backward is one action (interleaved: if F/2 <=
//           B+W <= 2F, since exchanges keep the order that they have for F = B = W); zb (p-1)
//           max(F, B, F+B-W) for m >= p (the paper's is the last of these); zbv (p-1) max(B,
//           2(B-W)) for m >= 2p, if B is the longest of the three and, for p > 2, at most F+W.
//           Otherwise there is no formula.
//           A send is one activation or gradient between two stages: S C elements, C the width and
//           S the rows that a rank holds (all R of a micro-batch; with sequence parallelism R/tp,
//           rounded up). For p > 1 there are 2 m in all at each of the pv - 1 cuts; zbv's middle
//           cut lies inside the last stage and sends nothing.
//
// sources   GPipe (Huang et al., 2019); 1F1B (Narayanan et al., "PipeDream", SOSP 2019; its
//           flushing form in "Memory-efficient pipeline-parallel DNN training", 2021); interleaved
//           (Narayanan et al., "Efficient large-scale language model training on GPU clusters using
//           Megatron-LM", SC 2021); zb is ZB-H1 (Qi et al., "Zero bubble pipeline parallelism",
//           2023) and zbv is ZB-V (the same, and "Pipeline parallelism with controllable memory",
//           2024), as a list for F = B = W, which they adapt to measured times
// not here  ZB-H2, uneven chunks a stage, schedules found by search
// test      tests/test_schedule.cpp; build/show_schedule draws any of them
#pragma once
#include <compare>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

// ---- the data

// What one position hands to the next, or back. Both stages list the same Transfer: one sends it,
// the other receives it. Where they are one stage it stays in memory, and is in no list.
struct Transfer {
  enum Payload { activation, gradient };
  Payload payload;  // activations travel to the next position, their gradients back
  int from, to;     // stages
  int microbatch;
  int chunk;  // of `from`: the one that computes it
  auto operator<=>(const Transfer&) const = default;
};

struct Action {
  enum Kind {
    forward,
    backward,         // both gradients at once
    input_gradient,   // or in two parts: what travels to the previous position,
    weight_gradient,  // and what is added to this chunk's parameters
    exchange,         // all of `transfers`, one or two, as one group on the communication stream
  };
  Kind kind;
  int microbatch = -1, chunk = -1;       // of a computation
  std::vector<Transfer> transfers = {};  // of an exchange
  auto operator<=>(const Action&) const = default;
};

// of one chunk; a whole backward takes both gradients' times
struct Times {
  double forward = 1, input_gradient = 1, weight_gradient = 1, send = 0;
  double all() const { return forward + input_gradient + weight_gradient; }
  bool operator==(const Times&) const = default;
};

// Where the model's positions are: position i is chunk i / p of its stage.
enum class Placement {
  line,  // one chunk a stage
  ring,  // any number of chunks: position i is on stage i mod p; p micro-batches at a time
  vee,   // two chunks: down the stages and up again; the last stage has both at the bottom
};

// How often, and which computations: F is a forward, G a whole backward, B an input gradient and W
// a weight gradient, each of the next micro-batch; a digit after it says of which chunk. 1f1b on
// stage 2 of 4: {{1, "F"}, {m, "F G"}}, so F of micro-batch 0, then F of 1 and G of 0, F of 2 and G
// of 1, ...; what comes after the last micro-batch is left out.
using Phases = std::vector<std::pair<int, const char*>>;

struct ScheduleRow;
struct Schedule {
  const ScheduleRow* row = nullptr;
  int stages = 1, microbatches = 1, chunks = 1;   // p, m, v
  std::vector<std::vector<Action>> actions = {};  // actions[s]: what stage s does, in order
  int positions() const { return stages * chunks; }
  // where a stage's chunk is in the model; position 0 holds the first layers
  int position(int stage, int chunk) const;
  int stage_of(int position) const;
  std::vector<int> stages_of_positions() const;
};

// A row of the table: what makes a schedule, for any number of stages and micro-batches. Nothing
// else asks which schedule it is; only defaults name one.
struct ScheduleRow {
  const char* name;
  Placement placement;
  bool splits_backward;
  Phases (*phases)(int p, int m, int v, int s);  // of a stage's computations
  // How long each stage idles if sends are free; NaN for times that no formula above holds for.
  double (*idle)(int p, int m, const Times& t);
  // the most pairs of micro-batch and chunk that are live at once on stage s
  int (*live)(int p, int m, int v, int s);

  // of a stage, where no number is asked for
  int chunks() const { return placement == Placement::line ? 1 : 2; }
  // The number of micro-batches must be a multiple of this.
  int divisor(int stages) const { return placement == Placement::ring ? stages : 1; }
};
const ScheduleRow& schedule_row(std::string_view name);  // or a sentence that lists the names
std::vector<std::string> schedule_names();

constexpr int64_t kMostForwards = 1'000'000;  // of a schedule, on all stages
// Refuses what a schedule does not allow with a sentence. chunks 0: as many as the row says.
Schedule make_schedule(const std::string& name, int stages, int microbatches, int chunks = 0);
// Its forwards alone, of any number of micro-batches: for evaluation and sampling.
Schedule forwards_of(const Schedule& schedule, int microbatches);

// What a stage computes, in order: its list without exchanges. Of the schedule it needs no actions.
std::vector<Action> computations(const Schedule& s, int stage);

// How a computation's input comes to its stage, and how its result leaves: activations from the
// position before and to the next one, gradients the other way round. Where that is on the same
// stage (the bottom of the V, or one stage alone) it is no exchange. Nothing at the ends of the
// model and for weight gradients.
std::optional<Transfer> input_of(const Schedule& s, int stage, const Action& computation);
std::optional<Transfer> output_of(const Schedule& s, int stage, const Action& computation);

// Calls f(stage, index, action) for each.
template <class F> void for_each_computation(const Schedule& s, const F& f) {
  for (int stage = 0; stage < s.stages; stage++)
    for (int i = 0; const Action& action : s.actions[stage]) {
      if (action.kind != Action::exchange) f(stage, i, action);
      i++;
    }
}

const char* name_of(Action::Kind kind);
inline const char* name_of(Transfer::Payload payload) {
  return payload == Transfer::activation ? "activation" : "gradient";
}
std::string to_string(const Transfer& transfer);  // "activation of micro-batch 3, ..."
std::string to_string(const Action& action);      // "forward of micro-batch 3, chunk 0"
std::string to_string(const Schedule& schedule);  // "1f1b, 4 stages, 8 micro-batches"
