// trace.h: what every rank computed, sent and held in some steps, as a file in Chrome's trace
// format (Perfetto opens it): --trace. docs/tracing.md says what each row is.
//
// idea      support/recorder.h has a step's works in the order of issue, and kernels/op_times.h
//           their times. The first rank gathers those of all ranks, joins the ends of each
//           collective, and makes the file's events of them.
// matching  Ranks that share a communicator call it in one order. So the k-th collective of some
//           ranks on an axis is the same one on all of them.
// measured  On a GPU times are those of events, on each rank since the beginning of the trace. The
//           clocks are compared by a barrier and a broadcast, and what that leaves is mended: no
//           rank ends a collective before another one begins it, or a receive before its send.
//           Streams in queues (THREEFOLD_STREAMS) are measured, too.
// rebuilt   With no GPU ranks may share cores, and the clock shows the scheduler's doing. So a work
//           lasts as long as the processor time of the thread that issues it, which takes part in
//           all that its team does: that is what the clock would show if each thread had a core. A
//           collective lasts as long as on the rank on which it took least, the last one to come.
//           theory/timeline.h makes times of these durations and of the waits that were recorded.
//           What the host does between works takes no time there.
// cost      two events a work, and its record in memory until the end, some 100 KB a step; while it
//           is written, those of all ranks on each; steps that are not traced: a branch
// test      tests/test_trace.cpp
#pragma once
#include "support/metrics.h"
#include "theory/timeline.h"
#include "trainer.h"

class Trace {
 public:
  // Collective. The file is created where `path` is not empty; one that is there is put aside.
  Trace(const std::string& path, const Mesh& mesh, const Trainer& trainer,
        bool rebuilds = !device().is_gpu && !getenv("THREEFOLD_STREAMS"));
  void begin_step();  // collective
  void end_step();    // the host has waited for the step
  bool empty() const { return timed_ == 0; }
  // Collective, once. Returns what is wrong where the file cannot be written, else "".
  std::string write();

 private:
  JsonLines file_;
  const Mesh& mesh_;
  const Trainer& trainer_;
  const bool rebuilds_;
  Event origin_{true};  // of times, which get coarser with the distance: 1 us after 10 s
  double began_ = 0;    // origin_ by the first rank's clock
  size_t timed_ = 0;    // works
};
