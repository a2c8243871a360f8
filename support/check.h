// check.h: what to say when something is wrong. Every failure is one sentence in an Error; main
// prints it and exits non-zero.
#pragma once
#include <cctype>
#include <cerrno>
#include <charconv>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class Part> const Part& digits(const Part& part) { return part; }
// as few as say exactly which number it is: "--top-p 1.0000001 is above 1"
inline std::string digits(double number) {
  char text[32];
  return std::string(
      text, std::to_chars(text, text + sizeof text, number, std::chars_format::general).ptr);
}

template <class... Parts> std::string sentence(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << digits(parts));
  return out.str();
}

inline std::string join(const std::vector<std::string>& words, const std::string& separator) {
  std::string all;
  for (const std::string& word : words) all += (all.empty() ? "" : separator) + word;
  return all;
}

// of the rows of a table
template <class Rows> std::vector<std::string> names_of(const Rows& rows) {
  std::vector<std::string> names;
  for (const auto& row : rows) names.push_back(row.name);
  return names;
}

using NamedValues = std::vector<std::pair<std::string, std::string>>;

// what printf would print
__attribute__((format(printf, 1, 2))) inline std::string format(const char* pattern, ...) {
  char text[256];
  va_list values;
  va_start(values, pattern);
  vsnprintf(text, sizeof text, pattern, values);
  va_end(values);
  return text;
}

// What the program does now, for the sentence about memory that the host does not have.
inline std::string at_work = "starting";
inline std::string words_of(const std::exception& e) {
  if (!dynamic_cast<const std::bad_alloc*>(&e) && !dynamic_cast<const std::length_error*>(&e))
    return e.what();
  return "the memory of this machine, or what a limit leaves of it (ulimit -v, ulimit -d), does "
         "not hold what this asks for: " +
         at_work;
}

// what it throws, in words; "" if it ends well
template <class Work> std::string error_of(const Work& work) {
  try {
    work();
  } catch (const std::exception& e) {
    return words_of(e);
  }
  return "";
}

// A text of others for a terminal: a '?' for each control character, the C1 controls (U+0080 to
// U+009F), too, but not for the ends of lines and tabs.
inline std::string printable(std::string text) {
  for (size_t i = 0; i < text.size(); i++) {
    const unsigned char c = text[i], next = text.c_str()[i + 1];
    const bool is_c1 = c == 0xc2 && 0x80 <= next && next < 0xa0;
    if (is_c1) text.erase(i, 1);
    if (is_c1 || (iscntrl(c) && c != '\n' && c != '\t')) text[i] = '?';
  }
  return text;
}

// For the user: REQUIRE(width % heads == 0, "--width ", width, " does not divide by --heads ",
// heads). Alive in every build.
#define REQUIRE(condition, ...)                           \
  do {                                                    \
    if (!(condition)) throw Error(sentence(__VA_ARGS__)); \
  } while (0)

// The same for what the system refuses: the sentence ends with its reason.
#define SYSTEM_CHECK(condition, ...) REQUIRE(condition, __VA_ARGS__, ": ", strerror(errno))

// The row of a table by its name, or a sentence that lists the names.
template <class Rows>
const auto& row_named(const Rows& rows, const char* kind, std::string_view name) {
  for (const auto& row : rows)
    if (row.name == name) return row;
  throw Error(
      sentence("there is no ", kind, " '", name, "': choose one of ", join(names_of(rows), ", ")));
}

// For the programmer: a broken contract inside the program; names the place.
#define ASSERT(condition, ...)                                                                     \
  do {                                                                                             \
    if (!(condition))                                                                              \
      throw Error(                                                                                 \
          sentence(__FILE__, ":", __LINE__, ": ", #condition, " does not hold. ", ##__VA_ARGS__)); \
  } while (0)

// The last line of a main: what was printed has arrived.
inline void check_printed() {
  REQUIRE(fflush(stdout) == 0 && !ferror(stdout),
          "what was printed could not be written to the standard output");
}

// A main of one process: what is wrong is said after the program's name, and its status is 1.
template <class Work> int run_main(const char* name, const Work& work) {
  const std::string error = error_of([&] {
    work();
    check_printed();
  });
  fflush(stdout);  // what it has said before that
  if (!error.empty()) fprintf(stderr, "%s: %s\n", name, printable(error).c_str());
  return !error.empty();
}

// For libraries whose functions return a status; `words` may read it, as status_.
#define STATUS_CHECK(text, call, success, words)                                      \
  do {                                                                                \
    const auto status_ = (call);                                                      \
    if (status_ != (success))                                                         \
      throw Error(sentence(__FILE__, ":", __LINE__, ": ", text, " failed: ", words)); \
  } while (0)
#define CUDA_CHECK(call) STATUS_CHECK(#call, call, cudaSuccess, cudaGetErrorString(status_))
#define CUBLAS_CHECK(call) \
  STATUS_CHECK(#call, call, CUBLAS_STATUS_SUCCESS, sentence("cuBLAS status ", int(status_)))
