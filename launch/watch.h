// watch.h: says which rank died, stopped or waits, and where, instead of hanging in silence.
//
// idea      each rank keeps a record (last collective, step, a heartbeat) in memory that the ranks
//           of its node share, so that the record of a stopped or killed rank can still be read. A
//           thread a rank looks at it: a rank that has made no progress (entered no collective,
//           begun no op or step, read no sequence, moved no bytes of a file) for `timeout` seconds
//           reports where everybody stands and ends the job. The thread also asks NCCL for errors
//           that no call returns. A child process of each node's first rank holds the other end
//           of a pipe from each rank and names the rank whose
//           end closed first without a goodbye. Whoever explains the end first, a rank that throws
//           included, silences the others of its node.
// patience  Time in which the watch itself did not run (the job was stopped, a machine slept) does
//           not count. A disk may take long in one call, so while all ranks are at a run's
//           files, a rank has ten times `timeout`, a minute at least, from the last byte that any
//           rank of its node moved; a rank whose process does not run is still found after
//           `timeout`.
// nodes     Records of other nodes cannot be read. Before a node reports, its first stuck rank asks
//           the ranks of all others, whose threads answer where they stand: who does not answer is
//           stopped, its node or cable is gone, or it has finished.
// cost      one thread that wakes ten times a second; a record is written at each ledger line
// test      tests/test_failures.sh, tests/test_network.sh
#pragma once
#include <mutex>
#include <span>
#include <thread>

#include "launch/job.h"

struct WatchRecord {
  std::atomic<int> rank, pid, stage;  // (of the pipeline)
  // on the node's monotonic clock: the watch thread ran; the rank got on
  std::atomic<int64_t> heartbeat_ms, progress_ms;
  // begun, -1 until the mesh is checked; entered so far
  std::atomic<int64_t> step, collectives;
  std::atomic<int> collective;  // the last one entered
  char axis[16];                // its axis
  // said goodbye: may exit, or idle without being reported
  std::atomic<bool> finished;
  std::atomic<bool> at_files;  // a checkpoint's, the data, a trace
  std::atomic<int> ended_by;   // a signal that nobody listened for; 0: none
  // the reading end of a pipe that nobody but this rank can write
  std::atomic<int> lifeline;
  // of the first rank's record: a rank of this node asks the other nodes; why the job ends has been
  // said here
  std::atomic<bool> asked, explained;
};

// A line for each rank of a node: where it stands, whether it runs (on the node's clock; `woke`:
// when the watch itself last came back), and whether it is behind others of its stage.
std::string standings(std::span<const WatchRecord> records, int64_t now, int64_t woke);

class Watch {
 public:
  // collective; hooks itself into the ledger and the job
  Watch(Job& job, int64_t timeout_seconds);
  ~Watch();
  // Asks its communicators for errors from now on; an empty one before close_mesh. The ranks of one
  // stage enter the same collectives: who is behind is told from how many.
  void observe(const Mesh& mesh);
  void step(int64_t step) {  // this rank begins a step; 0 when the mesh is checked
    mine_->step = step;
    progress();
  }
  void progress();  // this rank gets on, though it enters no collective
  // `work`, which every rank calls, reads or writes files
  template <class Work> void at_files(const Work& work) {
    mine_->at_files = true;
    work();
    barrier();   // nobody goes on to wait elsewhere for a rank that is still at it
    progress();  // before the flag falls: the thread would find the time of before the work
    mine_->at_files = false;
  }

 private:
  void look();
  bool is_stuck(int64_t now) const;
  void ask_nccl();
  std::string report() const;
  void answer();
  std::string ask_other_nodes();
  void start_child();
  const Job& job_;
  MPI_Comm asking_ = MPI_COMM_NULL;  // of all ranks, where there are several nodes
  int64_t timeout_ms_;
  std::span<WatchRecord> records_;  // one for each rank of this node
  WatchRecord* mine_ = nullptr;
  int64_t woke_ms_ = 0;  // this thread, after it had not run for a while
  int lifeline_[2];
  std::mutex mutex_;  // guards what is observed
  std::vector<Axis> observed_;
  std::atomic<bool> stop_ = false;
  std::thread thread_;
};
