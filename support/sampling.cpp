// sampling.cpp: see sampling.h.
#include "support/sampling.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "support/philox.h"

int pick(const std::vector<double>& logits, const Sampling& how, int64_t position, int64_t sequence) {
  const int likeliest = int(std::max_element(logits.begin(), logits.end()) - logits.begin());
  if (how.temperature == 0 || how.top_k == 1) return likeliest;
  std::vector<double> p(logits.size());
  for (size_t v = 0; v < p.size(); v++) p[v] = std::exp((logits[v] - logits[size_t(likeliest)]) / how.temperature);
  std::vector<int> order(p.size());
  std::iota(order.begin(), order.end(), 0);
  size_t kept = p.size();
  if (how.top_k > 0 || how.top_p < 1) {  // the likeliest first, equals by number
    std::sort(order.begin(), order.end(), [&](int a, int b) { return p[size_t(a)] != p[size_t(b)] ? p[size_t(a)] > p[size_t(b)] : a < b; });
    if (how.top_k > 0) kept = std::min(kept, size_t(how.top_k));
    const double all = std::accumulate(order.begin(), order.begin() + long(kept), 0.0, [&](double sum, int v) { return sum + p[size_t(v)]; });
    double reached = 0;
    for (size_t i = 0; i < kept; i++)
      if ((reached += p[size_t(order[i])]) >= how.top_p * all) kept = i + 1;
  }
  double sum = 0;
  for (size_t i = 0; i < kept; i++) sum += p[size_t(order[i])];
  const uint64_t at = uint64_t(position);
  double u = philox(uint32_t(at), uint32_t(at >> 32), uint32_t(sequence), 1, uint32_t(how.seed), uint32_t(how.seed >> 32)).v[0] / 4294967296.0 * sum;
  for (size_t i = 0; i + 1 < kept; i++)
    if ((u -= p[size_t(order[i])]) < 0) return order[i];
  return order[kept - 1];
}
