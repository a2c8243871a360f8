// trainer.h: one training step, composed from the model, the strategies and the optimizer.
// train_gpt and the parity tests share it.
//
// idea      this rank has some parts of the model (Gpt::pieces): Fsdp holds their parameters, and
//           Pipeline runs them over the micro-batches. gradients(batch) does so, forward and
//           backward; update(lr) is the optimizer. Between the two the gradients can be looked at,
//           as the parity tests do, since Adam would hide a wrong scale.
// sums      the loss divides by the step's number of tokens once; everything after that is a sum
// host      It goes through a step without waiting for the device. So the next batch can be read,
//           sorted and on its way while this one is computed; results() is the one wait.
// batch     sequence s of the global batch goes to the data-parallel rank and micro-batch that the
//           layout says; which tokens it holds depends on (seed, step, s) alone. Along the cp axis
//           each rank has its pieces of it.
#pragma once
#include <memory>

#include "fsdp.h"
#include "gpt.h"
#include "pipeline.h"

struct TrainerOptions {
  int64_t batch = 8, microbatch = 8;  // sequences: a step of the whole job; one forward of one rank
  uint64_t seed = 1337;
  double clip = 1, weight_decay = 0.1;
  FsdpOptions fsdp;
  std::string schedule = "1f1b";  // of the pipeline, where pp > 1
  int chunks = 0;                 // of a stage; 0: as many as the schedule has
};
// What a layout does in a step. On one stage each micro-batch runs forward and backward, whatever
// the options' schedule.
Schedule schedule_of(const TrainerOptions& options, const Layout& layout);
Schedule outline_of(const TrainerOptions& options, const Layout& layout);  // without its actions
// What a stage holds of the model: a piece for each of its chunks.
std::vector<ModelPiece> pieces_of(const Gpt& gpt, const Schedule& schedule, int stage);

// Sequence s of a batch: context + 1 tokens, the last ones are only targets.
using Sequences = std::function<std::vector<int>(int64_t s)>;
// A rank's micro-batches of a step, on the device: inputs on the embedding's stage, targets on the
// head's, between the two neither.
using Batch = std::vector<Tokens>;

class Trainer {
 public:
  Trainer(const Mesh& mesh, const GptConfig& config, const TrainerOptions& options);
  Batch read(const Sequences& batch) const;
  void gradients(const Batch& batch);
  void update(double lr);
  // Whether weights and moments are finite numbers, and so are the loss and the gradients that they
  // give for a batch: a bad update does not show in the loss of its own step. Counts no traffic.
  bool can_go_on(const Batch& batch);
  struct Results {
    double loss, norm;
  };
  // Of the last gradients(): the loss over the whole batch, and the norm before clipping, which
  // update() measures. Waits for the device.
  Results results() const;
  Optimizer& optimizer() { return *optimizer_; }  // its shards are what this rank saves and resumes

  // mean loss, the same in every layout
  double evaluate(int64_t sequences, const Sequences& held_out);
  // (V) after the last token; every rank calls it
  std::vector<double> next_logits(const std::vector<int>& tokens);

  const TrainerOptions options;
  Gpt gpt;
  Fsdp fsdp;
  Pipeline pipeline;  // of one stage where pp is 1

 private:
  Var forward_loss(Tape& tape, int chunk, const Var& x, const Tokens& tokens, double scale);
  // what a chunk's parts make of x, the result of the part before: at the end of the model, logits
  Var forward(Tape& tape, int chunk, Var x, const Tokens& tokens);
  // of this rank's micro-batch i, of `count` sequences each
  int64_t first_sequence(int64_t i, int64_t count) const;
  Tokens read(int64_t first, int64_t count, int64_t length, const Sequences& sequence) const;
  void sum_loss();
  void sum_squares(const Tensor& squares);
  // of `count` sequences on this rank
  Shape activation(int64_t count, int64_t length) const {
    return {gpt.tp.rows_here(count * gpt.cp.part(length).rows()), gpt.config.width};
  }

  const Mesh& mesh_;
  std::vector<ModelPiece> pieces_;        // by chunk
  std::map<const ModelPart*, int> uses_;  // FSDP's number of each part
  bool exchanges_tied_ = false;           // the token embedding is on another rank, too
  std::unique_ptr<Optimizer> optimizer_;
  Tensor results_;  // (2) f64: loss and norm
  Tensor total_;    // (1): its first, the loss
};
