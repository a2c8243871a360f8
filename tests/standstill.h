// standstill.h: a stream that stands still until the test has looked.
#pragma once
#include <cuda_runtime.h>
#include <unistd.h>

#include <atomic>

#include "support/check.h"

// What comes on the stream after it waits until go(), ten seconds at most.
class Standstill {
 public:
  explicit Standstill(cudaStream_t stream) {
    CUDA_CHECK(cudaLaunchHostFunc(stream, stand, &state_));
  }
  ~Standstill() {
    for (go(); stands();) usleep(1000);
  }
  void go() { state_.go = true; }
  bool stands() const { return !state_.ended; }

 private:
  struct State {
    std::atomic<bool> go = false, ended = false;
  };
  static void stand(void* p) {
    State& s = *static_cast<State*>(p);
    for (int i = 0; i < 10000 && !s.go; i++) usleep(1000);
    s.ended = true;
  }
  State state_;
};
