// training.cpp: see training.h.
#include "checkpoint/training.h"

#include "support/stopwatch.h"

void take_sizes(Options& o) {
  const bool is_named = !o.model_name.empty();
  for (const std::string& path : checkpoints_in(o.checkpoint)) try {
      const CheckpointInfo info = Checkpoint(path).info;
      o.end_of_text = info.end_of_text;
      o.tokenizer_key = info.tokenizer;
      if (!is_named) o.model_name = nearest_model(info.model);
      for (const SizeOption& size : kSizes) {
        int64_t& mine = o.model.*size.member;
        if (mine == 0 && (!is_named || size.member == &ModelSize::vocab))
          mine = info.model.*size.member;
      }
      return;
    } catch (const Damaged&) {  // then those of the one before
    }
}

// Says another thing of other files, even of the same names and sizes (content_of).
static std::string in_full(const Dataset& data) {
  return sentence(data.describe(), " (", data.content, ")");
}

std::optional<int64_t> resume_training(const Options& o, const Dataset& data, const Job& job,
                                       Trainer& trainer) {
  const auto say = [&](const std::string& text) {
    if (job.speaks) printf("resume   %s\n", printable(text).c_str());
  };
  const std::optional<Checkpoint> c = newest_checkpoint(o.checkpoint, job, say, o.resume_step);
  if (!c) {
    say("there is no checkpoint in " + o.checkpoint + ": starting at step 1");
    return {};
  }
  const CheckpointInfo& saved = c->info;
  const bool imported = saved.step == 0;
  const std::string model = to_string(saved.model), mine = to_string(o.model);
  REQUIRE(model == mine, c->path, " holds a model of ", model, ", and this one has ", mine,
          ": leave out --model and its sizes");
  REQUIRE(
      !saved.bytes || o.tokenizer_key == 0, c->path,
      " was trained on bytes last, and a tokenizer's tokens are others: leave out --tokenizer, and "
      "remove a tokenizer's files from ",
      o.checkpoint);
  c->check_tokenizer(o.tokenizer_key);
  std::set<std::string> names;
  for (const Param* p : trainer.gpt.params()) names.insert(p->name);
  for (const auto& [name, shape] : c->tensors)
    REQUIRE(names.count(name), c->path, " has a tensor that this model lacks: ", name);
  REQUIRE(o.model.vocab == 256 || !data.is_text() || saved.bytes, c->path,
          " was not trained on bytes last (", saved.data,
          "), so they are not its tokens: give --tokenizer DIR");
  REQUIRE(saved.step <= o.steps, c->path, " has ", saved.step,
          " steps already: give more --steps than that");
  if (saved.step == o.steps)
    say(sentence(c->path, " has all of the ", o.steps, " steps: give more --steps to go on"));
  resume(*c, trainer.optimizer());
  trainer.fsdp.end_step();  // shards have changed
  say(sentence(c->path, ", saved on ", to_string(saved.layout)));
  if (!imported && !saved.data.ends_with("(" + data.content + ")"))
    say(sentence("it was trained on ", saved.data, ", and is now on ", in_full(data),
                 ": what is held out now may have been trained on"));
  if (!imported && saved.options != o.command && saved.options + " --resume" != o.command)
    say("it was trained with the options " + saved.options);
  if (!imported && saved.seed != uint64_t(o.seed))
    say(sentence("it was trained with --seed ", saved.seed, ", so batches differ from here on"));
  return saved.step;
}

std::string save_training(const Options& o, const Dataset& data, int64_t step, const Job& job,
                          const Mesh& mesh, Trainer& trainer) {
  const Stopwatch saving;
  const GptConfig& config = trainer.gpt.config;
  const Dtype dtype = master_dtype(config.dtype);
  const CheckpointInfo info{.step = step,
                            .model = o.model,
                            .layout = o.layout,
                            .dtype = dtype,
                            .seed = uint64_t(o.seed),
                            .options = o.command,
                            .data = in_full(data),
                            .keep = o.keep,
                            .bytes = data.is_text(),
                            .end_of_text = o.end_of_text,
                            .tokenizer = data.is_text() ? 0 : o.tokenizer_key};
  const std::vector<std::string> said =
      save_checkpoint(o.checkpoint, info, job, mesh, trainer.optimizer().shards());
  return format("checkpoint saved: %.1f MB in %.2f s",
                parameter_count(config) * 3 * size_of(dtype) / 1e6, saving.seconds()) +
         (said.empty() ? "" : "; " + join(said, ", "));
}
