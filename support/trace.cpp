// trace.cpp: see trace.h. Format: "Trace Event Format", complete events ("ph":"X"), times in microseconds.
#include "support/trace.h"

#include <cerrno>
#include <cstring>
#include <fstream>

#include "support/check.h"

void write_trace(const std::string& path, const Schedule& s, const Timeline& t) {
  std::ofstream out(path);
  out << "{\"traceEvents\":[";
  for (int stage = 0; stage < s.stages; stage++) {
    out << (stage ? ",\n" : "\n") << sentence("{\"ph\":\"M\",\"name\":\"thread_name\",\"pid\":0,\"tid\":", stage, ",\"args\":{\"name\":\"stage ", stage, "\"}}");
    for (size_t i = 0; i < s.ranks[stage].size(); i++) {
      const Action& a = s.ranks[stage][i];
      const Span& span = t.spans[stage][i];
      out << sentence(",\n{\"ph\":\"X\",\"pid\":0,\"tid\":", stage, ",\"ts\":", span.start * 1e3, ",\"dur\":", (span.end - span.start) * 1e3,
                      ",\"name\":\"", to_string(a), "\"}");
    }
  }
  out << "\n]}\n";
  out.close();
  REQUIRE(out, "--trace: ", path, " cannot be written: ", strerror(errno));
}
