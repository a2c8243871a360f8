// fuzz.cpp: libFuzzer's entry: the target that the environment names (tests/fuzz.sh).
#include "tests/fuzz_targets.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const fuzz::Target& target = *std::find_if(
      std::begin(fuzz::kTargets), std::end(fuzz::kTargets),
      [name = std::string(getenv("FUZZ_TARGET"))](const auto& t) { return t.name == name; });
  fuzz::run(target, std::string(reinterpret_cast<const char*>(data), size));
  return 0;
}
