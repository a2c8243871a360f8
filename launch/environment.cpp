// environment.cpp: see environment.h.
#include "launch/environment.h"

#include <nlohmann/json.hpp>

#include "kernels/kernels.h"
#include "support/files.h"

// ---- products

// Numbers are -1, 0 and 1, so that every dtype holds each sum exactly.
static Tensor numbers(int64_t count, int64_t seed, Dtype dtype) {
  std::vector<double> x(count);
  for (int64_t i = 0; i < count; i++) x[i] = uint32_t((i + seed) * 2654435761) % 3 - 1.0;
  const Tensor wide({count}, Dtype::f64, Memory::workspace);
  upload(wide, x.data());
  const Tensor narrow({count}, dtype, Memory::workspace);
  cast(narrow, wide);
  return narrow;
}

// c (m,n) = a (m,k) b (k,n) by the library and by the project's own kernels, with rows that are
// longer than they need be
static void check_product(Dtype dtype, int64_t m, int64_t n, int64_t k, bool a_transposed,
                          bool b_transposed) {
  constexpr int64_t kGap = 3;
  const int64_t lda = (a_transposed ? m : k) + kGap, ldb = (b_transposed ? k : n) + kGap;
  const Tensor a = numbers((a_transposed ? k : m) * lda, 1, dtype),
               b = numbers((b_transposed ? n : k) * ldb, 2, dtype),
               c({m, n}, dtype, Memory::workspace);
  std::vector<std::vector<double>> products;
  for (const MatmulBackend backend : {MatmulBackend::cublas, MatmulBackend::own}) {
    matmul_backend = backend;
    matmul(dtype, dtype, m, n, k, {a.raw(), lda, a_transposed}, {b.raw(), ldb, b_transposed},
           {c.raw(), n});
    products.push_back(download(c));
  }
  REQUIRE(products[0] == products[1], "this machine multiplies matrices wrongly: ", m, " x ", k,
          " by ", k, " x ", n, " in ", name_of(dtype),
          "; look at the settings of OpenMP and oneDNN or cuBLAS in the environment, and at the "
          "library's version");
}

void check_products() {
  const MatmulBackend asked = matmul_backend;
  for (const Dtype dtype : {Dtype::f32, Dtype::bf16})
    for (const auto& [m, n] : {std::pair<int64_t, int64_t>{192, 96}, {1, 200}, {200, 1}})
      for (const bool a_transposed : {false, true})
        for (const bool b_transposed : {false, true})
          check_product(dtype, m, n, 160, a_transposed, b_transposed);
  matmul_backend = asked;
  device().memory = {};  // none of it belongs to the run
}

// ---- what the ranks were given

std::string differences(NamedValues given) {
  given.emplace_back("the program", content_of({"/proc/self/exe"}));
  // ranks by name and value
  std::map<std::string, std::map<std::string, std::vector<std::string>>> ranks;
  const std::vector<nlohmann::json> all = gather(given);
  for (size_t rank = 0; rank < all.size(); rank++)
    for (const auto& [name, value] : all[rank].get<NamedValues>())
      if (auto& who = ranks[name][value]; who.size() <= 8)
        who.push_back(who.size() < 8 ? std::to_string(rank) : "others");
  std::vector<std::string> different;
  for (const auto& [name, values] : ranks) {
    std::vector<std::string> where;
    for (const auto& [value, who] : values)
      where.push_back((value.empty() ? "unset" : value) +
                      (who.size() == 1 ? " on rank " : " on ranks ") + join(who, " and "));
    if (values.size() > 1) different.push_back(name + " is " + join(where, ", "));
  }
  return different.empty() ? "" : "the ranks were not started alike: " + join(different, "; ");
}
