// timeline.h: when each piece of work of a job begins and ends, from how long it takes and what it
// waits for.
//
// idea      A rank has two queues, for computation and for communication, and each does its tasks
//           in the order in which they were issued. So what a task of one queue waits for is one
//           task of the other: the latest of those that it needs. A collective begins when the last
//           of its ranks has reached it, and lasts as long as its largest piece of work.
// steady    The makespan of a schedule grows by the same time with every micro-batch (in a ring:
//           with every p of them) once all stages are in their steady state. `extended_makespan`
//           runs small numbers of micro-batches and goes on from there.
// cost      O(tasks)
// test      tests/test_plan.cpp: equal to theory/simulate for pipelines
#pragma once
#include <algorithm>
#include <functional>

#include "support/recorder.h"
#include "theory/simulate.h"

using Queue = Recorder::Queue;  // compute, communication
struct Task {
  int rank = 0;
  Queue queue = Queue::compute;
  double duration = 0;
  int after = -1;       // a task of the rank's other queue; -1: waits for nothing
  int collective = -1;  // tasks of one number, on different ranks, are one collective; -1: none
};

// Of each task; that of a collective begins where its rank has come to it. An Error where tasks
// wait for each other.
std::vector<Span> run(const std::vector<Task>& tasks);
double makespan(const std::vector<Span>& spans);

// The same of one rank alone: its tasks wait for earlier ones, so each has its times at once.
class Issue {
 public:
  // Waits for all that was issued to the compute queue so far. Returns when it ends.
  double communicate(double duration) {
    return communicated_ = std::max(communicated_, computed_) + duration;
  }
  // Waits for a communication that ends then. Returns how long.
  double compute(double duration, double communicated) {
    const double begins = std::max(communicated, computed_), waited = begins - computed_;
    computed_ = begins + duration;
    return waited;
  }
  double computed() const { return computed_; }  // when the last computation ends

 private:
  double computed_ = 0, communicated_ = 0;
};

// The tasks of a schedule: first those of stage 0, in the order of its actions, then those of stage
// 1, ... Exchanges are on the communication queue.
std::vector<Task> tasks_of(const Schedule& schedule, const Durations& durations);

// From how many micro-batches on a schedule has a steady state, if its stages are alike.
int steady_microbatches(const ScheduleRow& row, int stages);
// The makespan of m micro-batches. of(m) runs as many; m grows in steps of `step`. Beyond `steady`
// micro-batches every step adds as much as the one before. Where two steps in a row do not, there
// is no steady state yet, and twice as many are run.
double extended_makespan(int m, int step, int steady, const std::function<double(int m)>& of);
