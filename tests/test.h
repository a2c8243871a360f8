// test.h: the few lines that every test program shares. A test is named for the sentence it proves
// and prints what it measured.
//
//   TEST(gelu_equals_reference) { ...; CHECK_LE(difference, 1e-6); measured("max|d| = ",
//   difference); } int main() { return run_tests(); }
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

#include "support/check.h"

namespace test {

struct Case {
  const char* name;
  void (*body)();
};
inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}
inline std::string note;
struct Skip {
  std::string why;
};
// Under mpiexec: what all ranks agree the error is, and who prints (tests/mpi_test.h).
inline std::function<std::string(const std::string& error)> agree = [](const std::string& error) {
  return error;
};
inline bool prints = true;
struct Register {
  Register(const char* name, void (*body)()) { cases().push_back({name, body}); }
};

}  // namespace test

#define TEST(name)                                      \
  static void name();                                   \
  static test::Register name##_registered(#name, name); \
  static void name()

template <class... Parts> void measured(const Parts&... parts) {
  std::ostringstream out;  // six digits are enough here
  (out << ... << parts);
  test::note += out.str();
}
// The larger of the two; a NaN counts as infinite (std::max(worst, NaN) is worst).
inline double worst_of(double worst, double d) {
  return std::isnan(d) ? INFINITY : std::max(worst, d);
}
[[noreturn]] inline void skip(const std::string& why) { throw test::Skip{why}; }

#define CHECK ASSERT
// a <= b; a NaN fails
#define CHECK_LE(a, b, ...)                                                                     \
  do {                                                                                          \
    const auto a_ = (a);                                                                        \
    const auto b_ = (b);                                                                        \
    if (!(a_ <= b_))                                                                            \
      throw Error(sentence(__FILE__, ":", __LINE__, ": ", #a, " = ", a_, ", expected at most ", \
                           b_, ". ", ##__VA_ARGS__));                                           \
  } while (0)
#define CHECK_EQ(a, b, ...)                                                                       \
  do {                                                                                            \
    const auto a_ = (a);                                                                          \
    const auto b_ = (b);                                                                          \
    if (!(a_ == b_))                                                                              \
      throw Error(sentence(__FILE__, ":", __LINE__, ": ", #a, " = ", a_, ", expected ", b_, ". ", \
                           ##__VA_ARGS__));                                                       \
  } while (0)
// The statement throws an Error whose sentence contains `part`.
#define CHECK_SAYS(statement, part)                                                     \
  do {                                                                                  \
    std::string said_ = "nothing";                                                      \
    try {                                                                               \
      statement;                                                                        \
    } catch (const Error& e) {                                                          \
      said_ = e.what();                                                                 \
    }                                                                                   \
    if (said_.find(part) == std::string::npos)                                          \
      throw Error(sentence(__FILE__, ":", __LINE__, ": ", #statement, " said '", said_, \
                           "', expected '", part, "'"));                                \
  } while (0)

// Runs the tests whose names contain argv[1] (all when absent; there must be one); the exit status
// is 1 when something failed.
inline int run_tests(int argc = 0, char** argv = nullptr) {
  int passed = 0, failed = 0, skipped = 0;
  for (const auto& c : test::cases()) {
    if (argc > 1 && !strstr(c.name, argv[1])) continue;
    test::note.clear();
    std::string error, why;
    try {
      c.body();
    } catch (const test::Skip& s) {
      why = s.why;
    } catch (const std::exception& e) {
      error = sentence("failed: ", e.what());
    }
    error = test::agree(error);
    (!error.empty() ? failed : !why.empty() ? skipped : passed)++;
    if (!test::prints) continue;
    printf("%s %s  %s\n",
           !error.empty() ? "FAIL"
           : !why.empty() ? "SKIP"
                          : "ok  ",
           c.name,
           !error.empty() ? error.c_str()
           : !why.empty() ? why.c_str()
                          : test::note.c_str());
    fflush(stdout);
  }
  const bool none = passed + failed + skipped == 0;
  failed += none;
  if (!test::prints) return failed ? 1 : 0;
  if (none) printf("FAIL %s  no test has this in its name\n", argc > 1 ? argv[1] : "");
  printf("%d passed, %d failed", passed, failed);
  if (skipped) printf(", %d skipped", skipped);
  printf("\n");
  return failed ? 1 : 0;
}
