// theory.cpp: see theory.h.
#include "theory/theory.h"

#include "theory/simulate.h"

Theory theory(const GptConfig& config, const Layout& layout, int pp_rank, int tp_rank,
              const TrainerOptions& o) {
  Mesh mesh(layout);  // sizes only: nothing is opened
  mesh["tp"].rank = tp_rank;
  const Axis &fsdp = mesh["fsdp"], &tp = mesh["tp"], &pp = mesh["pp"];
  Gpt gpt(config, tp);  // nor allocated
  const int64_t n = fsdp.size, p = pp.size, t = tp.size;
  const int64_t e = int64_t(size_of(config.dtype)),
                g = int64_t(size_of(master_dtype(config.dtype)));
  const Schedule schedule = schedule_of(o, layout);
  const int64_t b = o.microbatch, m = schedule.microbatches, params = int64_t(gpt.params().size());
  const int zero = n == 1 ? 0 : o.fsdp.zero;

  // This rank's pieces of the model
  const auto ranges = split_layers(config.layers, head_in_layers(config), schedule.positions());
  const bool first = pp_rank == 0, last = pp_rank == p - 1;
  std::vector<Range> pieces;
  for (int c = 0; c < schedule.chunks; c++) pieces.push_back(ranges[schedule.position(pp_rank, c)]);
  int64_t L = 0;
  for (const Range& piece : pieces) L += piece.size();

  Theory theory;
  const auto enter = [&](const Axis& axis, Collective c, Traffic purpose, int64_t calls,
                         int64_t numerator) {
    if (axis.size == 1 || calls == 0) return;
    Ledger::Row& row = theory.step[{axis.name, c, purpose}];
    row.calls += calls, row.numerator += calls * numerator, row.n = axis.size;
  };

  // Data parallelism: units, gathered before and summed after they are used
  const int64_t scatters = zero >= 2 ? m : 1;
  const bool again = zero == 3 && o.fsdp.reshard;
  // uses: with its parameters, in a micro-batch
  const auto unit = [&](const std::vector<Param*>& of, int64_t uses) {
    const int64_t P = padded_unit(of, n);
    enter(fsdp, Collective::all_gather, Traffic::training, again ? uses * m : 1, (n - 1) * P * e);
    enter(fsdp, Collective::reduce_scatter, Traffic::training, scatters, (n - 1) * P * g);
    for (const Axis& copies : mesh.that(&AxisKind::splits_model, false))
      enter(copies, Collective::all_reduce, Traffic::training, 1,
            2 * (copies.size - 1) * P / n * g);
    theory.persistent[int(Memory::parameters)] += zero == 3 ? P / n * e : P * e;
    theory.persistent[int(Memory::gradients)] += zero >= 2 ? P / n * g : P * g;
    theory.persistent[int(Memory::optimizer)] += (e == g ? 2 : 3) * P / n * g;
    return P;
  };
  int64_t root = 0, block = 0;
  if (first || last) {
    std::vector<Param*> rest;
    if (first) rest.push_back(&gpt.wpe);
    if (last) rest.insert(rest.end(), {&gpt.ln_f_weight, &gpt.ln_f_bias});
    root = unit({&gpt.wte}, first && last ? 2 : 1) + unit(rest, first && last ? 2 : 1);
    enter(pp, Collective::send, Traffic::embedding, 1, p * (padded_unit({&gpt.wte}, n) / n) * g);
  }
  for (const Range& piece : pieces)
    for (int64_t l = piece.begin; l < piece.end; l++) block = unit(gpt.blocks[l].params(), 2);
  // the head's own buffer for the tied embedding
  if (zero < 2 && p == 1) theory.persistent[int(Memory::gradients)] += gpt.wte.numel() * g;
  // Embeddings and their gradients, 1 + K blocks, 2 block gradients (where weight gradients are put
  // off: all).
  if (zero >= 2)
    theory.gather_bound +=
        root * g + (schedule.row->splits_backward ? std::max<int64_t>(L, 2) : 2) * block * g;
  if (zero == 3)
    theory.gather_bound += root * e + (o.fsdp.reshard ? 1 + o.fsdp.prefetch : L) * block * e;

  // Tensor parallelism: W bytes of activations of full width; by rows they are padded to t ranks
  const int64_t C = config.width, T = config.context, R = b * T;
  const bool by_rows = config.sequence_parallel && t > 1;
  const int64_t S = by_rows ? (R + t - 1) / t : R, W = (by_rows ? S * t : R) * C * e,
                ends = first + last;
  const auto sums = [&](Traffic purpose, int64_t calls) {  // of partial results
    if (by_rows) enter(tp, Collective::reduce_scatter, purpose, calls, (t - 1) * W);
    else enter(tp, Collective::all_reduce, purpose, calls, 2 * (t - 1) * W);
  };
  const auto gathers_of_rows = [&](Traffic purpose, int64_t calls) {
    if (by_rows) enter(tp, Collective::all_gather, purpose, calls, (t - 1) * W);
  };
  sums(Traffic::training, 4 * L * m), gathers_of_rows(Traffic::training, 4 * L * m);
  sums(Traffic::embedding, ends * m), gathers_of_rows(Traffic::embedding, ends * m);
  if (config.recompute)
    sums(Traffic::recompute, 2 * L * m), gathers_of_rows(Traffic::recompute, 2 * L * m);
  gathers_of_rows(Traffic::again, (2 * L + last) * m);
  enter(tp, Collective::all_reduce, Traffic::loss, last * m, 2 * (t - 1) * R * g);  // maxima
  // sums of exponentials, target logits
  enter(tp, Collective::all_reduce, Traffic::loss, last * m, 2 * (t - 1) * 2 * R * g);
  // layernorms, biases after sums
  if (by_rows)
    enter(tp, Collective::all_reduce, Traffic::partial, scatters * (6 * L + 2 * last),
          2 * (t - 1) * C * g);

  // Pipeline parallelism: an activation to the next position, a gradient to the one before
  for (int c = 0; c < schedule.chunks; c++) {
    const int position = schedule.position(pp_rank, c);
    enter(pp, Collective::send, Traffic::training,
          m * ((position > 0) + (position + 1 < schedule.positions())), p * S * C * e);
  }

  // Norm and loss
  for (const Axis& axis : mesh.that(&AxisKind::splits_model))
    enter(axis, Collective::all_reduce, Traffic::norm, 1, 2 * (axis.size - 1) * params * 8);
  std::vector<Axis> of_loss = mesh.that(&AxisKind::splits_batch);
  of_loss.push_back(pp);
  for (const Axis& axis : of_loss)
    enter(axis, Collective::all_reduce, Traffic::loss, 1, 2 * (axis.size - 1) * 8);

  // Of a block: x, two layernorms and the sum by rows; qkv, attention's result, two of the hidden
  // width by columns; statistics of rows.
  const int64_t heads = gpt.tp.part(config.heads).size(), channels = heads * (C / config.heads),
                hidden = gpt.tp.part(4 * C).size();
  const int64_t attention =
      config.attention == AttentionKind::plain ? b * heads * T * T * e : b * heads * T * g;
  const int64_t kept = config.recompute ? S * C * e
                                        : 4 * S * C * e + 4 * S * g +
                                              R * (4 * channels + 2 * hidden) * e + attention;
  const int64_t head = 2 * S * C * e + 2 * S * g + R * gpt.tp.part(config.vocab).size() * e;
  std::vector<int64_t> bytes;  // by piece
  for (const Range& piece : pieces) bytes.push_back(piece.size() * kept);
  if (last) bytes.back() += head;
  theory.activations = peak_live(schedule, pp_rank, bytes);
  return theory;
}
