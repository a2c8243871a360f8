// simulate.h: whether a schedule can run, when each of its actions would, and what it keeps alive.
//
// idea      A schedule is only lists, so all of this is a walk over them that computes nothing.
// test      tests/test_schedule.cpp
#pragma once
#include "schedule.h"

// ---- the checker

// Empty, or a sentence that says what is wrong and where: every micro-batch once forward and once
// backward on each chunk, in an order that respects dependencies and sums gradients in ascending
// order; every transfer that this needs once, after what it sends and before what uses it; the
// receives of each pair of stages in the order of the sends; no deadlock, even when each action
// blocks its stage and a send waits for its receive. An executor that overlaps transfers with
// computation waits for less: it is safe, too.
std::string check(const Schedule& schedule);

// ---- the simulator

// [stage][action]; of an exchange: how long each of its transfers takes
using Durations = std::vector<std::vector<double>>;
Durations durations(const Schedule& schedule, const Times& times);

struct Span {
  double start, end;
};
using Spans = std::vector<std::vector<Span>>;  // [stage][action]; from 0
struct Timeline {
  Spans spans;
  std::vector<double> busy;  // [stage]: time spent computing
  double makespan = 0;       // when the last computation ends
  double bubble(int stage) const { return makespan > 0 ? 1 - busy[stage] / makespan : 0; }
  double bubble() const;  // idle share of all stages together
};

// The timeline of an executor with two queues a stage. Computations run in list order, each when
// the exchange that receives its input has completed. Exchanges run in list order, each when what
// it sends has been computed; a transfer starts when both its ends have been reached, and an
// exchange completes with its last transfer. The schedule must have passed `check`.
Timeline simulate(const Schedule& schedule, const Durations& durations);

// Bytes that one micro-batch keeps on a chunk: from its forward to its backward, and where that is
// split from its input gradient to its weight gradient.
struct Kept {
  int64_t forward = 1, input_gradient = 1;
  auto operator<=>(const Kept&) const = default;
};
// The most that is live at once on a stage, by chunk; without `kept` it is counted.
int64_t peak_live(const Schedule& schedule, int stage, std::vector<Kept> kept = {});

// The row's idle time as a share of the time.
double theoretical_bubble(const Schedule& schedule, const Times& times = {});
