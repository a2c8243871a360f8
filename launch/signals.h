// signals.h: the signals that mean "end soon", which no computing thread ever sees.
//
// idea      A scheduler's warning (USR1, USR2, XCPU), its end (TERM), Ctrl-C (INT) and a closed
//           terminal (HUP) are blocked in every thread before MPI starts its own: a signal that
//           interrupts a matrix product has been seen to corrupt the heap, and MPICH's and UCX's
//           handlers run on whichever thread they hit. One thread of ours fetches them. What was
//           ignored when the program started (nohup) stays ignored.
// meaning   Where somebody listens, a signal sets a flag. TERM or INT once more, a second later,
//           ends the process immediately, as does any signal that nobody listens for.
// test      tests/test_environment.sh, tests/test_checkpoint.sh
#pragma once
#include <atomic>

void fetch_signals();       // from then on; before MPI_Init
void listen_for_signals();  // from then on they are asked for
// Whether a signal has come to this process, or whoever reads its output has left (`| head -1`):
// then it says so, and what is printed from now on goes nowhere.
bool look_for_end();
// where the number of the signal that ends the process is left: in the watch's record
inline std::atomic<std::atomic<int>*> ended_by = nullptr;
