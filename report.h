// report.h: the end of a run: what each rank held and sent, beside what theory says.
#pragma once
#include <string>

#include "comm.h"
#include "support/metrics.h"
#include "trainer.h"

// Collective. `trace`: where the pipeline's timeline goes, if not empty. The tables as text for rank 0's terminal; the same numbers, of all ranks, become the metrics' summary line.
std::string compare_with_theory(const Mesh& mesh, const Trainer& trainer, const TrainerOptions& options, int64_t steps, const std::string& trace,
                                Metrics& metrics);
