// timeline.cpp: see timeline.h.
#include "theory/timeline.h"

#include <cmath>
#include <deque>
#include <utility>

#include "support/check.h"

std::vector<Span> run(const std::vector<Task>& tasks, bool may_wait) {
  struct Line {
    std::deque<int> waiting = {};  // tasks
    double free = 0;               // when its last task has ended
  };
  std::map<std::pair<int, Queue>, Line> lines;
  for (size_t i = 0; i < tasks.size(); i++)
    lines[{tasks[i].rank, tasks[i].queue}].waiting.push_back(i);
  std::vector<Span> spans(tasks.size(), {INFINITY, INFINITY});
  bool moved = true;
  while (std::exchange(moved, false))
    for (auto& [queue, line] : lines)
      for (; !line.waiting.empty(); line.waiting.pop_front()) {
        const Task& t = tasks[line.waiting.front()];
        Span& span = spans[line.waiting.front()];
        double start = t.after < 0 ? line.free : std::max(line.free, spans[t.after].end);
        moved |= start < span.start;
        span.start = start;
        for (const int other : t.with) start = std::max(start, spans[other].start);
        if (start == INFINITY) break;
        span.end = line.free = start + t.duration;
        moved = true;
      }
  for (const Span& span : spans)
    REQUIRE(may_wait || span.end < INFINITY, "tasks of this timeline wait for each other");
  return spans;
}
