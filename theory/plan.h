// plan.h: all layouts of a cluster for a model, those that fit in memory, and the fastest of them.
//
// memory    A part of the model keeps the same bytes for every micro-batch, and the schedule says
//           how many are live. So the formulas of theory/ are asked once for each kind of stage,
//           and all layouts follow. Memory is what the code here holds, whatever the profile; of
//           its workspace what a block keeps that runs again (--recompute), and nothing else.
// time      Every layout that fits gets a bound from below: no stage waits for anything but tp and
//           cp, and the busiest one idles only while the first micro-batch comes and, where
//           backwards are not split, the last goes. In the order of their bounds layouts are
//           predicted (predict.h), until no bound left is below the time of the last that is asked
//           for. So none faster is left out.
// cost      half a kilobyte for each layout that fits
// not here  more than 4 chunks a stage, with interleaved; other numbers of uses unsharded ahead
// test      tests/test_plan.cpp, tests/test_plan.sh
#pragma once
#include <optional>

#include "theory/predict.h"

// By theory/: the fullest rank of all; and, by axis, the most that the fullest rank of a
// stage sends in a step.
struct Account {
  int stage = 0, rank = 0;
  // exactly, but for gather, a bound; activations: at the peak; workspace: what recompute needs
  std::array<int64_t, kMemoryCategories> memory{};
  std::map<std::string, int64_t> sent;
};
Account account(const TrainingJob& job);

// What is fixed by the user: 0 or empty where all are tried.
struct Wanted : TrainingJob {
  std::vector<bool> reshard{true, false}, by_rows{false, true}, recomputes{false, true};  // tried
};
struct Planned : TrainingJob, Prediction {
  using Prediction::operator=;  // of this part alone
  int64_t memory = 0;           // bytes of the fullest rank
};
struct Plan {
  std::vector<Planned> fastest;
  int64_t layouts = 0, fitting = 0, predicted = 0;  // how many there are; that fit; of these
  // of what does not fit, the layout that needs least
  std::optional<Planned> smallest;
};
Plan plan(const Cluster& cluster, const Wanted& wanted, int64_t top);
