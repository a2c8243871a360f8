// recorder.cpp: see recorder.h.
#include "support/recorder.h"

#include <nvtx3/nvToolsExt.h>
#include <time.h>

#include <nlohmann/json.hpp>

#include "support/check.h"

using Json = nlohmann::json;

Recorder recorder;

static double processor_time() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return double(t.tv_sec) + double(t.tv_nsec) * 1e-9;
}

// ---- where

void Recorder::enter(const char* new_pass, const std::string& new_part) {
  if (!on) return;
  pass = new_pass;
  part = new_part;
  if (std::exchange(part_, {})) nvtxRangePop();
}

// ---- works

void Recorder::begin(Queue queue, const std::string& name) {
  const int work = last_[queue] = works.size(), edge = 2 * work;
  works.push_back({queue, std::exchange(waits_for_[queue], -1)});
  open_ = queue;
  if (queue == compute) {
    if (!part_) {
      part_ = events.size();
      const std::string of = pass + (part.empty() ? "" : " ") + part;
      add("X", "part", of, compute, edge, {{"pass", pass}, {"part", part}});
      nvtxRangePushA(of.c_str());
    }
    events[*part_]["dur"] = edge + 1;
    add("X", "op", name, compute, edge, {});
    nvtxRangePushA(name.c_str());
  }
  began_ = processor_time();
}

// The arguments of the open block of collectives; its first call names it.
Json& Recorder::block(const char* op, const std::string& axis, const std::vector<int>& ranks,
                      const std::string& serves) {
  int& event = works.back().event;
  if (event < 0) {
    event = events.size();
    const std::string name = op + (" " + serves);
    add("X", "collective", name, communication, 2 * last_[communication],
        {{"op", op},
         {"axis", axis},
         {"ranks", ranks},
         {"for", serves},
         {"purpose", purpose},
         {"function", function},
         {"bytes", 0.0},
         {"sends", Json::array()},
         {"receives", Json::array()}});
    nvtxRangePushA(name.c_str());
  }
  return events[event]["args"];
}

void Recorder::call(const char* op, const std::string& axis, const std::vector<int>& ranks,
                    double bytes) {
  if (open_ != communication) return;
  block(op, axis, ranks, part.empty() ? purpose : part)["bytes"].get_ref<double&>() += bytes;
}

void Recorder::travel(const std::string& axis, const std::vector<int>& ranks, bool send,
                      const char* payload, int peer, int64_t bytes) {
  if (open_ != communication) return;
  const std::string of = microbatch < 0 ? "" : sentence(" of micro-batch ", microbatch);
  block("exchange", axis, ranks, payload + of)[send ? "sends" : "receives"].push_back(
      {{"payload", payload},
       {"microbatch", microbatch},
       {send ? "to" : "from", peer},
       {"bytes", bytes}});
}

void Recorder::end() {
  works.back().processor = processor_time() - began_;
  if (open_ == compute || works.back().event >= 0) nvtxRangePop();  // else nothing was to be sent
  open_.reset();
}

void Recorder::wait(Queue queue, int work) {
  if (work >= 0 && works[work].queue != queue)
    waits_for_[queue] = std::max(waits_for_[queue], work);
}

// ---- events

void Recorder::add(const char* kind, const char* category, const std::string& name, int row,
                   int edge, Json args) {
  if (on) args["microbatch"] = microbatch;
  events.push_back({{"ph", kind},
                    {"cat", category},
                    {"name", name},
                    {"tid", row},
                    {"ts", edge},
                    {"dur", edge | 1},
                    {"args", std::move(args)}});
}

void Recorder::resharded(const std::string& unit) {
  if (on) add("i", "unit", "reshard", compute, 2 * last_[compute] + 1, {{"unit", unit}});
}

void Recorder::allocated(const char* category, int of, int64_t bytes) {
  if (!on) return;
  const bool is_first = open_ == compute && bytes > 0;  // in the op that is open
  const int edge = 2 * last_[compute] + !is_first;
  changes["memory"][edge][category] += bytes;
  if (of >= 0) changes["activations"][edge][sentence(of)] += bytes;
}
