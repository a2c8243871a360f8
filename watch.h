// watch.h: says which rank died, stopped or waits, and where, instead of hanging in silence.
//
// idea      each rank keeps a record (last collective, step, a heartbeat) in memory that the ranks of its node share, so that the record of a
//           stopped or killed rank can still be read. A thread a rank looks at it: a rank that has entered no collective and finished no
//           step for `timeout` seconds reports where everybody stands and ends the job. A child process of each node's first rank holds
//           the other end of a pipe from each rank and names the rank whose end closed first without a goodbye.
// cost      one thread that wakes ten times a second; a record is written at each ledger line
// not here  ranks of other nodes: each node reports its own
// test      tests/test_failures.sh
#pragma once
#include <atomic>
#include <memory>
#include <string>
#include <thread>

#include "comm.h"

struct WatchRecord {
  std::atomic<int> rank, pid;
  std::atomic<int64_t> heartbeat_ms, progress_ms;  // on the node's monotonic clock: the watch thread ran; the rank got on
  std::atomic<int64_t> step, collectives;          // entered so far
  std::atomic<int> collective;                     // the last one entered
  char axis[16];                                   // its axis
  std::atomic<bool> finished;                      // said goodbye: may exit, or idle without being reported
  std::atomic<int> lifeline;                       // the reading end of a pipe that nobody but this rank can write
};

class Watch {
 public:
  Watch(const Job& job, double timeout_seconds);  // collective; hooks itself into the ledger
  ~Watch();
  void step(int64_t step);  // this rank begins a step

 private:
  void look();
  std::string report() const;
  void start_child();
  const Job& job_;
  int64_t timeout_ms_;
  WatchRecord* records_ = nullptr;  // one for each rank of this node
  WatchRecord* mine_ = nullptr;
  int lifeline_[2];
  std::atomic<bool> stop_ = false;
  std::thread thread_;
};
