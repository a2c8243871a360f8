// first_minute.h: the first minute on a cluster.
// idea      Before training, each axis and each kind of collective runs once, with known answers.
//           An Error says what to look at when one fails; when one hangs, the watch does.
// test      tests/test_comm.cpp
#pragma once
#include "comm.h"

void check_mesh(const Mesh& mesh);
bool exchanges(const Axis& axis);  // whether its neighbours send to each other
