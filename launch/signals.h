// signals.h: the signals that mean "end soon", which no computing thread ever sees.
//
// idea      A scheduler's warning (USR1, USR2, XCPU), its end (TERM), Ctrl-C (INT) and a closed
//           terminal (HUP) are blocked in every thread before MPI starts its own: a signal that
//           interrupts a matrix product has been seen to corrupt the heap, and MPICH's and UCX's
//           handlers run on whichever thread they hit. One thread of ours fetches them. What was
//           ignored when the program started (nohup) stays ignored.
// meaning   While somebody listens, a signal sets a flag. TERM or INT once more, a second later,
//           ends the process at once, as does any signal that nobody listens for.
// test      tests/test_environment.sh, tests/test_checkpoint.sh
#pragma once
#include <atomic>
#include <csignal>
#include <thread>

class Signals {
 public:
  Signals();  // before MPI_Init
  ~Signals();

  class Listener {  // while it lives, signals are asked for
   public:
    Listener() { listens_ = true; }
    ~Listener() { listens_ = false; }
    // A signal has come to this process, or whoever reads its output has left (`| head -1`): then
    // what is printed from now on goes nowhere.
    bool came() const;
  };

 private:
  void fetch();
  static inline std::atomic<bool> listens_ = false, came_ = false;
  sigset_t fetched_;
  std::atomic<bool> stop_ = false;
  std::thread thread_;
};
