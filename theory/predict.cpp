// predict.cpp: see predict.h.
#include "theory/predict.h"

#include <algorithm>

// ---- a rank's part of one micro-batch, as it is issued

namespace {

enum { kFirst, kMiddle, kLast };  // micro-batches of a step
int which(int microbatch, int of) {
  return microbatch == 0 ? kFirst : microbatch == of - 1 ? kLast : kMiddle;
}

// Between the ranks of two stages, each of so many, over one card: a pair on two nodes counts.
Link between_stages(const Cluster& c, int64_t ranks, int a, int b) {
  const auto [from, to] = std::minmax(a, b);
  if (!c.spread && from * ranks / c.devices == ((to + 1) * ranks - 1) / c.devices)
    return {c.inside.bandwidth, c.inside.latency, 2, 1, c.profile.direct};
  const int64_t apart = (to - from) * ranks;
  return link_of(c, 2, c.spread ? apart : std::max(apart, c.devices));
}

// How long a chunk takes.
struct ChunkTimes {
  double of[3][4] = {};  // which micro-batch, Action::Kind
  double gathers = 0;    // of the step, while the first activation is on its way
  double tail = 0;       // after the last backward: sums of gradients
  double optimizer = 0;  // then
};

class RankWork : TheoryOfChunk, Issue {
 public:
  // Of a chunk, the only one of its rank; one block stands for all. What is sent over the first
  // `free_axes` of kAxes takes no time.
  RankWork(const Cluster& cluster, const TrainingJob& job, size_t free_axes, ChunkKind chunk)
      : TheoryOfChunk(job, {chunk[ModelPart::embedding], 1, chunk[ModelPart::head]}),
        cluster(cluster),
        free_axes(free_axes),
        chunk(chunk) {}

  // To be called once. later: its stage is not a pipeline's first, and gathers at the begin and
  // sums at the end (fsdp.h). folded: embedding and head are two chunks of one stage; the
  // embedding's sums and updates the units of both.
  ChunkTimes run(bool later, bool folded, int microbatches) {
    ChunkTimes times;
    sums_at_end = !profile.overlaps || (later && !splits && !shards_gradients);
    const auto all = units_of(folded ? gpt.params() : params_of(pieces));
    for (const ModelPart& part : pieces[0]) {
      const int first = uses.size(), count = chunk[part.kind];
      uses.resize(first + count, Use{&part});
      for (const auto& [number, params] : units_of(part.params)) {
        const double elements = padded_unit(all.at(number), shards.size);
        double partial = 0;  // bytes of gradients that tp sums, in one group
        for (const Param* p : all.at(number)) partial += p->partial * p->numel() * gradient;
        for (int i = 0; i < count; i++)
          uses[first + i].units.push_back(
              &units.try_emplace(number + i, Unit{elements, first + i, partial}).first->second);
      }
    }
    const bool ahead = later && !reshards && profile.overlaps && options.fsdp.prefetch > 0;
    for (auto& [key, unit] : units) {
      unit.gathered = ahead;
      if (ahead) times.gathers += over_fsdp.seconds(Collective::all_gather, unit.elements * e);
      if (folded && chunk[ModelPart::head] && key < kFirstBlock) {
        unit.gathered = !reshards;
        unit.first_use = -1;  // in no backward here
      } else {
        times.optimizer += unit.elements / shards.size * profile.optimizer_bytes / cluster.copy;
      }
    }
    const int n = std::min(microbatches, 3);
    for (int i = 0; i < n; i++) {
      double* phases = times.of[which(i, n)];
      is_last = i == n - 1;
      for (size_t u = 0; u < uses.size(); u++) forward(u);
      phases[Action::forward] = end_phase();
      for (size_t u = uses.size(); u-- > 0;) backward(u);
      phases[splits ? Action::input_gradient : Action::backward] = end_phase();
      for (size_t u = uses.size(); splits && u-- > 0;) reduce_gradients(u);
      phases[Action::weight_gradient] = end_phase();
    }
    finish_reduce();
    for (const auto& [key, unit] : units)
      if (sums_at_end && unit.first_use >= 0) wait_for(sum_of(unit));
    times.tail = end_phase();
    return times;
  }

  // of an activation between two stages
  double exchange_seconds(int from, int to) const {
    if (pp_is_free) return 0;
    const double parts = profile.overlaps || by_rows ? 1 : tp.size;
    return between_stages(cluster, stage_ranks, from, to)
               .seconds(Collective::send, activation / parts) +
           (parts > 1 ? over_tp.seconds(Collective::all_gather, activation) : 0);
  }
  // of the tied embedding's gradient, between the first stage and the last of so many
  double tied_seconds(int stages) const {
    if (pp_is_free) return 0;
    const double elements =
        padded_unit(units_of(gpt.params()).at(kTied), shards.size) / shards.size;
    return between_stages(cluster, stage_ranks, 0, stages - 1)
        .seconds(Collective::send, elements * gradient);
  }

 private:
  struct Unit {
    double elements;
    int first_use;   // in whose backward, the last of all, its gradient is complete
    double partial;  // bytes
    bool gathered = false;
    double arrived = 0, reduced = 0;  // when
  };
  struct Use {
    const ModelPart* part;
    std::vector<Unit*> units = {};
    double put_off = 0;  // seconds of weight gradients
  };

  // ---- issuing to the two queues
  // when it ends
  double send(const Link& over, Collective c, double bytes, double calls = 1) {
    return over.ranks == 1 || bytes == 0 ? 0 : communicate(calls * over.seconds(c, bytes / calls));
  }
  // of a phase: how long it took, and longer where something travelled beside computations
  double end_phase() {
    const double now = computed() + (1 - cluster.overlap) * overlapped();
    return now - std::exchange(began, now);
  }
  // of which there are few, again and again
  double product(double m, double n, double k, double batch = 1) {
    double& seconds = products[{m, n, k, batch}];
    if (seconds == 0) seconds = product_seconds(cluster, m, n, k, batch, e);
    return seconds;
  }
  double move(double numbers, double kernels) const {
    return move_seconds(cluster, numbers * e, kernels);
  }
  void weight(double seconds) {
    if (splits) put_off += seconds;
    else compute(seconds);
  }
  // rows of width C over tp: their sum, or all of them where a rank has a share
  double tp_sum() {
    return send(over_tp, by_rows ? Collective::reduce_scatter : Collective::all_reduce, whole);
  }
  double tp_gather() { return by_rows ? send(over_tp, Collective::all_gather, whole) : 0; }

  // ---- blocks, head, embedding
  void attention(bool backward) {
    // in each of n rounds all queries meet the keys of as many tokens
    const double n = cp.size, T = config.context / n, batch = B * heads;
    const bool flash = config.attention == AttentionKind::flash;
    double computing = 0;
    if (profile.stores_scores || !flash) {
      if (backward && flash && !config.recompute) attention(false);  // selective recomputation
      const double scores = (backward ? profile.backward : profile.forward).scores;
      computing = n * ((backward ? 2 : 1) * (product(T, T, D, batch) + product(T, D, T, batch)) +
                       move(scores * batch * T * T, 2));
    } else {
      // the causal mask leaves half of 2 products forward and 5 backward, of 2 operations each
      const double rate =
          cluster.products.rbegin()->second * profile.flash_share / cluster.slower(e);
      computing = (backward ? 5 : 2) * R * config.context * channels / rate +
                  cluster.launch * (backward ? 2 * n + 1 : n);
    }
    if (n == 1) return compute(computing);
    // While keys and values of the next rank travel, and gradients of the last, those that are here
    // are attended to; the last gradients come home alone. Results of rounds are merged and added.
    const double queries = R * channels, keys = 2 * R * kv_channels,
                 merged = backward
                              ? (n - 1) * (3 * keys + 2 * queries) * g + (queries + keys) * (g + e)
                              : (n - 1) * 3 * queries * g + queries * (g + e),
                 arrives = send(over_cp, Collective::send,
                                keys * ((n - 1) * e + (backward ? (n - 2) * g : 0)), n - 1);
    compute(computing * (n - 1) / n +
            move_seconds(cluster, 2 * keys * e + merged, n + 1 + backward));
    wait_for(arrives);
    compute(computing / n);
    if (backward) wait_for(send(over_cp, Collective::send, keys * g));
  }
  void block_forward() {
    const Passes& p = profile.forward;
    const double half = move(p.rows / 2 * S * C, p.kernels / 2);
    wait_for(tp_gather());
    compute(half + product(R, channels + 2 * kv_channels, C));
    attention(false);
    compute(move(p.columns * R * channels, 0) + product(R, C, channels));
    wait_for(tp_sum());
    wait_for(tp_gather());
    compute(half + product(R, F, C) + move(p.hidden * R * F, 0) + product(R, C, F));
    wait_for(tp_sum());
  }
  // of a matrix split by its outputs, n of them on this rank
  void column_backward(double n) {
    const double saved = tp_gather();  // of the share that was
    compute(product(R, C, n));
    wait_for(saved);
    const double sum = tp_sum();
    if (!profile.overlaps) wait_for(sum);
    weight(product(C, n, R));
    wait_for(sum);
  }
  void row_backward(double n) {
    wait_for(tp_gather());
    compute(product(R, n, C));
    weight(product(n, C, R));
  }
  void block_backward() {
    if (config.recompute) block_forward();
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
      wait_for(tp_sum());
    } else {
      wait_for(tp_gather());
      compute(move(2 * S * C, 1) + product(R, V, C) + move(profile.forward.logits * R * V, 4));
      wait_for(send(over_tp, Collective::all_reduce, R * g));      // maxima
      wait_for(send(over_tp, Collective::all_reduce, 2 * R * g));  // sums, targets' logits
    }
  }
  void part_backward(ModelPart::Kind kind) {
    if (kind == ModelPart::block) return block_backward();
    if (kind == ModelPart::embedding) {
      wait_for(tp_gather());
      compute(move(3 * R * C, 1));
    } else {
      compute(move(profile.backward.logits * R * V, 2));
      column_backward(V);
      compute(move(4 * S * C, 1));
    }
  }

  // ---- FSDP around them: the names are those of fsdp.cpp
  void unshard(int use, int direction) {
    for (int k = 0; k <= options.fsdp.prefetch; k++) {
      const int next = use + k * direction;
      if (next < 0 || next >= std::ssize(uses)) break;
      if (direction < 0 && uses[next].part->backward_reads == BackwardReads::nothing) continue;
      for (Unit* u : uses[next].units)
        if (!std::exchange(u->gathered, true))
          u->arrived = send(over_fsdp, Collective::all_gather, u->elements * e);
    }
    for (Unit* u : uses[use].units) wait_for(u->arrived);
  }
  void reshard(int use) {
    if (reshards)
      for (Unit* u : uses[use].units) u->gathered = false;
  }
  void forward(int use) {
    unshard(use, +1);
    part_forward(uses[use].part->kind);
    if (uses[use].part->backward_reads != BackwardReads::values_kept) reshard(use);
  }
  void backward(int use) {
    unshard(use, -1);
    part_backward(uses[use].part->kind);
    uses[use].put_off = std::exchange(put_off, 0);
    if (!splits) reduce_gradients(use);
    reshard(use);
  }
  // over its shards, and in the last micro-batch over copies
  double sum_of(const Unit& u) {
    const double bytes = u.elements * gradient;
    double ends = send(over_tp, Collective::all_reduce, u.partial);
    ends = std::max(ends, send(over_fsdp, Collective::reduce_scatter, bytes));
    if (is_last)
      ends = std::max(ends, send(over_copies, Collective::all_reduce, bytes / shards.size));
    return ends;
  }
  void reduce_gradients(int use) {
    compute(uses[use].put_off);
    for (Unit* u : uses[use].units) {
      if (u->first_use != use || (is_last ? sums_at_end : !shards_gradients)) continue;
      u->reduced = sum_of(*u);
      if (shards_gradients) finish_reduce();  // of the one before
      summing = u;
      if (options.fsdp.prefetch == 0) finish_reduce();
    }
  }
  void finish_reduce() {
    const Unit* u = std::exchange(summing, nullptr);
    if (!u) return;
    wait_for(u->reduced);
    if (shards_gradients) compute(move_seconds(cluster, 3 * u->elements / shards.size * g, 1));
  }

  // of n ranks, whose collectives are those of an axis
  Link link(AxisName axis, int64_t n, int64_t stride) const {
    Link link = link_of(cluster, axis.index < free_axes ? 1 : n, stride);
    // round a ring one rank of a node sends to the next node, over one card
    const bool is_ring = axis.index == AxisName("cp").index;
    if (is_ring && link.nodes > 1)
      link.bandwidth = std::min(cluster.inside.bandwidth, cluster.between.bandwidth);
    if (axis.index == AxisName("fsdp").index)
      link.bandwidth = std::min(link.bandwidth, profile.fsdp_bandwidth);
    return link;
  }

  const Cluster& cluster;
  const SoftwareProfile& profile = cluster.profile;
  const size_t free_axes;
  const bool pp_is_free = free_axes > AxisName("pp").index;
  const int64_t stage_ranks = mesh.size / pp.size;
  const ChunkKind chunk;
  const bool splits = schedule.row->splits_backward,
             reshards = shards_parameters && options.fsdp.reshard;
  bool is_last = false, sums_at_end = false;
  Link over_tp = link("tp", tp.size, 1), over_cp = link("cp", cp.size, tp.size),
       over_fsdp = link("fsdp", shards.size, tp.size),
       over_copies = link("replicate", mesh["replicate"].size, int64_t(shards.size) * tp.size);
  double channels = heads * D, kv_channels = kv * D;
  // bytes on the wire
  double gradient = profile.gradient_bytes > 0 ? profile.gradient_bytes : g;
  std::map<std::array<double, 4>, double> products;
  std::map<int, Unit> units;
  std::vector<Use> uses;
  const Unit* summing = nullptr;  // the last whose sum nobody has waited for: sums end in order
  double began = 0;               // the phase
  double put_off = 0;             // of this use
};

}  // namespace

ChunkKind kind_of(ModelPiece piece) {
  ChunkKind parts{};
  for (const ModelPart& part : piece) parts[part.kind]++;
  return parts;
}

int64_t fullest_rank(const TrainingJob& job) {
  const int cp = job.layout["cp"];
  const ContextParallel axis({"cp", cp});
  int fullest = cp - 1;
  for (int r = 0; r < cp && job.context % (2 * cp); r++)
    if (axis.part_of(r, job.context).rows() > axis.part_of(fullest, job.context).rows())
      fullest = r;
  const int64_t last = job.layout.ranks() / job.layout["pp"] - 1;
  return last - (cp - 1 - fullest) * job.layout["tp"];
}

static GptConfig of_blocks(GptConfig config, int64_t blocks) {
  config.layers = blocks;
  return config;
}

TheoryOfChunk::TheoryOfChunk(const TrainingJob& job, const ChunkKind& chunk)
    : TheoryOfRank{of_blocks(job, chunk[ModelPart::block]), job,
                   Mesh(job.layout, fullest_rank(job)), Schedule{&schedule_row(job.schedule)}} {
  pieces = {gpt.parts().subspan(!chunk[ModelPart::embedding], total(chunk))};
}

// ---- the step

// Computations last longer by such a share of the time in which their rank also exchanges.
static void slow_down(std::vector<Task>& tasks, double share) {
  const std::vector<Span> spans = run(tasks);
  std::map<int, std::vector<Span>> exchanges;  // of each rank, in order, once both ends have come
  for (size_t i = 0; i < tasks.size(); i++)
    if (tasks[i].queue == Queue::communication)
      exchanges[tasks[i].rank].push_back({spans[i].end - tasks[i].duration, spans[i].end});
  for (size_t i = 0; i < tasks.size(); i++) {
    if (tasks[i].queue != Queue::compute) continue;
    const auto& of_rank = exchanges[tasks[i].rank];
    auto beside = std::ranges::upper_bound(of_rank, spans[i].start, {}, &Span::end);
    for (; beside != of_rank.end() && beside->start < spans[i].end; beside++)
      tasks[i].duration +=
          share * (std::min(beside->end, spans[i].end) - std::max(beside->start, spans[i].start));
  }
}

Prediction Predictor::step(const TrainingJob& job, double limit, size_t free_axes) {
  const Schedule s = outline_of(job, job.layout);
  const bool ends_meet = s.stage_of(0) == s.stage_of(s.positions() - 1);
  std::map<std::tuple<bool, bool, ChunkKind>, ChunkTimes> known;
  std::vector<ChunkTimes> times;  // [position]
  for (const ModelPiece& piece : gpt.pieces(s.stages_of_positions())) {
    const ChunkKind kind = kind_of(piece);
    const bool later = s.stage_of(times.size()) > 0,
               folded = ends_meet && has_embedding(piece) != has_head(piece);
    const auto [of_kind, is_new] = known.try_emplace({later, folded, kind});
    if (is_new)
      of_kind->second = RankWork(cluster, job, free_axes, kind).run(later, folded, s.microbatches);
    times.push_back(of_kind->second);
  }
  Prediction result;
  // the busiest stage, and a bound: a stage begins after the first forward of those before it,
  // which end after its last backward; where that is split, its last weight gradients may wait
  // first, middle and last micro-batches; of a single one the last has no times
  const double count[] = {1, std::max(0.0, s.microbatches - 2.0), 1};
  std::vector<double> tails(s.stages);
  double busiest = 0, bound = 0, forwards = 0, backwards = 0, late = 0;
  for (int stage = 0; stage < s.stages; stage++) {
    double busy = 0, gathers = 0, optimizer = 0;
    for (int chunk = 0; chunk < s.chunks; chunk++) {
      const ChunkTimes& t = times[s.position(stage, chunk)];
      tails[stage] += t.tail;
      gathers += t.gathers;
      optimizer += t.optimizer;
      for (const int which : {kFirst, kMiddle, kLast})
        for (const double seconds : t.of[which]) busy += count[which] * seconds;
    }
    // squares (cleared, of pieces, of parameters), their norm, and the update
    result.optimizer = std::max(result.optimizer, optimizer + 5 * cluster.launch);
    busiest = std::max(busiest, busy + tails[stage]);
    bound = std::max(bound, forwards + busy + backwards);
    late = std::max(late, gathers - forwards);
    const ChunkTimes& first = times[s.position(stage, 0)];
    forwards += first.of[kFirst][Action::forward];
    backwards += first.of[s.microbatches > 1 ? kLast : kFirst][Action::backward];
  }

  // embedding and head add up their gradients when all else is done
  const auto any = [&] { return RankWork(cluster, job, free_axes, {1, 1, 1}); };
  result.seconds = busiest + result.optimizer + (ends_meet ? 0 : any().tied_seconds(s.stages));
  // Where a stage idles, those of its node that share its processor compute. Approximately: two
  // stages alone on one processor are never idle, and are here.
  const int64_t ranks = job.layout.ranks() / s.stages,
                on_node = cluster.spread ? ceil_div(ranks, cluster.nodes) : ranks;
  const double share = std::clamp<double>(cluster.devices / on_node, 1, cluster.sharing);
  const auto idle = [&](double pipeline) { return std::max(0.0, pipeline - busiest) / share; };
  result.bubble = idle(bound);
  if (s.stages > 1 && result.seconds + result.bubble < limit) {
    // where nothing overlaps, a computation first takes what comes, and then hands on its result
    const RankWork work = any();
    const double exposed = cluster.profile.overlaps ? 0 : work.exchange_seconds(0, s.stages - 1);
    const auto exchange = [&](const Action& a) {
      double longest = 0;
      for (const Transfer& t : a.transfers)
        longest = std::max(longest, work.exchange_seconds(t.from, t.to));
      return std::max(0.0, longest - exposed);
    };
    bool slows = false;
    const auto makespan = [&](int m) {
      auto& [schedule, tasks] = pipelines_[to_string(Schedule{s.row, s.stages, m, s.chunks})];
      if (tasks.empty()) {
        schedule = make_schedule(s.row->name, s.stages, m, s.chunks);
        tasks = tasks_of(schedule, durations(schedule, {}));
      }
      auto task = tasks.begin();
      for (int stage = 0; stage < s.stages; stage++) {
        for (const Action& a : schedule.actions[stage])
          (task++)->duration =
              a.kind == Action::exchange
                  ? exchange(a)
                  : times[s.position(stage, a.chunk)].of[which(a.microbatch, m)][a.kind] +
                        (a.kind == Action::weight_gradient ? 0 : exposed);
        (task - 1)->duration += tails[stage];
      }
      if (slows) slow_down(tasks, 1 - cluster.overlap);
      return std::ranges::max(run(tasks), {}, &Span::end).end;
    };
    const double fast = extended_makespan(s, makespan);
    result.bubble = idle(fast) + late;
    slows = cluster.overlap < 1;
    if (slows) result.seconds += extended_makespan(s, makespan) - fast;  // no stage idles for it
  }
  result.seconds += result.bubble;
  return result;
}

Prediction Predictor::predict(const TrainingJob& job) {
  Prediction result = step(job);
  double left = result.seconds;
  for (size_t axis = 0; axis < kAxes.size(); axis++) {
    if (job.layout.sizes[axis] == 1) continue;
    const Prediction without = step(job, INFINITY, axis + 1);
    result.waiting[axis] = std::max(0.0, left - without.seconds);
    left -= result.waiting[axis];
    result.bubble = std::min(without.bubble, left - result.optimizer);
  }
  result.computing = left - result.bubble - result.optimizer;
  return result;
}

// ---- inference

DecodePrediction predict_decoding(const Cluster& cluster, const GptConfig& config,
                                  const Layout& layout, int64_t sequences, int64_t length) {
  const TheoryOfChunk t({config, {}, layout}, {1, config.layers, 1});
  const double C = t.C, L = config.layers, row = sequences * t.e,
               position = 2 * t.kv * t.D * row;                 // of a block's cache
  double numbers = -C * config.context, sums = 0, fullest = 0;  // positions: a token reads a row
  for (const Param* p : t.gpt.params()) numbers += p->numel();
  for (const ModelPart& part : t.gpt.parts()) sums += split_matrices(part).by_inputs;
  const int64_t tp = layout["tp"], pp = layout["pp"];
  const Link link = link_of(cluster, tp, 1);
  double stages = link_of(cluster, pp, tp).seconds(Collective::broadcast, sequences * 4);
  for (int stage = 1; stage < pp; stage++)
    stages += between_stages(cluster, tp, stage - 1, stage).seconds(Collective::send, row * C);
  // of a block: 4 products, 2 norms, attention, gelu, a bias, add; and besides: embedding, last
  // norm, logits, a copy of these without padding
  constexpr double kKernels = 10, kOthers = 4;
  for (const ModelPiece& piece : t.gpt.pieces(pp)) {
    double held = position * config.context * kind_of(piece)[ModelPart::block];
    for (const Param* p : params_of({piece})) held += elements(p->local_shape()) * t.e;
    fullest = std::max(fullest, held);
  }
  const double rate = cluster.products.rbegin()->second / cluster.slower(t.e);
  return {{std::max(numbers * t.e / cluster.read, 2 * numbers * sequences / rate),
           position * L * length / cluster.read, (L * kKernels + kOthers) * cluster.launch,
           sums * link.seconds(Collective::all_reduce, row * C) +
               link.seconds(Collective::all_gather, sequences * t.g * config.vocab),
           stages},
          fullest};
}
