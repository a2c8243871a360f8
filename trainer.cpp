// trainer.cpp: see trainer.h.
#include "trainer.h"

#include <algorithm>

// ---- composition

Trainer::Trainer(Mesh& mesh, const GptConfig& config, const TrainerOptions& options)
    : gpt(config, mesh.tp, mesh.stream), fsdp(std::make_unique<Fsdp>(mesh, config.dtype, options.fsdp, options.seed)), mesh_(mesh), options_(options) {
  const int64_t all = options.microbatch * data_ranks();
  REQUIRE(options.batch % all == 0, "--batch ", options.batch, " does not divide by the ", options.microbatch, " sequences of a micro-batch on ",
          data_ranks(), " data-parallel ranks (", all, ")");
  // Units: wte alone, the rest of the root, then each block. Uses: embedding, blocks, head.
  const int wte = fsdp->add_unit({&gpt.wte});
  const int root = fsdp->add_unit({&gpt.wpe, &gpt.ln_f_weight, &gpt.ln_f_bias});
  fsdp->add_use({wte, root}, Backward::nothing);
  for (Block& b : gpt.blocks) fsdp->add_use({fsdp->add_unit(b.params())}, Backward::gathers);
  head_use_ = fsdp->add_use({wte, root}, Backward::keeps);
  fsdp->complete_gradients = [this](const std::vector<Param*>& params) { gpt.tp.sum_partial_gradients(params); };
  optimizer_ = std::make_unique<Optimizer>(fsdp->optimizer_shards(), int64_t(gpt.params().size()), options.clip, options.weight_decay);
  total_ = Tensor({1}, Dtype::f64, Memory::workspace);
}

Var Trainer::forward(Tape& tape, const Tokens& tokens) {
  Var x = fsdp->run(tape, 0, [&] { return gpt.embed(tape, tokens); });
  for (int64_t l = 0; l < gpt.config.layers; l++) x = fsdp->run(tape, int(1 + l), [&] { return gpt.block(tape, l, x, tokens.B, tokens.T); });
  return x;
}

void Trainer::forward_loss(Tape& tape, const Tokens& tokens, double scale) {
  const Var x = forward(tape, tokens);
  fsdp->run(tape, head_use_, [&] {
    gpt.tp.cross_entropy(tape, gpt.logits(tape, x, tokens.B * tokens.T), tokens.targets, scale, total_);
    return Var{};
  });
}

// `count` sequences from `first` on, as inputs and, one token further, targets.
Tokens Trainer::read(int64_t first, int64_t count, const Sequences& sequence) const {
  std::vector<int> inputs, targets;
  int64_t T = 0;
  for (int64_t s = first; s < first + count; s++) {
    const std::vector<int> tokens = sequence(s);
    T = int64_t(tokens.size()) - 1;
    inputs.insert(inputs.end(), tokens.begin(), tokens.end() - 1);
    targets.insert(targets.end(), tokens.begin() + 1, tokens.end());
  }
  return Tokens(count, T, std::move(inputs), std::move(targets), gpt.tp.part(gpt.config.vocab));
}

// ---- a step

void Trainer::gradients(const Sequences& batch) {
  const int64_t b = options_.microbatch, microbatches = options_.batch / (b * data_ranks());
  fill(total_, 0);
  fsdp->begin_step(int(microbatches));
  for (int64_t i = 0; i < microbatches; i++) {
    Tape tape;
    const Tokens tokens = read((i * data_ranks() + data_rank()) * b, b, batch);
    forward_loss(tape, tokens, 1.0 / double(options_.batch * tokens.T));
    kept_activations_ = device().memory.now[int(Memory::activations)];
    tape.backward();
  }
  fsdp->finish_backward();
  fsdp->sum_loss(total_);
}

void Trainer::update(double lr) {
  optimizer_->step(lr, [this](const Tensor& squares) {
    fsdp->sum_squares(squares);
    gpt.tp.sum_squares(squares);
  });
  fsdp->end_step();
}

// ---- forward only

double Trainer::evaluate(int64_t sequences, const Sequences& held_out) {
  const Purpose purpose(Traffic::evaluation);
  fill(total_, 0);
  // Whole rounds first; then one sequence a rank, ranks that have none left repeating one at weight 0: all ranks run the same collectives.
  const int64_t round = options_.microbatch * data_ranks();
  int64_t done = 0;
  const auto add = [&](int64_t first, int64_t count, bool counts) {
    Tape tape(false);
    const Tokens tokens = read(first, count, held_out);
    forward_loss(tape, tokens, counts ? 1.0 / double(sequences * tokens.T) : 0.0);
  };
  for (; done + round <= sequences; done += round) add(done + data_rank() * options_.microbatch, options_.microbatch, true);
  for (; done < sequences; done += data_ranks()) {
    const int64_t mine = done + data_rank();
    add(std::min(mine, sequences - 1), 1, mine < sequences);
  }
  fsdp->sum_loss(total_);
  fsdp->end_step();
  return loss();
}

std::vector<double> Trainer::next_logits(const std::vector<int>& tokens) {
  const Purpose purpose(Traffic::evaluation);
  const int64_t n = int64_t(tokens.size());
  Tape tape(false);
  const Var x = forward(tape, Tokens(1, n, tokens, tokens, gpt.tp.part(gpt.config.vocab)));
  const Var last{gpt.tp.one_row(x.value, n, n - 1)};
  const Var logits = fsdp->run(tape, head_use_, [&] { return gpt.logits(tape, last, 1); });
  return download(gpt.tp.whole_logits(logits.value, gpt.config.vocab));
}
