// recorder.h: what a traced step is made of, in the order in which the host issued it (--trace).
//
// idea      tensor.h puts an event before and one behind each op and each block of collectives.
//           What else a trace says of such a work is noted here: the part of the model that it
//           belongs to, what it waits for in the rank's other queue, what the ledger counts for it,
//           and what changes beside it in memory and in the state of units. It becomes text at
//           once, but for the times, which report/trace.h adds.
// order     The host allocates and frees in the order of the compute stream (Buffer in tensor.h).
//           So a change of memory stands at the op before it, however far the host is ahead.
// names     On the CUDA build parts, ops and collectives are NVTX ranges, too: Nsight shows them.
// cost      a branch, where nothing is recorded
// test      tests/test_trace.cpp
#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

class Recorder {
 public:
  bool on = false;
  int stage = 0;
  void stop();  // until it is switched on again

  // ---- where the work is that is issued now
  struct Part {  // "block 2", and what FSDP shards of it
    std::string name = "";
    std::vector<int> units = {};
  };
  struct Where {
    const char* pass = "";  // "forward"
    const Part* part = nullptr;
    int microbatch = -1, chunk = -1;
    int number = 0;  // work of one number is one part of the step
  };
  Where where;
  void enter(const char* pass, const Part* part = nullptr);
  void enter_use(const char* pass, const Part& part);  // which needs its units' parameters

  // ---- works: ops and blocks of collectives
  enum Queue { compute, communication };
  enum Edge { begins, ends };
  struct Issued {
    Queue queue;
    int after;               // the last work of the other queue that this one waits for; -1: none
    double processor = 0;    // seconds of the issuing thread
    std::string ranks = "";  // of a collective: the axis and who takes part
    std::vector<int> sources = {};  // ranks that it receives from
  };
  std::vector<Issued> works;
  void begin(Queue queue, const std::string& name, double bytes, double flops);
  // Of an axis, in the world: first, first + stride, ...; `rank` is this rank's place among them.
  struct Ranks {
    std::string axis = "";
    int first = 0, stride = 1, size = 0, rank = 0;
  };
  void issued_by(const char* function, const char* purpose);
  void call(const Ranks& ranks, const char* op, double bytes);  // as the ledger counts it
  void travel(const Ranks& ranks, bool send, const char* payload, int peer, int64_t bytes);
  void end();
  int last(Queue queue) const { return last_[queue]; }  // work so far
  void wait(Queue queue, int work);                     // the queue does, until it is done

  // ---- what is drawn: at an edge of a work, or from its begin to the end of another
  struct Mark {
    Queue row;
    int work;  // -1: at the beginning
    Edge edge;
    int last;           // -1: no bar
    std::string event;  // in JSON, up to its arguments, without times and ranks
  };
  std::vector<Mark> marks;
  std::vector<std::pair<int, int>> arrows;  // from a unit's gather to the work before its first use
  void note_unit(const char* name, Queue row, const Part& unit, const char* function);
  void note_live(const char* name, int64_t bytes);  // activations of the micro-batch
  // changes at an edge of an op, in bytes by category
  std::map<std::pair<int, Edge>, std::array<int64_t, 8>> memory;
  void allocated(int category, int64_t bytes);  // or freed, if negative

 private:
  std::string microbatch() const;
  void name_block(const Ranks& ranks, const char* op);

  int last_[2] = {-1, -1}, waits_for_[2] = {-1, -1};
  int numbers_ = 0, drawn_ = 0;
  size_t part_ = 0;             // the mark of the part that is open
  std::map<int, int> gathers_;  // by unit, until it is used
  bool open_ = false;
  double began_ = 0;
  struct {
    Ranks ranks;
    std::string op, serves, purpose, function, travels[2];
    double bytes = 0;
    int peer = -1;  // of all sends and receives; -2: there are several
  } block_;
};
inline Recorder recorder;

// What is issued while it lives belongs to this part.
class Entered {
 public:
  explicit Entered(const char* pass, const Recorder::Part* part = nullptr)
      : before_(recorder.where) {
    recorder.enter(pass, part);
  }
  ~Entered() { recorder.where = before_; }
  Entered(const Entered&) = delete;

 private:
  const Recorder::Where before_;
};
