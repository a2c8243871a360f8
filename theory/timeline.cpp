// timeline.cpp: see timeline.h.
#include "theory/timeline.h"

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
  std::vector<Span> spans(tasks.size(), {-1, -1});
  size_t done = 0;
  bool moved = true;
  // Does the next task of a queue, if it can.
  const auto proceed = [&](Line& line) {
    if (line.waiting.empty()) return false;
    const int i = line.waiting.front();
    const Task& t = tasks[i];
    if (t.after >= 0 && spans[t.after].end < 0) return false;
    moved |= spans[i].start < 0;
    spans[i].start = t.after < 0 ? line.free : std::max(line.free, spans[t.after].end);
    double start = spans[i].start;
    for (const int other : t.with) {
      if (spans[other].start < 0) return false;
      start = std::max(start, spans[other].start);
    }
    spans[i].end = line.free = start + t.duration;
    line.waiting.pop_front();
    done++;
    return true;
  };
  while (std::exchange(moved, false))
    for (auto& [queue, line] : lines)
      while (proceed(line)) moved = true;
  REQUIRE(may_wait || done == tasks.size(), "tasks of this timeline wait for each other");
  return spans;
}
