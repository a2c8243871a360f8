// metrics.cpp: see metrics.h.
#include "support/metrics.h"

#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>

namespace fs = std::filesystem;

// ---- for programs

// What is written goes elsewhere, /dev/stdout's perhaps to a file.
static bool is_device(const std::string& path) {
  return path.starts_with("/dev/") && !path.starts_with("/dev/shm/");
}

void put_aside(const std::string& path, const std::string& what) {
  std::error_code none;
  // a pipe holds nothing, and a file that is not there or empty neither
  if (!fs::is_regular_file(path, none) || fs::is_empty(path, none) || is_device(path)) return;
  std::string aside;
  for (int n = 1; aside.empty() || fs::exists(fs::symlink_status(aside, none)); n++)
    aside = sentence(path, ".", n);
  SYSTEM_CHECK(rename(path.c_str(), aside.c_str()) == 0, path,
               " of an earlier run cannot be renamed");
  printf("%-8s of an earlier run are in %s now\n", what.c_str(), printable(aside).c_str());
}

JsonLines::JsonLines(const std::string& path, int64_t resumed, const std::string& what)
    : path_(path) {
  if (path.empty()) return;
  std::error_code none;
  if (resumed == 0) put_aside(path, what);
  else if (fs::is_regular_file(path, none) && !is_device(path)) {
    const std::string text = read_file(path, false, SIZE_MAX);
    std::istringstream lines(text);
    size_t kept = 0;
    int64_t step;
    // what a killed run began has no end of line
    for (std::string line; std::getline(lines, line) && !lines.eof(); kept += line.size() + 1)
      if (sscanf(line.c_str(), "{\"step\":%ld", &step) == 1 ? step > resumed
                                                            : !line.starts_with("{\"summary\":"))
        break;
    if (kept < text.size()) {
      write_file(path, [&](const Write& write) {
        write(std::string_view(text).substr(0, kept));
        put_aside(path, what);  // once what is kept of it is written beside
      });
    }
  }
  // what is printed and what is written here may go to one file
  if (is_device(path)) fcntl(STDOUT_FILENO, F_SETFL, fcntl(STDOUT_FILENO, F_GETFL) | O_APPEND);
  file_.emplace(path, O_WRONLY | O_CREAT | O_APPEND);
}

void JsonLines::line(const nlohmann::ordered_json& object) {
  if (!file_) return;
  const std::string text = object.dump() + "\n";
  for (std::string_view left = text; !left.empty();) {
    const ssize_t n = write(file_->fd, left.data(), left.size());
    SYSTEM_CHECK(n > 0, path_, " cannot be written");
    left.remove_prefix(n);
  }
}

void JsonLines::step(const StepRecord& r) {
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

StepRecord Progress::end_step(int64_t step, double loss, double norm, double lr, int64_t tokens,
                              double communicated) {
  const double s = std::max(step_.seconds(), 1e-9);
  if (first_step_ == 0) first_step_ = step;
  if (step == first_step_ + 1) timed_ = {};  // the second replaces the first
  timed_.steps++;
  timed_.tokens += tokens;
  timed_.seconds += s;
  timed_.communicated += communicated;
  const double since = printed_.seconds();
  const bool landmark = step == first_step_ || step == steps_;
  const bool due =
      terminal_ ? since > 0.1 : since > 10 || step % std::max<int64_t>(steps_ / 20, 1) == 0;
  if (landmark || due) {
    printed_ = {};
    const int64_t left = lround(run_.seconds() / (step - first_step_ + 1) * (steps_ - step));
    const std::string text =
        format("step %ld/%ld  loss %.4f  norm %.3f  lr %.2e  %.0f tokens/s  %ld:%02ld:%02ld left",
               step, steps_, loss, norm, lr, timed_.tokens / timed_.seconds, left / 3600,
               left / 60 % 60, left % 60);
    show(terminal_ ? "\r" + text + "\033[K" : text + "\n");
    line_open_ = terminal_;
  }
  return {step, loss, norm, lr, tokens / s, s * 1e3};
}

void Progress::show(const std::string& text) {
  if (!out_) return;
  fputs(text.c_str(), out_);
  fflush(out_);
}

void Progress::say(int64_t step, const std::string& what) {
  show(sentence(line_open_ ? "\r\033[K" : "", "step ", step, "/", steps_, "  ", printable(what),
                "\n"));
  line_open_ = false;
}

void Progress::done() {
  if (line_open_) show("\n");
  line_open_ = false;
}

std::string Progress::summary(double flops_per_token) const {
  if (timed_.steps == 0) return "no step was timed";
  const double rate = timed_.tokens / timed_.seconds;
  return format("%.0f tokens/s, %.1f ms a step, %.4g GFLOP/s", rate,
                timed_.seconds * 1e3 / timed_.steps, rate * flops_per_token / 1e9);
}
