// environment.cpp: see environment.h.
#include "launch/environment.h"

#include <map>
#include <nlohmann/json.hpp>

#include "kernels/kernels.h"
#include "support/data.h"

// ---- products

// Numbers are -1, 0 and 1, so that every dtype holds each sum exactly.
static std::vector<double> digits(int64_t count, int64_t seed) {
  std::vector<double> x(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; i++)
    x[size_t(i)] = double(uint32_t((i + seed) * 2654435761) % 3) - 1;
  return x;
}

static Tensor tensor_of(const std::vector<double>& x, Dtype dtype) {
  const Tensor wide({int64_t(x.size())}, Dtype::f64, Memory::workspace);
  upload(wide, x.data());
  const Tensor narrow(wide.shape(), dtype, Memory::workspace);
  cast(narrow, wide);
  return narrow;
}

// c (m,n) = a (m,k) b (k,n), with rows that are longer than they need be
static void check_product(Dtype dtype, int64_t m, int64_t n, int64_t k, bool a_transposed,
                          bool b_transposed) {
  constexpr int64_t kGap = 3;
  const int64_t lda = (a_transposed ? m : k) + kGap, ldb = (b_transposed ? k : n) + kGap;
  const std::vector<double> a = digits((a_transposed ? k : m) * lda, 1),
                            b = digits((b_transposed ? n : k) * ldb, 2);
  const Tensor on_a = tensor_of(a, dtype), on_b = tensor_of(b, dtype),
               on_c({m, n}, dtype, Memory::workspace);
  matmul(dtype, dtype, m, n, k, {on_a.raw(), lda, a_transposed}, {on_b.raw(), ldb, b_transposed},
         {on_c.raw(), n});
  const std::vector<double> c = download(on_c);
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++) {
      double sum = 0;
      for (int64_t l = 0; l < k; l++)
        sum += a[size_t(a_transposed ? l * lda + i : i * lda + l)] *
               b[size_t(b_transposed ? j * ldb + l : l * ldb + j)];
      REQUIRE(
          c[size_t(i * n + j)] == sum, "this machine multiplies matrices wrongly: of a ", m, " x ",
          k, " by ", k, " x ", n, " product in ", name_of(dtype), " element (", i, ", ", j, ") is ",
          c[size_t(i * n + j)], ", not ", sum,
          "; look at the settings of OpenMP and oneDNN or cuBLAS in the environment, and at the "
          "library's version");
    }
}

void check_products() {
  for (const Dtype dtype : {Dtype::f32, Dtype::bf16})
    for (const auto& [m, n] : {std::pair<int64_t, int64_t>{192, 96}, {1, 200}, {200, 1}})
      for (const bool a_transposed : {false, true})
        for (const bool b_transposed : {false, true})
          check_product(dtype, m, n, 160, a_transposed, b_transposed);
  device().memory = {};  // none of it belongs to the run
}

// ---- what the ranks were given

// "rank 3", "ranks 0 to 2", "ranks 0, 4 and 6"
static std::string words_of(const std::vector<int>& ranks) {
  const size_t n = ranks.size();
  std::string s = n == 1 ? "rank " : "ranks ";
  if (n > 2 && ranks.back() - ranks.front() == int(n) - 1)
    return s + sentence(ranks.front(), " to ", ranks.back());
  for (size_t i = 0; i < std::min<size_t>(n, 8); i++)
    s += sentence(i == 0 ? "" : i + 1 == n ? " and " : ", ", ranks[i]);
  return n > 8 ? s + sentence(" and ", n - 8, " more") : s;
}

std::string differences(const Job& job, std::vector<std::pair<std::string, std::string>> given) {
  given.emplace_back("the program", content_of({"/proc/self/exe"}));
  const std::string mine = nlohmann::json(given).dump(
      -1, ' ', false, nlohmann::json::error_handler_t::replace);  // a name may be no UTF-8
  const std::vector<std::string> digests =
      gather_text(std::to_string(std::hash<std::string>()(mine)));
  bool alike = true;
  for (const std::string& digest : digests) alike &= digest == digests[0];
  if (alike) return "";
  std::map<std::string, std::map<std::string, std::vector<int>>> ranks;  // by name and value
  const std::vector<std::string> all = gather_text(mine);
  for (int rank = 0; rank < job.size; rank++)
    for (const auto& [name, value] :
         nlohmann::json::parse(all[size_t(rank)]).get<decltype(given)>())
      ranks[name][value].push_back(rank);
  std::string s;
  for (const auto& [name, values] : ranks) {
    if (values.size() == 1) continue;
    s += (s.empty() ? "" : "; ") + name + " is ";
    std::string separator;
    for (const auto& [value, who] : values) {
      s += separator + (value.empty() ? "unset" : value) + " on " + words_of(who);
      separator = ", ";
    }
  }
  return "the ranks were not started alike: " + s;
}
