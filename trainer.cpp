// trainer.cpp: see trainer.h.
#include "trainer.h"

#include <algorithm>

// ---- composition

Schedule schedule_of(const TrainerOptions& o, const Layout& l) {
  const int64_t all = o.microbatch * l.data_ranks();
  ASSERT(o.batch % all == 0);
  const int pp = int(l["pp"]);
  return make_schedule(pp > 1 ? o.schedule : "1f1b", pp, int(o.batch / all), o.chunks);
}

Trainer::Trainer(Mesh& mesh, const GptConfig& config, const TrainerOptions& options)
    : gpt(config, mesh["tp"], mesh.stream),
      fsdp(mesh["fsdp"], mesh.that(&AxisKind::splits_model, false), mesh.stream, config.dtype,
           options.fsdp, options.seed),
      pipeline(mesh, schedule_of(options, mesh.layout)),
      mesh_(mesh),
      options_(options) {
  if (mesh["pp"].size > 1) {
    gpt.wte.tied = false;  // embedding and head are on different ranks: each has one use of it
    gpt.wte.counted = mesh["pp"].rank == 0;
  }
  const auto ranges =
      split_layers(config.layers, head_in_layers(config), pipeline.schedule().positions());
  for (int c = 0; c < pipeline.schedule().chunks; c++) add_piece(c, ranges[pipeline.position(c)]);
  fsdp.complete_gradients = [this](const std::vector<Param*>& params) {
    gpt.tp.sum_partial_gradients(params);
  };
  optimizer_ = std::make_unique<Optimizer>(fsdp.optimizer_shards(), int64_t(gpt.params().size()),
                                           options.clip, options.weight_decay);
  total_ = Tensor({1}, Dtype::f64, Memory::workspace);
}

// Units: wte alone, the rest of the root, then each block. Uses: embedding, blocks, head. A rank
// has those of its pieces.
void Trainer::add_piece(int chunk, Range layers) {
  const bool first = pipeline.is_first(chunk), last = pipeline.is_last(chunk);
  Piece piece{layers};
  std::vector<int> root;
  if (first || last) {
    std::vector<Param*> rest;
    if (first) rest.push_back(&gpt.wpe);
    if (last) rest.insert(rest.end(), {&gpt.ln_f_weight, &gpt.ln_f_bias});
    tied_unit_ = fsdp.add_unit({&gpt.wte});
    root = {tied_unit_, fsdp.add_unit(rest)};
  }
  if (first) piece.uses.push_back(fsdp.add_use(root, Backward::nothing, chunk));
  for (int64_t l = layers.begin; l < layers.end; l++)
    piece.uses.push_back(
        fsdp.add_use({fsdp.add_unit(gpt.blocks[l].params())}, Backward::gathers, chunk));
  if (last) piece.uses.push_back(fsdp.add_use(root, Backward::keeps, chunk));
  pieces_.push_back(piece);
}

Var Trainer::forward(Tape& tape, int chunk, const Var& in, const Tokens& tokens) {
  const Range layers = pieces_[chunk].layers;
  auto use = pieces_[chunk].uses.begin();
  Var x = in;
  if (pipeline.is_first(chunk)) x = fsdp.run(tape, *use++, [&] { return gpt.embed(tape, tokens); });
  for (int64_t l = layers.begin; l < layers.end; l++)
    x = fsdp.run(tape, *use++, [&] { return gpt.block(tape, l, x, tokens.B, tokens.T); });
  return x;
}

// What the next piece goes on with; after the last one nothing: the loss has been added up.
Var Trainer::forward_loss(Tape& tape, int chunk, const Var& in, const Tokens& tokens,
                          double scale) {
  const Var x = forward(tape, chunk, in, tokens);
  if (!pipeline.is_last(chunk)) return x;
  return fsdp.run(tape, pieces_[chunk].uses.back(), [&] {
    gpt.tp.cross_entropy(tape, gpt.logits(tape, x, tokens.B * tokens.T), tokens.targets, scale,
                         total_);
    return Var{};
  });
}

int64_t Trainer::data_rank() const {
  int64_t rank = 0;
  for (const Axis& axis : mesh_.that(&AxisKind::splits_batch)) rank = rank * axis.size + axis.rank;
  return rank;
}

// `count` sequences from `first` on, as inputs and, one token further, targets.
Tokens Trainer::read(int64_t first, int64_t count, const Sequences& sequence) const {
  std::vector<int> inputs, targets;
  int64_t T = 0;
  for (int64_t s = first; s < first + count; s++) {
    const std::vector<int> tokens = sequence(s);
    T = int64_t(tokens.size()) - 1;
    if (s == first)  // at once: what does not fit is refused before it is read
      for (std::vector<int>* all : {&inputs, &targets}) all->reserve(size_t(count * T));
    inputs.insert(inputs.end(), tokens.begin(), tokens.end() - 1);
    targets.insert(targets.end(), tokens.begin() + 1, tokens.end());
  }
  return Tokens(count, T, std::move(inputs), std::move(targets), gpt.tp.part(gpt.config.vocab));
}

// ---- a step

void Trainer::gradients(const Sequences& batch) {
  const int64_t b = options_.microbatch, T = gpt.config.context;
  const auto work = [&](Tape& tape, int chunk, const Var& in, int i) {
    const Tokens tokens = read((i * data_ranks() + data_rank()) * b, b, batch);
    return forward_loss(tape, chunk, in, tokens, 1.0 / double(options_.batch * tokens.T));
  };
  fill(total_, 0);
  fsdp.begin_step(pipeline.schedule().microbatches);
  pipeline.run(activation(b * T), gpt.config.dtype, work);
  fsdp.finish_backward();
  pipeline.sum_tied(fsdp.gradient_shard(tied_unit_));
  sum_loss();
}

// Each data-parallel rank has its sequences' part of the loss, and only the last stage has any.
void Trainer::sum_loss() {
  std::vector<Axis> axes = mesh_.that(&AxisKind::splits_batch);
  axes.push_back(mesh_["pp"]);
  sum_over(axes, total_, Traffic::loss, mesh_.stream);
}

void Trainer::update(double lr) {
  optimizer_->step(lr, [this](const Tensor& squares) {
    sum_over(mesh_.that(&AxisKind::splits_model), squares, Traffic::norm, mesh_.stream);
  });
  fsdp.end_step();
}

// ---- forward only

double Trainer::evaluate(int64_t sequences, const Sequences& held_out) {
  const Purpose purpose(Traffic::evaluation);
  const int64_t T = gpt.config.context, b = options_.microbatch, round = b * data_ranks(),
                rounds = sequences / round;
  fill(total_, 0);
  // Whole rounds first; then one sequence a rank, ranks that have none left repeating one at weight
  // 0: all ranks run the same collectives.
  const auto add = [&](int64_t first, int64_t count, int64_t times) {
    pipeline.forward(activation(count * T), gpt.config.dtype, int(times),
                     [&](Tape& tape, int chunk, const Var& in, int i) {
                       const int64_t mine = first + (i * data_ranks() + data_rank()) * count;
                       const Tokens tokens =
                           read(std::min(mine, sequences - count), count, held_out);
                       return forward_loss(tape, chunk, in, tokens,
                                           mine < sequences ? 1.0 / double(sequences * tokens.T)
                                                            : 0.0);
                     });
  };
  add(0, b, rounds);
  add(rounds * round, 1, (sequences - rounds * round + data_ranks() - 1) / data_ranks());
  sum_loss();
  fsdp.end_step();
  return loss();
}

std::vector<double> Trainer::next_logits(const std::vector<int>& tokens) {
  const Purpose purpose(Traffic::evaluation);
  const int64_t n = int64_t(tokens.size());
  Tensor next;
  pipeline.forward(
      activation(n), gpt.config.dtype, 1, [&](Tape& tape, int chunk, const Var& in, int) {
        const Var x =
            forward(tape, chunk, in, Tokens(1, n, tokens, tokens, gpt.tp.part(gpt.config.vocab)));
        if (!pipeline.is_last(chunk)) return x;
        const Var last{gpt.tp.one_row(x.value, n, n - 1)};
        next = gpt.tp.whole_logits(fsdp.run(tape, pieces_[chunk].uses.back(),
                                            [&] { return gpt.logits(tape, last, 1); })
                                       .value,
                                   gpt.config.vocab);
        return Var{};
      });
  if (next.empty()) {  // another stage has them
    next = Tensor({1, gpt.config.vocab}, gpt.config.dtype, Memory::workspace);
    fill(next, 0);
  }
  sum_over({mesh_["pp"]}, next, Traffic::evaluation, mesh_.stream);
  return download(next);
}
