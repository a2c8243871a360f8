// progress.h: how those who read and write files tell the watch that slow work moves on.
#pragma once
#include <atomic>
#include <cstdint>

inline std::atomic<int64_t> bytes_moved = 0;  // read, written or verified by this process so far
