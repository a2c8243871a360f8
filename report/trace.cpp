// trace.cpp: see trace.h. Format: "Trace Event Format", complete events ("ph":"X"), times in
// microseconds.
#include "report/trace.h"

#include <cerrno>
#include <cstring>
#include <fstream>

#include "support/metrics.h"

void open_trace(const std::string& path) {
  put_aside(path, "traces");
  REQUIRE(std::ofstream(path, std::ios::app), "--trace: ", path,
          " cannot be opened for writing: ", strerror(errno));
}

void write_trace(const std::string& path, const Schedule& s,
                 const std::vector<Timeline>& pipelines) {
  std::ofstream out(path);
  out << "{\"traceEvents\":[";
  const char* comma = "\n";
  for (int stage = 0; stage < s.stages; stage++)
    for (size_t c = 0; c < pipelines.size(); c++) {
      const size_t rank = stage * pipelines.size() + c;
      out << comma
          << sentence("{\"ph\":\"M\",\"name\":\"thread_name\",\"pid\":0,\"tid\":", rank,
                      ",\"args\":{\"name\":\"rank ", rank, ", stage ", stage, "\"}}");
      comma = ",\n";
      for (size_t i = 0; i < s.actions[stage].size(); i++) {
        const Span& span = pipelines[c].spans[stage][i];
        out << sentence(",\n{\"ph\":\"X\",\"pid\":0,\"tid\":", rank, ",\"ts\":", span.start * 1e3,
                        ",\"dur\":", (span.end - span.start) * 1e3, ",\"name\":\"",
                        to_string(s.actions[stage][i]), "\"}");
      }
    }
  out << "\n]}\n";
  out.close();
  REQUIRE(out, "--trace: ", path, " cannot be written: ", strerror(errno));
}
