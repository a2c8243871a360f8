// theory/fsdp.cpp: what data parallelism sends and holds: the table of fsdp.cpp for real units.
#include "theory/theory.h"

void TheoryOfRank::add_fsdp() {
  const bool reshards = shards_parameters && options.fsdp.reshard;
  int64_t& gradients = sum.persistent[int(Memory::gradients)];
  std::map<int, int64_t> gathers;  // of each unit in a micro-batch, where it is resharded
  for (const ModelPiece& piece : pieces)
    for (const ModelPart& part : piece)
      for (const auto& [unit, params] : units_of(part.params))
        gathers[unit] += part.backward_reads == BackwardReads::values ? 2 : 1;
  // tied: each of its two uses has a gradient of its own
  if (has_embedding(pieces[0]) && has_head(pieces.back()) && !shards_gradients)
    gradients += elements(gpt.tied().local_shape()) * g;

  int64_t ends = 0, block = 0;  // elements of the units of embedding and head; of a block's
  for (const auto& [unit, params] : units_of(params_of(pieces))) {
    const int64_t P = padded_unit(params, shards.size), shard = P / shards.size;
    enter(shards, Collective::all_gather, Traffic::training, reshards ? gathers[unit] * m : 1,
          P * e);
    enter(shards, Collective::reduce_scatter, Traffic::training, shards_gradients ? m : 1, P * g);
    for (const Axis& copies : mesh.axes_where(&AxisKind::copies_model))
      enter(copies, Collective::all_reduce, Traffic::training, 1, shard * g);
    sum.persistent[int(Memory::parameters)] += (shards_parameters ? shard : P) * e;
    gradients += (shards_gradients ? shard : P) * g;
    // two moments and, where another dtype computes, master weights
    sum.persistent[int(Memory::optimizer)] += (e == g ? 2 : 3) * shard * g;
    if (unit < kFirstBlock) ends += P;
    else block = P;
  }

  // For a while whole: gradients of both ends, of a block and, unless prefetch is 0, of the one
  // before, whose sum runs on, or of all where weight gradients are put off; parameters of both
  // ends, of a block and those that are gathered ahead.
  const int64_t summed = options.fsdp.prefetch > 0 ? 2 : 1,
                of_blocks = schedule.row->splits_backward ? std::max(blocks(), summed) : summed;
  if (shards_gradients) sum.gather_bound += (ends + of_blocks * block) * g;
  const int64_t ahead = 1 + options.fsdp.prefetch,
                gathered = reshards ? std::min(blocks(), ahead) : blocks();
  if (shards_parameters) sum.gather_bound += (ends + gathered * block) * e;
}
