// recorder.cpp: see recorder.h.
#include "support/recorder.h"

#include <time.h>

#include <nlohmann/json.hpp>

#include "support/check.h"
#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>
#else  // nobody looks at ranges
static void nvtxRangePushA(const char*) {}
static void nvtxRangePop() {}
#endif

using Json = nlohmann::json;

Recorder recorder;

static double processor_time() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return double(t.tv_sec) + double(t.tv_nsec) * 1e-9;
}

// ---- where

void Recorder::stop() {
  if (std::exchange(drawn_, 0)) nvtxRangePop();
  where = {};
  on = false;
}

void Recorder::enter(const char* pass, const std::string& part) {
  if (on) where = {pass, part, where.microbatch, where.chunk, ++numbers_};
}

// ---- works

void Recorder::begin(Queue queue, const std::string& name, double bytes, double flops) {
  const int work = last_[queue] = works.size(), edge = begin_of(work);
  works.push_back({queue, std::exchange(waits_for_[queue], -1)});
  open_ = queue;
  if (queue == compute) {
    if (drawn_ != where.number) {
      if (drawn_) nvtxRangePop();
      drawn_ = where.number;
      part_ = events.size();
      const std::string of = where.pass + (where.part.empty() ? "" : " ") + where.part;
      add("X", "part", of, compute, edge, {{"pass", where.pass}, {"part", where.part}});
      nvtxRangePushA(of.c_str());
    }
    events[part_]["dur"] = end_of(work);
    for (const int collective : std::exchange(arriving_, {})) {
      add("s", "flow", "use", communication, begin_of(collective), {{"work", collective}});
      add("f", "flow", "use", compute, edge, {{"work", collective}});
    }
    add("X", "op", name, compute, edge, {{"bytes", bytes}, {"flops", flops}});
    nvtxRangePushA(name.c_str());
  }
  began_ = processor_time();
}

// The arguments of the open block of collectives, if one is open; its first call names it.
Json* Recorder::block(const char* op, const std::string& axis, const std::vector<int>& ranks) {
  if (open_ != communication) return nullptr;
  int& event = works.back().event;
  if (event < 0) {
    event = events.size();
    std::string serves = where.part.empty() ? where.pass : where.part;
    if (where.part.empty() && where.microbatch >= 0)
      serves += sentence(" of micro-batch ", where.microbatch);
    const std::string name = op + (" " + serves), declared = function,
                      caller = declared.substr(0, declared.find('('));
    add("X", "collective", name, communication, begin_of(last_[communication]),
        {{"op", op},
         {"axis", axis},
         {"ranks", ranks},
         {"for", serves},
         {"purpose", purpose},
         {"function", caller.substr(caller.rfind(' ') + 1)},
         {"bytes", 0.0},
         {"sends", Json::array()},
         {"receives", Json::array()}});
    nvtxRangePushA(name.c_str());
  }
  return &events[event]["args"];
}

void Recorder::call(const char* op, const std::string& axis, const std::vector<int>& ranks,
                    double bytes) {
  if (Json* args = block(op, axis, ranks)) (*args)["bytes"].get_ref<double&>() += bytes;
}

void Recorder::travel(const std::string& axis, const std::vector<int>& ranks, bool send,
                      const char* payload, int peer, int64_t bytes) {
  if (Json* args = block("exchange", axis, ranks))
    (*args)[send ? "sends" : "receives"].push_back({{"payload", payload},
                                                    {"microbatch", where.microbatch},
                                                    {send ? "to" : "from", peer},
                                                    {"bytes", bytes}});
}

void Recorder::end() {
  works.back().processor = processor_time() - began_;
  if (open_ == compute || works.back().event >= 0) nvtxRangePop();  // else nothing was to be sent
  open_.reset();
}

void Recorder::wait(Queue queue, int work) {
  if (work < 0 || works[work].queue == queue) return;
  waits_for_[queue] = std::max(waits_for_[queue], work);
  if (queue == compute && !std::exchange(works[work].awaited, true)) arriving_.push_back(work);
}

// ---- events

void Recorder::add(const char* kind, const char* category, const std::string& name, int row,
                   int edge, Json args) {
  if (on) {
    args["microbatch"] = where.microbatch;
    args["chunk"] = where.chunk;
  }
  events.push_back({{"ph", kind},
                    {"cat", category},
                    {"name", name},
                    {"tid", row},
                    {"ts", edge},
                    {"dur", edge | 1},
                    {"args", std::move(args)}});
}

void Recorder::note_unit(const char* name, const Part& part, const char* function) {
  if (!on) return;
  const Queue row = open_.value_or(compute);
  add("i", "unit", name, row, end_of(last_[row]),
      {{"unit", part.unit}, {"name", part.name}, {"function", function}});
}

void Recorder::note_live(const char* name, int64_t bytes) {
  if (on) add("i", "live", name, compute, end_of(last_[compute]), {{"bytes", bytes}});
}

void Recorder::allocated(int category, int64_t bytes) {
  const bool is_first = open_ == compute && bytes > 0;  // in the op that is open
  const int op = last_[compute];
  memory[is_first ? begin_of(op) : end_of(op)][category] += bytes;
}
