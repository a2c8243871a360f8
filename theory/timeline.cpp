// timeline.cpp: see timeline.h.
#include "theory/timeline.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "support/check.h"

std::vector<Span> run(const std::vector<Task>& tasks) {
  const int n = tasks.size();
  int ranks = 0, collectives = 0;
  for (const Task& t : tasks) {
    ranks = std::max(ranks, t.rank + 1);
    collectives = std::max(collectives, t.collective + 1);
  }
  const auto queue_of = [](const Task& t) { return 2 * t.rank + int(t.queue); };
  std::vector<std::vector<int>> queues(2 * ranks);
  for (int i = 0; i < n; i++) queues[queue_of(tasks[i])].push_back(i);
  struct Meeting {
    int missing = 0;  // ranks
    double start = 0, longest = 0;
    std::vector<int> there = {};
  };
  std::vector<Meeting> meetings(collectives);
  for (const Task& t : tasks)
    if (t.collective >= 0) meetings[t.collective].missing++;

  std::vector<Span> spans(n, {-1, -1});
  std::vector<double> free(2 * ranks);
  std::vector<size_t> next(2 * ranks);  // of each queue
  int done = 0;
  const auto end = [&](int i, double time) {
    const int queue = queue_of(tasks[i]);
    spans[i].end = free[queue] = time;
    next[queue]++;
    done++;
  };
  const auto proceed = [&](int queue) {  // does the next task, if it can
    if (next[queue] == queues[queue].size()) return false;
    const int i = queues[queue][next[queue]];
    const Task& t = tasks[i];
    if (spans[i].start >= 0) return false;  // it stands in a collective
    if (t.after >= 0 && spans[t.after].end < 0) return false;
    const double start = std::max(free[queue], t.after >= 0 ? spans[t.after].end : 0);
    spans[i].start = start;
    if (t.collective < 0) {
      end(i, start + t.duration);
      return true;
    }
    Meeting& m = meetings[t.collective];
    m.start = std::max(m.start, start);
    m.longest = std::max(m.longest, t.duration);
    m.there.push_back(i);
    if (--m.missing > 0) return false;
    for (const int member : m.there) end(member, m.start + m.longest);
    return true;
  };
  for (int before = -1; before < done;) {
    before = done;
    for (int queue = 0; queue < 2 * ranks; queue++)
      while (proceed(queue)) {
      }
  }
  REQUIRE(done == n, "tasks of this timeline wait for each other");
  return spans;
}

double makespan(const std::vector<Span>& spans) {
  double last = 0;
  for (const Span& s : spans) last = std::max(last, s.end);
  return last;
}

// ---- a pipeline

std::vector<Task> tasks_of(const Schedule& s, const Durations& durations) {
  std::vector<Task> tasks;
  std::map<std::pair<int, Transfer>, int> collective;  // by one end: stage and transfer
  int collectives = 0;
  for (int stage = 0; stage < s.stages; stage++) {
    std::map<Transfer, int> came;  // by which task
    std::map<Action, int> made;
    for (int i = 0; i < int(s.actions[stage].size()); i++) {
      const Action& a = s.at(stage, i);
      Task task{stage, Queue::compute, durations[stage][i]};
      const int number = tasks.size();
      if (a.kind == Action::exchange) {
        task.queue = Queue::communication;
        for (const Transfer& t : a.transfers) {
          if (t.send) {
            const auto kind =
                t.payload == Transfer::activation ? Action::forward : Action::input_gradient;
            task.after = std::max(task.after, made.at({kind, t.microbatch, t.chunk}));
          } else {
            came[t] = number;
          }
          const auto facing = collective.find({t.peer, other_end(s, stage, t)});
          if (facing != collective.end()) task.collective = facing->second;
        }
        if (task.collective < 0) task.collective = collectives++;
        for (const Transfer& t : a.transfers) collective[{stage, t}] = task.collective;
      } else {
        const auto input = transfer_of(s, stage, a, false);
        if (input && input->peer != stage) task.after = came.at(*input);
        made[{a.kind == Action::backward ? Action::input_gradient : a.kind, a.microbatch,
              a.chunk}] = number;
      }
      tasks.push_back(task);
    }
  }
  return tasks;
}

int steady_microbatches(const ScheduleRow& row, int p) {
  // found by running all up to 16 stages; a ring of few stages settles late
  return row.place == Place::ring ? std::max(28, 3 * p) : 2 * p;
}

double extended_makespan(int m, int step, int steady, const std::function<double(int m)>& of) {
  for (int first = (steady + step - 1) / step * step;; first *= 2) {
    if (first + 2 * step >= m) return of(m);
    const double a = of(first), b = of(first + step), c = of(first + 2 * step);
    const int rest = m - (first + 2 * step);
    if (std::abs((c - b) - (b - a)) > 1e-9 * c) continue;
    return c + (c - b) * rest / step;
  }
}
