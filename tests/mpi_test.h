// mpi_test.h: test.h for programs that run under mpiexec: a test passes when it passes on every rank, and rank 0 prints the line.
#pragma once
#include "comm.h"
#include "tensor.h"
#include "tests/test.h"

inline Job*& the_job() { static Job* job = nullptr; return job; }
inline Job& job() { return *the_job(); }

inline int run_mpi_tests(int argc, char** argv) {
  Job job(&argc, &argv);
  the_job() = &job;
  test::agree = [&job](const std::string& error) { return job.agree(error.empty() ? "" : sentence("rank ", job.rank, ": ", error)); };
  test::prints = job.rank == 0;
  const int status = run_tests(argc, argv);
  close_device();
  return status;
}
