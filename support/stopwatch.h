// stopwatch.h: how long something takes.
#pragma once
#include <chrono>

struct Stopwatch {  // runs from its making on
  using Clock = std::chrono::steady_clock;
  double seconds() const { return std::chrono::duration<double>(Clock::now() - began).count(); }
  Clock::time_point began = Clock::now();
};
