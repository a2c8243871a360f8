// sampling.cpp: see sampling.h.
#include "inference/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "support/check.h"
#include "support/philox.h"

namespace {

// Tokens in an order, and the sums of their probabilities up to each.
struct Ranking {
  explicit Ranking(std::span<const double> all) : p(all), order(all.size()) {
    std::iota(order.begin(), order.end(), 0);
  }
  // The first `count` are the likeliest, in order, equals by number. Returns their sum.
  double sort(size_t count) {
    const auto comes_first = [&](int a, int b) { return p[a] != p[b] ? p[a] > p[b] : a < b; };
    const auto begin = order.begin() + sums.size(), end = order.begin() + count;
    std::nth_element(begin, end, order.end(), comes_first);
    std::sort(begin, end, comes_first);
    double sum = sums.empty() ? 0 : sums.back();
    for (size_t i = sums.size(); i < count; i++) sums.push_back(sum += p[order[i]]);
    return sum;
  }

  std::span<const double> p;
  std::vector<int> order;    // sorted as far as there are sums
  std::vector<double> sums;  // of the first one, the first two, ...
};

// Sorts at least as many of the likeliest as reach top_p of the sum of all, which is returned. They
// are often few, and sorting a vocabulary of 50257 takes 8 ms.
double sort_up_to(double top_p, Ranking& ranking) {
  const std::vector<double>& sums = ranking.sums;
  const size_t V = ranking.p.size();
  const double total = std::reduce(ranking.p.begin(), ranking.p.end()), reach = top_p * total,
               rounding = reach * V * std::numeric_limits<double>::epsilon();
  for (double count = 64; count <= V / 4.0;) {
    const double left = reach + rounding - ranking.sort(count);
    if (left <= 0) {
      // summed in the order of the ranking the total differs by rounding, which must not decide
      const bool is_clear = *std::ranges::lower_bound(sums, reach - rounding) >= reach + rounding;
      return is_clear ? total : ranking.sort(V);
    }
    // each of the others is at most as likely as the last one
    const double least = left / ranking.p[ranking.order[sums.size() - 1]];
    count = std::max(4 * count, sums.size() + least);
  }
  return ranking.sort(V);
}

}  // namespace

int pick(std::span<double> logits, const Sampling& how, int64_t position, int64_t sequence) {
  bool finite = true;  // without a branch, which would keep the loop from being vectorized
  for (const double l : logits) finite &= std::abs(l) <= std::numeric_limits<double>::max();
  REQUIRE(
      finite,
      "the model's logits are not all finite numbers: its weights are damaged, or too large for "
      "this --dtype");
  const int likeliest = std::ranges::max_element(logits) - logits.begin();
  const double most = logits[likeliest];
  if (how.temperature == 0 || how.top_k == 1) return likeliest;
  const std::span<double> p = logits;
  for (double& l : p) l = l == kNever ? 0 : std::exp((l - most) / how.temperature);
  const Philox4 r = philox(position, position >> 32, sequence, 1, how.seed, how.seed >> 32);
  const double u = r.v[0] / 4294967296.0;
  if (how.top_k == 0 && how.top_p >= 1) {  // no cut: tokens need no ranking
    const double share = u * std::accumulate(p.begin(), p.end(), 0.0);
    double sum = 0;
    size_t v = 0;
    while ((sum += p[v]) <= share) v++;
    return int(v);
  }
  Ranking ranking(p);
  const double total = how.top_k > 0 ? ranking.sort(std::min(p.size(), size_t(how.top_k)))
                                     : sort_up_to(how.top_p, ranking);
  const std::vector<double>& sums = ranking.sums;
  // the first that reaches top_p
  const auto last = std::lower_bound(sums.begin(), sums.end() - 1, how.top_p * total);
  return ranking.order[std::upper_bound(sums.begin(), last, u * *last) - sums.begin()];
}
