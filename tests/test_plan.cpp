// test_plan.cpp: the timeline against the simulator and cases by hand; the planner against the
// formulas of theory/ and against published tables.
#include <algorithm>
#include <random>

#include "tests/test.h"
#include "theory/timeline.h"

namespace {

double close(double a, double b) { return std::abs(a - b) / std::max({std::abs(a), std::abs(b)}); }

// Calls f for schedules of every kind.
void for_schedules(int most_stages, int most_microbatches,
                   const std::function<void(const Schedule&)>& f) {
  for (const std::string& name : schedule_names())
    for (int p = 1; p <= most_stages; p += 1 + p / 4)
      for (int m = 1; m <= most_microbatches; m += 1 + m / 3) {
        const ScheduleRow& row = schedule_row(name);
        const int of = (m + row.divisor(p) - 1) / row.divisor(p) * row.divisor(p);
        if (of <= most_microbatches)
          for (const int V : row.place == Place::ring ? std::vector{2, 3} : std::vector{0})
            f(make_schedule(name, p, of, V));
      }
}

// Every stage's own times of its kinds, and a time of transfers.
Durations uneven(const Schedule& s, std::mt19937& random) {
  Durations all(s.stages);
  std::uniform_real_distribution<double> part(0.2, 1);
  const double send = part(random) / 5;
  for (int stage = 0; stage < s.stages; stage++) {
    const double f = part(random), b = part(random), w = part(random);
    const double of_kind[] = {f, b + w, b, w, send};
    for (const Action& a : s.actions[stage]) all[stage].push_back(of_kind[a.kind]);
  }
  return all;
}

}  // namespace

// ---- the timeline

TEST(a_pipeline_takes_as_long_as_the_simulator_says) {
  std::mt19937 random(1);
  int count = 0;
  double worst = 0;
  for_schedules(12, 40, [&](const Schedule& s) {
    const Durations durations = uneven(s, random);
    const std::vector<Span> spans = run(tasks_of(s, durations));
    const Timeline expected = simulate(s, durations);
    size_t task = 0;
    for (const auto& stage : expected.spans)
      for (const Span& span : stage) worst = std::max(worst, close(spans[task++].end, span.end));
    count++;
  });
  CHECK_LE(worst, 1e-12);
  measured(count, " schedules, every action's end within ", worst);
}

TEST(a_schedule_extends_to_any_number_of_micro_batches) {
  std::mt19937 random(2);
  std::uniform_real_distribution<double> part(0.2, 1);
  int count = 0, extended = 0;
  double worst = 0;
  for (const std::string& name : schedule_names())
    for (const int p : {2, 3, 4, 7, 8, 16}) {
      const ScheduleRow& row = schedule_row(name);
      const int step = row.divisor(p);
      for (const Times& t :
           {Times{}, Times{1, 1, 1, 0.1}, Times{part(random), part(random), part(random), 0.05}}) {
        int most = 0;  // that were run
        const auto of = [&](int m) {
          most = std::max(most, m);
          const Schedule s = make_schedule(name, p, m);
          return makespan(run(tasks_of(s, durations(s, t))));
        };
        for (int m = step; m <= 64; m += step * (1 + 4 / step)) {
          most = 0;
          const double expected = [&] {
            const Schedule s = make_schedule(name, p, m);
            return simulate(s, durations(s, t)).makespan;
          }();
          worst = std::max(worst, close(extended_makespan(m, step, steady_microbatches(row, p), of),
                                        expected));
          extended += most < m;
          count++;
        }
      }
    }
  CHECK_LE(worst, 1e-9);
  measured(count, " cases, ", extended, " of them extended, within ", worst);
}

TEST(a_collective_begins_with_its_last_rank_and_lasts_its_longest) {
  // rank 0 computes 1, rank 1 computes 3; then both sum (2 and 1), and rank 0 goes on behind it
  const std::vector<Task> tasks{
      {0, Queue::compute, 1}, {0, Queue::communication, 2, 0, 0}, {0, Queue::compute, 1, 1},
      {1, Queue::compute, 3}, {1, Queue::communication, 1, 3, 0}, {1, Queue::compute, 1}};
  const std::vector<Span> spans = run(tasks);
  CHECK_EQ(spans[1].start, 3);
  CHECK_EQ(spans[4].end, 5);
  CHECK_EQ(spans[2].end, 6);
  CHECK_EQ(spans[5].end, 4, "nobody waits for the sum here");
}

TEST(tasks_that_wait_for_each_other_are_refused) {
  CHECK_SAYS(run({{0, Queue::compute, 1, 1}, {0, Queue::communication, 1, 0}}), "wait for each");
  CHECK_SAYS(run({{0, Queue::compute, 1, -1, 0},
                  {0, Queue::compute, 1, -1, 1},
                  {1, Queue::compute, 1, -1, 1},
                  {1, Queue::compute, 1, -1, 0}}),
             "wait for each");
}

int main(int argc, char** argv) { return run_tests(argc, argv); }
