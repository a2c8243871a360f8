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

using Json = nlohmann::json;

Recorder recorder;

static double processor_time() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return double(t.tv_sec) + double(t.tv_nsec) * 1e-9;
}

// ---- where

void Recorder::stop() {
  if (std::exchange(drawn_, 0)) close_range();
  where = {};
  on = false;
}

void Recorder::enter(const char* pass, const std::string& part) {
  if (on) where = {pass, part, where.microbatch, where.chunk, ++numbers_};
}

// ---- works

void Recorder::begin(Queue queue, const std::string& name, double bytes, double flops) {
  const int work = last_[queue] = int(works.size()), edge = begin_of(work);
  works.push_back({queue, std::exchange(waits_for_[queue], -1), name, bytes, flops});
  open_ = queue;
  block_ = -1;
  if (queue == compute) {
    if (drawn_ != where.number) {
      if (drawn_) close_range();
      drawn_ = where.number;
      part_ = events.size();
      const std::string of = where.pass + (where.part.empty() ? "" : " ") + where.part;
      add("X", "part", of, compute, edge, {{"pass", where.pass}, {"part", where.part}});
      open_range(of);
    }
    events[part_]["dur"] = end_of(work);
    for (const int collective : std::exchange(arriving_, {})) {
      add("s", "flow", "use", communication, begin_of(collective), {{"work", collective}});
      add("f", "flow", "use", compute, edge, {{"work", collective}});
    }
    open_range(name);
  }
  began_ = processor_time();
}

void Recorder::issued_by(const char* function, const char* purpose) {
  function_ = function;
  purpose_ = purpose;
}

static Json all_of(const Recorder::Ranks& ranks) {
  Json all;
  for (int r = 0; r < ranks.size; r++) all.push_back(ranks.first + r * ranks.stride);
  return all;
}

// The arguments of the open block of collectives, if one is open; its first call names it.
Json* Recorder::block(const Ranks& ranks, const char* op) {
  if (open_ != communication) return nullptr;
  if (block_ < 0) {
    block_ = int(events.size());
    std::string serves = where.part.empty() ? where.pass : where.part;
    if (where.part.empty() && where.microbatch >= 0)
      serves += sentence(" of micro-batch ", where.microbatch);
    const std::string name = op + (" " + serves),
                      function = function_.substr(0, function_.find('('));
    add("X", "collective", name, communication, begin_of(last_[communication]),
        {{"op", op},
         {"axis", ranks.axis},
         {"ranks", all_of(ranks)},
         {"for", serves},
         {"purpose", purpose_},
         {"function", function.substr(function.rfind(' ') + 1)},
         {"bytes", 0.0},
         {"sends", Json::array()},
         {"receives", Json::array()}});
    open_range(name);
  }
  return &events[block_]["args"];
}

void Recorder::call(const Ranks& ranks, const char* op, double bytes) {
  if (Json* args = block(ranks, op)) (*args)["bytes"].get_ref<double&>() += bytes;
}

void Recorder::travel(const Ranks& ranks, bool send, const char* payload, int peer, int64_t bytes) {
  Json* args = block(ranks, "exchange");
  if (!args) return;
  const int me = ranks.first + ranks.rank * ranks.stride, other = ranks.first + peer * ranks.stride;
  const Json two{std::min(me, other), std::max(me, other)};
  Json &members = (*args)["ranks"], &sends = (*args)["sends"], &receives = (*args)["receives"];
  if (sends.empty() && receives.empty()) members = two;
  else if (members != two) members = all_of(ranks);
  (send ? sends : receives)
      .push_back({{"payload", payload},
                  {"microbatch", where.microbatch},
                  {send ? "to" : "from", other},
                  {"bytes", bytes}});
}

void Recorder::end() {
  works.back().processor = processor_time() - began_;
  if (open_ == compute || block_ >= 0) close_range();  // else nothing was to be sent
  open_.reset();
}

void Recorder::wait(Queue queue, int work) {
  if (work < 0 || works[work].queue == queue) return;
  waits_for_[queue] = std::max(waits_for_[queue], work);
  if (queue == compute && awaited_.insert(work).second) arriving_.push_back(work);
}

// ---- events

void Recorder::add(const char* kind, const char* category, const std::string& name, int row,
                   int edge, Json args) {
  if (on) {
    args["stage"] = stage;
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

void Recorder::note_unit(const char* name, Queue row, const Part& part, const char* function) {
  if (!on) return;
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
