// report.h: the end of a run: what each rank held and sent, beside what theory says.
#pragma once
#include <string>

#include "comm.h"
#include "support/metrics.h"
#include "trainer.h"

// Collective. Rank 0 prints the tables; the same numbers, of all ranks, become the metrics' summary
// line. communication: the share of this rank's time in which it communicated. trace: where the
// pipelines' timelines go, if not empty.
void compare_with_theory(const Mesh& mesh, const Trainer& trainer, const TrainerOptions& options,
                         int64_t steps, double communication, const std::string& trace,
                         Metrics& metrics);
