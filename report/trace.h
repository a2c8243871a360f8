// trace.h: a timeline as a file in Chrome's trace format (chrome://tracing and Perfetto open it): a
// row a rank, a bar a computation.
#pragma once
#include <string>

#include "theory/simulate.h"

// Creates the file; one that is there stays as it is. Throws where it cannot be written: before
// training, not after it.
void open_trace(const std::string& path);
// pipelines: of the ranks that differ in other axes only; rank = stage * number of pipelines +
// pipeline. Spans are in ms. Throws where the file cannot be written.
void write_trace(const std::string& path, const Schedule& schedule,
                 const std::vector<Timeline>& pipelines);
