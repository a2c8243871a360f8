// host.h: what the stand-in takes from its host, and what it does where there is less of it:
// threads and scratch memory.
//
// threads   oneDNN cuts its work for omp_get_max_threads() and leaves out what threads that do not
//           come would have computed. So each thread that calls it first learns how many come, and
//           asks for no more from then on: OMP_THREAD_LIMIT, OMP_DYNAMIC, OMP_MAX_ACTIVE_LEVELS and
//           limits of processes all make teams smaller.
// test      tests/test_environment.sh
#pragma once
#include <omp.h>
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <latch>
#include <system_error>
#include <thread>
#include <vector>

namespace cpu {

// How many of `wanted` threads to use. libgomp ends the program where the system refuses one; then
// half of what it gives are taken, since others need threads, too.
inline int threads_to_be_had(int wanted) {
  std::latch end(1);
  std::vector<std::thread> others;
  try {
    while (int(others.size()) + 1 < wanted) others.emplace_back([&] { end.wait(); });
  } catch (const std::system_error&) {
  }
  end.count_down();
  for (std::thread& t : others) t.join();
  const int come = int(others.size()) + 1;
  return come < wanted ? std::max(1, come / 2) : come;
}

inline size_t stack_bytes() {  // of this thread
  pthread_attr_t attributes;
  void* base;
  size_t bytes = 0;
  if (pthread_getattr_np(pthread_self(), &attributes)) return SIZE_MAX;
  pthread_attr_getstack(&attributes, &base, &bytes);
  pthread_attr_destroy(&attributes);
  return bytes;
}

// The first call of a thread makes its teams as large as they come. Returns the smallest stack.
inline size_t settle_team() {
  static thread_local size_t smallest = 0;
  if (smallest) return smallest;
  smallest = stack_bytes();
  // Ranks share the cores: without OMP_NUM_THREADS each thread that computes would start one for
  // every core. (MPICH's mpiexec tells how many ranks this node has.)
  if (const char* ranks = getenv("MPI_LOCALNRANKS"); ranks && !getenv("OMP_NUM_THREADS"))
    omp_set_num_threads(std::max(1, omp_get_num_procs() / std::max(1, atoi(ranks))));
  omp_set_dynamic(0);
  const int most = std::max(64, omp_get_num_procs());  // more would only be waited for
  omp_set_num_threads(threads_to_be_had(std::min(omp_get_max_threads(), most)));
  int team = 1;
  size_t least = smallest;
#pragma omp parallel reduction(min : least)
  {
    least = stack_bytes();
#pragma omp master
    team = omp_get_num_threads();
  }
  omp_set_num_threads(team);
  return smallest = std::min(smallest, least);
}

// Never null: inside a team nobody could catch an exception.
inline void* host_memory(size_t bytes) {
  void* memory = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  if (memory) return memory;
  fprintf(stderr, "the host's memory has no %.1f MiB more for a kernel's scratch\n",
          double(bytes) / 1048576);
  _exit(1);
}

}  // namespace cpu
