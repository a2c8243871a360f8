// draw_map.h: when to use what, as a picture that the planner draws.
//
// idea      For each size of model and number of devices, every kind of layout is planned by
//           itself. A cell shows the simplest kind whose best layout is at most 3 % slower than the
//           fastest of all. A line shows above which size one device does not hold a training.
// cost      Four minutes of one core: docs/when_to_use_what.svg is one; no test draws it.
#pragma once
#include "theory/plan.h"

// One map for each speed of the links between nodes: that of the cluster, and at most 10 Gbit/s;
// below them the time per token of inference by tp. How many nodes and devices the cluster has does
// not matter.
std::string draw_map(Cluster cluster);
