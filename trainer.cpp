// trainer.cpp: see trainer.h. The parts' forwards are in gpt.cpp; a backward is the tape, run from
// its end.
#include "trainer.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "kernels/op_times.h"

// ---- composition

Schedule outline_of(const TrainerOptions& o, const Layout& l) {
  const int64_t all = o.microbatch * l.data_ranks();
  ASSERT(o.batch % all == 0);
  const int pp = l["pp"];
  const ScheduleRow& row = schedule_row(pp > 1 ? o.schedule : "1f1b");
  return {&row, pp, int(o.batch / all), o.chunks ? o.chunks : row.chunks()};
}

Schedule schedule_of(const TrainerOptions& o, const Layout& l) {
  const Schedule s = outline_of(o, l);
  return make_schedule(s.row->name, s.stages, s.microbatches, s.chunks);
}

std::vector<ModelPiece> pieces_of(const Gpt& gpt, const Schedule& schedule, int stage) {
  const std::vector<ModelPiece> all = gpt.pieces(schedule.stages_of_positions());
  std::vector<ModelPiece> of_stage;
  for (int c = 0; c < schedule.chunks; c++) of_stage.push_back(all[schedule.position(stage, c)]);
  return of_stage;
}

Trainer::Trainer(const Mesh& mesh, const GptConfig& config, const TrainerOptions& o)
    : options(o),
      gpt(config, mesh["tp"], mesh["cp"]),
      fsdp(mesh.shards, mesh.axes_where(&AxisKind::copies_model), config.dtype, options.fsdp),
      pipeline(mesh["pp"], config.dtype, schedule_of(options, mesh.layout)),
      mesh_(mesh),
      pieces_(pieces_of(gpt, pipeline.schedule(), mesh["pp"].rank)) {
  fsdp.add_units(params_of(pieces_), options.seed, name_of_unit);
  for (int c = 0; c < int(pieces_.size()); c++)
    for (const ModelPart& part : pieces_[c])
      uses_[&part] = fsdp.add_use(part.params, part.backward_reads, c, name_of(part));
  // A stage after the first begins by waiting for an activation: it gathers meanwhile. At its end
  // the stage before waits for its last gradient, which sums would delay: they come after it. Where
  // the backward is split, sums follow the weight gradients, for which nobody waits. (Later chunks
  // of stage 0 gain nothing by this: fsdp.md.)
  fsdp.gathers_at_begin = mesh["pp"].rank > 0;
  fsdp.sums_at_end = mesh["pp"].rank > 0 && !pipeline.schedule().row->splits_backward;

  // Embedding and head are tied. Where one rank has both, each has a gradient of its own, which are
  // added once a step; or they share one, which lives for a micro-batch only (ZeRO-2 and 3). Where
  // two ranks have them, each has a copy of the parameter, they exchange their gradients, and the
  // copy with the embedding counts in the norm and is saved.
  const bool first = has_embedding(pieces_[0]), last = has_head(pieces_.back());
  if (first && last && !fsdp.shards_gradients()) separate_uses(gpt.tied());
  gpt.tied().counted = first;
  exchanges_tied_ = first != last;

  fsdp.complete_gradients = [this](const std::vector<Param*>& params) {
    for (Param* p : params) join_uses(*p);
    gpt.tp.sum_partial_gradients(params);
  };
  optimizer_ = std::make_unique<Optimizer>(fsdp.param_shards(), gpt.params().size(), options.clip,
                                           options.weight_decay,
                                           [this](const Tensor& squares) { sum_squares(squares); });
  results_ = Tensor({2}, Dtype::f64, Memory::workspace);
  total_ = results_.view(0, {1});
}

// ---- a step

Batch Trainer::read(const Sequences& batch) const {
  recorder.enter("next batch");
  OP("read a batch");
  Batch mine;
  const int64_t b = options.microbatch;
  for (int i = 0; i < pipeline.schedule().microbatches; i++)
    mine.push_back(read(first_sequence(i, b), b, gpt.config.context, batch));
  return mine;
}

void Trainer::gradients(const Batch& batch) {
  const int64_t b = options.microbatch, T = gpt.config.context;
  recorder.enter("begin");
  fill(total_, 0);
  fsdp.begin_step(pipeline.schedule().microbatches);
  pipeline.run(activation(b, T), [&](Tape& tape, int chunk, const Var& x, int microbatch) {
    return forward_loss(tape, chunk, x, batch[microbatch], 1.0 / (options.batch * T));
  });
  fsdp.finish_backward();
  if (exchanges_tied_) pipeline.sum_tied(fsdp.units().at(kTied).shard_grad);
  recorder.enter("loss");
  sum_loss();
}

Var Trainer::forward(Tape& tape, int chunk, Var x, const Tokens& tokens) {
  for (const ModelPart& part : pieces_[chunk])
    x = fsdp.run(tape, uses_.at(&part), [&] { return gpt.run(tape, part, x, tokens); });
  return x;
}

Var Trainer::forward_loss(Tape& tape, int chunk, const Var& x, const Tokens& tokens, double scale) {
  Var y = forward(tape, chunk, x, tokens);
  if (!has_head(pieces_[chunk])) return y;
  // too short to split: all ranks of cp have the whole loss
  if (!gpt.cp.splits(tokens.T)) scale /= mesh_["cp"].size;
  recorder.enter("forward", "loss");
  gpt.tp.cross_entropy(tape, std::move(y), tokens.targets, gpt.config.vocab, scale, total_);
  return {};
}

int64_t Trainer::first_sequence(int64_t i, int64_t count) const {
  int64_t turn = i;  // of all ranks' micro-batches
  for (const Axis& axis : mesh_.axes_where(&AxisKind::splits_batch))
    turn = turn * axis.size + axis.rank;
  return turn * count;
}

// This rank's pieces of `count` sequences of `length` tokens from `first` on, as inputs and, one
// token further, targets: what of these its stage has a use for.
Tokens Trainer::read(int64_t first, int64_t count, int64_t length,
                     const Sequences& sequence) const {
  const bool embeds = has_embedding(pieces_[0]), predicts = has_head(pieces_.back());
  const Positions positions = gpt.cp.part(length);
  std::vector<int> inputs, targets;
  // in one allocation: what does not fit is refused before it is read
  if (embeds) inputs.reserve(count * positions.rows());
  if (predicts) targets.reserve(count * positions.rows());
  for (int64_t s = first; s < first + count && (embeds || predicts); s++) {
    const std::vector<int> tokens = sequence(s);
    ASSERT(int64_t(tokens.size()) == length + 1);
    for (const int token : tokens)
      ASSERT(0 <= token && token < gpt.config.vocab, "there is no token ", token);
    for (const Range& piece : {positions.low, positions.high}) {
      const auto begin = tokens.begin() + piece.begin, end = tokens.begin() + piece.end;
      if (embeds) inputs.insert(inputs.end(), begin, end);
      if (predicts) targets.insert(targets.end(), begin + 1, end + 1);
    }
  }
  return Tokens(count, length, positions, std::move(inputs), std::move(targets),
                gpt.tp.part(gpt.config.vocab));
}

// In one call, after which all ranks have the same bits. A rank has its sequences', or its pieces',
// part of the loss, if its stage has the head; what tp ranks hold alike counts once.
void Trainer::sum_loss() {
  if (mesh_["tp"].rank) fill(total_, 0);
  sum_over({mesh_.world}, total_, Traffic::loss);
}

// Of the norm, in the same way. Copies count once.
void Trainer::sum_squares(const Tensor& squares) {
  for (const Axis& copies : mesh_.axes_where(&AxisKind::copies_model))
    if (copies.rank) fill(squares, 0);
  sum_over({mesh_.world}, squares, Traffic::norm);
}

void Trainer::update(double lr) {
  recorder.enter("optimizer");
  optimizer_->step(lr);
  fsdp.end_step();
}

Trainer::Results Trainer::results() const {
  recorder.enter("results");
  copy(results_.view(1, {1}), optimizer_->norm());
  const std::vector<double> both = download(results_);
  return {both[0], both[1]};
}

bool Trainer::can_go_on(const Batch& batch) {
  const auto rows = ledger.rows;
  const bool measured = std::exchange(pipeline.measures, false);
  gradients(batch);
  optimizer_->measure_norm();
  fsdp.end_step();
  ledger.rows = rows;
  pipeline.measures = measured;
  const auto [loss, norm] = results();
  return std::isfinite(loss) && std::isfinite(norm) && optimizer_->finite();
}

// ---- forward only

double Trainer::evaluate(int64_t sequences, const Sequences& held_out) {
  const Purpose purpose(Traffic::evaluation);
  const int64_t T = gpt.config.context, ranks = mesh_.layout.data_ranks();
  // Micro-batches of one size, of which there is a whole number. A rank that has none left repeats
  // the last one with weight 0: all ranks run the same collectives.
  int64_t count = std::min(options.microbatch, ceil_div(sequences, ranks));
  while (sequences % count) count--;
  fill(total_, 0);
  Batch batch;
  for (int64_t i = 0; i < ceil_div(sequences, count * ranks); i++)
    batch.push_back(
        read(std::min(first_sequence(i, count), sequences - count), count, T, held_out));
  pipeline.forward(
      activation(count, T), batch.size(), [&](Tape& tape, int chunk, const Var& x, int i) {
        const bool counts = first_sequence(i, count) < sequences;
        return forward_loss(tape, chunk, x, batch[i], counts ? 1.0 / (sequences * T) : 0);
      });
  sum_loss();
  fsdp.end_step();  // the next step gathers, as every step does, and the ledger counts it
  return download(total_)[0];
}

std::vector<double> Trainer::next_logits(const std::vector<int>& tokens) {
  const Purpose purpose(Traffic::evaluation);
  const int64_t n = tokens.size(), V = gpt.config.vocab;
  Tokens batch = read(0, 1, n, [&](int64_t) {
    std::vector<int> and_target = tokens;
    and_target.push_back(0);
    return and_target;
  });
  batch.last_rows = true;
  // without an end_step after it: for the next token the weights are the same
  Tensor next({1, V}, master_dtype(gpt.config.dtype), Memory::workspace);
  fill(next, 0);  // what a rank has that does not have the head
  pipeline.forward(activation(1, n), 1, [&](Tape& tape, int chunk, const Var& x, int) {
    const Var y = forward(tape, chunk, x, batch);
    if (!has_head(pieces_[chunk])) return y;
    if (gpt.cp.has_last(n)) next = y.value;
    return Var{};
  });
  sum_over({mesh_["cp"], mesh_["pp"]}, next, Traffic::evaluation);
  return download(next);
}
