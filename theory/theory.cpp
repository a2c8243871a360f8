// theory.cpp: see theory.h. A rank's place, and what it sums once a step.
#include "theory/theory.h"

Theory theory(const GptConfig& config, const Layout& layout, int rank,
              const TrainerOptions& options) {
  TheoryOfRank t{config, options, Mesh(layout, rank), outline_of(options, layout)};
  t.schedule.actions.resize(t.schedule.stages);  // of which its own are asked for
  t.schedule.actions[t.pp.rank] = computations(t.schedule, t.pp.rank);
  t.add_fsdp();
  t.add_context_parallel();
  t.add_tensor_parallel();
  t.add_pipeline();
  t.add_activations();
  // in f64, over all ranks: a sum of squares for each parameter, and the loss
  const auto sum = [&](Traffic purpose, int64_t numbers) {
    t.enter(t.mesh.world, Collective::all_reduce, purpose, 1, numbers * 8);
  };
  sum(Traffic::norm, t.gpt.params().size());
  sum(Traffic::loss, 1);
  return t.sum;
}

SizedGpt::SizedGpt(const GptConfig& g, const Axis& axis, const Axis& cp) : Gpt(g, axis, cp) {
  if (g.kv() == g.heads) return;
  const int64_t D = g.width / g.heads, queries = g.heads / g.kv() * D, group = queries + 2 * D;
  const auto split = [&](Param& p, Shape shape, int dim) {
    p.shape = std::move(shape);
    p = tp.split(p, dim, g.kv());
  };
  for (const ModelPart& block : parts().subspan(1, g.layers)) {
    ASSERT(block.params[2]->name.ends_with("attn.c_attn.weight") &&
           block.params[4]->name.ends_with("attn.c_proj.weight"));
    split(*block.params[2], {g.width, g.kv(), group}, 1);  // c_attn's weight and bias
    split(*block.params[3], {g.kv(), group}, 0);
    split(*block.params[4], {g.width, g.width}, 0);  // the projection
  }
}

int64_t TheoryOfRank::blocks() const {
  int64_t count = 0;
  for (const ModelPiece& piece : pieces)
    count += piece.size() - has_embedding(piece) - has_head(piece);
  return count;
}

void TheoryOfRank::enter(const Axis& axis, Collective collective, Traffic purpose, int64_t calls,
                         int64_t bytes) {
  if (axis.size == 1 || calls == 0) return;
  sum.step.purpose = purpose;
  sum.step.enter(axis, collective, bytes, calls);
}
