// check.h: what to say when something is wrong. Every failure is one sentence in an Error; main prints it and exits non-zero.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Parts>
std::string sentence(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// For the user: REQUIRE(width % heads == 0, "--width ", width, " does not divide by --heads ", heads). Alive in every build.
#define REQUIRE(condition, ...) \
  do { if (!(condition)) throw Error(sentence(__VA_ARGS__)); } while (0)

// For the programmer: a broken contract inside the program; names the place.
#define ASSERT(condition, ...) \
  do { if (!(condition)) throw Error(sentence(__FILE__, ":", __LINE__, ": ", #condition, " does not hold. ", ##__VA_ARGS__)); } while (0)

#define CUDA_CHECK(call)                                                                                              \
  do {                                                                                                                \
    const cudaError_t status_ = (call);                                                                               \
    if (status_ != cudaSuccess)                                                                                       \
      throw Error(sentence(__FILE__, ":", __LINE__, ": ", #call, " failed: ", cudaGetErrorString(status_)));          \
  } while (0)

#define CUBLAS_CHECK(call)                                                                                            \
  do {                                                                                                                \
    const cublasStatus_t status_ = (call);                                                                            \
    if (status_ != CUBLAS_STATUS_SUCCESS)                                                                             \
      throw Error(sentence(__FILE__, ":", __LINE__, ": ", #call, " failed with cuBLAS status ", int(status_)));       \
  } while (0)
