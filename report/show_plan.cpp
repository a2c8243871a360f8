// show_plan.cpp: which layout trains a model fastest on a cluster, and why. Needs no GPU, no MPI.
//
//   build/plan --model gpt2-xl --nodes 4 --devices 8 --machine h100 --batch 512
//   build/plan --model gpt2 --devices 2 --machine lab.txt --memory 8000 --layout --tp 2 --json
//   build/plan --model gpt2-xl --decode
//   build/plan --map when_to_use_what.svg
//
// idea      The options are those of train_gpt. What is given is fixed, and all of the rest is
//           tried; with --layout all of it is fixed. Of each layout there is one description, in
//           JSON; what is printed for people comes from it.
// test      tests/test_plan.sh
#include <cstdio>
#include <nlohmann/json.hpp>

#include "launch/options.h"
#include "report/draw_map.h"
#include "support/files.h"
#include "support/metrics.h"
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
  OptionGroup mesh = mesh_options(o.layout, true);
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
      model_options(o),
      {"More of the model, and the job",
       {
           {"kv-heads", "H", whole(&o.model.kv_heads, 1, 1'000'000),
            "heads of keys and values, which queries share", "the heads"},
           {"feed-forward", "F", whole(&o.model.feed_forward, 1, 10'000'000),
            "width between an MLP's two products; of a gated one, which has three, 1.5 times its",
            "4 C"},
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
           {"profile", "", choice(&o.profile, profile_names()),
            "what software does with it; of megatron-2021 and deepspeed-2021, --attention flash is "
            "selective recomputation"},
           {"memory", "MiB", whole(&o.memory), "of a device", "92 % of the machine's"},
       }},
      mesh,
      {"Output",
       {
           {"layout", "", flag(&o.layout_only),
            "only the layout that the options name; axes that are not given have 1 rank"},
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

// ---- what is said of a layout

// The options of train_gpt that make it: those that matter.
Json options_of(const TrainingJob& job) {
  const int64_t shards = job.layout["fsdp"] * job.layout["cp"];
  Json options;
  const auto say = [&](bool matters, const char* name, const Json& value) {
    if (matters) options[name] = value;
  };
  for (size_t a = 0; a < kAxes.size(); a++)
    say(job.layout.sizes[a] > 1, kAxes[a].name, job.layout.sizes[a]);
  say(job.fsdp.prefetch != 1 && shards * job.layout["replicate"] > 1, "prefetch",
      job.fsdp.prefetch);
  say(shards > 1, "zero", job.fsdp.zero);
  say(shards > 1 && !job.fsdp.reshard, "reshard-after-forward", "no");
  say(job.layout["pp"] > 1, "schedule", job.schedule);
  say(schedule_row(job.schedule).placement == Placement::ring, "chunks", job.chunks);
  say(true, "microbatch", job.microbatch);
  say(job.sequence_parallel, "sequence-parallel", true);
  say(job.recompute, "recompute", true);
  return options;
}
std::string command_line_of(const Json& options) {
  std::string text;
  for (const auto& [name, value] : options.items()) {
    text += (text.empty() ? "--" : " --") + name;
    if (!value.is_boolean()) text += " " + (value.is_string() ? std::string(value) : value.dump());
  }
  return text;
}

// Numbers that programs read: seconds and bytes. The parts of a step are the longest first.
Json json_of(const Cluster& cluster, const Planned& p) {
  const Account a = account(p);
  const double tokens = p.batch * p.context / p.seconds,
               peak = p.dtype == Dtype::bf16 ? cluster.peak : cluster.f32;
  std::multimap<double, std::string, std::greater<>> parts{{p.computing, "computing"},
                                                           {p.bubble, "bubble"},
                                                           {p.optimizer, "optimizer"}};
  for (size_t axis = 0; axis < kAxes.size(); axis++)
    parts.emplace(p.waiting[axis], sentence("waiting for ", kAxes[axis].name));
  Json seconds, memory;
  for (const auto& [time, name] : parts) seconds[name] = time;
  for (int i = 0; i < kMemoryCategories; i++) memory[name_of(Memory(i))] = a.memory[i];
  const Json layout = options_of(p);
  return {{"layout", layout},
          {"options", command_line_of(layout)},
          {"step_seconds", p.seconds},
          {"tokens_per_second", tokens},
          {"mfu", tokens * flops_per_token(p) / p.layout.ranks() / peak},
          {"seconds", seconds},
          {"memory_stage", a.stage},
          {"memory_rank", a.rank},
          {"memory", memory},
          {"memory_bytes", p.memory},
          {"sent_bytes", a.sent}};
}

// The parts of a whole that are not nothing, each with its share.
void print_parts(const Json& parts, double unit, const char* unit_name) {
  double all = 0;
  for (const double part : parts) all += part;
  for (const auto& [name, part] : parts.items())
    if (part > 0)
      printf("  %-24s %9.4g %-3s %5.1f %%\n", name.c_str(), double(part) / unit, unit_name,
             100 * double(part) / all);
}

void explain(const Cluster& cluster, const Json& layout) {
  const std::string options = layout["options"];
  printf("layout   %s\nmemory   %.4g GiB of %.4g on stage %d\n", options.c_str(),
         double(layout["memory_bytes"]) / kGiB, cluster.memory / kGiB, int(layout["memory_stage"]));
  print_parts(layout["memory"], kGiB, "GiB");
  if (!layout["sent_bytes"].empty()) printf("sent     in a step by a rank, by axis, at most\n");
  print_parts(layout["sent_bytes"], 1e6, "MB");
  printf("step     %.4g s, %.4g tokens/s, MFU %.1f %%; what binds is first\n",
         double(layout["step_seconds"]), double(layout["tokens_per_second"]),
         100 * double(layout["mfu"]));
  print_parts(layout["seconds"], 1, "s");
}

// ---- what is asked for

void check_fits(const Cluster& cluster, double needed) {
  REQUIRE(needed <= cluster.memory,
          format("does not fit: a rank needs %.4g GiB, and a device has %.4g", needed / kGiB,
                 cluster.memory / kGiB));
}

void decode(const PlanOptions& o, const Cluster& cluster, const GptConfig& config) {
  const int64_t devices = o.nodes * o.devices, pp = std::max<int64_t>(o.layout["pp"], 1),
                most = std::min({devices / pp, config.kv(), config.vocab});
  double least = INFINITY;
  Json rows = Json::array();
  std::string text = "  tp  ms a token   weights     cache   kernels      sums    stages       GiB";
  for (int64_t tp = 1; tp <= most; tp++) {
    if (devices % (tp * pp) || (o.layout["tp"] > 0 && o.layout["tp"] != tp)) continue;
    const DecodePrediction d = predict_decoding(cluster, config, {{"pp", pp}, {"tp", tp}},
                                                o.sequences, config.context / 2);
    least = std::min(least, d.memory);
    const bool fits = d.memory <= cluster.memory;
    Json seconds;
    const double* next = std::begin(d.seconds);
    text += format("\n%4ld %11.3f", tp, d.seconds.sum() * 1e3);
    for (const char* part : {"weights", "cache", "kernels", "sums", "stages"}) {
      seconds[part] = *next;
      text += format(" %9.3f", *next++ * 1e3);
    }
    if (fits)
      rows.push_back({{"tp", tp},
                      {"pp", pp},
                      {"token_seconds", d.seconds.sum()},
                      {"seconds", seconds},
                      {"memory_bytes", d.memory}});
    text += format(" %9.4g%s", d.memory / kGiB, fits ? "" : "  does not fit");
  }
  REQUIRE(least < INFINITY, "no --tp is possible: times --pp, it must divide the ", devices,
          " devices, and be at most ", most, " (with --pp ", pp, "; --kv-heads, --vocab)");
  puts((o.json ? Json{{"decode", rows}}.dump(1) : text).c_str());
  check_fits(cluster, least);
}

// Which options are given, and have no meaning in any of these layouts.
std::string without_use(const PlanOptions& o, const Json& layouts) {
  std::string text;
  for (const auto& [option, needed] : {std::pair{"zero", "zero"},
                                       {"reshard-after-forward", "zero"},
                                       {"schedule", "pp"},
                                       {"chunks", "pp"},
                                       {"sequence-parallel", "tp"}}) {
    bool used = !o.given.count(option);
    for (const Json& row : layouts) used |= row["layout"].contains(needed);
    if (!used) text += sentence("--", option, " has no use in these layouts\n");
  }
  return text;
}

Cluster cluster_of(const PlanOptions& o) {
  Cluster cluster{o.machine == "this" ? measure_machine(o.devices) : read_machine(o.machine),
                  profile_named(o.profile), o.nodes, o.devices, o.spread};
  cluster.memory = o.memory > 0 ? o.memory << 20 : 0.92 * cluster.memory;
  return cluster;
}

// Bad options get a sentence. Of those that are given, some have a meaning with others alone.
void check_asked(const PlanOptions& o) {
  check_meaning(o, {{{"sequences"}, o.decode, "is about inference: give --decode"},
                    {{"spread"}, o.nodes > 1, "is about several nodes: give --nodes"},
                    {{"top"}, !o.layout_only, "is about a search, which --layout leaves out"},
                    {{"replicate", "fsdp", "cp", "batch", "microbatch", "zero",
                      "reshard-after-forward", "prefetch", "schedule", "chunks",
                      "sequence-parallel", "recompute", "attention", "layout", "top"},
                     !o.decode,
                     "is about training, and --decode about inference: leave one of them out"}});
  const ModelSize& m = o.model;
  REQUIRE(m.heads % m.kv() == 0, "--kv-heads ", m.kv(), " does not divide the ", m.heads, " heads");
  const double scores = o.attention == "flash" ? 0 : m.context * m.heads;  // whole ones
  REQUIRE(std::max<int64_t>(o.batch, 1024) * m.context * ((m.width + scores) * m.layers + m.vocab) <
              1e17,
          "so many tokens in so large a model are too many bytes to count: make them fewer",
          scores > 0 ? ", or give --attention flash" : "");
}

void print_asked(const PlanOptions& o, const Cluster& cluster, const GptConfig& config) {
  printf("model    %s: %.4g B parameters in %s\n", to_string(o.model).c_str(),
         parameter_count(config) / 1e9, name_of(config.dtype));
  std::string missing;
  for (const SizeOption& size : kSizes)
    if (!o.given.count("model") && !o.given.count(size.name)) missing += sentence(" --", size.name);
  if (!missing.empty()) printf("         not given, and as in tiny:%s\n", missing.c_str());
  if (!o.decode && !o.given.count("batch"))
    printf("batch    %ld sequences, as for one device: --batch says another\n", o.batch);
  printf("cluster  %ld x %ld devices, %s, %.4g GiB each\n", o.nodes, o.devices,
         cluster.name.c_str(), cluster.memory / kGiB);
  if (o.machine == "this") puts(cluster.text.c_str());
  if (cluster.profile.stores_scores)
    puts("memory   is what the code here would hold: the profile is about times alone");
}

// What is given is fixed; with --layout all is.
Wanted wanted_of(const PlanOptions& o, const GptConfig& config) {
  Wanted wanted{{config, trainer_options(o), o.layout}};
  const auto is_fixed = [&](const char* option) { return o.layout_only || o.given.count(option); };
  if (!is_fixed("zero")) wanted.fsdp.zero = 0;
  if (!is_fixed("schedule")) wanted.schedule.clear();
  if (is_fixed("reshard-after-forward")) wanted.reshard = {wanted.fsdp.reshard};
  if (is_fixed("sequence-parallel")) wanted.by_rows = {wanted.sequence_parallel};
  if (is_fixed("recompute")) wanted.recomputes = {wanted.recompute};
  return wanted;
}

// The fastest layouts, each a line, and the first of them in full; where none fits, the smallest.
// Where one layout was asked for, it alone.
void print_plan(const PlanOptions& o, const Cluster& cluster, const Plan& found) {
  Json fastest = Json::array();
  std::string table;
  for (const Planned& p : found.fastest) {
    const Json& row = fastest.emplace_back(json_of(cluster, p));
    const double percent = 100 / p.seconds;
    table += format("%9.4g %11.4g %4.1f%% %6.3g %7.1f%% %5.1f%% %5.1f%%  ", p.seconds,
                    double(row["tokens_per_second"]), 100 * double(row["mfu"]), p.memory / kGiB,
                    percent * (p.computing + p.optimizer), percent * p.bubble,
                    percent * total(p.waiting)) +
             std::string(row["options"]) + "\n";
  }
  const Json smallest = found.fitting == 0 ? json_of(cluster, *found.smallest) : Json();
  if (o.json) {
    puts(Json{{"layouts", found.layouts},
              {"fitting", found.fitting},
              {"fastest", fastest},
              {"smallest_that_does_not_fit", smallest}}
             .dump(1)
             .c_str());
    return;
  }
  if (!o.layout_only) {
    printf("layouts  %ld of a batch of %ld, %ld fit in memory\n\n", found.layouts, o.batch,
           found.fitting);
    if (found.fitting == 0) puts("the one that needs least memory, as if it fitted");
    else
      printf("  step, s    tokens/s   MFU    GiB  compute bubble  waits  layout\n%s%s\n",
             table.c_str(), without_use(o, fastest).c_str());
  }
  explain(cluster, found.fitting > 0 ? fastest[0] : smallest);
}

void show(PlanOptions& o) {
  PlanOptions named = o;  // what train_gpt takes, where nothing is said
  for (int64_t& size : named.layout.sizes) size = std::max<int64_t>(size, 1);
  resolve(named, true);
  if (o.layout_only) o = named;
  o.batch = named.batch;
  resolve_common(o, true);
  PlanOptions checked = o;  // a limit of our kernel is none of software that stores scores
  if (profile_named(o.profile).stores_scores) checked.attention = "plain";
  check_common(checked);
  check_asked(o);
  const Cluster cluster = cluster_of(o);
  const GptConfig config = model_config(o);
  if (!o.json) print_asked(o, cluster, config);
  if (o.decode) return decode(o, cluster, config);

  if (o.given.count("schedule"))
    make_schedule(o.schedule, 1, 1, o.chunks);  // or it has other chunks
  const int64_t devices = o.nodes * o.devices;
  if (o.layout_only) {
    REQUIRE(o.layout.ranks() == devices, to_string(o.layout), " has ", o.layout.ranks(),
            " ranks, and --nodes ", o.nodes, " with --devices ", o.devices, " have ", devices);
    check(checked);
  }
  const Plan found = plan(cluster, wanted_of(o, config), o.top);
  REQUIRE(found.layouts > 0, "no layout of ", devices,
          " devices is what the options ask for: axes divide the devices; the batch of ", o.batch,
          " must divide by the ranks that share it, and each one's part by --microbatch, into a "
          "number of micro-batches that --schedule takes; --tp is at most ",
          config.kv(), ", --cp at most half of the context of ", config.context,
          ", --pp times --chunks at most ", config.layers, ", and a schedule has at most ",
          kMostForwards, " forwards");
  print_plan(o, cluster, found);
  if (found.fitting == 0) check_fits(cluster, found.smallest->memory);
}

}  // namespace

int main(int argc, char** argv) {
  return run_main("plan", [&] {
    PlanOptions o, defaults;
    o.layout.sizes.fill(0);
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
      write_file(o.map, [&](const Write& write) {  // which must be possible: it takes minutes
        const std::string map = draw_map(cluster_of(o));
        put_aside(o.map, "drawings");
        write(map);
      });
    }
  });
}
