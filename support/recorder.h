// recorder.h: what a traced step is made of, in the order in which the host issued it (--trace).
//
// idea      op_times.h puts an event before and one after each op and each block of collectives:
//           such a piece of work has a number. What else a trace says of it is noted here: the part
//           of the model that it belongs to, what it waits for in the rank's other queue, what the
//           ledger counts for it, which units are resharded after it, and what changes beside it
//           in memory. report/trace.h makes a file of it when all is done.
// order     The host allocates and frees in the order of the compute stream (Buffer in tensor.h).
//           So a change of memory stands at the op before it, however far the host is ahead.
// names     On the CUDA build parts, ops and collectives are NVTX ranges, too: Nsight shows them.
// cost      where nothing is recorded: a branch, and of an exchange the list of its two ranks
// test      tests/test_trace.cpp
#pragma once
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

class Recorder {
 public:
  bool on = false;

  // ---- where the work is that is issued now
  int microbatch = -1;
  // what is issued from here on belongs to this part: "forward", "block 2"
  void enter(const char* pass, const std::string& part = "");

  // ---- works: ops and blocks of collectives
  enum Queue { compute, communication };
  struct Issued {
    Queue queue;
    int after;         // the last work of the other queue that this one waits for; -1: none
    std::string name;  // of an op
    // where `args` has the part that begins with it, or the collectives in it; -1: nowhere
    int args = -1;
    std::vector<std::string> resharded = {};  // units, after the last op so far
    // in processor seconds of the issuing thread; where report/trace.h measures, in seconds by the
    // first rank's clock
    double begin = 0, end = 0;
  };
  std::vector<Issued> works;
  std::vector<nlohmann::json> args;  // as a trace has them
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
  void resharded(const std::string& unit);

  // ---- memory
  // What is allocated, or freed if negative, as {edge of an op, curve, of what, bytes}: of
  // "memory" by category, of "activations" by micro-batch. 2 i is the begin of work i, 2 i + 1 its
  // end; the end of work -1 is the beginning of the trace.
  std::vector<std::tuple<int, std::string, std::string, int64_t>> changes;
  void allocated(const char* category, int microbatch, int64_t bytes);

 private:
  void add(const std::string& name, nlohmann::json described);  // of the last work
  nlohmann::json& block(const char* op, const std::string& axis, const std::vector<int>& ranks,
                        const std::string& serves);

  std::string pass_, part_;
  int last_[2] = {-1, -1}, waits_for_[2] = {-1, -1};
  std::optional<Queue> open_;  // of the work that is being issued
  bool in_part_ = false;       // the part that was entered has an op
};
extern Recorder recorder;
