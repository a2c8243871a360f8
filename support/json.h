// json.h: JSON as it comes in files of others: what is read must be what is written there.
// test      tests/test_support.cpp
#pragma once
#include <nlohmann/json.hpp>
#include <set>

#include "support/check.h"

// Not 8.9, true or "8", which nlohmann's get would take for numbers.
inline int64_t whole_number(const nlohmann::json& n, int64_t most = INT64_MAX) {
  REQUIRE(n.is_number_unsigned() && n <= uint64_t(most), n, " is no whole number from 0 to ", most);
  return n;
}

// What nlohmann says of a fault, without its "[json.exception....] ".
inline std::string without_prefix(const std::string& error) {
  return error.substr(error.starts_with("[json.") ? error.find("] ") + 2 : 0);
}

constexpr int kDeepest = 100;  // since nlohmann recurses; real files are nested about 5 deep

// Calls read(what the text of a file holds): an object, in which and below which no name stands
// twice. What is wrong becomes a sentence about the file.
template <class Read> void read_json(const std::string& path, std::string_view text, Read read) {
  using Event = nlohmann::json::parse_event_t;
  const auto damaged = [&](const std::string& why) {  // which may hold any name of the file
    return Error(sentence(path, " is damaged, or of another kind: ", why.substr(0, 400),
                          why.size() > 400 ? " ..." : ""));
  };
  try {
    // where nlohmann stops reading
    REQUIRE(text.find('\0') == text.npos, "a zero byte stands in it");
    REQUIRE(!text.starts_with("\xef\xbb\xbf"), "it begins with a byte-order mark");  // passed over
    std::vector<std::set<std::string>> names;  // of the objects around
    const auto json = nlohmann::json::parse(text, [&](int depth, Event event, const auto& name) {
      REQUIRE(depth <= kDeepest, "it is nested more than ", kDeepest, " deep");
      if (event == Event::object_start) names.emplace_back();
      if (event == Event::object_end) names.pop_back();
      REQUIRE(event != Event::key || names.back().insert(name).second, "the name ", name,
              " stands twice in one object");
      return true;
    });
    REQUIRE(json.is_object(), "it is no object of names");
    read(json);
  } catch (const Error& e) {
    throw damaged(e.what());
  } catch (const nlohmann::json::exception& e) {
    throw damaged(without_prefix(e.what()));
  }
}
