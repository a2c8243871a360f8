// plan.cpp: see plan.h.
#include "theory/plan.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <utility>

int64_t StageMemory::total() const {
  int64_t sum = 0;
  for (const int64_t bytes : held) sum += bytes;
  return sum;
}

int Account::fullest() const {
  const auto most = std::ranges::max_element(stages, {}, &StageMemory::total);
  return most - stages.begin();
}

Account account(const Job& job) {
  Account result;
  const int64_t ranks = job.layout.ranks(), pp = job.layout["pp"];
  for (int64_t stage = 1; stage <= pp; stage++) {
    // the last rank of a stage has the largest part of everything
    const Theory t = theory(job.config, job.layout, ranks / pp * stage - 1, job.options);
    StageMemory memory{t.persistent};
    memory.held[int(Memory::gather)] = t.gather_bound;
    memory.held[int(Memory::activations)] = t.activations;
    result.stages.push_back(memory);
    std::map<std::string, int64_t> sent;
    for (const auto& [key, row] : t.step.rows) sent[std::get<0>(key)] += row.bytes();
    for (const auto& [axis, bytes] : sent) result.sent[axis] = std::max(result.sent[axis], bytes);
  }
  return result;
}

// ---- the search

namespace {

std::vector<int64_t> divisors(int64_t n) {
  std::vector<int64_t> all;
  for (int64_t d = 1; d * d <= n; d++) {
    if (n % d) continue;
    all.push_back(d);
    if (d * d < n) all.push_back(n / d);
  }
  std::ranges::sort(all);
  return all;
}

// All, or the one that is wanted.
template <class T> std::vector<T> those(std::vector<T> all, const T& wanted) {
  std::erase_if(all, [&](const T& x) { return wanted != T{} && x != wanted; });
  return all;
}

class Search {
 public:
  Search(const Cluster& cluster, const Profile& profile, const GptConfig& config,
         const Wanted& wanted, int64_t memory)
      : predictor(cluster, profile, config), config(config), wanted(wanted), memory(memory) {}

  Plan run(int64_t top) {
    const int64_t ranks = predictor.cluster.nodes * predictor.cluster.devices;
    for (const int64_t tp : sizes("tp", ranks, std::min(config.kv(), config.vocab)))
      for (const int64_t cp : sizes("cp", ranks / tp, std::max<int64_t>(config.context / 2, 1)))
        for (const int64_t pp : sizes("pp", ranks / tp / cp, config.layers)) {
          const int64_t data = ranks / tp / cp / pp;
          if (wanted.batch % data) continue;
          Job job{config, {}, {{"pp", pp}, {"cp", cp}, {"tp", tp}}};
          job.options.batch = wanted.batch;
          for (const int64_t b : those(divisors(wanted.batch / data), wanted.microbatch))
            for (const bool by_rows :
                 tp == 1 ? std::vector{false} : those({false, true}, wanted.sequence_parallel))
              for (const bool recompute : those({false, true}, wanted.recompute)) {
                job.options.microbatch = b;
                job.config.sequence_parallel = by_rows;
                job.config.recompute = recompute;
                for_schedules(job, data);
              }
        }
    return predict(top);
  }

 private:
  std::vector<int64_t> sizes(AxisName axis, int64_t of, int64_t most) const {
    std::vector<int64_t> all = those(divisors(of), wanted.layout[axis]);
    std::erase_if(all, [=](int64_t d) { return d > most; });
    return all;
  }

  void for_schedules(Job job, int64_t data) {
    const int pp = job.layout["pp"], m = job.options.batch / data / job.options.microbatch;
    for (const std::string& name :
         pp == 1 ? std::vector<std::string>{"1f1b"} : those(schedule_names(), wanted.schedule)) {
      const ScheduleRow& row = schedule_row(name);
      if (m % row.divisor(pp)) continue;
      std::vector<int64_t> chunks{pp == 1 ? 1 : row.chunks()};
      if (pp > 1 && row.place == Place::ring)
        chunks = wanted.chunks ? std::vector{wanted.chunks} : std::vector<int64_t>{2, 3, 4};
      else if (pp > 1) chunks = those(chunks, wanted.chunks);
      for (const int64_t V : chunks) {
        if (pp * V > config.layers || pp * V * m > kMostForwards) continue;
        job.options.schedule = name;
        job.options.chunks = V;
        for_shards(job, Schedule{&row, pp, m, int(V)}, data);
      }
    }
  }

  void for_shards(Job job, const Schedule& s, int64_t data) {
    const auto& chunks = chunks_of(s);
    const auto [of_block, of_head] = kept(job);
    const auto times = block_seconds(job, s.row->splits_backward);
    // by what a stage has: the most that its backwards keep; and the bound of the step's time
    std::map<ChunkKind, int64_t> activations;
    double bound = 0, before = 0;
    for (int stage = 0; stage < s.stages; stage++) {
      ChunkKind all{0, false, false};
      std::vector<Kept> bytes;
      double busy = 0;
      for (const ChunkKind& c : chunks[stage]) {
        all.blocks += c.blocks;
        all.embedding |= c.embedding;
        all.head |= c.head;
        bytes.push_back({c.blocks * of_block.forward + c.head * of_head.forward,
                         c.blocks * of_block.input_gradient + c.head * of_head.input_gradient});
        busy += seconds(times, c, true);
      }
      int64_t& most = activations[all];
      most = std::max(most, peak(s, stage, bytes));
      bound = std::max(bound, before + s.microbatches * busy);
      before += seconds(times, chunks[stage][0], false);
    }
    bound /= predictor.cluster.machine.sharing;
    for (const int64_t fsdp : sizes("fsdp", data, data)) {
      job.layout["fsdp"] = fsdp;
      job.layout["replicate"] = data / fsdp;
      if (wanted.layout["replicate"] > 0 && wanted.layout["replicate"] != data / fsdp) continue;
      const bool shards = fsdp * job.layout["cp"] > 1;
      const int prefetch = data * job.layout["cp"] > 1 ? int(wanted.prefetch) : 0;
      for (const int64_t zero : shards ? those({1, 2, 3}, wanted.zero) : std::vector<int64_t>{1})
        for (const std::string& reshard :
             zero == 3 ? those({"yes", "no"}, wanted.reshard) : std::vector<std::string>{"yes"}) {
          job.options.fsdp = {int(zero), reshard == "yes", prefetch};
          Candidate c{bound, {job, 0, {}}};
          for (const auto& [kind, kept] : activations) {
            const Held h = held(job, kind, s.row->splits_backward);
            c.planned.memory = std::max(c.planned.memory, kept + int64_t(h.bytes));
            c.bound = std::max(c.bound, h.sending + s.microbatches * h.sending_each);
          }
          result.layouts++;
          const bool fits = c.planned.memory <= memory;
          result.fitting += fits;
          if (fits) keep(c);
          else if (!result.smallest || c.planned.memory < result.smallest->memory)
            result.smallest = c.planned;
        }
    }
  }

  // ---- what theory says, asked once for each kind
  // in a block, and in the head
  std::pair<Kept, Kept> kept(const Job& job) {
    const auto [found, is_new] = kept_.try_emplace(key_of(job));
    if (!is_new) return found->second;
    FewBlocks one(job, 1);
    const TheoryOfRank t{one.config, one.options, one.mesh, Schedule{&schedule_row("1f1b")}};
    return found->second = {t.kept(t.gpt.parts()[1]), t.kept(t.gpt.parts()[2])};
  }
  // between steps, and of whole units; and how long they are sent, once and in each micro-batch
  struct Held {
    double bytes, sending, sending_each;
    Held operator*(double x) const { return {bytes * x, sending * x, sending_each * x}; }
    Held operator+(const Held& h) const {
      return {bytes + h.bytes, sending + h.sending, sending_each + h.sending_each};
    }
  };
  Held ask(const Job& job, const ChunkKind& kind, int64_t blocks, bool splits) const {
    FewBlocks few(job, blocks);
    const Schedule one_stage{&schedule_row(splits ? "zb" : "1f1b")};
    double sending[2] = {};  // with one micro-batch, and with two
    Held h{};
    for (const int m : {1, 2}) {
      TheoryOfRank t{few.config, few.options, few.mesh, one_stage};
      t.schedule.microbatches = m;
      t.m = m;
      t.pieces = {t.gpt.parts().subspan(!kind.embedding, blocks + kind.embedding + kind.head)};
      t.add_fsdp();
      h.bytes = t.sum.gather_bound;
      for (const int64_t bytes : t.sum.persistent) h.bytes += bytes;
      const int64_t tp = job.layout["tp"];
      for (const auto& [key, row] : t.sum.step.rows) {
        const auto& [axis, collective, purpose] = key;
        const Link link =
            link_of(predictor.cluster, row.n, axis == "replicate" ? tp * t.fsdp.size : tp);
        const double of_gradients = predictor.profile.gradient_bytes,  // on the wire
            share =
                of_gradients > 0 && collective != Collective::all_gather ? of_gradients / t.g : 1;
        sending[m - 1] += row.calls * link.latency_of(row.n, collective) +
                          share * double(row.numerator) / row.n / link.bandwidth;
      }
    }
    h.sending_each = sending[1] - sending[0];
    h.sending = sending[0] - h.sending_each;
    return h;
  }
  Held held(const Job& job, const ChunkKind& kind, bool splits) {
    const FsdpOptions& o = job.options.fsdp;
    // models of three blocks at most do not show what more than one unit gathered ahead takes
    const int64_t exactly = o.prefetch > 1 ? kind.blocks : 0;
    auto& of =
        held_[{job.layout["tp"], job.layout["fsdp"] * job.layout["cp"], job.layout["replicate"],
               4 * o.zero + 2 * o.reshard + splits, kind.embedding, kind.head, exactly}];
    if (exactly && of.empty()) of.push_back(ask(job, kind, exactly, splits));
    if (of.empty())
      for (const int64_t blocks : {1, 2, 3}) of.push_back(ask(job, kind, blocks, splits));
    return exactly || kind.blocks == 1 ? of[0] : of[1] + (of[2] + of[1] * -1) * (kind.blocks - 2);
  }
  // the most that is live at once on a stage
  int64_t peak(const Schedule& s, int stage, const std::vector<Kept>& bytes) {
    if (s.chunks == 1 && !s.row->splits_backward)
      return s.row->live(s.stages, s.microbatches, 1, stage) * bytes[0].forward;
    // beyond 4 p micro-batches no more are live at once
    Schedule few = s;
    few.microbatches = std::min(s.microbatches, 4 * s.stages);
    auto& states = states_[{s.row->name, s.stages, few.microbatches, s.chunks, stage}];
    if (states.empty()) {
      std::vector<Kept> live(s.chunks, {0, 0});  // how many micro-batches keep each
      for (const Action& a : computations(few, stage)) {
        auto& [forward, input_gradient] = live[a.chunk];
        (a.kind == Action::weight_gradient ? input_gradient : forward) +=
            a.kind == Action::forward ? 1 : -1;
        input_gradient += a.kind == Action::input_gradient;
        states.insert(live);
      }
    }
    int64_t most = 0;
    for (const auto& live : states) {
      int64_t sum = 0;
      for (int c = 0; c < s.chunks; c++)
        sum +=
            live[c].forward * bytes[c].forward + live[c].input_gradient * bytes[c].input_gradient;
      most = std::max(most, sum);
    }
    return most;
  }
  const std::vector<std::vector<ChunkKind>>& chunks_of(const Schedule& s) {
    auto& kinds = chunks_[{s.row->place, s.stages, s.chunks}];
    if (kinds.empty()) kinds = predictor.chunks_of(s);
    return kinds;
  }
  // forward, backward and weight gradients: of a block, of the embedding, of the head
  using BlockSeconds = std::array<std::array<double, 3>, 3>;
  const BlockSeconds& block_seconds(const Job& job, bool splits) {
    const auto [of, is_new] = seconds_.try_emplace({key_of(job), splits});
    if (is_new) {
      Job alone = job;
      alone.layout["fsdp"] = alone.layout["replicate"] = 1;
      alone.options.fsdp = {1, true, 0};
      const ChunkKind kinds[] = {{1, false, false}, {1, true, false}, {1, false, true}};
      for (int i = 0; i < 3; i++) of->second[i] = predictor.chunk_seconds(alone, kinds[i], splits);
      for (int i = 1; i < 3; i++)
        for (int k = 0; k < 3; k++) of->second[i][k] -= of->second[0][k];
    }
    return of->second;
  }
  static double seconds(const BlockSeconds& s, const ChunkKind& c, bool weights) {
    double sum = 0;
    for (int k = 0; k < 2 + weights; k++)
      sum += c.blocks * s[0][k] + c.embedding * s[1][k] + c.head * s[2][k];
    return sum;
  }
  using Key = std::tuple<int64_t, int64_t, int64_t, bool, bool>;
  static Key key_of(const Job& job) {
    return {job.layout["tp"], job.layout["cp"], job.options.microbatch,
            job.config.sequence_parallel, job.config.recompute};
  }

  // ---- from the lowest bound on
  struct Candidate {
    double bound;
    Planned planned;
  };
  // those of the lowest bounds: far more than are predicted
  void keep(const Candidate& c) {
    constexpr size_t kMost = 200'000;
    candidates.push_back(c);
    if (candidates.size() < kMost) return;
    std::ranges::nth_element(candidates, candidates.begin() + kMost / 2, {}, &Candidate::bound);
    candidates.resize(kMost / 2);
  }
  Plan predict(int64_t top) {
    std::ranges::sort(candidates, {}, &Candidate::bound);
    const auto faster = [](const Planned& a, const Planned& b) {
      return a.time.seconds < b.time.seconds;
    };
    auto& best = result.fastest;  // a heap: the slowest is first
    for (Candidate& c : candidates) {
      const bool full = int64_t(best.size()) == top;
      const double limit = full ? best[0].time.seconds : INFINITY;
      if (limit <= c.bound) break;
      c.planned.time = predictor.predict(c.planned.job, limit);
      best.push_back(c.planned);
      result.predicted++;
      std::ranges::push_heap(best, faster);
      if (!full) continue;
      std::ranges::pop_heap(best, faster);
      best.pop_back();
    }
    std::ranges::sort(best, faster);
    for (Planned& p : best) predictor.split_bubble(p.job, p.time);
    return result;
  }

  Predictor predictor;
  GptConfig config;
  const Wanted& wanted;
  int64_t memory;
  std::vector<Candidate> candidates;
  Plan result;
  std::map<Key, std::pair<Kept, Kept>> kept_;
  std::map<std::tuple<int64_t, int64_t, int64_t, int, bool, bool, int64_t>, std::vector<Held>>
      held_;
  std::map<std::tuple<const char*, int, int, int, int>, std::set<std::vector<Kept>>> states_;
  std::map<std::tuple<Place, int, int>, std::vector<std::vector<ChunkKind>>> chunks_;
  std::map<std::pair<Key, bool>, BlockSeconds> seconds_;
};

}  // namespace

Plan plan(const Cluster& cluster, const Profile& profile, const GptConfig& config,
          const Wanted& wanted, int64_t memory, int64_t top) {
  return Search(cluster, profile, config, wanted, memory).run(top);
}
