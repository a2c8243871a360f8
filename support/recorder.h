// recorder.h: what a traced step is made of, in the order in which the host issued it (--trace).
//
// idea      tensor.h puts an event before and one behind each op and each block of collectives:
//           such a piece of work has a number. What else a trace says of it is noted here: the part
//           of the model that it belongs to, what it waits for in the rank's other queue, what the
//           ledger counts for it, what changes beside it in memory, and where a unit is resharded.
//           It is an event of Chrome's format at once, but for the times: until report/trace.h
//           knows those, they are edges of works.
// order     The host allocates and frees in the order of the compute stream (Buffer in tensor.h).
//           So a change of memory stands at the op before it, however far the host is ahead.
// names     On the CUDA build parts, ops and collectives are NVTX ranges, too: Nsight shows them.
// cost      where nothing is recorded: a branch, and of an exchange the list of its two ranks
// test      tests/test_trace.cpp
#pragma once
#include <cstdint>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

class Recorder {
 public:
  bool on = false;

  // ---- where the work is that is issued now
  std::string pass, part;  // "forward", "block 2"
  int microbatch = -1;
  // what is issued from here on belongs to this part
  void enter(const char* pass, const std::string& part = "");

  // ---- works: ops and blocks of collectives
  enum Queue { compute, communication };
  struct Issued {
    Queue queue;
    int after;             // the last work of the other queue that this one waits for; -1: none
    int event = -1;        // of a block of collectives, if one of it was called
    double processor = 0;  // seconds of the issuing thread
    double begin = 0, end = 0;  // by the first rank's clock: report/trace.h knows
  };
  std::vector<Issued> works;
  void begin(Queue queue, const std::string& name);
  // Of the next block of collectives, and what is in it. `ranks`, which take part, and `peer` are
  // numbers in the world. The ledger counts the bytes of a call.
  const char *function = "", *purpose = "";
  void call(const char* op, const std::string& axis, const std::vector<int>& ranks, double bytes);
  void travel(const std::string& axis, const std::vector<int>& ranks, bool send,
              const char* payload, int peer, int64_t bytes);
  void end();
  int last(Queue queue) const { return last_[queue]; }  // work so far
  void wait(Queue queue, int work);                     // the queue does, until it is done

  // ---- events
  // An edge of a work: 2 i is the begin of work i, 2 i + 1 its end; the end of work -1 is the
  // beginning of the trace.
  std::vector<nlohmann::json> events;
  // kind: "X" a bar from a begin to the same work's end, "i" a mark, "C" a curve's next value, "M"
  // a name
  void add(const char* kind, const char* category, const std::string& name, int row, int edge,
           nlohmann::json args);
  void resharded(const std::string& unit);  // at the end of the last op
  // What is allocated, or freed if negative, at an edge of an op: of "memory" in bytes by category,
  // of "activations" by micro-batch.
  std::map<std::string, std::map<int, std::map<std::string, int64_t>>> changes;
  void allocated(const char* category, int microbatch, int64_t bytes);

 private:
  nlohmann::json& block(const char* op, const std::string& axis, const std::vector<int>& ranks,
                        const std::string& serves);

  int last_[2] = {-1, -1}, waits_for_[2] = {-1, -1};
  std::optional<Queue> open_;   // of the work that is being issued
  std::optional<size_t> part_;  // the event of the part that was entered, once it has an op
  double began_ = 0;
};
extern Recorder recorder;
