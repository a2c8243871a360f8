// training.h: the checkpoints of a training: which one it goes on from, and what it saves.
// test      tests/test_checkpoint.sh
#pragma once
#include "checkpoint/checkpoint.h"
#include "launch/options.h"
#include "support/data.h"

// Before options are resolved: the sizes that --resume is not told are the checkpoint's, all of
// them or that of the vocabulary alone. So is the token that ends a text.
void take_sizes(Options& options);

// ---- collective

// How many steps the newest complete checkpoint had, now in the trainer. None if there is none; an
// imported one had 0.
std::optional<int64_t> resume_training(const Options& options, const Dataset& data, const Job& job,
                                       Trainer& trainer);
// says what was saved
std::string save_training(const Options& options, const Dataset& data, int64_t step, const Job& job,
                          const Mesh& mesh, Trainer& trainer);
