// show_plan.cpp: which layout trains a model fastest on a cluster, and why. Needs no GPU, no MPI.
//
//   build/plan --model gpt2-xl --nodes 4 --devices 8 --machine h100 --batch 512
//   build/plan --model gpt2 --devices 2 --machine lab.txt --memory 8000 --layout --tp 2 --json
//   build/plan --model gpt2-xl --decode
//   build/plan --map when_to_use_what.svg
//
// idea      The options are those of train_gpt. What is given is fixed, and all of the rest is
//           tried; with --layout nothing is tried.
// test      tests/test_plan.sh
#include <cstdio>
#include <nlohmann/json.hpp>

#include "launch/options.h"
#include "report/draw_map.h"
#include "support/files.h"
#include "theory/plan.h"

using Json = nlohmann::ordered_json;

namespace {

struct PlanOptions : Options {
  std::string machine = "a100-80g", profile = "threefold";
  int64_t nodes = 1, devices = 8, memory = 0, top = 10, sequences = 1;
  std::string map;
  bool layout_only = false, json = false, decode = false, spread = false;
};

OptionTable table(PlanOptions& o) {
  OptionGroup model = model_options(o), mesh = mesh_options(o.layout, true);
  model.options.push_back({"kv-heads", "H", whole(&o.model.kv_heads, 1, 1'000'000),
                           "heads of keys and values, which queries share", "the heads"});
  model.options.push_back({"feed-forward", "F", whole(&o.model.feed_forward, 1, 10'000'000),
                           "width between an MLP's two products", "4 C"});
  mesh.title = "Layout: what is given is fixed, all of the rest is tried";
  const OptionTable trains = train_options(o);
  for (const char* name : {"--microbatch", "--zero", "--reshard-after-forward", "--prefetch",
                           "--schedule", "--chunks", "--sequence-parallel", "--recompute"})
    mesh.options.push_back(find_option(trains, name));
  for (Option& option : mesh.options) {
    if (option.name != "prefetch") option.unset = "any";
    if (option.name == "chunks") option.unset = "2 to 4";
  }
  return {
      model,
      {"Job",
       {
           find_option(trains, "--batch"),
           {"dtype", "", choice(&o.dtype, {"f32", "bf16"}), "what is computed in", "bf16"},
           find_option(trains, "--attention"),
       }},
      {"Cluster",
       {
           {"nodes", "N", whole(&o.nodes, 1, 100'000), "nodes"},
           {"devices", "N", whole(&o.devices, 1, 1000), "devices of a node"},
           {"spread", "", flag(&o.spread), "each next rank is on the next node"},
           {"machine", "NAME", text(&o.machine),
            join(machine_names(), "|") + "|this, or a file (theory/machine.h)"},
           {"profile", "", choice(&o.profile, profile_names()), "what software does with it"},
           {"memory", "MiB", whole(&o.memory), "of a device", "92 % of the machine's"},
       }},
      mesh,
      {"Output",
       {
           {"layout", "", flag(&o.layout_only),
            "explain the one layout that the options name; axes that are not given have 1 rank"},
           {"top", "N", whole(&o.top, 1, 1000), "how many layouts to show"},
           {"decode", "", flag(&o.decode), "instead: the time per token of inference, by tp"},
           {"sequences", "N", whole(&o.sequences, 1, 1'000'000), "with --decode: at once"},
           {"map", "FILE.svg", text(&o.map),
            "instead: draw when to use what, by size of model and number of devices, in minutes",
            "none"},
           {"json", "", flag(&o.json), "as one JSON object"},
           {"help", "", flag(&o.help), "print this"},
       }}};
}

// ---- a layout in words: the options of train_gpt

std::string words_of(const Job& job) {
  std::string text;
  for (size_t a = 0; a < kAxes.size(); a++)
    if (job.layout.sizes[a] > 1)
      text += sentence("--", kAxes[a].name, " ", job.layout.sizes[a], " ");
  if (job.fsdp.prefetch != 1 && job.layout.data_ranks() * job.layout["cp"] > 1)
    text += sentence("--prefetch ", job.fsdp.prefetch, " ");
  if (job.layout["fsdp"] * job.layout["cp"] > 1)
    text +=
        sentence("--zero ", job.fsdp.zero, job.fsdp.reshard ? " " : " --reshard-after-forward no ");
  if (job.layout["pp"] > 1) {
    text += sentence("--schedule ", job.schedule, " ");
    if (schedule_row(job.schedule).place == Place::ring)
      text += sentence("--chunks ", job.chunks, " ");
  }
  text += sentence("--microbatch ", job.microbatch);
  if (job.sequence_parallel) text += " --sequence-parallel";
  if (job.recompute) text += " --recompute";
  return text;
}

struct Measures {
  double tokens_per_second, mfu;
};
Measures measures(const Cluster& cluster, const Planned& p) {
  const double tokens = double(p.batch * p.context) / p.seconds;
  const double peak = p.dtype == Dtype::bf16 ? cluster.peak : cluster.f32;
  return {tokens, tokens * flops_per_token(p) / p.layout.ranks() / peak};
}

double gib(double bytes) { return bytes / (1024.0 * 1024 * 1024); }

// The parts of a step, the longest first.
std::vector<std::pair<double, std::string>> parts_of(const Prediction& p) {
  std::vector<std::pair<double, std::string>> parts{{p.computing, "computing"},
                                                    {p.bubble, "bubble"},
                                                    {p.optimizer, "optimizer"}};
  for (size_t a = 0; a < kAxes.size(); a++)
    parts.push_back({p.waiting[a], sentence("waiting for ", kAxes[a].name)});
  std::ranges::sort(parts, std::greater<>());
  return parts;
}

std::string memory_words(const Account& a) {
  std::string text;
  for (int i = 0; i < kMemoryCategories; i++)
    if (a.memory[i] > 0)
      text += format("%s%s %.4g", text.empty() ? "" : ", ", name_of(Memory(i)), gib(a.memory[i]));
  return text;
}

Json json_of(const Cluster& cluster, const Planned& p) {
  const Account a = account(p);
  const auto [tokens, mfu] = measures(cluster, p);
  Json layout, waiting, memory;
  for (size_t i = 0; i < kAxes.size(); i++) {
    layout[kAxes[i].name] = p.layout.sizes[i];
    waiting[kAxes[i].name] = p.waiting[i];
  }
  for (int i = 0; i < kMemoryCategories; i++)
    if (a.memory[i] > 0) memory[name_of(Memory(i))] = a.memory[i];
  return {{"layout", layout},
          {"options", words_of(p)},
          {"zero", p.fsdp.zero},
          {"reshard_after_forward", p.fsdp.reshard},
          {"schedule", p.schedule},
          {"chunks", p.chunks},
          {"microbatch", p.microbatch},
          {"sequence_parallel", p.sequence_parallel},
          {"recompute", p.recompute},
          {"step_seconds", p.seconds},
          {"tokens_per_second", tokens},
          {"mfu", mfu},
          {"seconds",
           {{"computing", p.computing},
            {"waiting", waiting},
            {"bubble", p.bubble},
            {"optimizer", p.optimizer}}},
          {"memory_rank", p.layout.ranks() / p.layout["pp"] * (a.stage + 1) - 1},
          {"memory", memory},
          {"memory_bytes", a.bytes},
          {"sent_bytes", a.sent}};
}

void explain(const Cluster& cluster, const Planned& p) {
  const Account a = account(p);
  const auto [tokens, mfu] = measures(cluster, p);
  printf("layout   %s\n", words_of(p).c_str());
  printf("step     %.4g s, %.4g tokens/s, MFU %.1f %%\n", p.seconds, tokens, 100 * mfu);
  const auto parts = parts_of(p);
  for (const auto& [seconds, name] : parts)
    if (seconds > 0)
      printf("  %-24s %9.4g s %5.1f %%\n", name.c_str(), seconds, 100 * seconds / p.seconds);
  printf("memory   %.4g GiB of %.4g on stage %d: %s\n", gib(p.memory), gib(cluster.memory), a.stage,
         memory_words(a).c_str());
  for (const auto& [axis, bytes] : a.sent)
    printf("sent     %.4g MB a step over %s\n", double(bytes) / 1e6, axis.c_str());
  if (p.memory <= cluster.memory)
    printf("binds    %s takes %.0f %% of the step\n", parts[0].second.c_str(),
           100 * parts[0].first / p.seconds);
}

// ---- what is asked for

void check_fits(const Cluster& cluster, double needed) {
  REQUIRE(needed <= cluster.memory,
          format("does not fit: a rank needs %.4g GiB, and a device has %.4g", gib(needed),
                 gib(cluster.memory)));
}

void decode(const PlanOptions& o, const Cluster& cluster, const GptConfig& config) {
  const int64_t devices = o.nodes * o.devices, pp = std::max<int64_t>(o.layout["pp"], 1);
  double least = INFINITY;
  Json rows = Json::array();
  if (!o.json)
    printf("  tp  ms a token   weights     cache   kernels      sums    stages       GiB\n");
  for (int64_t tp = 1; tp <= std::min({devices / pp, config.kv(), config.vocab}); tp++) {
    if (devices % tp || (o.layout["tp"] > 0 && o.layout["tp"] != tp)) continue;
    const DecodePrediction d = predict_decoding(cluster, config, {{"pp", pp}, {"tp", tp}},
                                                o.sequences, config.context / 2);
    least = std::min(least, d.memory);
    const bool fits = d.memory <= cluster.memory;
    if (fits) rows.push_back({{"tp", tp}, {"pp", pp}, {"token_seconds", d.seconds.sum()}});
    if (o.json) continue;
    printf("%4d %11.3f", int(tp), d.seconds.sum() * 1e3);
    for (const double seconds : d.seconds) printf(" %9.3f", seconds * 1e3);
    printf(" %9.4g%s\n", gib(d.memory), fits ? "" : "  does not fit");
  }
  REQUIRE(least < INFINITY, "no --tp is possible: it must divide the ", devices,
          " devices, make at most ", devices, " ranks with --pp ", pp, " and be at most ",
          std::min(config.kv(), config.vocab), " (--kv-heads, --vocab)");
  if (o.json) printf("%s\n", Json{{"decode", rows}}.dump(1).c_str());
  check_fits(cluster, least);
}

// Where nothing is said, what train_gpt takes.
PlanOptions resolved(PlanOptions o) {
  for (int64_t& size : o.layout.sizes) size = std::max<int64_t>(size, 1);
  resolve(o, true);
  return o;
}

// The options name one layout, as train_gpt's do.
Job one_job(const PlanOptions& options) {
  const PlanOptions o = resolved(options);
  REQUIRE(o.layout.ranks() == o.nodes * o.devices, to_string(o.layout), " has ", o.layout.ranks(),
          " ranks, and --nodes ", o.nodes, " with --devices ", o.devices, " have ",
          o.nodes * o.devices);
  check(o);
  return {model_config(o), trainer_options(o), o.layout};
}

Machine machine_of(const PlanOptions& o) {
  return o.machine == "this" ? measure_machine(o.devices) : read_machine(o.machine);
}

void show(PlanOptions& o) {
  check_meaning(o, {{{"sequences"}, o.decode, "is about inference: give --decode"},
                    {{"top"}, !o.layout_only, "is about a search, which --layout leaves out"},
                    {{"replicate", "fsdp", "cp", "batch", "microbatch", "zero",
                      "reshard-after-forward", "prefetch", "schedule", "chunks",
                      "sequence-parallel", "recompute", "layout", "top"},
                     !o.decode,
                     "is about training, and --decode about inference: leave one of them out"}});
  if (o.dtype.empty()) o.dtype = "bf16";
  resolve_common(o, true);
  check_common(o);
  const ModelSize& m = o.model;
  REQUIRE(m.heads % m.kv() == 0, "--kv-heads ", m.kv(), " does not divide the ", m.heads, " heads");
  const double of_scores =
      o.attention == "flash" ? 0 : double(m.context) * m.heads * m.layers;  // whole ones
  REQUIRE(
      double(std::max<int64_t>(o.batch, 1024)) * m.context *
              (double(m.width) * m.layers + m.vocab + of_scores) <
          1e17,
      "so many tokens in so large a model are too many bytes to count: make them fewer, or give "
      "--attention flash");
  Cluster cluster{machine_of(o), profile_named(o.profile), o.nodes, o.devices, o.spread};
  const GptConfig config = model_config(o);
  cluster.memory = o.memory > 0 ? double(o.memory << 20) : 0.92 * cluster.memory;
  if (!o.json) {
    printf("model    %s: %.4g B parameters in %s\n", to_string(m).c_str(),
           double(parameter_count(config)) / 1e9, name_of(config.dtype));
    printf("cluster  %d x %d devices, %s, %.4g GiB each\n", int(o.nodes), int(o.devices),
           cluster.name.c_str(), gib(cluster.memory));
    if (o.machine == "this") printf("%s\n", cluster.text.c_str());
  }
  if (o.decode) return decode(o, cluster, config);
  if (o.layout_only) {
    const Job job = one_job(o);
    REQUIRE(job.layout["tp"] <= job.kv(), "--tp ", job.layout["tp"],
            " has more ranks than --kv-heads ", job.kv());
    Predictor predictor(cluster, config);
    const Planned p{job, predictor.predict(job), account(job).bytes};
    if (o.json) printf("%s\n", json_of(cluster, p).dump(1).c_str());
    else explain(cluster, p);
    return check_fits(cluster, p.memory);
  }

  if (o.given.count("schedule"))
    make_schedule(o.schedule, 1, 1, o.chunks);  // or it has other chunks
  Wanted wanted{{config, trainer_options(o), o.layout}};
  wanted.batch = resolved(o).batch;
  if (o.given.count("reshard-after-forward")) wanted.reshard = {wanted.fsdp.reshard};
  if (!o.given.count("zero")) wanted.fsdp.zero = 0;
  if (!o.given.count("schedule")) wanted.schedule.clear();
  const Plan found = plan(cluster, wanted, o.top);
  REQUIRE(found.layouts > 0, "no layout of ", o.nodes * o.devices,
          " devices is what the options ask for: axes divide the devices; the batch of ",
          wanted.batch,
          " must divide by the ranks that share it, and each one's part by --microbatch; --tp is at"
          " most ",
          m.kv(), ", --cp at most half of the context of ", m.context,
          ", --pp times --chunks at most ", m.layers, ", and a schedule has at most ",
          kMostForwards, " forwards");
  if (o.json) {
    Json all = Json::array();
    for (const Planned& p : found.fastest) all.push_back(json_of(cluster, p));
    printf("%s\n", Json{{"layouts", found.layouts}, {"fitting", found.fitting}, {"fastest", all}}
                       .dump(1)
                       .c_str());
  } else {
    printf("layouts  %lld of a batch of %lld, %lld fit in memory\n", (long long)found.layouts,
           (long long)wanted.batch, (long long)found.fitting);
    if (found.smallest) {
      const Planned& p = *found.smallest;
      printf("too large from %.4g GiB on: %s\n         (%s)\n", gib(p.memory), words_of(p).c_str(),
             memory_words(account(p)).c_str());
    }
    if (!found.fastest.empty())
      printf("\n  step, s    tokens/s   MFU   GiB  compute bubble  waits  layout\n");
    for (const Planned& p : found.fastest) {
      const auto [tokens, mfu] = measures(cluster, p);
      const double percent = 100 / p.seconds;
      printf("%9.4g %11.4g %4.1f%% %5.1f %7.1f%% %5.1f%% %5.1f%%  %s\n", p.seconds, tokens,
             100 * mfu, gib(p.memory), percent * p.computing, percent * p.bubble,
             100 - percent * (p.computing + p.bubble + p.optimizer), words_of(p).c_str());
    }
  }
  if (found.fitting == 0) check_fits(cluster, found.smallest->memory);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    PlanOptions o, defaults;
    for (int64_t& size : o.layout.sizes) size = 0;
    o.given = parse(argc, argv, table(o));
    if (o.help)
      printf("%s", help_text("usage: build/plan [options]\n"
                             "Predicts which layout trains a model fastest on a cluster. [In "
                             "brackets: what holds without the option.]",
                             table(defaults))
                       .c_str());
    else if (o.map.empty()) show(o);
    else {
      for (const std::string& name : o.given)
        REQUIRE(name == "map" || name == "machine" || name == "profile", "--", name,
                " would do nothing: --map draws models and clusters of its own");
      write_file(o.map, [&](const Write& write) {  // which must be possible: it takes a minute
        write(draw_map(machine_of(o), profile_named(o.profile), 1.25e9));
      });
    }
    check_printed();
  } catch (const std::exception& e) {
    fflush(stdout);  // what it has said before that
    fprintf(stderr, "plan: %s\n", words_of(e).c_str());
    return 1;
  }
  return 0;
}
