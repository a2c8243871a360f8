// metrics.cpp: see metrics.h.
#include "support/metrics.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

namespace fs = std::filesystem;

// ---- for programs

void put_aside(const std::string& path, const std::string& what) {
  std::error_code none;
  // a device or a pipe holds nothing, and a file that is not there or empty neither; /dev/stdout
  // may be a file
  if (!fs::is_regular_file(path, none) || fs::is_empty(path, none) || path.starts_with("/dev/"))
    return;
  int n = 1;
  while (fs::exists(fs::symlink_status(sentence(path, ".", n), none))) n++;
  REQUIRE(rename(path.c_str(), sentence(path, ".", n).c_str()) == 0, path,
          " of an earlier run cannot be renamed: ", strerror(errno));
  printf("%-8s of an earlier run are in %s.%d now\n", what.c_str(), path.c_str(), n);
}

Metrics::Metrics(const std::string& path, int64_t resumed) : path_(path) {
  if (path.empty()) return;
  if (resumed == 0) put_aside(path, "metrics");
  else if (std::error_code none; fs::is_regular_file(path, none)) {
    std::ifstream before(path);
    REQUIRE(before, "--metrics: ", path, " cannot be read: ", strerror(errno));
    uintmax_t kept = 0;
    std::string line;
    // what a killed run began has no end of line
    for (long long step; std::getline(before, line) && !before.eof(); kept += line.size() + 1)
      if (sscanf(line.c_str(), "{\"step\":%lld", &step) == 1 && step > resumed) break;
    REQUIRE(!before.bad(), "--metrics: ", path, " cannot be read: ", strerror(errno));
    fs::resize_file(path, kept);
  }
  file_ = fopen(path.c_str(), "ae");
  REQUIRE(file_, "--metrics: ", path, " cannot be opened for writing: ", strerror(errno));
}

Metrics::~Metrics() {
  if (file_) fclose(file_);
}

void Metrics::line(const nlohmann::ordered_json& object) {
  if (!file_) return;
  errno = 0;
  REQUIRE(fprintf(file_, "%s\n", object.dump().c_str()) > 0 && fflush(file_) == 0,
          "--metrics: writing ", path_, " failed: ", strerror(errno));
}

void Metrics::step(const StepRecord& r) {
  nlohmann::ordered_json object{{"step", r.step},
                                {"loss", r.loss},
                                {"grad_norm", r.grad_norm},
                                {"lr", r.lr},
                                {"tokens_per_second", r.tokens_per_second},
                                {"step_ms", r.step_ms}};
  if (r.held_out_loss) object["held_out_loss"] = *r.held_out_loss;
  line(object);
}

// ---- for people

static double seconds(std::chrono::steady_clock::duration d) {
  return std::chrono::duration<double>(d).count();
}

static std::string duration(double s) {
  if (s < 60) return format("%.0f s", s);
  if (s < 3600)
    return format("%.0f min %02.0f s", std::floor(s / 60), std::floor(std::fmod(s, 60)));
  return format("%.0f h %02.0f min", std::floor(s / 3600), std::floor(std::fmod(s, 3600) / 60));
}

Progress::Progress(int64_t steps, FILE* out, bool terminal)
    : steps_(steps), out_(out), terminal_(terminal), started_(Clock::now()) {}

void Progress::start_step() { step_started_ = Clock::now(); }

StepRecord Progress::end_step(int64_t step, double loss, double norm, double lr, int64_t tokens,
                              double communicated) {
  const double s = std::max(seconds(Clock::now() - step_started_), 1e-9);
  if (first_step_ == 0) first_step_ = step;
  if (step == first_step_ + 1) timed_ = {};  // the second replaces the first
  timed_.steps++;
  timed_.tokens += tokens;
  timed_.seconds += s;
  timed_.communicated += communicated;
  const StepRecord r{step, loss, norm, lr, double(tokens) / s, s * 1e3};
  print(r);
  return r;
}

void Progress::print(const StepRecord& r) {
  const Clock::time_point now = Clock::now();
  const double since = seconds(now - printed_);
  const bool landmark = r.step == first_step_ || r.step == steps_;
  const bool due =
      terminal_ ? since > 0.1 : since > 10 || r.step % std::max<int64_t>(steps_ / 20, 1) == 0;
  if (!landmark && !due) return;
  printed_ = now;
  const double left =
      seconds(now - started_) / double(r.step - first_step_ + 1) * double(steps_ - r.step);
  const std::string text =
      format("step %lld/%lld  loss %.4f  norm %.3f  lr %.2e  %.0f tokens/s  %s left",
             (long long)r.step, (long long)steps_, r.loss, r.grad_norm, r.lr,
             double(timed_.tokens) / timed_.seconds, duration(left).c_str());
  show(terminal_ ? "\r" + text + "\033[K" : text + "\n");
  line_open_ = terminal_;
}

void Progress::show(const std::string& text) {
  if (out_) fputs(text.c_str(), out_), fflush(out_);
}

void Progress::say(int64_t step, const std::string& what) {
  show(sentence(line_open_ ? "\r\033[K" : "", "step ", step, "/", steps_, "  ", what, "\n"));
  line_open_ = false;
}

void Progress::done() {
  if (line_open_) show("\n");
  line_open_ = false;
}

std::string Progress::summary(double flops_per_token) const {
  if (timed_.steps == 0) return "no step was timed";
  const double rate = double(timed_.tokens) / timed_.seconds;
  return format("%.0f tokens/s, %.1f ms a step, %.4g GFLOP/s", rate,
                timed_.seconds * 1e3 / double(timed_.steps), rate * flops_per_token / 1e9);
}
