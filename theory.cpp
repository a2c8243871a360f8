// theory.cpp: see theory.h.
#include "theory.h"

Theory theory(const GptConfig& config, const Layout& layout, int tp_rank, const FsdpOptions& options, int64_t b, int64_t m) {
  Gpt gpt(config, {"tp", layout.tp, tp_rank});  // sizes only: nothing is allocated
  const int64_t n = layout.fsdp, r = layout.replicate, e = int64_t(size_of(config.dtype)), g = int64_t(size_of(master_dtype(config.dtype)));
  const int zero = n == 1 ? 0 : options.zero;
  std::vector<int64_t> units;  // P of: wte, the rest of the root, each block
  units.push_back(padded_unit({&gpt.wte}, layout.fsdp));
  units.push_back(padded_unit({&gpt.wpe, &gpt.ln_f_weight, &gpt.ln_f_bias}, layout.fsdp));
  for (Block& b : gpt.blocks) units.push_back(padded_unit(b.params(), layout.fsdp));

  Theory t;
  const auto enter = [&](const char* axis, int64_t ranks, Collective c, Traffic purpose, int64_t calls, int64_t numerator) {
    if (ranks == 1) return;
    Ledger::Row& row = t.step[{axis, c, purpose}];
    row.calls += calls, row.numerator += calls * numerator, row.n = int(ranks);
  };
  const int64_t gathers = zero == 3 && options.reshard ? 2 * m : 1, scatters = zero >= 2 ? m : 1;
  for (int64_t P : units) {
    enter("fsdp", n, Collective::all_gather, Traffic::training, gathers, (n - 1) * P * e);
    enter("fsdp", n, Collective::reduce_scatter, Traffic::training, scatters, (n - 1) * P * g);
    enter("replicate", r, Collective::all_reduce, Traffic::training, 1, 2 * (r - 1) * P / n * g);
    t.persistent[int(Memory::parameters)] += zero == 3 ? P / n * e : P * e;
    t.persistent[int(Memory::gradients)] += zero >= 2 ? P / n * g : P * g;
    t.persistent[int(Memory::optimizer)] += (e == g ? 2 : 3) * P / n * g;
  }
  if (zero < 2) t.persistent[int(Memory::gradients)] += gpt.wte.numel() * g;  // the head's own buffer for the tied embedding
  enter("fsdp", n, Collective::all_reduce, Traffic::norm, 1, 2 * (n - 1) * int64_t(gpt.params().size()) * 8);
  enter("fsdp", n, Collective::all_reduce, Traffic::loss, 1, 2 * (n - 1) * 8);
  enter("replicate", r, Collective::all_reduce, Traffic::loss, 1, 2 * (r - 1) * 8);

  // Embeddings and their gradients, 1 + K blocks, 2 block gradients.
  const int64_t root = units[0] + units[1], block = units[2];
  if (zero >= 2) t.gather_bound += root * g + 2 * block * g;
  if (zero == 3) t.gather_bound += root * e + (options.reshard ? 1 + options.prefetch : config.layers) * block * e;

  // Tensor parallelism: W bytes of activations of full width; by rows they are padded to p ranks.
  const int64_t p = layout.tp, L = config.layers, C = config.width, T = config.context, R = b * T;
  const bool by_rows = config.sequence_parallel && p > 1;
  const int64_t S = by_rows ? (R + p - 1) / p : R, W = (by_rows ? S * p : R) * C * e, replayed = config.recompute ? 2 * L * m : 0;
  const auto sums = [&](Traffic purpose, int64_t calls) {  // of partial results
    if (by_rows) enter("tp", p, Collective::reduce_scatter, purpose, calls, (p - 1) * W);
    else enter("tp", p, Collective::all_reduce, purpose, calls, 2 * (p - 1) * W);
  };
  const auto gathers_of_rows = [&](Traffic purpose, int64_t calls) {
    if (by_rows) enter("tp", p, Collective::all_gather, purpose, calls, (p - 1) * W);
  };
  sums(Traffic::training, 4 * L * m), gathers_of_rows(Traffic::training, 4 * L * m);
  sums(Traffic::embedding, 2 * m), gathers_of_rows(Traffic::embedding, 2 * m);
  if (replayed) sums(Traffic::recompute, replayed), gathers_of_rows(Traffic::recompute, replayed);
  gathers_of_rows(Traffic::again, (2 * L + 1) * m);
  enter("tp", p, Collective::all_reduce, Traffic::loss, m, 2 * (p - 1) * R * g);      // maxima
  enter("tp", p, Collective::all_reduce, Traffic::loss, m, 2 * (p - 1) * 2 * R * g);  // sums of exponentials, target logits
  enter("tp", p, Collective::all_reduce, Traffic::norm, 1, 2 * (p - 1) * int64_t(gpt.params().size()) * 8);
  if (by_rows) {
    enter("tp", p, Collective::all_reduce, Traffic::partial, scatters * (6 * L + 2), 2 * (p - 1) * C * g);  // layernorms, biases after sums
  }

  // Of a block: x, two layernorms and the sum by rows; qkv, attention's result, two of the hidden width by columns; statistics of rows.
  const int64_t heads = gpt.tp.part(config.heads).size(), channels = heads * (C / config.heads), hidden = gpt.tp.part(4 * C).size();
  const int64_t attention = config.attention == AttentionKind::plain ? b * heads * T * T * e : b * heads * T * g;
  const int64_t kept = config.recompute ? S * C * e : 4 * S * C * e + 4 * S * g + R * (4 * channels + 2 * hidden) * e + attention;
  t.activations = L * kept + 2 * S * C * e + 2 * S * g + R * gpt.tp.part(config.vocab).size() * e;
  return t;
}
