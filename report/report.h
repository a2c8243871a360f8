// report.h: what a run says before it trains; and at its end what each rank held and sent, beside
// what theory says.
#pragma once
#include "launch/options.h"
#include "support/data.h"
#include "support/metrics.h"

void print_setup(const Options& options, const Dataset& data);

// Collective. Rank 0 prints the tables; the same numbers, of all ranks, become the metrics' summary
// line. time: of a step of this rank.
void compare_with_theory(const Mesh& mesh, const Trainer& trainer, int64_t steps, StepTime time,
                         JsonLines& metrics);
