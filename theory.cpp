// theory.cpp: see theory.h.
#include "theory.h"

Theory theory(const GptConfig& config, const Layout& layout, const FsdpOptions& options, int64_t m) {
  Gpt gpt(config);  // sizes only: nothing is allocated
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
  return t;
}
