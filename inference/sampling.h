// sampling.h: which token comes next, from logits.
// source    top-k: Fan et al., "Hierarchical neural story generation", 2018; top-p: Holtzman et
//           al., "The curious case of neural text degeneration", 2020
// test      tests/test_support.cpp
#pragma once
#include <cstdint>
#include <limits>
#include <span>

// the logit of a token that is not to be drawn, whatever the temperature
inline constexpr double kNever = std::numeric_limits<double>::lowest();

struct Sampling {
  double temperature = 1;  // 0: the likeliest token
  int64_t top_k = 0;       // among the k likeliest; 0: all
  double top_p = 1;        // among the likeliest whose probabilities, of the top_k, reach p
  uint64_t seed = 1337;
};
// A token with the probabilities of softmax(logits / temperature), cut to top_k and top_p. The
// random number depends on (seed, position, sequence) alone, so every layout picks the same, and
// every batch in which the text has the same place. The logits are overwritten, so that
// without cuts a draw needs no memory of its own.
int pick(std::span<double> logits, const Sampling& how, int64_t position, int64_t sequence = 0);
