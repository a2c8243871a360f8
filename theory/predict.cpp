// predict.cpp: see predict.h.
#include "theory/predict.h"

#include <algorithm>
#include <set>

#include "theory/timeline.h"

// ---- what software does

// threefold: the kernels' reads and writes as docs/gpu.md lists them; flash attention by tensor
// cores as FlashAttention-2 reaches it on an A100 (Dao, 2023: half to three quarters of the peak).
// threefold-cpu: the same on the stand-ins for a GPU and NCCL (cpu/); --profile shows attention at
// 24 % of a product (backward) and 32 % (forward).
// megatron-2021: the kernels of Megatron-LM's transformer layer of 2021, with its fused softmax,
// bias + GELU and bias + dropout + add, and one byte a number for a dropout's mask. Where attention
// is "flash", it is computed again in the backward (selective recomputation). A tp rank sends its
// slice of an activation to the next stage, where the slices are gathered. Its optimizer reads and
// writes gradients in 16 bits, a copy in 32, master weights and two moments.
static constexpr Passes kForward{13, 6, 4, 2, 3, 16}, kBackward{13, 3, 4, 3, 0, 14};
static const Profile kProfiles[] = {
    {"threefold", kForward, kBackward, false, true, true, true, 0, 39, 0.6, false},
    {"threefold-cpu", kForward, kBackward, false, true, true, true, 0, 28, 0.26, true},
    {"megatron-2021",
     {11, 2, 2, 4.5, 11, 12},
     {21, 11, 4, 5.5, 7, 20},
     true,
     false,
     false,
     false,
     2,
     52,
     0,
     false},
};

std::vector<std::string> profile_names() {
  std::vector<std::string> names;
  for (const Profile& p : kProfiles) names.push_back(p.name);
  return names;
}

const Profile& profile_named(const std::string& name) {
  const auto known = std::ranges::find(kProfiles, name, &Profile::name);
  REQUIRE(known != std::end(kProfiles), "there is no profile '", name, "': choose one of ",
          join(profile_names(), ", "));
  return *known;
}

// ---- a rank's part of one micro-batch, as it is issued

namespace {

enum { kFirst, kMiddle, kLast };  // micro-batches of a step
struct Phase {
  double seconds = 0;
  std::array<double, kAxes.size()> waiting{};
};
struct ChunkTimes {
  Phase forward[3], backward[3], weights[3], tail;  // tail: of the step, behind the last backward
};

class RankWork {
 public:
  RankWork(const Predictor& predictor, const Job& job, const ChunkKind& chunk, bool splits_backward)
      : machine(predictor.cluster.machine),
        profile(predictor.profile),
        splits(splits_backward),
        one(job, 1),
        t{one.config, one.options, one.mesh, Schedule{&schedule_row("1f1b")}} {
    const GptConfig& c = one.config;
    R = t.R;
    S = t.S;
    C = c.width;
    F = t.gpt.tp.part(c.hidden()).size();
    V = t.gpt.tp.padded_part(c.vocab);
    const double kv = t.gpt.tp.part(c.kv()).size(), D = C / c.heads;
    heads = kv * (c.heads / c.kv());
    channels = heads * D;
    kv_channels = kv * D;
    int64_t stride = 1;
    for (size_t a = kAxes.size(); a-- > 0; stride *= job.layout.sizes[a])
      links[a] = link_of(predictor.cluster, job.layout.sizes[a], stride);
    const int64_t tp = job.layout["tp"];
    shards = link_of(predictor.cluster, t.fsdp.size, tp);
    const auto parts = t.gpt.parts();
    if (chunk.embedding) add_use(parts[0]);
    for (int64_t i = 0; i < chunk.blocks; i++) add_use(parts[1], i);
    if (chunk.head) add_use(parts[2]);
  }

  ChunkTimes run(int microbatches) {
    ChunkTimes times;
    const int n = std::min(microbatches, 3);
    for (int i = 0; i < n; i++) {
      const int which = i == 0 ? kFirst : i == n - 1 ? kLast : kMiddle;
      is_last = i == n - 1;
      for (size_t u = 0; u < uses.size(); u++) forward(u);
      mark(times.forward[which]);
      for (size_t u = uses.size(); u-- > 0;) backward(u);
      mark(times.backward[which]);
      if (!splits) continue;
      for (; !deferred.empty(); deferred.pop_front()) deferred.front()();
      mark(times.weights[which]);
    }
    end_step();
    mark(times.tail);
    read_off();
    return times;
  }
  double bytes_between_stages() const { return t.activation; }
  // of the optimizer, after the last backward
  double optimizer() const {
    double elements = 0;
    for (const auto& [key, unit] : units) elements += unit.elements;
    return move_seconds(machine, elements * profile.optimizer_bytes, 4 * units.size());
  }

 private:
  struct Unit {
    double elements = 0;                   // of this rank's shard
    double whole = 0, whole_gradient = 0;  // bytes
    bool gathered = false;
    int arrived = -1, reduced = -1, uses = 0, done = 0;
  };
  struct Use {
    ModelPart::Kind kind;
    Backward backward;
    std::vector<Unit*> units;
  };
  void add_use(const ModelPart& part, int layer = 0) {
    Use use{part.kind, part.backward, {}};
    for (const auto& [number, params] : units_of(part.params)) {
      Unit& u = units[number + (number >= kFirstBlock ? layer : 0)];
      const int64_t padded = padded_unit(params, t.fsdp.size);
      const double g = profile.gradient_bytes > 0 ? profile.gradient_bytes : t.g;
      u.elements = padded / t.fsdp.size;
      u.whole = padded * t.e;
      u.whole_gradient = padded * g;
      u.uses++;
      use.units.push_back(&u);
    }
    uses.push_back(use);
  }

  // ---- issuing
  int send(AxisName axis, const Link& link, int n, Collective c, double bytes) {
    const int task = issue.communicate(collective_seconds(link, n, c, bytes));
    axis_of.resize(task + 1);
    axis_of[task] = axis.index;
    return task;
  }
  void compute(double seconds) { issue.compute(seconds); }
  double product(double m, double n, double k, double batch = 1) const {
    return product_seconds(machine, m, n, k, batch, t.e);
  }
  double move(double numbers, double kernels) const {
    return move_seconds(machine, numbers * t.e, kernels);
  }
  void weight(double seconds) {
    if (splits) deferred.push_back([=, this] { compute(seconds); });
    else compute(seconds);
  }
  // rows of width C over tp: their sum, or all of them where a rank has a slice
  void tp_start(Collective c) {
    if (t.tp.size == 1) return;
    const double bytes = t.by_rows ? t.tp.size * t.activation : t.activation;
    send("tp", links[AxisName("tp").index], t.tp.size, c, bytes);
  }
  void tp_sum() { tp_start(t.by_rows ? Collective::reduce_scatter : Collective::all_reduce); }
  void tp_gather() {
    if (t.by_rows) tp_start(Collective::all_gather);
  }
  void finish() { issue.finish(); }
  // and wait for it
  void whole_rows() {
    tp_gather();
    if (t.by_rows) finish();
  }
  void whole_sum() {
    tp_sum();
    if (t.tp.size > 1) finish();
  }

  // ---- blocks, head, embedding
  void attention(bool backward) {
    const GptConfig& c = t.config;
    const double T = c.context, D = c.width / c.heads, batch = t.B * heads;
    const bool splits_sequence = t.gpt.cp.splits(c.context);
    const Passes& passes = backward ? profile.backward : profile.forward;
    const bool whole = profile.stores_scores || c.attention == AttentionKind::plain;
    if (whole && !splits_sequence) {
      if (backward && profile.stores_scores && c.attention == AttentionKind::flash && !c.recompute)
        attention(false);  // selective recomputation
      const double both = product(T, T, D, batch) + product(T, D, T, batch);
      compute((backward ? 2 : 1) * both + move(passes.scores * batch * T * T, 2));
      return;
    }
    // the causal mask leaves half of 2 products forward and 5 backward, of 2 operations each
    const double operations = (backward ? 5 : 2) * R * T * channels,
                 slower = t.e == 2 || machine.f32 == machine.peak ? 1 : machine.peak / machine.f32,
                 rate = machine.products.back().second *
                        (profile.flash_share > 0 ? profile.flash_share : 0.6) / slower;
    const double computing = operations / rate + machine.launch * (backward ? 3 : 1);
    if (!splits_sequence) return compute(computing);
    // while keys and values of the next rank travel, those that are here are attended to
    const double n = t.cp.size,
                 travels = 2 * R * kv_channels * (backward ? t.e + t.g : t.e) * (n - 1);
    send("cp", links[AxisName("cp").index], 2, Collective::send, travels);
    compute(computing * (n - 1) / n);
    finish();
    compute(computing / n);
  }
  void block_forward() {
    const Passes& p = profile.forward;
    const double half = move(p.rows / 2 * S * C, p.kernels / 2);
    whole_rows();
    compute(half + product(R, channels + 2 * kv_channels, C));
    attention(false);
    compute(move(p.columns * R * channels, 0) + product(R, C, channels));
    whole_sum();
    whole_rows();
    compute(half + product(R, F, C) + move(p.hidden * R * F, 0) + product(R, C, F));
    whole_sum();
  }
  // of a matrix split by its outputs, n of them on this rank
  void column_backward(double n) {
    tp_gather();  // of the slice that was saved
    compute(product(R, C, n));
    if (t.by_rows) finish();
    tp_sum();
    if (t.tp.size > 1 && (!profile.overlaps_sums || splits)) finish();
    weight(product(C, n, R));
    if (t.tp.size > 1) finish();
  }
  void row_backward(double n) {
    whole_rows();
    compute(product(R, n, C));
    weight(product(n, C, R));
  }
  void block_backward() {
    if (t.config.recompute) block_forward();
    const Passes& p = profile.backward;
    const double half = move(p.rows / 2 * S * C, p.kernels / 2);
    row_backward(F);
    compute(move(p.hidden * R * F, 0));
    column_backward(F);
    compute(half);
    row_backward(channels);
    attention(true);
    compute(move(p.columns * R * channels, 0));
    column_backward(channels + 2 * kv_channels);
    compute(half);
  }
  void part_forward(ModelPart::Kind kind) {
    if (kind == ModelPart::block) return block_forward();
    if (kind == ModelPart::embedding) {
      compute(move(2 * R * C, 1));
      whole_sum();
      return;
    }
    whole_rows();
    compute(move(2 * S * C, 1) + product(R, V, C) + move(profile.forward.logits * R * V, 4));
    if (t.tp.size == 1) return;
    send("tp", links[AxisName("tp").index], t.tp.size, Collective::all_reduce, 3 * R * t.g);
    finish();
  }
  void part_backward(ModelPart::Kind kind) {
    if (kind == ModelPart::block) return block_backward();
    if (kind == ModelPart::embedding) {
      whole_rows();
      compute(move(3 * R * C, 1));
      return;
    }
    compute(move(profile.backward.logits * R * V, 2));
    column_backward(V);
    compute(move(4 * S * C, 1));
  }

  // ---- FSDP around them: the names are those of fsdp.cpp
  void start_unshard(Unit& u) {
    if (u.gathered) return;
    u.gathered = true;
    if (t.fsdp.size > 1)
      u.arrived = send("fsdp", shards, t.fsdp.size, Collective::all_gather, u.whole);
  }
  void unshard(int use, int direction) {
    for (Unit* u : uses[use].units) start_unshard(*u);
    for (int k = 1; k <= t.options.fsdp.prefetch; k++) {
      const int next = use + k * direction;
      if (next < 0 || next >= int(uses.size())) break;
      if (direction < 0 && uses[next].backward != Backward::unshards) continue;
      for (Unit* u : uses[next].units) start_unshard(*u);
    }
    for (Unit* u : uses[use].units) issue.wait_for(u->arrived);
  }
  void reshard(int use) {
    if (t.shards_parameters && t.options.fsdp.reshard)
      for (Unit* u : uses[use].units) u->gathered = false;
  }
  void forward(int use) {
    unshard(use, +1);
    part_forward(uses[use].kind);
    if (uses[use].backward != Backward::keeps) reshard(use);
  }
  void backward(int use) {
    if (uses[use].backward != Backward::nothing) unshard(use, -1);
    part_backward(uses[use].kind);
    if (splits) deferred.push_back([=, this] { reduce_gradients(use); });
    else reduce_gradients(use);
    reshard(use);
  }
  void sum_over_copies(const Unit& u) {
    const int n = t.mesh.layout["replicate"];
    if (n > 1)
      send("replicate", links[AxisName("replicate").index], n, Collective::all_reduce,
           u.whole_gradient / t.fsdp.size);
  }
  void reduce_gradients(int use) {
    for (Unit* u : uses[use].units) {
      if (++u->done < u->uses) continue;
      u->done = 0;
      if (!t.shards_gradients && !is_last) continue;
      if (!profile.overlaps_gradients && is_last) continue;  // at the step's end
      if (t.fsdp.size > 1)
        send("fsdp", shards, t.fsdp.size, Collective::reduce_scatter, u->whole_gradient);
      if (is_last) sum_over_copies(*u);
      u->reduced = issue.tasks.size() - 1;
      in_flight.push_back(u);
      while (in_flight.size() > (t.options.fsdp.prefetch > 0 ? 1 : 0)) finish_reduce();
    }
  }
  void finish_reduce() {
    const Unit& u = *in_flight.front();
    in_flight.pop_front();
    if (t.fsdp.size * t.mesh.layout["replicate"] == 1) return;
    issue.wait_for(u.reduced);
    compute(t.shards_gradients ? move_seconds(machine, 3 * u.elements * t.g, 1) : 0);
  }
  void end_step() {
    while (!in_flight.empty()) finish_reduce();
    if (profile.overlaps_gradients) return;
    for (const auto& [key, unit] : units) {
      if (t.fsdp.size > 1)
        send("fsdp", shards, t.fsdp.size, Collective::reduce_scatter, unit.whole_gradient);
      sum_over_copies(unit);
    }
    finish();
  }

  // ---- what came of it
  void mark(Phase& phase) {
    compute(0);
    marks.push_back({issue.last_compute(), &phase});
  }
  void read_off() {
    const std::vector<Span> spans = ::run(issue.tasks);
    // of the last computation; of the phase; of what has travelled in it and was not waited for
    double end = 0, begin = 0, beside = 0;
    size_t next = 0;
    for (int i = 0; i < int(issue.tasks.size()); i++) {
      const Task& task = issue.tasks[i];
      if (task.queue != Queue::compute) {
        beside += task.duration;
        continue;
      }
      Phase& phase = *marks[next].second;
      const double waited = std::max(0.0, spans[i].start - end);
      if (waited > 0) phase.waiting[axis_of[task.after]] += waited;
      beside -= waited;
      end = spans[i].end;
      if (i < marks[next].first) continue;
      phase.seconds = end - begin + (1 - machine.overlap) * std::max(0.0, beside);
      begin = end;
      beside = 0;
      next++;
    }
  }

  friend class ::Predictor;
  const Machine& machine;
  const Profile& profile;
  bool splits, is_last = false;
  FewBlocks one;
  TheoryOfRank t;
  Link links[kAxes.size()], shards;
  double R, S, C, F, V;
  double heads, channels, kv_channels;
  std::map<int, Unit> units;
  std::vector<Use> uses;
  std::deque<Unit*> in_flight;
  std::deque<std::function<void()>> deferred;
  Issue issue;
  std::vector<size_t> axis_of;  // of a communication, by its task
  std::vector<std::pair<int, Phase*>> marks;
};

}  // namespace

FewBlocks::FewBlocks(const Job& job, int64_t blocks)
    : config(job.config), options(job.options), mesh(job.layout) {
  config.layers = blocks;
  mesh.layout["pp"] = 1;
  mesh = Mesh(mesh.layout, mesh.layout.ranks() - 1);  // the largest part of everything
}

std::array<double, 3> Predictor::chunk_seconds(const Job& job, const ChunkKind& chunk,
                                               bool splits_backward) {
  const ChunkTimes t = RankWork(*this, job, chunk, splits_backward).run(3);
  return {t.forward[kMiddle].seconds, t.backward[kMiddle].seconds, t.weights[kMiddle].seconds};
}

// ---- the step

std::vector<std::vector<ChunkKind>> Predictor::chunks_of(const Schedule& s) const {
  std::vector<std::vector<ChunkKind>> kinds;
  for (int stage = 0; stage < s.stages; stage++) {
    kinds.emplace_back();
    for (const ModelPiece& piece : pieces_of(*gpt_, s, stage)) {
      const bool embedding = has_embedding(piece), head = has_head(piece);
      kinds.back().push_back({int64_t(piece.size()) - embedding - head, embedding, head});
    }
  }
  return kinds;
}

// Without actions.
static Schedule outline(const Job& job) {
  const int pp = job.layout["pp"];
  const ScheduleRow& row = schedule_row(pp > 1 ? job.options.schedule : "1f1b");
  const int64_t ranks = job.options.microbatch * job.layout.data_ranks();
  const int chunks = pp == 1 ? 1 : job.options.chunks ? job.options.chunks : row.chunks();
  return {&row, pp, int(job.options.batch / ranks), chunks};
}

// The tasks of a pipeline without their durations, and what each of them is.
struct Predictor::PipelineTasks {
  struct What {
    int stage;
    Action::Kind kind;
    int chunk, microbatch;
  };
  std::vector<Task> tasks;
  std::vector<What> what;
};

const Predictor::PipelineTasks& Predictor::tasks(const Schedule& s, int microbatches) {
  auto& kept = pipelines_[{s.row->name, s.stages, microbatches, s.chunks}];
  if (kept) return *kept;
  kept = std::make_shared<PipelineTasks>();
  const Schedule schedule = make_schedule(s.row->name, s.stages, microbatches, s.chunks);
  kept->tasks = tasks_of(schedule, durations(schedule, {}), Queue::communication);
  for (int stage = 0; stage < s.stages; stage++)
    for (const Action& a : schedule.actions[stage])
      kept->what.push_back({stage, a.kind, a.chunk, a.microbatch});
  return *kept;
}

// Of an activation between two stages, over one card.
static double exchange_seconds(const Predictor& p, const Job& job, const RankWork& work) {
  const int64_t pp = job.layout["pp"], tp = job.layout["tp"], stride = job.layout.ranks() / pp;
  const bool leaves = pp * stride > p.cluster.devices && !p.cluster.spread;
  const Link link = link_of(p.cluster, 2, leaves ? std::max(stride, p.cluster.devices) : stride);
  const double bytes = work.bytes_between_stages();
  if (p.profile.overlaps_exchanges || job.config.sequence_parallel)
    return collective_seconds(link, 2, Collective::send, bytes);
  return collective_seconds(link, 2, Collective::send, bytes / tp) +
         collective_seconds(link_of(p.cluster, tp, 1), tp, Collective::all_gather, bytes);
}

Prediction Predictor::predict(const Job& job, double limit) {
  const Schedule s = outline(job);
  const auto kinds = chunks_of(s);
  std::map<ChunkKind, ChunkTimes> times;
  Prediction result;
  double exchange = 0, tail = 0;
  for (const auto& stage : kinds) {
    double optimizer = 0, of_stage = 0;
    for (const ChunkKind& kind : stage) {
      RankWork work(*this, job, kind, s.row->splits_backward);
      if (!times.count(kind)) times[kind] = work.run(s.microbatches);
      optimizer += work.optimizer();
      of_stage += times[kind].tail.seconds;
      exchange = exchanges_are_free_ ? 0 : exchange_seconds(*this, job, work);
    }
    result.optimizer = std::max(result.optimizer, optimizer);
    tail = std::max(tail, of_stage);
  }

  // which of three times a micro-batch has
  const auto phase = [&](const PipelineTasks::What& what, int microbatches) -> const Phase& {
    const ChunkTimes& t = times.at(kinds[what.stage][what.chunk]);
    const int which = what.microbatch == 0                  ? kFirst
                      : what.microbatch == microbatches - 1 ? kLast
                                                            : kMiddle;
    return what.kind == Action::forward           ? t.forward[which]
           : what.kind == Action::weight_gradient ? t.weights[which]
                                                  : t.backward[which];
  };
  const auto run_with = [&](double exchange, int m) {
    const PipelineTasks& pipeline = tasks(s, m);
    std::vector<Task> timed = pipeline.tasks;
    // where nothing overlaps, a computation first takes what comes, and then hands on its result
    const double exposed = profile.overlaps_exchanges ? 0 : exchange;
    for (size_t i = 0; i < timed.size(); i++) {
      const auto& what = pipeline.what[i];
      if (what.kind == Action::exchange) timed[i].duration = exchange - exposed;
      else timed[i].duration = phase(what, m).seconds + exposed;
    }
    return makespan(run(timed));
  };
  const auto step = [&](double exchange) {
    return extended_makespan(s.microbatches, s.row->divisor(s.stages),
                             steady_microbatches(*s.row, s.stages),
                             [&](int m) { return run_with(exchange, m); });
  };

  // the busiest stage: its computations, and what they wait for; and a bound: a stage begins behind
  // the first forward of those before it, which end behind its last backward
  double busiest = 0, bound = 0, before = 0;
  const auto add = [](auto& sum, const auto& x, double times) {
    for (size_t a = 0; a < kAxes.size(); a++) sum[a] += times * x[a];
  };
  for (int stage = 0; stage < s.stages; stage++) {
    double busy = 0;
    std::array<double, kAxes.size()> waiting{};
    for (int chunk = 0; chunk < s.chunks; chunk++) {
      add(waiting, times.at(kinds[stage][chunk]).tail.waiting, 1);
      for (const int m : std::set{0, std::min(1, s.microbatches - 1), s.microbatches - 1})
        for (const auto kind : {Action::forward, Action::backward, Action::weight_gradient}) {
          const bool middle = m > 0 && m < s.microbatches - 1;
          const double times = middle ? s.microbatches - 2 : 1;
          const Phase& p = phase({stage, kind, chunk, m}, s.microbatches);
          busy += times * p.seconds;
          add(waiting, p.waiting, times);
        }
    }
    bound = std::max(bound, before + busy);
    const ChunkTimes& first = times.at(kinds[stage][0]);
    before +=
        first.forward[kFirst].seconds + first.backward[s.microbatches > 1 ? kLast : kFirst].seconds;
    if (busy <= busiest) continue;
    busiest = busy;
    result.waiting = waiting;
  }
  result.computing = busiest + tail;
  for (const double w : result.waiting) result.computing -= w;
  if (s.stages > 1) {
    // Where a stage idles, those of its node that share its processor compute. Approximately: two
    // stages alone on one processor are never idle, and are here.
    const int64_t ranks = job.layout.ranks() / s.stages,
                  on_node = cluster.spread ? ceil_div(ranks, cluster.nodes) : ranks,
                  stages = std::max<int64_t>(1, cluster.devices / on_node);
    const double share = std::min<double>(stages, cluster.machine.sharing);
    const auto idle = [&](double pipeline) { return std::max(0.0, pipeline - busiest) / share; };
    result.bubble = idle(bound);
    if (busiest + result.bubble + tail + result.optimizer < limit)
      result.bubble = idle(step(exchange));
  }
  result.seconds = busiest + result.bubble + tail + result.optimizer;
  return result;
}

void Predictor::split_bubble(const Job& job, Prediction& prediction) {
  if (job.layout["pp"] == 1) return;
  Predictor free(*this);
  free.exchanges_are_free_ = true;
  const double exchanging = prediction.seconds - free.predict(job).seconds;
  prediction.waiting[AxisName("pp").index] = exchanging;
  prediction.bubble -= exchanging;
}

// ---- inference

DecodePrediction predict_decoding(const Cluster& cluster, const GptConfig& config,
                                  const Layout& layout, int64_t sequences, int64_t length) {
  const Machine& machine = cluster.machine;
  const Mesh mesh(layout, layout.ranks() - 1);
  const SizedGpt gpt(config, mesh["tp"]);
  const double e = size_of(config.dtype), row = sequences * e, L = config.layers, C = config.width,
               kv = gpt.tp.part(config.kv()).size() * C / config.heads;
  const double position = 2 * kv * L * row;  // of the cache
  double weights = 0, sums = 0;
  for (const Param* p : gpt.params()) weights += p->numel() * e;
  for (const ModelPart& part : gpt.parts()) sums += split_matrices(part).by_inputs;
  const int tp = mesh["tp"].size, pp = mesh["pp"].size;
  const Link link = link_of(cluster, tp, 1), to_next = link_of(cluster, pp, tp);
  constexpr double kKernels = 13;  // of a block: 4 products, their biases, 2 norms, attention, ...
  return {weights / machine.read,
          position * length / machine.read,
          (L * kKernels + 6) * machine.launch,
          sums * collective_seconds(link, tp, Collective::all_reduce, row * C) +
              collective_seconds(link, tp, Collective::all_gather, row * config.vocab),
          (pp - 1) * collective_seconds(to_next, 2, Collective::send, row * C) +
              collective_seconds(to_next, pp, Collective::broadcast, sequences * 4),
          (weights + position * config.context) / pp};
}
