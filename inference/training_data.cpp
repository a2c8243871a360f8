// training_data.cpp: see training_data.h.
#include "inference/training_data.h"

#include "checkpoint/checkpoint.h"
#include "inference/text_shards.h"
#include "launch/environment.h"

void TrainingData::find_tokenizer(Options& o) {
  const std::string& given = o.tokenizer;
  REQUIRE(given.empty() || has_tokenizer(given), "--tokenizer: ", given,
          " has neither tokenizer.json nor vocab.json and merges.txt");
  // The checkpoints have it from an earlier --tokenizer, or from an import. It may also have been
  // put there by hand, or by a run that saved nothing: then another can be given.
  const bool kept =
      has_tokenizer(o.checkpoint) && (given.empty() || !checkpoints_in(o.checkpoint).empty());
  directory_ = kept ? o.checkpoint : given;
  if (directory_.empty()) return;
  if (!kept) o.end_of_text = -1;  // of numbers that have had no text until now
  tokenizer.emplace(directory_, o.model.vocab, false, o.end_of_text);
  REQUIRE(given.empty() || tokenizer->key() == Tokenizer(given, 0).key(), "--tokenizer ", given,
          " is not the one in ", o.checkpoint, ": leave it out");
  o.tokenizer_key = tokenizer->key();
  if (o.model.vocab == 0) o.model.vocab = tokenizer->size();
}

void TrainingData::open(Options& o, const Job& job) {
  if (directory_.empty() || job.rank == 0) read(o, job);
  if (directory_.empty()) tokenizer.emplace("", o.model.vocab, tokens->is_text(), o.end_of_text);
}

void TrainingData::meet(Options& o, const Job& job) {
  // not before every rank has looked for one there
  if (!o.checkpoint.empty() && job.rank == 0) copy_tokenizer(directory_, o.checkpoint);
  if (!tokens) read(o, job);
  // what is in the files, wherever a node has them
  const std::string differ = differences({{"the data", tokens->content}});
  REQUIRE(differ.empty(), differ);
}

void TrainingData::read(Options& o, const Job& job) {
  const auto say = [&](const std::string& text) {
    if (!job.speaks) return;
    printf("tokens   %s\n", printable(text).c_str());
    fflush(stdout);
  };
  if (!directory_.empty()) o.data = token_shards(o.data, *tokenizer, o.checkpoint, say);
  tokens.emplace(Dataset::open(o.data, o.model.context, o.model.vocab));
}
