// metrics.cpp: see metrics.h.
#include "support/metrics.h"

#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>

namespace fs = std::filesystem;

// ---- for programs

void put_aside(const std::string& path, const std::string& what) {
  std::error_code none;
  // a device or a pipe holds nothing, and a file that is not there or empty neither; /dev/stdout
  // may be a file
  if (!fs::is_regular_file(path, none) || fs::is_empty(path, none) || path.starts_with("/dev/"))
    return;
  std::string aside;
  for (int n = 1; aside.empty() || fs::exists(fs::symlink_status(aside, none)); n++)
    aside = sentence(path, ".", n);
  SYSTEM_CHECK(rename(path.c_str(), aside.c_str()) == 0, path,
               " of an earlier run cannot be renamed");
  printf("%-8s of an earlier run are in %s now\n", what.c_str(), aside.c_str());
}

Metrics::Metrics(const std::string& path, int64_t resumed) : path_(path) {
  if (path.empty()) return;
  std::error_code none;
  if (resumed == 0) put_aside(path, "metrics");
  else if (fs::is_regular_file(path, none)) {
    const std::string before = read_file(path), begin = "{\"step\":";
    size_t kept = 0;
    // what a killed run began has no end of line
    for (size_t end; (end = before.find('\n', kept)) != before.npos; kept = end + 1)
      if (before.compare(kept, begin.size(), begin) == 0 &&
          atoll(before.c_str() + kept + begin.size()) > resumed)
        break;
    fs::resize_file(path, kept);
  }
  file_.emplace(path, O_WRONLY | O_CREAT | O_APPEND);
}

void Metrics::line(const nlohmann::ordered_json& object) {
  if (!file_) return;
  const std::string text = object.dump() + "\n";
  SYSTEM_CHECK(write(file_->fd, text.data(), text.size()) == ssize_t(text.size()), path_,
               " cannot be written");
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

Progress::Progress(int64_t steps, FILE* out, bool terminal)
    : steps_(steps), out_(out), terminal_(terminal) {}

void Progress::start_step() { step_ = {}; }

StepRecord Progress::end_step(int64_t step, double loss, double norm, double lr, int64_t tokens,
                              double communicated) {
  const double s = std::max(step_.seconds(), 1e-9);
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
  const double since = printed_.seconds();
  const bool landmark = r.step == first_step_ || r.step == steps_;
  const bool due =
      terminal_ ? since > 0.1 : since > 10 || r.step % std::max<int64_t>(steps_ / 20, 1) == 0;
  if (!landmark && !due) return;
  printed_ = {};
  const long long left =
      llround(run_.seconds() / double(r.step - first_step_ + 1) * double(steps_ - r.step));
  const std::string text = format(
      "step %lld/%lld  loss %.4f  norm %.3f  lr %.2e  %.0f tokens/s  %lld:%02lld:%02lld left",
      (long long)r.step, (long long)steps_, r.loss, r.grad_norm, r.lr,
      double(timed_.tokens) / timed_.seconds, left / 3600, left / 60 % 60, left % 60);
  show(terminal_ ? "\r" + text + "\033[K" : text + "\n");
  line_open_ = terminal_;
}

void Progress::show(const std::string& text) {
  if (!out_) return;
  fputs(text.c_str(), out_);
  fflush(out_);
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
