// metrics.h: what a run reports while it trains: a JSON object per step for programs, a line of
// progress for people.
// idea      Numbers are written with the digits that say exactly which double they were: equal runs
//           write equal text. The file of --trace is one such line.
// cost      one write per line
// not here  averaging over ranks: one rank reports for all
// test      tests/test_support.cpp
#pragma once
#include <nlohmann/json_fwd.hpp>
#include <optional>

#include "support/files.h"
#include "support/stopwatch.h"

struct StepRecord {
  int64_t step = 0;  // from 1
  double loss = 0, grad_norm = 0, lr = 0, tokens_per_second = 0, step_ms = 0;
  std::optional<double> held_out_loss = {};  // where it was measured after this step
};

// ---- for programs

// Renames a file (or a link to one) that an earlier run has written to path.1, path.2, ...; says
// so.
void put_aside(const std::string& path, const std::string& what);

class JsonLines {  // JSON lines; what JSON cannot say, infinities and NaN, is null
 public:
  // path empty: nothing is written. One that cannot be written fails here, before training. A run
  // that resumes after some steps goes on after the last of those, and one that begins at step 1
  // begins anew; a file with more than that is put aside whole. what: it is called so then.
  explicit JsonLines(const std::string& path, int64_t resumed = 0,
                     const std::string& what = "metrics");
  void step(const StepRecord& r);
  void line(const nlohmann::ordered_json& object);

 private:
  std::string path_;
  std::optional<OpenFile> file_;
};

// ---- for people

struct StepTime {
  double ms = 0, communicating = 0;
};

// on a terminal one line rewritten in place; elsewhere about twenty lines, or more of a slow run
class Progress {
 public:
  Progress(int64_t steps, FILE* out, bool terminal)  // out null: says nothing
      : steps_(steps), out_(out), terminal_(terminal) {}
  ~Progress() { done(); }
  Progress(const Progress&) = delete;
  void start_step() { step_ = {}; }
  // Prints, and times the step. communicated: how many seconds of it the communication stream was
  // busy.
  StepRecord end_step(int64_t step, double loss, double norm, double lr, int64_t tokens,
                      double communicated = 0);
  void say(int64_t step, const std::string& what);  // a line that stays
  void done();
  // Speed, and a step's milliseconds, of which those in which that stream was busy; the first step,
  // which warms up, counts only if it is the only one.
  std::string summary(double flops_per_token) const;
  StepTime step_time() const {
    const double per_step = 1e3 / timed_.steps;
    return {timed_.seconds * per_step, timed_.communicated * per_step};
  }

 private:
  void show(const std::string& text);
  struct {
    int64_t steps = 0, tokens = 0;
    double seconds = 0, communicated = 0;
  } timed_;
  int64_t steps_, first_step_ = 0;
  FILE* out_;
  bool terminal_, line_open_ = false;
  Stopwatch run_, step_, printed_;
};
