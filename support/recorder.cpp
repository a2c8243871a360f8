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
  return t.tv_sec + t.tv_nsec * 1e-9;
}

// ---- where

void Recorder::enter(const char* pass, const std::string& part) {
  if (!on) return;
  pass_ = pass;
  part_ = part;
  if (std::exchange(in_part_, false)) nvtxRangePop();
}

// ---- works

void Recorder::begin(Queue queue, const std::string& name) {
  last_[queue] = works.size();
  works.push_back({queue, std::exchange(waits_for_[queue], -1), name});
  if (queue == compute) {
    if (!std::exchange(in_part_, true))
      add(pass_ + (part_.empty() ? "" : " ") + part_, {{"pass", pass_}, {"part", part_}});
    nvtxRangePushA(name.c_str());
  }
  open_ = queue;
  works.back().begin = processor_time();
}

void Recorder::add(const std::string& name, Json described) {
  works.back().args = args.size();
  described.update({{"name", name}, {"microbatch", microbatch}});
  args.push_back(std::move(described));
  nvtxRangePushA(name.c_str());
  works.back().begin = processor_time();  // writing this down is no part of the work
}

// What `args` has of the open block of collectives, which its first call names.
Json& Recorder::block(const char* op, const std::string& axis, const std::vector<int>& ranks,
                      const std::string& serves) {
  if (works.back().args < 0)
    add(op + (" " + serves), {{"op", op},
                              {"axis", axis},
                              {"ranks", ranks},
                              {"for", serves},
                              {"purpose", purpose},
                              {"function", function},
                              {"bytes", 0.0},
                              {"sends", Json::array()},
                              {"receives", Json::array()}});
  return args.back();
}

void Recorder::call(const char* op, const std::string& axis, const std::vector<int>& ranks,
                    double bytes) {
  if (open_ != communication) return;
  block(op, axis, ranks, part_.empty() ? purpose : part_)["bytes"].get_ref<double&>() += bytes;
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
  works.back().end = processor_time();
  if (open_ == compute || works.back().args >= 0) nvtxRangePop();  // else nothing was to be sent
  open_.reset();
}

void Recorder::wait(Queue queue, int work) {
  if (work >= 0 && works[work].queue != queue)
    waits_for_[queue] = std::max(waits_for_[queue], work);
}

void Recorder::resharded(const std::string& unit) {
  if (on) works.back().resharded.push_back(unit);
}

// ---- memory

void Recorder::allocated(const char* category, int of, int64_t bytes) {
  if (!on) return;
  const bool is_first = open_ == compute && bytes > 0;  // in the op that is open
  const int edge = 2 * last_[compute] + !is_first;
  changes.emplace_back(edge, "memory", category, bytes);
  if (of >= 0) changes.emplace_back(edge, "activations", std::to_string(of), bytes);
}
