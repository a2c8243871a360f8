// theory.h: what the textbook says a layout sends and holds, from configuration and mesh alone;
// never from the buffers.
// idea      the program prints these numbers beside the ones it measured, and a test fails if they
//           differ by a byte
// symbols   P elements of a padded unit, e and g bytes of an element of the compute and the master
//           dtype, n ranks on the fsdp axis, t on tp, p on pp; m micro-batches a
//           step of b sequences, R = b T rows, S of them on a rank
// test      tests/test_fsdp.cpp, tests/test_tensor_parallel.cpp, tests/test_pipeline.cpp
#pragma once
#include "trainer.h"

struct Theory {
  // what the rank sends in one training step
  std::map<Ledger::Key, Ledger::Row> step;
  // bytes that it holds between steps: parameters, gradients, optimizer
  std::array<int64_t, kMemoryCategories> persistent{};
  // bytes of borrowed units at any time, at most
  int64_t gather_bound = 0;
  // bytes kept for backwards at once: of one micro-batch, or of a pipeline's live ones
  int64_t activations = 0;
};
// Of the rank at these places of the pp and the tp axis: ranks that differ in the others send and
// hold the same.
Theory theory(const GptConfig& config, const Layout& layout, int pp_rank, int tp_rank,
              const TrainerOptions& options);
