// job.h: what mpiexec started: who this rank is, and how all ranks agree or end.
// test      tests/test_comm.cpp, tests/test_cli.sh, tests/test_failures.sh
#pragma once
#include <mpi.h>

#include <atomic>
#include <cstdlib>
#include <nlohmann/json_fwd.hpp>

#include "comm.h"

class Job {
 public:
  Job(int* argc, char*** argv);  // MPI_Init
  ~Job();                        // MPI_Finalize
  // The end of a program, collective: its status. Where ranks may speak over TCP (on several nodes,
  // or with UCX_TLS set), those that MPICH's mpiexec started end here, without MPI_Finalize: MPICH
  // 4.0 often waits in it for ever, since a rank that has closed its connections no longer answers
  // those that still close theirs. Other launchers may take that for a failure: under them
  // MPI_Finalize is called, and the process ends after half a minute if it has not returned.
  int leave(int status) const;
  // an Error when mpiexec belongs to another MPI and started n worlds of one rank
  void check_launcher();
  int rank = 0, size = 1;
  // among the ranks of this node: local_rank is the CUDA device
  int local_rank = 0, local_size = 1;
  MPI_Comm node;  // these ranks
  // Whether what is printed may be read on a terminal: mpiexec, which passes it on, may have one.
  bool prints_to_terminal() const;
  // what concerns all ranks is said by rank 0; of n worlds of one, by the launcher's first
  bool speaks = true;
  // Every rank calls it with its own error or "": each learns whether all are well, and the first
  // failing rank's sentence.
  std::string agree(const std::string& error) const;
  // Ends every rank with a non-zero status; prints "rank r: why", unless another rank of this node
  // has explained the end already.
  [[noreturn]] void abort(const std::string& why) const;
  std::atomic<bool>* explained = nullptr;  // shared by the ranks of this node once there is a Watch

 private:
  // MPICH's, and no other launcher; and they speak PMI-1, as both do unless this variable has them
  // speak another (from MPICH 4.1 on)
  const bool by_mpiexec_ = getenv("MPI_LOCALNRANKS") && !getenv("MPIR_CVAR_PMI_VERSION");
};

inline void barrier() { MPI_Ibarrier(MPI_COMM_WORLD, UntilDone()); }
std::string host_name();
std::vector<std::string> gather_text(const std::string& mine);  // of all ranks, on every rank
std::vector<nlohmann::json> gather(const nlohmann::json& mine);

// ---- collective work, which throws on every rank what went wrong on one

template <class Work> void collectively(const Job& job, Work work) {
  const std::string error = job.agree(error_of(work));
  REQUIRE(error.empty(), error);
}
template <class Work> void on_first_rank(const Job& job, Work work) {
  collectively(job, [&] {
    if (job.rank == 0) work();
  });
}
