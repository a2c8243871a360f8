// train_gpt.cpp: trains a GPT on text, on one device or many. Parse the options, build the mesh,
// compose the trainer, loop over steps, report.
// idea      every rank runs this program; trainer.cpp composes the model with the strategies
// test      tests/test_cli.sh (the program from outside), tests/test_golden.cpp and
//           tests/test_fsdp.cpp (its numbers)
#include <cmath>

#include "checkpoint/training.h"
#include "inference/sampling.h"
#include "inference/training_data.h"
#include "launch/program.h"
#include "report/profile.h"
#include "report/report.h"
#include "report/trace.h"

// ---- a step

using ReadBatch = std::function<Batch(int64_t step)>;

// `batch` is of this step, then of the next one: it is read while the device computes.
static StepRecord train_step(const Options& o, const Mesh& mesh, Watch& watch, Trainer& trainer,
                             Progress& progress, Profile& profile, Trace* trace, int64_t step,
                             Batch& batch, const ReadBatch& read, std::string& error) {
  if (trace) trace->begin_step();
  progress.start_step();
  watch.step(step);
  const double lr = learning_rate(step, o.steps, o.warmup, o.lr, o.min_lr);
  trainer.pipeline.measures = mesh["pp"].size > 1 && step == o.steps;
  op_times.start(o.profile || trace ? OpTimes::everything : OpTimes::collectives);
  profile.host_begins();
  trainer.gradients(batch);
  trainer.update(lr);
  profile.host_reads();
  error = error_of([&] { batch = read(step + 1); });
  profile.host_waits();
  const auto [loss, norm] = trainer.results();
  op_times.stop();
  REQUIRE(std::isfinite(loss) && std::isfinite(norm), "at step ", step, " the loss is ", loss,
          " and the gradient norm ", norm,
          ": training stops here; a smaller --lr or a longer --warmup may help");
  const StepRecord record =
      progress.end_step(step, loss, norm, lr, o.batch * o.model.context, communicated());
  if (o.profile) profile.end_step(record.step_ms * 1e-3);
  if (trace) trace->end_step();
  return record;
}

// The loss of a step is from before its update: what that made is looked at here.
static void check_weights(int64_t step, const Job& job, Trainer& trainer, const Batch& next) {
  const bool fine = trainer.can_go_on(next);
  collectively(job, [&] {
    REQUIRE(fine, "the update of step ", step,
            " made weights from which training cannot go on (they, their moments, their loss or its"
            " gradients are not finite numbers): nothing is saved; a smaller --lr may help");
  });
}

// A signal to any rank, or an error of its own, ends the work of all after one and the same step.
// So neither is acted on where it comes: an error is kept, and all ranks ask each other for both at
// the same places. Collective.
static bool stopped(const std::string& error = "") {
  int mine = signal_came() || !error.empty(), any = 0;
  MPI_Iallreduce(&mine, &any, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD, Finished());
  return any != 0;
}

// Of at most 32 sequences; none where the work ends. They are read before any of them is computed
// with: who cannot read must not leave the others in a collective.
static std::optional<double> held_out_loss(const Dataset& data, Trainer& trainer, Watch& watch,
                                           std::string& error) {
  std::vector<std::vector<int>> sequences(std::min<int64_t>(data.held_out_sequences(), 32));
  for (size_t s = 0; s < sequences.size() && error.empty(); s++)
    error = error_of([&] { sequences[s] = data.held_out(s); });
  if (stopped(error)) return {};
  return trainer.evaluate(sequences.size(), [&](int64_t s) {
    watch.progress();
    return sequences[s];
  });
}

// ---- a sample

static void print_sample(const Options& o, const TrainingData& data, Trainer& trainer, Watch& watch,
                         bool prints) {
  const int64_t T = o.model.context;
  std::vector<int> tokens = data.tokens->held_out(0);
  tokens.resize(std::min<int64_t>(T / 2 + 1, 48));
  const auto add = [&](int token) {
    if (prints) show(data.tokenizer->decode(token));
  };
  if (prints) printf("\n--- a sample: held-out text up to the bar, then the model's own\n");
  for (int token : tokens) add(token);
  if (prints) printf("|");
  for (int64_t i = 0; i < o.sample; i++) {
    watch.progress();
    const std::vector<int> window(tokens.end() - std::min<int64_t>(tokens.size(), T), tokens.end());
    int token =
        pick(trainer.next_logits(window), {.temperature = 0.8, .seed = uint64_t(o.seed)}, i);
    // copies of the model may differ by a rounding, and all must go on with one token
    MPI_Ibcast(&token, 1, MPI_INT, 0, MPI_COMM_WORLD, Finished());
    tokens.push_back(token);
    if (stopped() || tokens.back() == data.tokenizer->end_of_text()) break;
    add(tokens.back());
  }
  if (prints) printf("\n---\n");
}

// ---- training

static void train(const Options& o, const TrainingData& training, const Job& job, Mesh& mesh,
                  Watch& watch) {
  const bool prints = job.speaks;
  const Dataset& data = *training.tokens;
  if (prints) print_setup(o, data);
  at_work = "the model";
  Trainer trainer(mesh, model_config(o), trainer_options(o));
  int64_t resumed = 0;
  at_work = "the checkpoint that is resumed";
  if (o.resume) watch.at_files([&] { resumed = resume_training(o, data, job, trainer); });
  std::optional<Trace> trace;
  if (!o.trace.empty()) trace.emplace(prints ? o.trace : "", mesh, trainer);
  JsonLines metrics(prints ? o.metrics : "", resumed);
  listen_for_signals();
  Progress progress(o.steps, prints ? stdout : nullptr, isatty(fileno(stdout)));
  Profile profile;
  const std::string steps = sentence("a step in micro-batches of ", o.microbatch, " sequences of ",
                                     o.model.context, " tokens");
  const ReadBatch read = [&](int64_t of_step) {
    return trainer.read([&](int64_t s) {
      watch.progress();
      return data.sequence(of_step, s, o.seed);
    });
  };
  double first_loss = 0, loss = 0;
  std::string error;  // of data or metrics: what was trained is saved all the same
  int64_t step = resumed;
  bool ends = false;  // by a signal or an error, on all ranks
  at_work = steps;
  Batch batch = read(step + 1);
  for (bool last = false; !last;) {
    at_work = steps;
    step++;
    const bool is_traced = trace && o.traced.begin <= step && step <= o.traced.end;
    StepRecord record = train_step(o, mesh, watch, trainer, progress, profile,
                                   is_traced ? &*trace : nullptr, step, batch, read, error);
    loss = record.loss;
    if (step == resumed + 1) {
      first_loss = loss;
      if (o.resume_step >= 0)  // now that training goes on
        watch.at_files([&] {
          put_later_aside(o.checkpoint, resumed, job,
                          [&](const std::string& text) { progress.say(step, text); });
        });
    }
    if (o.eval_every && (step % o.eval_every == 0 || step == o.steps)) {
      record.held_out_loss = held_out_loss(data, trainer, watch, error);
      if (record.held_out_loss)
        progress.say(step, format("held-out loss %.4f", *record.held_out_loss));
    }
    if (error.empty()) error = error_of([&] { metrics.step(record); });
    ends = stopped(error);
    last = ends || step == o.steps;
    const bool due = last || (o.save_every && step % o.save_every == 0),
               saves = due && !o.checkpoint.empty();
    if (last || saves) check_weights(step, job, trainer, batch);
    if (saves) {
      at_work = "a checkpoint that is saved";
      watch.at_files([&] { progress.say(step, save_training(o, data, step, job, mesh, trainer)); });
    }
  }
  if (step < o.steps && error.empty()) {
    progress.say(step, o.checkpoint.empty()
                           ? "stopped by a signal; without --checkpoint nothing is saved"
                           : "stopped by a signal; --resume goes on from here");
  }
  if (trace && trace->empty())
    progress.say(step, sentence("nothing is written to ", o.trace, ": none of steps ",
                                o.traced.begin, " to ", o.traced.end, " was trained"));
  progress.done();
  if (o.sample && step == o.steps && !ends) print_sample(o, training, trainer, watch, prints);
  if (prints)
    printf("\nloss     %.4f at step %ld, %.4f at step %ld\nspeed    %s\n", first_loss, resumed + 1,
           loss, step, progress.summary(flops_per_token(trainer.gpt.config)).c_str());
  JsonLines none("");
  compare_with_theory(mesh, trainer, step - resumed, progress.step_time(),
                      error.empty() ? metrics : none);
  if (o.profile) profile.print(trainer, prints);
  if (trace && !trace->empty()) watch.at_files([&] { trace->write(); });
  collectively(job, [&] {
    REQUIRE(error.empty(), error, ": stopped after step ", step,
            o.checkpoint.empty() ? "" : ", which is saved");
  });
}

// ---- main

int main(int argc, char** argv) {
  Options o;
  TrainingData data;
  const auto refuse_used = [&] {
    REQUIRE(o.checkpoint.empty() || o.resume || checkpoints_in(o.checkpoint).empty(),
            "--checkpoint: ", o.checkpoint,
            " holds checkpoints already: give --resume to go on from them, or another directory");
  };
  const auto prepare = [&](const Job& job) {
    o.command = join({argv + 1, argv + argc}, " ");
    refuse_used();
    REQUIRE(o.checkpoint.empty() || !is_there(o.checkpoint + "/manifest.json"),
            "--checkpoint: ", o.checkpoint,
            " is one step of a run: give the run's directory, and --resume-step");
    if (o.resume) take_sizes(o);
    data.find_tokenizer(o);
    resolve(o, device().is_gpu);
    check_ranks(o.layout, job.size);
    check(o);
    schedule_of(trainer_options(o), o.layout);  // may refuse this number of micro-batches
    if (!o.checkpoint.empty() && job.rank == 0) make_directory(o.checkpoint);
    data.open(o, job);
    auto given = values_of(train_options(o));
    // nodes may have the data in different places: `meet` compares what is in it
    std::erase_if(given, [](const auto& option) { return option.first == "--data"; });
    return given;
  };
  const auto work = [&](const Job& job, Mesh& mesh, Watch& watch) {
    std::optional<DirectoryLock> lock;
    watch.at_files([&] {
      on_first_rank(job, [&] {
        if (!o.checkpoint.empty()) lock.emplace(o.checkpoint);
        refuse_used();  // by one that has ended since
      });
    });
    const std::string path = o.checkpoint + "/lock";
    // another node may see a new directory half a minute later
    for (int tries = job.local_size < job.size ? 60 : 1; tries-- && !o.checkpoint.empty();) {
      const std::string differ = differences({{"the lock in the directory of --checkpoint",
                                               is_there(path) ? read_file(path) : "none"}});
      if (differ.empty()) break;
      REQUIRE(tries, differ, ": is it the same directory?");
      watch.progress();
      sleep(1);
    }
    watch.at_files([&] { data.meet(o, job); });
    train(o, data, job, mesh, watch);
  };
  const char* usage =
      "usage: build/train_gpt [options]\n"
      "Trains a GPT on text. [In brackets: what holds without the option.]";
  return run_program("train_gpt", usage, argc, argv, o, train_options, prepare, work);
}
