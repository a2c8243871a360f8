// simulate.h: whether a schedule can run, when each of its actions would, and what it keeps alive.
//
// idea      A schedule is only lists, so all of this is a walk over them that computes nothing.
// steady    The makespan of a schedule grows by the same time with every micro-batch (in a ring:
//           with every p of them) once all stages are in their steady state. `extended_makespan`
//           runs small numbers of micro-batches and goes on from there.
// test      tests/test_schedule.cpp, tests/test_plan.cpp
#pragma once
#include <functional>

#include "schedule.h"
#include "theory/timeline.h"

// ---- the checker

// Empty, or a sentence that says what is wrong and where: every micro-batch once forward and once
// backward on each chunk, each kind in ascending order of micro-batches (so gradients are summed in
// it) and all in an order that respects dependencies; every transfer that this needs once, after
// what it sends and before what uses it; the receives of each pair of stages in the order of the
// sends; no deadlock, even when each action blocks its stage and a send waits for its receive. An
// executor that overlaps transfers with computation waits for less: it is safe, too.
std::string check(const Schedule& schedule);

// ---- the simulator

// [stage][action]; of an exchange: how long each of its transfers takes
using Durations = std::vector<std::vector<double>>;
Durations durations(const Schedule& schedule, const Times& times);

using Spans = std::vector<std::vector<Span>>;  // [stage][action]; from 0
struct Timeline {
  Spans spans;
  std::vector<double> busy;  // [stage]: time spent computing
  double makespan = 0;       // when the last computation ends
  double bubble(int stage) const { return makespan > 0 ? 1 - busy[stage] / makespan : 0; }
  double bubble() const;  // idle share of all stages together
};

// What an executor with two queues a stage does: the tasks of stage 0 in the order of its actions,
// then those of stage 1, ... Computations run in list order, each when the exchange that receives
// its input has completed. Exchanges run in list order, each when what it sends has been computed;
// a transfer starts when both its ends have been reached, and an exchange completes with its last
// transfer. With one queue each action blocks its stage. The schedule must have passed `check`, or
// all of it but that nothing deadlocks.
std::vector<Task> tasks_of(const Schedule& schedule, const Durations& durations,
                           bool one_queue = false);
Timeline simulate(const Schedule& schedule, const Durations& durations);

// The makespan of a schedule, of which no actions are needed. of(m) runs m micro-batches, a
// multiple of the row's divisor. From some number of them on every step of as many adds as much as
// the one before, if stages are alike. Where two steps in a row do not, there is no steady state
// yet, and twice as many are run.
double extended_makespan(const Schedule& outline, const std::function<double(int m)>& of);

// Bytes that one micro-batch keeps on a chunk: from its forward to its backward, and where that is
// split from its input gradient to its weight gradient.
struct Kept {
  int64_t forward = 1, input_gradient = 1;
};
// The most that is live at once on a stage, of chunks that keep so much; without `kept` pairs of
// micro-batch and chunk are counted.
int64_t peak_live(const Schedule& schedule, int stage, std::vector<Kept> kept = {});

// The row's idle time as a share of the time; NaN where it has no formula.
double theoretical_bubble(const Schedule& schedule, const Times& times = {});
