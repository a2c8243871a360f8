// theory.h: what the textbook says a layout sends and holds, from configuration and mesh alone; never from the buffers.
// idea      the program prints these numbers beside the ones it measured, and a test fails if they differ by a byte
// symbols   P elements of a padded unit, e and g bytes of an element of the compute and the master dtype, n ranks on the fsdp axis, r on replicate,
//           t on tp; m micro-batches a step of b sequences, R = b T rows
// test      tests/test_fsdp.cpp, tests/test_tensor_parallel.cpp
#pragma once
#include "fsdp.h"
#include "gpt.h"

struct Theory {
  std::map<Ledger::Key, Ledger::Row> step;                // what one rank sends in one training step
  std::array<int64_t, kMemoryCategories> persistent{};    // bytes that one rank holds between steps: parameters, gradients, optimizer
  int64_t gather_bound = 0;                               // bytes of borrowed units at any time, at most
  int64_t activations = 0;                                // bytes kept for the backward when a micro-batch's forward is done
};
Theory theory(const GptConfig& config, const Layout& layout, int tp_rank, const FsdpOptions& options, int64_t b, int64_t m);
