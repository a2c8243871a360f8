// timeline.h: when each piece of work of a job begins and ends, from how long it takes and what it
// waits for.
//
// idea      A rank has two queues, for computation and for communication, and each does its tasks
//           in the order in which they were issued. So what a task of one queue waits for is one
//           task of the other: the latest of those that it needs. What ranks do together begins
//           when the last of them has reached it.
// cost      O(tasks + p queues), where the longest chain of queues that wait for each other has p
// test      tests/test_plan.cpp
#pragma once
#include <algorithm>
#include <vector>

#include "support/recorder.h"

using Queue = Recorder::Queue;  // compute, communication
struct Task {
  int rank = 0;
  Queue queue = Queue::compute;
  double duration = 0;
  int after = -1;              // a task of the rank's other queue (or a later one of this one,
                               // which never begins); -1: waits for nothing
  std::vector<int> with = {};  // tasks that must be reached, too; it may be among them
};
struct Span {
  double start, end;
};

// Of each task; that of what ranks do together begins where its rank has come to it. Where tasks
// wait for each other there is an Error, or, if they may, what never begins or ends is infinite.
std::vector<Span> run(const std::vector<Task>& tasks, bool may_wait = false);

// The same of one rank alone: its tasks wait for earlier ones, so times are known when issued.
class Issue {
 public:
  // Waits for all that was issued to the compute queue so far. Returns when it ends.
  double communicate(double duration) {
    busy_ += duration;
    return communicated_ = std::max(communicated_, computed_) + duration;
  }
  void compute(double duration) {
    busy_ += duration;
    computed_ += duration;
  }
  // The next computation waits for a communication that ends then.
  void wait_for(double communicated) { computed_ = std::max(computed_, communicated); }
  double computed() const { return computed_; }  // when the last computation ends
  // how long both queues were busy at once: one of them always is
  double overlapped() const { return busy_ - std::max(computed_, communicated_); }

 private:
  double computed_ = 0, communicated_ = 0, busy_ = 0;
};
