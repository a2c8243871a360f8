// profile.h: where a step's time goes, op by op (--profile).
//
// idea      What kernels/op_times.h calls an op has an event before it and one after it; here they
//           are added up by name. Beside them: what the op takes at least, how fast that was done,
//           and how fast this machine copies and multiplies.
// exact     Rows are what the streams did: each op but those inside another, in every step but the
//           first, which warms up and counts only if it is the only one. A rank has one compute
//           stream, so its rows cannot overlap, and what is left of the step is in no row. On a GPU
//           collectives run beside the kernels; with no GPU everything runs in turn, and is timed
//           by the clock.
// cost      two events an op; without --profile a branch
// test      tests/test_trainer.cpp, tests/test_cli.sh
#pragma once
#include <map>

#include "kernels/op_times.h"
#include "support/stopwatch.h"
#include "trainer.h"

class Profile {
 public:
  // The host in a step: it launches, reads the next batch, and waits for the device.
  void host_begins() {
    if (all_.steps == 1 && !std::exchange(warm_, true)) all_ = {};
    clock_ = {};
  }
  void host_reads() { all_.launched += clock_.seconds(); }
  void host_waits() { all_.read += clock_.seconds(); }
  // Adds the step, and what op_times has of it; the host has waited.
  void end_step(double seconds);
  // Collective: the table of the rank whose kernels took longest, which the others wait for.
  void print(const Trainer& trainer, bool prints) const;

  struct Row {
    int64_t calls = 0;
    double seconds = 0;
    Work work;  // the sums
    bool collective = false;
  };
  const std::map<std::string, Row>& rows() const { return all_.rows; }

 private:
  struct Machine {
    double copied, multiplied;  // bytes, operations a second
    int64_t width, bytes;       // of the product, of the copy
  };
  static Machine measure(Dtype dtype);
  std::string table(const Machine& machine, Dtype dtype) const;
  double seconds_of(bool collectives) const;  // or of kernels

  Stopwatch clock_;
  struct {
    std::map<std::string, Row> rows;
    int64_t steps = 0;
    double seconds = 0, launched = 0, read = 0;  // until the host had launched, and read
  } all_;
  bool warm_ = false;
};
