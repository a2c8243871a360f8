// recorder.cpp: see recorder.h.
#include "support/recorder.h"

#include <time.h>

#include <nlohmann/json.hpp>

#include "support/check.h"
#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>
static void open_range(const std::string& name) { nvtxRangePushA(name.c_str()); }
static void close_range() { nvtxRangePop(); }
#else
static void open_range(const std::string&) {}
static void close_range() {}
#endif

static double processor_time() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return double(t.tv_sec) + double(t.tv_nsec) * 1e-9;
}

// More arguments may follow: report/trace.cpp closes both braces.
static std::string event(const char* kind, const std::string& name, const std::string& args) {
  return sentence("\"cat\":\"", kind, "\",\"name\":\"", name, "\",\"args\":{", args);
}

// ---- where

void Recorder::stop() {
  if (std::exchange(drawn_, 0)) close_range();
  where = {};
  on = false;
}

void Recorder::enter(const char* pass, const Part* part) {
  if (on) where = {pass, part, where.microbatch, where.chunk, ++numbers_};
}

void Recorder::enter_use(const char* pass, const Part& part) {
  if (!on) return;
  enter(pass, &part);
  for (const int unit : part.units)
    if (const auto gather = gathers_.extract(unit))
      arrows.push_back({gather.mapped(), works.size()});
}

std::string Recorder::microbatch() const {
  return where.microbatch < 0
             ? ""
             : sentence(",\"microbatch\":", where.microbatch, ",\"chunk\":", where.chunk);
}

// ---- works

void Recorder::begin(Queue queue, const std::string& name, double bytes, double flops) {
  const int number = int(works.size());
  works.push_back({queue, std::exchange(waits_for_[queue], -1)});
  last_[queue] = number;
  open_ = true;
  block_ = {};
  if (queue == compute) {
    if (drawn_ != where.number) {
      if (drawn_) close_range();
      drawn_ = where.number;
      part_ = marks.size();
      const Part part = where.part ? *where.part : Part{};
      const std::string of = sentence(where.pass, part.name.empty() ? "" : " ", part.name);
      open_range(of);
      marks.push_back({compute, number, begins, number,
                       event("part", of,
                             sentence("\"pass\":\"", where.pass, "\",\"part\":\"", part.name,
                                      "\",\"unit\":", nlohmann::json(part.units),
                                      ",\"stage\":", stage, microbatch()))});
    }
    marks[part_].last = number;
    marks.push_back({compute, number, begins, number,
                     event("op", name, sentence("\"bytes\":", bytes, ",\"flops\":", flops))});
    open_range(name);
  }
  began_ = processor_time();
}

// Of a block of collectives: what its first call says of all.
void Recorder::name_block(const Ranks& ranks, const char* op) {
  if (block_.ranks.size) return;
  block_.ranks = ranks;
  block_.op = op;
  block_.serves = where.part ? where.part->name : where.pass;
  if (!where.part && where.microbatch >= 0)
    block_.serves += sentence(" of micro-batch ", where.microbatch);
  open_range(block_.op + " " + block_.serves);
}

void Recorder::issued_by(const char* function, const char* purpose) {
  block_.function = function;
  block_.purpose = purpose;
}

void Recorder::call(const Ranks& ranks, const char* op, double bytes) {
  if (!open_ || works.back().queue == compute) return;
  name_block(ranks, op);
  block_.bytes += bytes;
}

void Recorder::travel(const Ranks& ranks, bool send, const char* payload, int peer, int64_t bytes) {
  if (!open_) return;
  name_block(ranks, "exchange");
  const int rank = ranks.first + peer * ranks.stride;
  block_.peer = block_.peer == -1 || block_.peer == rank ? rank : -2;
  std::string& all = block_.travels[send];
  all += sentence(all.empty() ? "" : ",", "{\"payload\":\"", payload,
                  "\",\"microbatch\":", where.microbatch, send ? ",\"to\":" : ",\"from\":", rank,
                  ",\"bytes\":", bytes, "}");
  if (!send) works.back().sources.push_back(rank);
}

void Recorder::end() {
  Issued& work = works.back();
  work.processor = processor_time() - began_;
  open_ = false;
  if (work.queue == communication && !block_.ranks.size) return;  // nothing was to be sent
  close_range();
  if (work.queue == compute) return;
  const auto& [axis, first, stride, size, mine] = block_.ranks;
  nlohmann::json ranks;  // all of the axis, or two
  for (int r = 0; r < size; r++)
    if (const int rank = first + r * stride; block_.peer < 0 || rank == block_.peer || r == mine)
      ranks.push_back(rank);
  work.ranks = axis + ranks.dump();
  const std::string function = block_.function.substr(0, block_.function.find('('));
  std::string args =
      sentence("\"op\":\"", block_.op, "\",\"axis\":\"", axis, "\",\"for\":\"", block_.serves,
               "\",\"purpose\":\"", block_.purpose, "\",\"bytes\":", block_.bytes,
               ",\"function\":\"", function.substr(function.rfind(' ') + 1), "\",\"ranks\":", ranks,
               microbatch());
  if (block_.peer != -1)
    args += sentence(",\"sends\":[", block_.travels[1], "],\"receives\":[", block_.travels[0], "]");
  marks.push_back({communication, last_[communication], begins, last_[communication],
                   event("collective", block_.op + " " + block_.serves, args)});
}

void Recorder::wait(Queue queue, int work) {
  if (work >= 0 && works[work].queue != queue)
    waits_for_[queue] = std::max(waits_for_[queue], work);
}

// ---- beside them

void Recorder::note_unit(const char* name, Queue row, const Part& part, const char* function) {
  if (!on) return;
  if (std::string_view(name) == "arrived") gathers_[part.units[0]] = last_[row];
  marks.push_back({row, last_[row], ends, -1,
                   event("unit", name,
                         sentence("\"unit\":", part.units[0], ",\"name\":\"", part.name,
                                  "\",\"function\":\"", function, "\""))});
}

void Recorder::note_live(const char* name, int64_t bytes) {
  if (!on) return;
  marks.push_back({compute, last_[compute], ends, -1,
                   event("live", name, sentence("\"bytes\":", bytes, microbatch()))});
}

void Recorder::allocated(int category, int64_t bytes) {
  const bool inside = open_ && works.back().queue == compute;
  memory[{last_[compute], inside && bytes > 0 ? begins : ends}][category] += bytes;
}
