// svg.h: a picture in SVG, written element by element.
// test      tests/test_schedule.cpp, tests/test_plan.sh
#pragma once
#include <sstream>

#include "support/check.h"

// `more` are an element's other attributes: "class='head'". Words may have any signs.
struct Svg {
  std::ostringstream out;

  Svg(double width, double height, const std::string& more, const std::string& title) {
    out << "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 " << width << " " << height << "' "
        << more << ">\n<title>";
    write(title);
    out << "</title>\n";
  }
  template <class... Words>
  void text(double x, double y, const std::string& more, const Words&... words) {
    out << "<text x='" << x << "' y='" << y << "' " << more << ">";
    std::ostringstream all;
    (all << ... << words);
    write(all.str());
    out << "</text>\n";
  }
  void box(double x, double y, double width, double height, const std::string& more) {
    out << "<rect x='" << x << "' y='" << y << "' width='" << width << "' height='" << height
        << "' " << more << "/>\n";
  }

 private:
  void write(const std::string& words) {
    for (const char c : words)
      if (c == '&') out << "&amp;";
      else if (c == '<') out << "&lt;";
      else out << c;
  }
};
