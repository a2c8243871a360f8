// theory.cpp: see theory.h. A rank's place, and what it sums once a step.
#include "theory/theory.h"

Theory theory(const GptConfig& config, const Layout& layout, int rank,
              const TrainerOptions& options) {
  Mesh mesh(layout, rank);
  TheoryOfRank t{config, options, mesh, schedule_of(options, layout)};
  t.add_fsdp();
  t.add_context_parallel();
  t.add_tensor_parallel();
  t.add_pipeline();
  t.add_activations();
  const auto sum_in_f64 = [&](const std::vector<Axis>& axes, Traffic purpose, int64_t numbers) {
    for (const Axis& axis : axes) t.enter(axis, Collective::all_reduce, purpose, 1, numbers * 8);
  };
  // a square a parameter; the loss, of which ranks have their tokens' part, and one stage all
  sum_in_f64(mesh.that(&AxisKind::splits_model), Traffic::norm, int64_t(t.gpt.params().size()));
  sum_in_f64(mesh.that(&AxisKind::splits_batch), Traffic::loss, 1);
  sum_in_f64({t.cp, t.pp}, Traffic::loss, 1);
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
