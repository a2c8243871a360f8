// training_data.h: the tokenizer and the tokens that a training reads.
//
// idea      Every rank first looks for its files by itself, before there is a mesh. Texts for byte
//           pairs are encoded by one rank; when all have met, the others find what it has written.
//           To find it, every rank reads each text once at every start, for its checksum.
// test      tests/test_formats.sh
#pragma once
#include <optional>

#include "inference/tokenizer.h"
#include "launch/job.h"
#include "launch/options.h"
#include "support/data.h"

class TrainingData {
 public:
  // ---- on every rank, without a word to the others
  // Beside the checkpoints or where --tokenizer says. Before options are resolved: a vocabulary
  // that nothing else tells is the tokenizer's.
  void find_tokenizer(Options& options);
  void open(Options& options, const Job& job);
  // ---- collective
  void meet(Options& options, const Job& job);

  std::optional<Tokenizer> tokenizer;
  std::optional<Dataset> tokens;

 private:
  void read(Options& options, const Job& job);
  std::string directory_;  // of the tokenizer; empty: bytes are tokens
};
