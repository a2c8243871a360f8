// train_gpt.cpp: trains a GPT on text, on one device or many. Parse the options, build the mesh,
// loop over steps, report.
// idea      every rank runs this program; trainer.cpp composes the model with the strategies
// test      tests/test_cli.sh (the program from outside), tests/test_golden.cpp and
//           tests/test_fsdp.cpp (its numbers)
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "checkpoint/checkpoint.h"
#include "support/data.h"
#include "support/metrics.h"
#include "launch/options.h"
#include "inference/sampling.h"
#include "inference/text_shards.h"
#include "report/trace.h"
#include "launch/program.h"
#include "report/report.h"
#include "trainer.h"

// ---- what the options mean

static TrainerOptions trainer_options(const Options& o) {
  TrainerOptions t;
  t.batch = o.batch, t.microbatch = o.microbatch, t.seed = uint64_t(o.seed);
  t.clip = o.clip, t.weight_decay = o.weight_decay;
  if (!o.schedule.empty()) t.schedule = o.schedule;
  t.chunks = int(o.chunks);
  t.fsdp = {o.zero ? int(o.zero) : 3, o.reshard != "no", int(std::max<int64_t>(o.prefetch, 0))};
  return t;
}

static void print_setup(const Options& o, const GptConfig& g, const Dataset& data) {
  printf("model    %s: %s: %.2f M parameters in %s\n", o.model_name.c_str(), to_string(g).c_str(),
         parameter_count(g) / 1e6, name_of(g.dtype));
  printf("device   %s\n", device().name.c_str());
  const int64_t ranks = o.layout.ranks();
  printf("ranks    %s\n%s", to_string(o.layout).c_str(),
         ranks > 1 && ranks <= 16 ? draw(o.layout).c_str() : "");
  printf("data     %s\n", data.describe().c_str());
  printf("steps    %lld of %lld sequences (%lld tokens), micro-batches of %lld\n\n",
         (long long)o.steps, (long long)o.batch, (long long)(o.batch * g.context),
         (long long)o.microbatch);
  fflush(stdout);
}

// ---- sampling

static void print_sample(Trainer& trainer, const Dataset& data, const Tokenizer& tokenizer,
                         int64_t count, uint64_t seed, Watch& watch, bool prints) {
  const int64_t T = trainer.gpt.config.context;
  std::vector<int> tokens = data.held_out(0);
  tokens.resize(std::min<int64_t>(T / 2 + 1, 48));
  const auto add = [&](int token) {
    if (prints) show(tokenizer.decode(token));
  };
  if (prints) printf("\n--- a sample: held-out text up to the bar, then the model's own\n");
  for (int token : tokens) add(token);
  if (prints) printf("|");
  for (int64_t i = 0; i < count; i++) {
    watch.progress();
    const std::vector<int> window(tokens.end() - std::min<int64_t>(int64_t(tokens.size()), T),
                                  tokens.end());
    tokens.push_back(pick(trainer.next_logits(window), {.temperature = 0.8, .seed = seed}, i));
    if (tokens.back() == tokenizer.end_of_text()) break;
    add(tokens.back());
  }
  if (prints) printf("\n---\n");
}

// ---- checkpoints

// A signal to any rank ends the training of all after one and the same step; collective.
static bool stopped(const SignalListener& listener) {
  int mine = listener.came(), any = 0;
  MPI_Iallreduce(&mine, &any, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD, Finished());
  return any != 0;
}

static std::string save(const Options& o, const std::string& data, int64_t step, const Job& job,
                        const Mesh& mesh, Trainer& trainer) {
  const Stopwatch saving;
  CheckpointInfo info{
      step,      o.model, o.layout, master_dtype(trainer.gpt.config.dtype), uint64_t(o.seed),
      o.command, data,    o.keep};
  const std::vector<std::string> removed =
      save_checkpoint(o.checkpoint, info, job, mesh, trainer.optimizer().shards());
  const double megabytes =
      double(parameter_count(trainer.gpt.config)) * 3 * double(size_of(info.dtype)) / 1e6;
  return format("checkpoint saved: %.1f MB in %.2f s", megabytes, saving.seconds()) +
         (removed.empty() ? "" : "; removed " + join(removed, ", "));
}

// How many steps the newest complete checkpoint had, now in the trainer; 0 if there is none.
static int64_t resume_training(const Options& o, const Dataset& data, const Job& job,
                               Trainer& trainer, bool prints) {
  const auto say = [prints](const std::string& text) {
    if (prints) printf("resume   %s\n", text.c_str());
  };
  const std::optional<Checkpoint> c = newest_checkpoint(o.checkpoint, job, say, o.resume_step);
  if (!c) return say("there is no checkpoint in " + o.checkpoint + ": starting at step 1"), 0;
  check_model(*c, o.model);
  const bool imported = c->info.step == 0;
  REQUIRE(!imported || !data.is_text() || o.model.vocab == 256, c->path,
          " was imported without a tokenizer, so bytes of text are not its tokens: give "
          "--tokenizer DIR");
  REQUIRE(c->info.step < o.steps, c->path, " has ", c->info.step,
          " steps already: give more --steps than that");
  resume(*c, trainer.optimizer());
  say(sentence(c->path, ", saved on ", to_string(c->info.layout)));
  if (o.resume_step >= 0) put_later_aside(o.checkpoint, c->info.step, job, say);
  if (imported) return 0;
  if (c->info.data != data.describe())
    say(sentence("it was trained on ", c->info.data, ", and is now on ", data.describe()));
  if (c->info.seed != uint64_t(o.seed))
    say(sentence("it was trained with --seed ", c->info.seed, ", so batches differ from here on"));
  return c->info.step;
}

// ---- training

static StepRecord train_step(const Options& o, const Dataset& data, const Mesh& mesh, Watch& watch,
                             Trainer& trainer, Progress& progress, int64_t step) {
  progress.start_step();
  watch.step(step);
  const double lr = learning_rate(step, o.steps, o.warmup, o.lr, o.min_lr);
  trainer.pipeline.timed = mesh["pp"].size > 1 && step == o.steps;
  start_timing();
  trainer.gradients([&](int64_t s) { return watch.progress(), data.sequence(step, s, o.seed); });
  trainer.update(lr);
  const double loss = trainer.loss(), norm = trainer.norm(), communicated = end_timing(mesh.stream);
  REQUIRE(std::isfinite(loss) && std::isfinite(norm), "at step ", step, " the loss is ", loss,
          " and the gradient norm ", norm,
          ": training stops here; a smaller --lr or a longer --warmup may help");
  return progress.end_step(step, loss, norm, lr, o.batch * o.model.context, communicated);
}

// The loss of a step is from before its update: what that made is looked at here.
static void check_weights(const Options& o, const Dataset& data, int64_t step, const Job& job,
                          Watch& watch, Trainer& trainer) {
  const bool fine = trainer.can_go_on(
      [&](int64_t s) { return watch.progress(), data.sequence(step + 1, s, uint64_t(o.seed)); });
  collectively(job, [&] {
    REQUIRE(fine, "the update of step ", step,
            " made weights from which training cannot go on (they, their moments, their loss or its"
            " gradients are not finite numbers): nothing is saved; a smaller --lr may help");
  });
}

static void train(const Options& o, const Dataset& data, const Tokenizer& tokenizer, const Job& job,
                  Mesh& mesh, Watch& watch) {
  const bool prints = job.speaks;
  matmul_backend = o.matmul == "own" ? MatmulBackend::own : MatmulBackend::cublas;
  GptConfig config = model_config(o);
  config.recompute = o.recompute, config.sequence_parallel = o.sequence_parallel;
  if (prints) print_setup(o, config, data);
  at_work = "the model";
  Trainer trainer(mesh, config, trainer_options(o));
  int64_t resumed = 0;
  at_work = "the checkpoint that is resumed";
  if (o.resume) watch.at_files([&] { resumed = resume_training(o, data, job, trainer, prints); });
  if (prints && !o.trace.empty()) open_trace(o.trace);
  Metrics metrics(prints ? o.metrics : "", resumed);
  const SignalListener listener;
  Progress progress(o.steps, prints ? stdout : nullptr, isatty(fileno(stdout)));
  const auto held_out = [&](int64_t s) { return watch.progress(), data.held_out(s); };
  const std::string steps = sentence("a step in micro-batches of ", o.microbatch, " sequences of ",
                                     o.model.context, " tokens");
  at_work = steps;
  double first_loss = 0, loss = 0;
  int64_t step = resumed;
  for (bool last = false; !last;) {
    StepRecord record = train_step(o, data, mesh, watch, trainer, progress, ++step);
    loss = record.loss;
    if (step == resumed + 1) first_loss = loss;
    if (o.eval_every && (step % o.eval_every == 0 || step == o.steps)) {
      record.held_out_loss =
          trainer.evaluate(std::min<int64_t>(data.held_out_sequences(), 32), held_out);
      progress.say(step, format("held-out loss %.4f", *record.held_out_loss));
    }
    metrics.step(record);
    last = stopped(listener) || step == o.steps;
    const bool saves =
        !o.checkpoint.empty() && (last || (o.save_every && step % o.save_every == 0));
    if (last || saves) check_weights(o, data, step, job, watch, trainer);
    if (saves) {
      at_work = "a checkpoint that is saved";
      watch.at_files(
          [&] { progress.say(step, save(o, data.describe(), step, job, mesh, trainer)); });
      at_work = steps;
    }
  }
  if (step < o.steps) {
    progress.say(step, o.checkpoint.empty()
                           ? "stopped by a signal; without --checkpoint nothing is saved"
                           : "stopped by a signal; --resume goes on from here");
    if (!o.trace.empty())
      progress.say(step, "nothing is written to " + o.trace + ": --trace is of the last step");
  }
  progress.done();
  if (o.sample && step == o.steps)
    print_sample(trainer, data, tokenizer, o.sample, uint64_t(o.seed), watch, prints);
  if (prints) {
    printf("\nloss     %.4f at step %lld, %.4f at step %lld\n", first_loss, (long long)resumed + 1,
           loss, (long long)step);
    printf("speed    %s\n", progress.summary(flops_per_token(config)).c_str());
  }
  compare_with_theory(mesh, trainer, trainer_options(o), step - resumed, progress.communication(),
                      o.trace, metrics);
}

// ---- texts for a model of byte pairs

// The sizes that --resume is not told are the checkpoint's: all, or that of the vocabulary alone.
static void take_model(Options& o) {
  const ModelSize& m = o.model;
  const bool told = !o.model_name.empty() || m.layers + m.width + m.heads + m.context + m.vocab > 0;
  if (!o.resume) return;
  for (const std::string& path : checkpoints_in(o.checkpoint)) {
    if (!is_complete(path)) continue;
    ModelSize saved;
    try {
      saved = Checkpoint(path).info.model;
    } catch (const Damaged&) {
      continue;
    }
    if (!told) o.model_name = nearest_model(saved);
    if (!told) o.model = saved;
    if (m.vocab == 0) o.model.vocab = saved.vocab;
    return;
  }
}

// Where the tokenizer is: beside the checkpoints, which have it from --tokenizer or an import.
static std::string tokenizer_directory(const Options& o) {
  const std::string& own = o.checkpoint;
  if (own.empty() || !has_tokenizer(own)) return o.tokenizer;
  REQUIRE(o.tokenizer.empty() || Tokenizer(own, 0).key() == Tokenizer(o.tokenizer, 0).key(),
          "--tokenizer ", o.tokenizer, " is not the one in ", own, ": leave it out");
  return own;
}

// ---- main

int main(int argc, char** argv) {
  Options o;
  std::unique_ptr<Dataset> data;
  std::unique_ptr<Tokenizer> tokenizer;
  std::string vocabulary;  // directory
  const auto open_data = [&] {
    data = std::make_unique<Dataset>(Dataset::open(o.data, o.model.context, o.model.vocab));
  };
  const auto prepare = [&](const Job& job) -> std::optional<Start> {
    o = parse_options(argc, argv);
    if (o.help) {
      if (job.speaks) print_help();
      return {};
    }
    const bool again = !o.checkpoint.empty() && !o.resume && !newest_in(o.checkpoint).empty();
    REQUIRE(!again, "--checkpoint: ", o.checkpoint,
            " holds checkpoints already: give --resume to go on from them, or another directory");
    open_device(job.local_rank % device_count(), o.device_memory << 20);
    take_model(o);
    vocabulary = tokenizer_directory(o);
    REQUIRE(vocabulary.empty() || has_tokenizer(vocabulary), "--tokenizer: ", vocabulary,
            " has neither tokenizer.json nor vocab.json and merges.txt");
    if (!vocabulary.empty()) {
      tokenizer = std::make_unique<Tokenizer>(vocabulary, o.model.vocab);
      if (o.model.vocab == 0) o.model.vocab = tokenizer->size();
    }
    resolve(o, device().is_gpu);
    check_ranks(o.layout, job.size);
    check(o);
    schedule_of(trainer_options(o), o.layout);  // may refuse this number of micro-batches
    if (!o.checkpoint.empty() && job.rank == 0) make_directory(o.checkpoint);
    // one rank encodes texts; the others wait, and read what it has written when all have met
    if (tokenizer && job.rank == 0)
      o.data = token_shards(o.data, *tokenizer, o.checkpoint, [](const std::string& text) {
        printf("tokens   %s\n", text.c_str());
        fflush(stdout);
      });
    if (!tokenizer || job.rank == 0) open_data();
    if (!tokenizer)
      tokenizer = std::make_unique<Tokenizer>("", data->is_text() ? 256 : o.model.vocab);
    auto given = values_of(train_options(o));
    std::erase_if(given, [](const auto& option) { return option.first == "--data"; });
    return Start{o.layout, o.timeout, given};
  };
  return run_program(
      "train_gpt", argc, argv, prepare, [&](const Job& job, Mesh& mesh, Watch& watch) {
        std::optional<DirectoryLock> lock;
        on_first_rank(job, [&] {
          if (!o.checkpoint.empty()) lock.emplace(o.checkpoint);
        });
        if (tokenizer->has_pairs()) o.data = gather(o.data)[0];  // the first rank's
        // not before every rank has looked for one there
        if (tokenizer->has_pairs() && !o.checkpoint.empty() && job.rank == 0)
          copy_tokenizer(vocabulary, o.checkpoint);
        if (!data) open_data();
        // what is in the files, wherever a node has them
        const std::string differ = differences({{"the data", content_of(data->paths())}});
        REQUIRE(differ.empty(), differ);
        train(o, *data, *tokenizer, job, mesh, watch);
      });
}
