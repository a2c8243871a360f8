// first_minute.h: the first minute on a cluster.
// idea      Before training, each kind of collective runs on each axis with known answers. An
//           Error says what to look at when one fails; when one hangs, the watch does. First one
//           element a rank travels, then 16 MiB: NCCL sends these in other ways, and opens a way,
//           and takes memory for it, when it first goes it. So it does before the model takes
//           memory.
// test      tests/test_comm.cpp, tests/test_network.sh
#pragma once
#include "comm.h"
#include "launch/job.h"

void check_mesh(const Mesh& mesh);
bool exchanges(const Axis& axis);  // whether its neighbours send to each other
// Collective: a sentence where a node would have room for the ranks of tp, which wait for each
// other in every layer, and some of them are on another; else empty.
std::string advice_on_nodes(const Mesh& mesh, const Job& job);
