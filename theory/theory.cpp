// theory.cpp: see theory.h. A rank's place, and what it sums once a step.
#include "theory/theory.h"

Theory theory(const GptConfig& config, const Layout& layout, int pp_rank, int tp_rank,
              const TrainerOptions& options) {
  TheoryOfRank t{config,
                 options,
                 {"pp", layout.pp, pp_rank},
                 {"replicate", layout.replicate},
                 {"fsdp", layout.fsdp},
                 {"tp", layout.tp, tp_rank},
                 schedule_of(options, layout)};
  t.add_fsdp();
  t.add_tensor_parallel();
  t.add_pipeline();
  t.add_activations();
  for (const Axis& axis : {t.fsdp, t.tp, t.pp})  // a square a parameter, in f64
    t.enter(axis, Collective::all_reduce, Traffic::norm, 1, int64_t(t.gpt.params().size()) * 8);
  for (const Axis& axis : {t.fsdp, t.replicate, t.pp})
    t.enter(axis, Collective::all_reduce, Traffic::loss, 1, 8);
  return t.sum;
}

void TheoryOfRank::enter(const Axis& axis, Collective collective, Traffic purpose, int64_t calls,
                         int64_t bytes) {
  if (axis.size == 1 || calls == 0) return;
  // what a bandwidth-optimal algorithm sends, in n-ths of the buffer
  const int64_t n = axis.size, parts = collective == Collective::all_reduce ? 2 * (n - 1)
                                       : collective == Collective::send     ? n
                                                                            : n - 1;
  Ledger::Row& row = sum.step[{axis.name, collective, purpose}];
  row.calls += calls;
  row.numerator += calls * parts * bytes;
  row.n = axis.size;
}
