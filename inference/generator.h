// generator.h: the model one token at a time, with a cache of keys and values, over tensor parallel
// ranks and pipeline stages.
//
// idea      a prompt goes through the model at once (prefill) and leaves each layer's keys and
//           values in the cache; then every new token is a batch of one row a sequence (decode)
//           whose attention reads the cache. Both are the model's parts with another attention.
// tp        splits every matrix, so that each rank reads 1/n of the weights: what a token waits
//           for. That is what tensor parallelism is for here.
// pp        splits the layers: the model fits, but a token still passes through all stages, one
//           after the other
// cost      a token of one sequence reads all weights once and the cache once: bound by memory, not
//           by arithmetic. Cache: 2 C elements a layer and position (2 C/tp on each rank)
// not here  continuous batching, pages, speculation; FSDP: gathering all weights for each token
//           would cost more than computing it
// test      tests/test_generator.cpp
#pragma once
#include <map>

#include "pipeline.h"
#include "checkpoint/checkpoint.h"

class Generator {
 public:
  // `sequences` at once, each with room for `room` tokens, prompt included. Weights are
  // uninitialised until one of the two below.
  Generator(const Mesh& mesh, const GptConfig& config, int64_t sequences, int64_t room);
  void initialise(uint64_t seed) {
    for (Param* p : params()) p->initialise(p->own(p->value), seed, 0);
  }
  void load_weights(const Checkpoint& checkpoint) {
    for (Param* p : params()) load(checkpoint, *p, 0, Part::weights, p->own(p->value));
  }

  // (sequences,V) on the last stage, after prefill one row; empty on the others
  using Logits = std::vector<double>;
  // the sequence starts anew; after the last token of the prompt
  Logits prefill(int64_t sequence, const std::vector<int>& prompt);
  // one new token of each sequence
  Logits decode(const std::vector<int>& tokens);
  // What the last stage has picked, on every stage.
  std::vector<int> share(std::vector<int> picked);

  Gpt gpt;

 private:
  Logits forward(Tokens tokens, const Gpt::Attend& attend);
  std::vector<Param*> params() const { return params_of({piece_}); }  // of this stage

  const Mesh& mesh_;
  ModelPiece piece_;                  // this stage's parts
  Pipeline pipeline_;                 // carries activations between stages
  std::map<int64_t, Tensor> caches_;  // of this stage's layers: see append_to_cache
  std::vector<int> lengths_;          // tokens of each sequence in the cache
  int64_t sequences_, room_, heads_;  // heads: of this rank
};
