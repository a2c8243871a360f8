// test_checkpoint.cpp: what is saved in one layout goes on in any other as if nothing had happened.
// tests/test_checkpoint.sh runs it:
//   mpiexec -n N test_checkpoint save DIR/a SETTING
//       trains 5 steps, saves, trains 5 more and writes DIR/a/losses
//   mpiexec -n N test_checkpoint resume SETTING DIR/a DIR/b...
//       resumes from each and compares its next 5 losses with DIR/a/losses
//   mpiexec -n N test_checkpoint differ DIR SETTING PARAMETER
//       saves three steps with keep 1, the last after one number of the parameter was changed on
//       the last rank, and prints what each save says
//   mpiexec -n N test_checkpoint lacks DIR SETTING PARAMETER
//       saves all but what the last rank has of the parameter
//   test_checkpoint later DIR STEP
//       puts checkpoints of later steps aside
//   test_checkpoint logits DIR TOKEN...
//       the logits after these tokens, one a line, in f64
// SETTING: pp=2,fsdp=2,schedule=zb,dtype=f64: axes, zero, schedule, chunks, by_rows (sequence
// parallelism) and dtype; of what is left out the default
#include <fstream>
#include <sstream>

#include "inference/generator.h"
#include "tests/parity.h"

namespace {

struct Setting {
  Layout layout;
  GptConfig config{7, 20, 4, 6, 23};  // nothing that 2 or 3 divide
  TrainerOptions options;
};

Setting parse_setting(const std::string& text) {
  Setting s;
  std::istringstream fields(text);
  for (std::string name, value;
       std::getline(fields, name, '=') && std::getline(fields, value, ',');) {
    for (size_t a = 0; a < kAxes.size(); a++)
      if (name == kAxes[a].name) s.layout.sizes[a] = std::stoi(value);
    if (name == "zero") s.options.fsdp.zero = std::stoi(value);
    if (name == "schedule") s.options.schedule = value;
    if (name == "chunks") s.options.chunks = std::stoi(value);
    if (name == "by_rows") s.config.sequence_parallel = value == "1";
    if (name == "dtype") s.config.dtype = value == "bf16" ? Dtype::bf16 : Dtype::f64;
  }
  s.options.batch = 24;
  s.options.microbatch = 24 / (s.layout.data_ranks() * (s.layout["pp"] > 1 ? 4 : 1));
  s.config.attention = AttentionKind::plain;
  return s;
}

std::vector<double> train(Trainer& trainer, const GptConfig& config, int first, int last) {
  std::vector<double> losses;
  for (int step = first; step <= last; step++) {
    trainer.gradients(trainer.read([&](int64_t i) { return sequence(step, i, config); }));
    trainer.update(kLearningRate);
    losses.push_back(trainer.results().loss);
  }
  return losses;
}

void save(const std::string& dir, const Setting& s) {
  Mesh mesh = open_mesh(s.layout);
  {
    Trainer trainer(mesh, s.config, s.options);
    train(trainer, s.config, 1, 5);
    save_checkpoint(dir, {5, s.config, s.layout, master_dtype(s.config.dtype), 1337, "", ""}, job(),
                    mesh, trainer.optimizer().shards());
    const std::vector<double> losses = train(trainer, s.config, 6, 10);
    if (job().rank == 0) {
      std::ofstream out(dir + "/losses");
      out.precision(17);
      for (const double l : losses) out << l << "\n";
    }
  }
  close_mesh(mesh);
}

// "exact" where all 5 losses have the same bits, else the largest relative difference: one line a
// directory
void resume_from(const std::vector<std::string>& dirs, const Setting& s) {
  Mesh mesh = open_mesh(s.layout);
  for (const std::string& dir : dirs) {
    Trainer trainer(mesh, s.config, s.options);
    const auto found =
        newest_checkpoint(dir, job(), [](const std::string& why) { throw Error(why); });
    CHECK(found.has_value() && found->info.step == 5, dir);
    resume(*found, trainer.optimizer());
    const std::vector<double> losses = train(trainer, s.config, 6, 10);
    std::ifstream in(dir + "/losses");
    double worst = 0;
    for (const double l : losses) {
      double expected = NAN;
      in >> expected;
      const double apart = l == expected ? 0 : std::abs(l - expected) / expected;
      worst = apart <= worst ? worst : std::isnan(apart) ? INFINITY : apart;
    }
    if (job().rank == 0) printf("%s %.3g\n", dir.c_str(), worst);
  }
  close_mesh(mesh);
}

void differ(const std::string& dir, const Setting& s, const std::string& name) {
  Mesh mesh = open_mesh(s.layout);
  {
    Trainer trainer(mesh, s.config, s.options);
    const auto& shards = trainer.optimizer().shards();
    on_first_rank(job(), [&] { make_directory(dir); });
    for (int step = 1; step <= 3; step++) {
      train(trainer, s.config, step, step);
      for (const ParamShard& shard : shards)
        if (step == 3 && job().rank == job().size - 1 && shard.param->name == name)
          fill(shard.weights.view(0, {1}), 5);
      CheckpointInfo info{step, s.config, s.layout, master_dtype(s.config.dtype), 1337, ""};
      info.keep = 1;
      const std::string said = join(save_checkpoint(dir, info, job(), mesh, shards), "; ");
      if (job().rank == 0) printf("%s\n", said.c_str());
    }
  }
  close_mesh(mesh);
}

void lacks(const std::string& dir, const Setting& s, const std::string& name) {
  Mesh mesh = open_mesh(s.layout);
  {
    Trainer trainer(mesh, s.config, s.options);
    std::vector<ParamShard> shards = trainer.optimizer().shards();
    if (job().rank == job().size - 1)
      std::erase_if(shards, [&](const ParamShard& shard) { return shard.param->name == name; });
    save_checkpoint(dir, {5, s.config, s.layout, master_dtype(s.config.dtype), 1337, "", ""}, job(),
                    mesh, shards);
  }
  close_mesh(mesh);
}

void print_logits(const std::string& dir, const std::vector<int>& tokens) {
  const Checkpoint c(newest_path(dir));
  const GptConfig config{c.info.model, Dtype::f64};
  Mesh mesh = open_mesh({});
  {
    Generator generator(mesh, config, 1, config.context);
    generator.load_weights(c);
    for (const double l : generator.prefill(0, tokens)) printf("%.17g\n", l);
  }
  close_mesh(mesh);
}

}  // namespace

int main(int argc, char** argv) {
  Job job(&argc, &argv);
  the_job() = &job;
  try {
    const std::vector<std::string> words(argv + 1, argv + argc);
    CHECK(words.size() >= 3, "usage: see the top of this file");
    open_device(job.local_rank % device_count(), 0);
    if (words[0] == "save") save(words[1], parse_setting(words[2]));
    else if (words[0] == "resume")
      resume_from({words.begin() + 2, words.end()}, parse_setting(words[1]));
    else if (words[0] == "differ") differ(words[1], parse_setting(words[2]), words[3]);
    else if (words[0] == "lacks") lacks(words[1], parse_setting(words[2]), words[3]);
    else if (words[0] == "later")
      put_later_aside(words[1], std::stoi(words[2]), job, [](const std::string&) {});
    else if (words[0] == "logits") {
      std::vector<int> tokens;
      for (size_t i = 2; i < words.size(); i++) tokens.push_back(std::stoi(words[i]));
      print_logits(words[1], tokens);
    } else throw Error("no mode " + words[0]);
    close_device();
    return 0;
  } catch (const std::exception& e) {
    job.abort(e.what());
  }
}
