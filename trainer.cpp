// trainer.cpp: see trainer.h.
#include "trainer.h"

#include <algorithm>

// ---- composition

Trainer::Trainer(Mesh& mesh, const GptConfig& config, const TrainerOptions& options)
    : gpt(config, mesh.tp, mesh.stream), fsdp(std::make_unique<Fsdp>(mesh, config.dtype, options.fsdp, options.seed)), mesh_(mesh), options_(options) {
  const int64_t all = options.microbatch * data_ranks();
  ASSERT(options.batch % all == 0);
  if (mesh.pp.size > 1) {
    gpt.wte.tied = false;  // embedding and head are on different ranks: each has one use of it
    gpt.wte.counted = mesh.pp.rank == 0;
  }
  // One stage runs each micro-batch forward and backward, whatever the schedule.
  const std::string schedule = mesh.pp.size > 1 ? options.schedule : "1f1b";
  pipeline = std::make_unique<Pipeline>(mesh, make_schedule(schedule, mesh.pp.size, int(options.batch / all), options.chunks));
  const auto ranges = split_layers(config.layers, head_in_layers(config), pipeline->schedule().positions());
  for (int c = 0; c < options.chunks; c++) add_piece(c, ranges[pipeline->position(c)], pipeline->is_first(c), pipeline->is_last(c));
  fsdp->complete_gradients = [this](const std::vector<Param*>& params) { gpt.tp.sum_partial_gradients(params); };
  optimizer_ = std::make_unique<Optimizer>(fsdp->optimizer_shards(), int64_t(gpt.params().size()), options.clip, options.weight_decay);
  total_ = Tensor({1}, Dtype::f64, Memory::workspace);
}

// Units: wte alone, the rest of the root, then each block. Uses: embedding, blocks, head. A rank has those of its pieces.
void Trainer::add_piece(int chunk, Range layers, bool first, bool last) {
  Piece piece{layers, first, last};
  std::vector<int> root;
  if (first || last) {
    std::vector<Param*> rest;
    if (first) rest.push_back(&gpt.wpe);
    if (last) rest.insert(rest.end(), {&gpt.ln_f_weight, &gpt.ln_f_bias});
    tied_unit_ = fsdp->add_unit({&gpt.wte});
    root = {tied_unit_, fsdp->add_unit(rest)};
  }
  if (first) piece.embedding = fsdp->add_use(root, Backward::nothing, chunk);
  for (int64_t l = layers.begin; l < layers.end; l++) {
    const int use = fsdp->add_use({fsdp->add_unit(gpt.blocks[l].params())}, Backward::gathers, chunk);
    if (l == layers.begin) piece.blocks = use;
  }
  if (last) piece.head = fsdp->add_use(root, Backward::keeps, chunk);
  pieces_.push_back(piece);
}

Var Trainer::forward(Tape& tape, const Piece& piece, const Var& in, const Tokens& tokens) {
  Var x = in;
  if (piece.first) x = fsdp->run(tape, piece.embedding, [&] { return gpt.embed(tape, tokens); });
  for (int64_t l = piece.layers.begin; l < piece.layers.end; l++)
    x = fsdp->run(tape, piece.blocks + int(l - piece.layers.begin), [&] { return gpt.block(tape, l, x, tokens.B, tokens.T); });
  return x;
}

// What the next piece goes on with; after the last one nothing: the loss has been added up.
Var Trainer::forward_loss(Tape& tape, const Piece& piece, const Var& in, const Tokens& tokens, double scale) {
  const Var x = forward(tape, piece, in, tokens);
  if (!piece.last) return x;
  return fsdp->run(tape, piece.head, [&] {
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
  const int64_t b = options_.microbatch, T = gpt.config.context, microbatches = options_.batch / (b * data_ranks());
  const auto work = [&](Tape& tape, int chunk, const Var& in, int i) {
    const Tokens tokens = read((i * data_ranks() + data_rank()) * b, b, batch);
    return forward_loss(tape, pieces_[chunk], in, tokens, 1.0 / double(options_.batch * tokens.T));
  };
  fill(total_, 0);
  fsdp->begin_step(int(microbatches));
  pipeline->run(activation(b * T), gpt.config.dtype, work);
  fsdp->finish_backward();
  pipeline->sum_tied(fsdp->gradient_shard(tied_unit_));
  sum_loss();
}

void Trainer::sum_loss() { sum_over(mesh_, {&mesh_.fsdp, &mesh_.replicate, &mesh_.pp}, total_, Traffic::loss); }

void Trainer::update(double lr) {
  optimizer_->step(lr, [this](const Tensor& squares) { sum_over(mesh_, {&mesh_.fsdp, &mesh_.tp, &mesh_.pp}, squares, Traffic::norm); });
  fsdp->end_step();
}

// ---- forward only

double Trainer::evaluate(int64_t sequences, const Sequences& held_out) {
  const Purpose purpose(Traffic::evaluation);
  const int64_t T = gpt.config.context, b = options_.microbatch, round = b * data_ranks(), rounds = sequences / round;
  fill(total_, 0);
  // Whole rounds first; then one sequence a rank, ranks that have none left repeating one at weight 0: all ranks run the same collectives.
  const auto add = [&](int64_t first, int64_t count, int64_t times) {
    pipeline->forward(activation(count * T), gpt.config.dtype, int(times), [&](Tape& tape, int chunk, const Var& in, int i) {
      const int64_t mine = first + (i * data_ranks() + data_rank()) * count;
      const Tokens tokens = read(std::min(mine, sequences - count), count, held_out);
      return forward_loss(tape, pieces_[chunk], in, tokens, mine < sequences ? 1.0 / double(sequences * tokens.T) : 0.0);
    });
  };
  add(0, b, rounds);
  add(rounds * round, 1, (sequences - rounds * round + data_ranks() - 1) / data_ranks());
  sum_loss();
  fsdp->end_step();
  return loss();
}

std::vector<double> Trainer::next_logits(const std::vector<int>& tokens) {
  const Purpose purpose(Traffic::evaluation);
  const int64_t n = int64_t(tokens.size());
  Tensor next;
  pipeline->forward(activation(n), gpt.config.dtype, 1, [&](Tape& tape, int chunk, const Var& in, int) {
    const Piece& piece = pieces_[chunk];
    const Var x = forward(tape, piece, in, Tokens(1, n, tokens, tokens, gpt.tp.part(gpt.config.vocab)));
    if (!piece.last) return x;
    const Var last{gpt.tp.one_row(x.value, n, n - 1)};
    next = gpt.tp.whole_logits(fsdp->run(tape, piece.head, [&] { return gpt.logits(tape, last, 1); }).value, gpt.config.vocab);
    return Var{};
  });
  if (next.empty()) {  // another stage has them
    next = Tensor({1, gpt.config.vocab}, gpt.config.dtype, Memory::workspace);
    fill(next, 0);
  }
  sum_over(mesh_, {&mesh_.pp}, next, Traffic::evaluation);
  return download(next);
}
