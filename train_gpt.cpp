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

// What a training has at hand, and its steps. Every rank calls the same functions. Members are made
// in this order: resume() needs those before it, and what comes after it needs to know the step.
struct Run {
  const Options& o;
  const TrainingData& data;
  const Job& job;
  const Mesh& mesh;
  Watch& watch;
  std::optional<DirectoryLock>& lock;  // rank 0's
  Trainer trainer{mesh, model_config(o), trainer_options(o)};
  std::string manifest = {};  // rank 0's, of the last checkpoint that was saved or resumed
  const int64_t resumed = o.resume ? resume() : 0;  // the step that it goes on from
  JsonLines metrics{job.speaks && resumed < o.steps ? o.metrics : "", resumed};
  Progress progress{o.steps, job.speaks ? stdout : nullptr, isatty(fileno(stdout)) != 0};
  std::optional<Trace> trace = {};
  Profile profile = {};
  int64_t step = resumed;  // the last that was begun
  Batch batch = {};        // of this step; once that is queued, of the next one
  std::string error = {};  // of data, metrics or trace: what was trained is saved all the same
  bool has_metrics = true;

  void train() {
    if (!o.trace.empty() && resumed < o.steps)
      trace.emplace(job.speaks ? o.trace : "", mesh, trainer);
    listen_for_signals();
    if (o.resume && o.eval_every) held_out_loss();
    collectively(job, [&] { REQUIRE(error.empty(), error); });
    if (resumed == o.steps) {  // there is nothing left to train
      for (const auto& [option, file] : {std::pair{"--metrics", o.metrics}, {"--trace", o.trace}})
        if (job.speaks && !file.empty())
          printf("resume   nothing is written to %s %s\n", option, file.c_str());
      if (o.sample && !stopped()) print_sample();
      return;
    }
    double first_loss = 0, loss = 0;
    bool ends = false;  // by a signal or an error, on all ranks
    while (!ends && step < o.steps) {
      StepRecord record = train_step();
      loss = record.loss;
      if (step == resumed + 1) {
        first_loss = loss;
        if (o.resume_step >= 0)  // now that training goes on
          watch.at_files([&] {
            put_later_aside(o.checkpoint, resumed, job,
                            [&](const std::string& text) { say(text); });
          });
      }
      if (o.eval_every && is_turn(o.eval_every)) record.held_out_loss = held_out_loss();
      const std::string unwritten = error_of([&] { metrics.step(record); });
      if (error.empty()) error = unwritten;
      has_metrics = unwritten.empty();
      ends = stopped();
      if (ends || is_turn(o.save_every)) {
        check_weights();
        if (!o.checkpoint.empty()) save();
      }
    }
    if (trace && trace->empty())
      say(sentence("nothing is written to ", o.trace, ": none of steps ", o.traced.begin, " to ",
                   o.traced.end, " was trained"));
    progress.done();
    if (o.sample && !ends) print_sample();
    report(first_loss, loss);  // ends here if a rank had an error
    if (step < o.steps)
      say(o.checkpoint.empty() ? "stopped by a signal; without --checkpoint nothing is saved"
                               : "stopped by a signal; --resume goes on from here");
  }

 private:
  void say(const std::string& text) { progress.say(step, text); }
  // every so many steps (0: never), and after the last one
  bool is_turn(int64_t every) const { return step == o.steps || (every && step % every == 0); }

  int64_t resume() {
    std::optional<int64_t> from;
    at_work = "the checkpoint that is resumed";
    watch.at_files([&] {
      from = resume_training(o, *data.tokens, job, trainer);
      if (from) remember(*from);
    });
    return from.value_or(0);
  }

  void save() {
    at_work = "a checkpoint that is saved";
    watch.at_files([&] {
      on_first_rank(job, [&] {
        if (lock->is_held()) return;
        // The directory, or the lock in it, is gone. Another run may be there now, or have been.
        make_directory(o.checkpoint);
        lock.emplace(o.checkpoint);
        const auto there = checkpoints_in(o.checkpoint);
        REQUIRE(there.empty() || read_file(there[0] + "/manifest.json") == manifest, o.checkpoint,
                " has checkpoints of another run by now: nothing more is saved there");
      });
      const std::string said = save_training(o, *data.tokens, step, job, mesh, trainer);
      remember(step);
      say(said);
    });
  }

  // Its number alone does not tell a checkpoint from that of another run.
  void remember(int64_t saved) {
    on_first_rank(job, [&] {
      manifest = read_file(checkpoint_path(o.checkpoint, saved) + "/manifest.json");
    });
  }

  void report(double first_loss, double loss) {
    if (job.speaks)
      printf("\nloss     %.4f at step %ld, %.4f at step %ld\nspeed    %s\n", first_loss,
             resumed + 1, loss, step,
             progress.summary(flops_per_token(trainer.gpt.config)).c_str());
    JsonLines none("");
    compare_with_theory(mesh, trainer, step - resumed, progress.step_time(),
                        has_metrics ? metrics : none);
    if (o.profile) profile.print(trainer, job.speaks);
    if (trace && !trace->empty()) write_trace();
    collectively(job, [&] {
      REQUIRE(error.empty(), error, ": stopped after step ", step,
              o.checkpoint.empty() ? "" : ", which is saved");
    });
  }

  // ---- a step

  // The next one's batch is read while the device computes.
  StepRecord train_step() {
    step++;
    at_work = sentence("a step in micro-batches of ", o.microbatch, " sequences of ",
                       o.model.context, " tokens");
    if (batch.empty()) batch = read_batch(step);
    const bool is_traced = trace && o.traced.begin <= step && step <= o.traced.end;
    if (is_traced) trace->begin_step();
    progress.start_step();
    watch.step(step);
    const double lr = learning_rate(step, o.steps, o.warmup, o.lr, o.min_lr);
    // of the last step alone: with no GPU nothing overlaps in it
    trainer.pipeline.measures = mesh["pp"].size > 1 && step == o.steps;
    op_times.start(o.profile || is_traced ? OpTimes::everything : OpTimes::collectives);
    profile.host_begins();
    trainer.gradients(batch);
    trainer.update(lr);
    profile.host_reads();
    if (step < o.steps) error = error_of([&] { batch = read_batch(step + 1); });
    profile.host_waits();
    const auto [loss, norm] = trainer.results();
    op_times.stop();
    REQUIRE(std::isfinite(loss) && std::isfinite(norm), "at step ", step, " the loss is ", loss,
            " and the gradient norm ", norm,
            ": training stops here; a smaller --lr or a longer --warmup may help");
    const StepRecord record =
        progress.end_step(step, loss, norm, lr, o.batch * o.model.context, seconds_communicating());
    if (o.profile) profile.end_step(record.step_ms * 1e-3);
    if (is_traced) trace->end_step();
    if (is_traced && step == o.traced.end && step < o.steps) write_trace();  // what follows may die
    return record;
  }

  void write_trace() {
    at_work = "a trace that is written";
    watch.at_files([&] {
      const std::string unwritten = trace->write();
      if (error.empty()) error = unwritten;
    });
    trace.reset();
  }

  Batch read_batch(int64_t number) const {
    return trainer.read([&](int64_t s) {
      watch.progress();
      return data.tokens->sequence(number, s, o.seed);
    });
  }

  // The loss of a step is from before its update: what that made is looked at here.
  void check_weights() {
    at_work = "the check of the weights";
    const bool fine = trainer.can_go_on(batch);
    collectively(job, [&] {
      REQUIRE(
          fine, "the update of step ", step,
          " made weights from which training cannot go on (they, their moments, their loss or its"
          " gradients are not finite numbers): nothing is saved; a smaller --lr may help");
    });
  }

  // A signal to any rank, or an error of its own, ends the work of all after one and the same
  // step. So neither is acted on where it comes: an error is kept, and all ranks ask each other for
  // both at the same places.
  bool stopped() const {
    int mine = look_for_end() || !error.empty(), any = 0;
    MPI_Iallreduce(&mine, &any, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD, UntilDone());  // waits here
    return any != 0;
  }

  // Computes and prints the loss on held-out text; nothing where the run is to end. A rank reads
  // all sequences first: one that cannot read must not leave the others in a collective.
  std::optional<double> held_out_loss() {
    at_work = "the held-out loss";
    std::vector<std::vector<int>> sequences(data.tokens->held_out_sequences());
    for (size_t s = 0; s < sequences.size() && error.empty(); s++)
      error = error_of([&] { sequences[s] = data.tokens->held_out(s); });
    if (stopped()) return {};
    const double loss = trainer.evaluate(sequences.size(), [&](int64_t s) {
      watch.progress();
      return sequences[s];
    });
    say(format("held-out loss %.4f", loss));
    return loss;
  }

  // ---- a sample

  void print_sample() {
    at_work = "a sample";
    const int64_t T = o.model.context;
    std::vector<int> tokens = data.tokens->held_out(0);
    tokens.resize(std::min<int64_t>(T / 2 + 1, 48));
    Screen screen(job.prints_to_terminal());
    const auto show = [&](const std::string& text) {
      if (job.speaks) screen.show(text);
    };
    show("\n--- a sample: held-out text up to the bar, then the model's own\n");
    for (int token : tokens) show(data.tokenizer->decode(token));
    show("|");
    for (int64_t i = 0; i < o.sample; i++) {
      watch.progress();
      const std::vector<int> window(tokens.end() - std::min<int64_t>(tokens.size(), T),
                                    tokens.end());
      std::vector<double> logits = trainer.next_logits(window);
      data.tokenizer->silence(logits);
      int token = pick(logits, {.temperature = 0.8, .seed = uint64_t(o.seed)}, i);
      // should two ranks' logits differ in a last bit, all still go on with one token
      MPI_Ibcast(&token, 1, MPI_INT, 0, MPI_COMM_WORLD, UntilDone());
      tokens.push_back(token);
      if (stopped()) break;
      if (token == data.tokenizer->end_of_text()) {
        show("\n--- here the model ended the text");
        break;
      }
      show(data.tokenizer->decode(token));
    }
    show("\n---\n");
  }
};

// ---- main: run_program (launch/program.h) calls `prepare` on every rank, compares what it
// returns, opens the mesh and calls `work`

// --checkpoint must be one directory on all nodes. What one of them makes in it, others may see
// half a minute later.
static void find_same_lock(const std::string& checkpoint, const Job& job, Watch& watch) {
  const std::string path = checkpoint + "/lock";
  for (int tries = job.local_size < job.size ? 60 : 1; tries--; sleep(1)) {
    const std::string differ = differences(
        {{"the lock in the directory of --checkpoint", is_there(path) ? read_file(path) : "none"}});
    if (differ.empty()) return;
    REQUIRE(tries, differ, ": is it the same directory?");
    watch.progress();
  }
}

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
    REQUIRE(o.checkpoint.empty() || !is_there(o.checkpoint + "/model.safetensors") ||
                !checkpoints_in(o.checkpoint).empty(),
            "--checkpoint: ", o.checkpoint,
            " holds Hugging Face's files: build/checkpoint import makes a checkpoint of them");
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
  const auto work = [&](const Job& job, const Mesh& mesh, Watch& watch) {
    std::optional<DirectoryLock> lock;
    watch.at_files([&] {
      on_first_rank(job, [&] {
        if (!o.checkpoint.empty()) lock.emplace(o.checkpoint);
        refuse_used();  // by one that has ended since
      });
    });
    if (!o.checkpoint.empty()) find_same_lock(o.checkpoint, job, watch);
    watch.at_files([&] { data.meet(o, job); });
    if (job.speaks) print_setup(o, *data.tokens);
    at_work = "the model";
    Run{o, data, job, mesh, watch, lock}.train();
  };
  const char* usage =
      "usage: build/train_gpt [options]\n"
      "Trains a GPT on text. [In brackets: what holds without the option.]";
  return run_program("train_gpt", usage, argc, argv, o, train_options, prepare, work);
}
