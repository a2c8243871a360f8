// theory.h: what the textbook says a layout sends and holds, from configuration and mesh alone;
// never from the buffers. So no strategy may send what depends on the data.
// idea      the program prints these numbers beside the ones it measured, and a test fails if they
//           differ by a byte. Each strategy has a file here (fsdp.cpp, tensor_parallel.cpp,
//           pipeline.cpp, context_parallel.cpp), which counts over the parts of the model that the
//           rank has.
// symbols   P elements of a padded unit; n ranks on the axis that a file is about; m micro-batches
//           a step of B sequences; R = B T rows, S of them on a rank
// test      tests/test_fsdp.cpp, tests/test_tensor_parallel.cpp, tests/test_pipeline.cpp,
//           tests/test_context_parallel.cpp, tests/test_generator.cpp
#pragma once
#include "theory/simulate.h"
#include "trainer.h"

struct Theory {
  Ledger step;  // what the rank sends in one training step
  // bytes that it holds between steps: parameters, gradients, optimizer
  std::array<int64_t, kMemoryCategories> persistent{};
  // bytes of units' whole buffers in use at any time, at most
  int64_t gather_bound = 0;
  // bytes kept for backwards at once: of one micro-batch, or of a pipeline's live ones; and what a
  // block that runs again keeps besides, until its backward has run
  int64_t activations = 0, recomputed = 0;
};
// Of a rank of the job.
Theory theory(const GptConfig& config, const Layout& layout, int rank,
              const TrainerOptions& options);
// What the rank at this place of the pp axis sends while a Generator decodes `steps` tokens of
// every sequence and shares what was picked.
int64_t decoding_bytes(const GptConfig& config, const Layout& layout, int pp_rank,
                       int64_t sequences, int64_t steps);

// The parameters of a model that may have fewer heads of keys and values than of queries, for
// counting: Gpt runs none.
struct SizedGpt : Gpt {
  explicit SizedGpt(const GptConfig& config, const Axis& tp = {}, const Axis& cp = {});
};

// ---- for the strategies' files

// A rank: its place in the job, its parts of the model, and the theory so far.
struct TheoryOfRank {
  void add_fsdp();
  void add_context_parallel();
  void add_tensor_parallel();
  void add_pipeline();
  void add_activations();
  void enter(const Axis& axis, Collective collective, Traffic purpose, int64_t calls,
             int64_t bytes);
  Kept kept(const ModelPart& part) const;  // of a micro-batch, where nothing is recomputed
  Kept kept_of(ModelPiece piece) const;
  int64_t recomputed() const;  // what a block that runs again keeps besides
  int64_t blocks() const;

  GptConfig config;
  TrainerOptions options;
  Mesh mesh;  // sizes only: nothing is opened
  Schedule schedule;
  const Axis &pp = mesh["pp"], &shards = mesh.shards, &cp = mesh["cp"], &tp = mesh["tp"];
  SizedGpt gpt{config, tp, cp};  // nor allocated
  std::vector<ModelPiece> pieces = pieces_of(gpt, schedule, pp.rank);
  bool shards_gradients = shards.size > 1 && options.fsdp.zero >= 2,
       shards_parameters = shards.size > 1 && options.fsdp.zero == 3,
       by_rows = config.sequence_parallel && tp.size > 1;
  // bytes of an element: of what computes; of gradients, master weights and moments
  int64_t e = size_of(config.dtype), g = size_of(master_dtype(config.dtype));
  int64_t m = schedule.microbatches, B = options.microbatch,
          R = B * gpt.cp.part(config.context).rows(), S = by_rows ? ceil_div(R, tp.size) : R;
  // channels, and of a head; of this rank: of the MLP, of the vocabulary; heads of keys, of queries
  int64_t C = config.width, D = C / config.heads, F = gpt.tp.part(config.hidden()).size(),
          V = gpt.tp.padded_part(config.vocab), kv = gpt.tp.part(config.kv()).size(),
          heads = kv * (config.heads / config.kv());
  // bytes of an activation of width C on this rank, and of all rows of it (tp.size slices)
  int64_t activation = S * C * e, whole = by_rows ? tp.size * activation : activation;

  Theory sum = {};
};

// Matrices of a part that are split over the tp axis: by the inputs of their product, whose results
// are then partial sums; by its outputs, whose input gradients are.
struct SplitMatrices {
  int64_t by_inputs = 0, by_outputs = 0;
};
SplitMatrices split_matrices(const ModelPart& part);
