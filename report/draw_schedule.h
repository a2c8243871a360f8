// draw_schedule.h: a timeline of a pipeline as text for a terminal and as SVG for a page.
// idea      one row a stage; a computation is as long as it took, and numbered by its micro-batch
// test      tests/test_schedule.cpp
#pragma once
#include "theory/simulate.h"

// One column `unit` of time; unit = 0 chooses one that fits 100 columns.
std::string draw_text(const Schedule& schedule, const Timeline& timeline, double unit);
// longest: how long the longest of the drawings takes that are to be compared: they get one width,
// and one scale of time. 0: this one is alone.
std::string draw_svg(const Schedule& schedule, const Timeline& timeline, const std::string& title,
                     const std::string& unit_name, double longest = 0);
