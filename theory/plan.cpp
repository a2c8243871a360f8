// plan.cpp: see plan.h.
#include "theory/plan.h"

#include <algorithm>
#include <functional>
#include <set>

Account account(const TrainingJob& job) {
  Account result;
  const int64_t ranks = job.layout.ranks(), pp = job.layout["pp"];
  for (int stage = 0; stage < pp; stage++) {
    const int rank = ranks / pp * stage + fullest_rank(job);
    const Theory t = theory(job, job.layout, rank, job);
    auto memory = t.persistent;
    memory[int(Memory::gather)] = t.gather_bound;
    memory[int(Memory::activations)] = t.activations;
    memory[int(Memory::workspace)] = t.recomputed;
    if (total(memory) > total(result.memory)) result = {stage, rank, memory, result.sent};
    std::map<std::string, int64_t> sent;
    for (const auto& [key, row] : t.step.rows) sent[std::get<0>(key)] += row.bytes();
    for (const auto& [axis, most] : sent) result.sent[axis] = std::max(result.sent[axis], most);
  }
  return result;
}

// ---- the search

namespace {

std::vector<int64_t> divisors(int64_t n) {
  std::set<int64_t> all;
  for (int64_t d = 1; d * d <= n; d++)
    if (n % d == 0) all.insert({d, n / d});
  return {all.begin(), all.end()};
}

// All, or the one that is wanted.
template <class T> std::vector<T> those(std::vector<T> all, const T& wanted) {
  std::erase_if(all, [&](const T& x) { return wanted != T{} && x != wanted; });
  return all;
}

class Search : Predictor {
 public:
  Search(const Cluster& cluster, const Wanted& wanted)
      : Predictor(cluster, wanted), wanted(wanted) {}

  Plan run(int64_t top) {
    const int64_t ranks = cluster.nodes * cluster.devices,
                  most_tp = std::min(wanted.kv(), wanted.vocab),
                  most_cp = std::max<int64_t>(wanted.context / 2, 1);
    TrainingJob job = wanted;
    job.layout = {};
    job.fsdp.zero = 1;
    for (const int64_t tp : sizes("tp", ranks))
      for (const int64_t cp : sizes("cp", ranks / tp))
        for (const int64_t b : those(divisors(wanted.batch), wanted.microbatch))
          for (const bool by_rows : tp == 1 ? std::vector{false} : wanted.by_rows)
            for (const bool recompute : wanted.recomputes) {
              job.layout["cp"] = cp;
              job.layout["tp"] = tp;
              job.microbatch = b;
              job.sequence_parallel = by_rows;
              job.recompute = recompute;
              for (const int64_t pp : sizes("pp", ranks / tp / cp)) {
                job.layout["pp"] = pp;
                job.layout["fsdp"] = ranks / tp / cp / pp;
                if (job.batch % (job.layout["fsdp"] * b) == 0 && cp <= most_cp && tp <= most_tp)
                  for_schedules(job);
              }
            }
    return fastest(top);
  }

 private:
  std::vector<int64_t> sizes(AxisName axis, int64_t of) const {
    return those(divisors(of), wanted.layout[axis]);
  }

  void for_schedules(TrainingJob job) {
    const int pp = job.layout["pp"];
    for (const std::string& name :
         pp == 1 ? std::vector<std::string>{"1f1b"} : those(schedule_names(), wanted.schedule)) {
      const ScheduleRow& row = schedule_row(name);
      const int asked = pp > 1 ? wanted.chunks : 0;
      std::vector<int> chunks = those({row.chunks()}, asked);
      if (row.placement == Placement::ring)
        chunks = asked ? std::vector{asked} : std::vector{2, 3, 4};
      for (const int v : chunks) {
        job.schedule = name;
        job.chunks = v;
        const Schedule s = outline_of(job, job.layout);
        if (s.microbatches % row.divisor(pp) == 0 && s.positions() <= wanted.layers &&
            int64_t(s.positions()) * s.microbatches <= kMostForwards)
          for_shards(job, s);
      }
    }
  }

  void for_shards(TrainingJob job, const Schedule& s) {
    const TheoryOfChunk any(job, {1, 1, 1});  // says what parts of all kinds keep
    const std::vector<ModelPiece> pieces = gpt.pieces(s.stages_of_positions());
    std::map<ChunkKind, int64_t> most;  // activations of the stages that have such parts
    for (int stage = 0; stage < s.stages; stage++) {
      ChunkKind all{};
      std::vector<Kept> bytes;
      for (int chunk = 0; chunk < s.chunks; chunk++) {
        const ModelPiece& piece = pieces[s.position(stage, chunk)];
        const ChunkKind its = kind_of(piece);
        std::ranges::transform(all, its, all.begin(), std::plus());
        bytes.push_back(any.kept_of(piece));
      }
      most[all] = std::max(most[all], peak(s, stage, bytes) + any.recomputed());
    }
    const TrainingJob most_shards = job;
    double bound = 0;  // of all that follow, found for the first that fits
    const int64_t data = job.layout["fsdp"];
    for (const int64_t fsdp : sizes("fsdp", data)) {
      job.layout["fsdp"] = fsdp;
      job.layout["replicate"] = data / fsdp;
      if (those({data / fsdp}, wanted.layout["replicate"]).empty()) continue;
      const bool shards = fsdp * job.layout["cp"] > 1;
      for (const int zero : shards ? those({1, 2, 3}, wanted.fsdp.zero) : std::vector{1})
        for (const bool reshard : zero < 3 ? std::vector{true} : wanted.reshard) {
          job.fsdp = {zero, reshard, wanted.fsdp.prefetch};
          Planned p{job, {}};
          for (const auto& [kind, kept] : most)
            p.memory = std::max(p.memory, kept + held(job, kind));
          result.layouts++;
          if (p.memory <= cluster.memory) {
            // nothing but tp and cp takes time to send, and the optimizer's state has most shards
            if (bound == 0) bound = step(most_shards, 0, AxisName("cp").index).seconds;
            p.seconds = bound;
            candidates.push_back(p);
          } else if (!result.smallest || p.memory < result.smallest->memory) {
            result.smallest = p;
          }
        }
    }
  }

  // ---- what theory says, asked once for each kind
  // bytes between steps, and of whole units: kept by all that they depend on and that is tried
  int64_t held(const TrainingJob& job, const ChunkKind& kind) {
    const auto& [zero, reshard, prefetch] = job.fsdp;
    int64_t& bytes = held_[{job.layout["tp"], job.layout["fsdp"] * job.layout["cp"], zero, reshard,
                            schedule_row(job.schedule).splits_backward, kind}];
    if (bytes > 0) return bytes;
    TheoryOfChunk t(job, kind);
    t.add_fsdp();
    return bytes = total(t.sum.persistent) + t.sum.gather_bound;
  }
  // the most that is live at once on a stage
  int64_t peak(Schedule s, int stage, const std::vector<Kept>& bytes) {
    if (s.chunks == 1 && !s.row->splits_backward)
      return s.row->live(s.stages, s.microbatches, 1, stage) * bytes[0].forward;
    // of those that are left (gpipe is not) beyond 4 p micro-batches no more are live at once
    s.microbatches = std::min(s.microbatches, 4 * s.stages);
    auto& few = schedules_[to_string(s)];
    if (few.actions.empty()) {
      few = s;
      for (int i = 0; i < s.stages; i++) few.actions.push_back(computations(s, i));
    }
    return peak_live(few, stage, bytes);
  }

  // from the lowest bound on
  Plan fastest(int64_t top) {
    result.fitting = candidates.size();
    std::ranges::stable_sort(candidates, {}, &Planned::seconds);
    auto& best = result.fastest;
    for (Planned& p : candidates) {
      const double limit = std::ssize(best) < top ? INFINITY : best.back().seconds;
      if (limit <= p.seconds) break;
      p.seconds = step(p, limit).seconds;
      result.predicted++;
      best.insert(std::ranges::upper_bound(best, p.seconds, {}, &Planned::seconds), p);
      if (std::ssize(best) > top) best.pop_back();
    }
    for (Planned& p : best) p = predict(p);
    if (best.empty() && result.smallest) *result.smallest = predict(*result.smallest);
    return result;
  }

  const Wanted& wanted;
  std::vector<Planned> candidates;
  Plan result;
  std::map<std::tuple<int64_t, int64_t, int, bool, bool, ChunkKind>, int64_t> held_;
  std::map<std::string, Schedule> schedules_;  // by their to_string
};

}  // namespace

Plan plan(const Cluster& cluster, const Wanted& wanted, int64_t top) {
  return Search(cluster, wanted).run(top);
}
