// first_minute.h: the first minute on a cluster.
// idea      Before training, each kind of collective runs on each axis with known answers. An
//           Error says what to look at when one fails; when one hangs, the watch does. First one
//           element a rank travels, then 16 MiB (without a GPU 256 KiB): NCCL sends short and long
//           messages by different algorithms, and sets each up, with memory of its own, at its
//           first use: here, before the model takes memory.
// test      tests/test_comm.cpp, tests/test_network.sh
#pragma once
#include "comm.h"
#include "launch/job.h"

void check_mesh(const Mesh& mesh);
bool exchanges(const Axis& axis);  // whether its neighbours send to each other
// Collective: a sentence where ranks are numbered in turn over the nodes, so that those of tp,
// which wait for each other in every layer, are on several, though one has room; else empty.
std::string advice_on_nodes(const Mesh& mesh, const Job& job);
