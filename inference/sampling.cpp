// sampling.cpp: see sampling.h.
#include "inference/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "support/check.h"
#include "support/philox.h"

int pick(const std::vector<double>& logits, const Sampling& how, int64_t position,
         int64_t sequence) {
  bool finite = true;  // without a branch, which would keep the loop from being vectorized
  for (const double l : logits) finite &= std::abs(l) <= std::numeric_limits<double>::max();
  REQUIRE(finite, "the model's logits at position ", position,
          " are not all finite numbers: its weights are damaged, or too large for this --dtype");
  const int likeliest = std::ranges::max_element(logits) - logits.begin();
  if (how.temperature == 0 || how.top_k == 1) return likeliest;
  std::vector<double> p(logits.size());
  for (size_t v = 0; v < p.size(); v++)
    p[v] = std::exp((logits[v] - logits[likeliest]) / how.temperature);
  std::vector<int> order(p.size());
  std::iota(order.begin(), order.end(), 0);
  if (how.top_k > 0 || how.top_p < 1) {  // the likeliest first, equals by number
    const auto comes_first = [&](int a, int b) { return p[a] != p[b] ? p[a] > p[b] : a < b; };
    const size_t most = how.top_k > 0 ? std::min(order.size(), size_t(how.top_k)) : order.size();
    if (most < order.size()) std::ranges::nth_element(order, order.begin() + most, comes_first);
    order.resize(most);
    std::ranges::sort(order, comes_first);
  }
  std::vector<double> sums;  // of the probabilities up to each
  for (double sum = 0; const int v : order) sums.push_back(sum += p[v]);
  // the first that reaches top_p
  const auto last = std::lower_bound(sums.begin(), sums.end() - 1, how.top_p * sums.back());
  const Philox4 r = philox(position, position >> 32, sequence, 1, how.seed, how.seed >> 32);
  const double u = r.v[0] / 4294967296.0;
  return order[std::upper_bound(sums.begin(), last, u * *last) - sums.begin()];
}
