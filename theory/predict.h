// predict.h: how long a training step takes on a cluster, and where the time goes.
//
// idea      One rank of each kind of stage is issued as the code issues it: products and kernels on
//           the compute stream, collectives of all axes on the communication stream (timeline.h).
//           From the first, a middle and the last micro-batch come the times of a stage's
//           computations, waiting included, and the schedule makes the step of them. Bytes, units
//           and what is kept come from theory/; nothing of it is counted again here.
// work      A product takes what its machine reaches (machine.h). Everything else is bound by
//           memory: a profile says how often software reads or writes each kind of activation.
// not here  an exchange of a pipeline that stands in the queue behind a sum, or behind a gather but
//           for those of a step's beginning; a step's sums of losses and squares; stragglers; the
//           host
// test      tests/test_plan.cpp: held against published tables
#pragma once
#include <numeric>
#include <valarray>

#include "theory/machine.h"
#include "theory/theory.h"

// the sum of all
template <class Numbers> auto total(const Numbers& numbers) {
  return std::reduce(numbers.begin(), numbers.end());
}

struct TrainingJob : GptConfig, TrainerOptions {
  Layout layout;
};
// How many parts of each ModelPart::Kind a chunk of a stage has.
using ChunkKind = std::array<int64_t, 3>;
ChunkKind kind_of(ModelPiece piece);
// Of a stage: the last has the largest part of everything but the sequence; along cp it is the one
// with the largest part of that.
int64_t fullest_rank(const TrainingJob& job);
// Of the fullest rank of a stage that has this chunk alone, of a model of as many blocks: all of a
// model's blocks are alike.
struct TheoryOfChunk : TheoryOfRank {
  TheoryOfChunk(const TrainingJob& job, const ChunkKind& chunk);
};
// Of a step. What an axis is waited for is what the step gains where its collectives take no time,
// those of the first of kAxes first (pp's with the gathers over tp after them); the other parts
// are of what is left. So all parts together are the step.
struct Prediction {
  double seconds = 0, computing = 0, bubble = 0, optimizer = 0;
  std::array<double, kAxes.size()> waiting{};
};
// Schedules are kept: the next prediction with as many stages and micro-batches is faster.
class Predictor {
 public:
  Predictor(const Cluster& cluster, const ModelSize& model)
      : cluster(cluster), gpt(GptConfig{model}) {}
  Prediction predict(const TrainingJob& job);
  // The same without `waiting`, where what is sent over so many of the first of kAxes takes no
  // time. Where it takes as long as the limit for certain, its pipeline is not run: a bound.
  Prediction step(const TrainingJob& job, double limit = INFINITY, size_t free_axes = 0);

  const Cluster cluster;
  const Gpt gpt;  // its pieces

 private:
  // by their to_string; with their tasks, which are in the order of the actions, of any durations
  std::map<std::string, std::pair<Schedule, std::vector<Task>>> pipelines_;
};

// How long one more token of each of `sequences` takes that have `length` tokens in the cache:
// weights and cache are read once (weights multiply meanwhile, which of many sequences takes
// longer), each sum over tp waits, and the stages come one after the other.
struct DecodePrediction {
  std::valarray<double> seconds;  // of weights, cache, kernels, sums, stages
  double memory;                  // bytes of the fullest stage's rank, when the cache is full
};
DecodePrediction predict_decoding(const Cluster& cluster, const GptConfig& config,
                                  const Layout& layout, int64_t sequences, int64_t length);
