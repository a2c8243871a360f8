// listings.cpp: the listings of the strategies' pages (docs/fsdp.md, ...), compiled as they stand
// there and compared with one rank, in f64: results, and gradients of everything that goes in.
// `make check-docs` runs it on 2 and 3 ranks.
#include "comm.h"
#include "kernels/kernels.h"
#include "tests/mpi_test.h"
#include "tests/tensors.h"

// ---- what the listings use

constexpr int64_t R = 4, C = 6, F = 12, T = 12, H = 2;
constexpr int m = 3;  // micro-batches
constexpr Dtype f64 = Dtype::f64;
static int rank, n;
static ncclComm_t comm;
static cudaStream_t stream;

struct Step {
  Tensor y, dx, da, db;
};
struct Stage {
  std::vector<Tensor> y, dx;
  Tensor dw;
};

struct Factor {  // (rows, columns), perhaps used as its transpose
  Factor(Tensor x, bool transposed = false) : x(std::move(x)), transposed(transposed) {}
  int64_t dim(int i) const { return x.dim(transposed ? 1 - i : i); }
  Matrix matrix() const { return {x.raw(), x.dim(1), transposed}; }
  Tensor x;
  bool transposed;
};
static Factor transposed(Tensor x) { return Factor(std::move(x), true); }
static Tensor product(const Factor& a, const Factor& b) {
  Tensor c({a.dim(0), b.dim(1)}, f64, Memory::activations);
  matmul(f64, f64, c.dim(0), c.dim(1), a.dim(1), a.matrix(), b.matrix(), {c.raw(), c.dim(1)});
  return c;
}

#include "fsdp.listing"
#include "tensor_parallel.listing"
#include "pipeline.listing"
#include "context_parallel.listing"

// ---- the same on one rank

static Tensor gelu(const Tensor& h) {
  Tensor g(h.shape(), f64, Memory::activations);
  gelu_forward(g, h);
  return g;
}
static Tensor gelu_gradient(const Tensor& dg, const Tensor& h) {
  Tensor dh(h.shape(), f64, Memory::activations);
  gelu_backward(dh, dg, h);
  return dh;
}
static Step two_layers(const Tensor& x, const Tensor& A, const Tensor& B) {
  const Tensor h = product(x, A), g = gelu(h), y = product(g, B);
  const Tensor dh = gelu_gradient(product(y, transposed(B)), h);
  return {y, product(dh, transposed(A)), product(transposed(x), dh), product(transposed(g), y)};
}

// ---- comparing

static Tensor random_matrix(int64_t rows, int64_t columns, unsigned seed) {
  return random_tensor({rows, columns}, f64, seed, 0.5);
}
// the part of this rank: rows, elements in order, or columns
static Tensor rows(const Tensor& x) {
  return x.view(rank * x.numel() / n, {x.dim(0) / n, x.dim(1)});
}
static Tensor shard(const Tensor& x) { return x.view(rank * x.numel() / n, {x.numel() / n}); }
static Tensor columns(const Tensor& x) {
  Tensor part({x.dim(0), x.dim(1) / n}, f64, Memory::data);
  copy_columns(part, 0, x, rank * part.dim(1), part.dim(1));
  return part;
}
// opens the communicator for one test
struct Ranks {
  Mesh mesh = open_mesh(Layout{{"fsdp", job().size}});
  Ranks() {
    rank = mesh.rank;
    n = mesh.size;
    comm = mesh["fsdp"].comm;
    stream = device().compute;
  }
  ~Ranks() {
    close_mesh(mesh);
    measured("max|d| = ", worst, ", n = ", n);
  }
  double worst = 0;

  void compare(const std::string& what, const Tensor& x, const Tensor& expected) {
    const double difference = relative_difference(download(x), download(expected));
    worst = std::max(worst, difference);
    CHECK_LE(difference, 1e-12, "It is ", what, "'s, on ", n, " ranks. ");
  }
  void compare(const Step& step, const Step& expected) {
    compare("y", step.y, expected.y);
    compare("dx", step.dx, expected.dx);
    compare("da", step.da, expected.da);
    compare("db", step.db, expected.db);
  }
};

TEST(fsdp_in_thirty_lines_equals_one_rank) {
  Ranks ranks;
  const Tensor x = random_matrix(n * R, C, 1), A = random_matrix(C, F, 2),
               B = random_matrix(F, C, 3);
  const Step whole = two_layers(x, A, B);
  ranks.compare(fsdp(rows(x), shard(A), shard(B)),
                {rows(whole.y), rows(whole.dx), shard(whole.da), shard(whole.db)});
}

TEST(tensor_parallelism_in_thirty_lines_equals_one_rank) {
  Ranks ranks;
  const Tensor x = random_matrix(R, C, 1), A = random_matrix(C, F, 2), B = random_matrix(F, C, 3);
  const Step whole = two_layers(x, A, B);
  ranks.compare(tensor_parallel(x, columns(A), rows(B)),
                {whole.y, whole.dx, columns(whole.da), rows(whole.db)});
}

TEST(a_pipeline_in_thirty_lines_equals_one_rank) {
  Ranks ranks;
  std::vector<Tensor> x, w, y;
  for (int i = 0; i < m; i++) x.push_back(random_matrix(R, C, 1 + i));
  for (int r = 0; r < n; r++) w.push_back(random_matrix(C, C, 11 + r));
  const Stage stage = pipeline(rank == 0 ? x : std::vector<Tensor>(m), w[rank]);
  Tensor dw(w[rank].shape(), f64, Memory::gradients);
  fill(dw, 0);
  for (int i = 0; i < m; i++) {
    std::vector<Tensor> in, h;
    Tensor a = x[i];
    for (int r = 0; r < n; r++) {
      in.push_back(a);
      h.push_back(product(a, w[r]));
      a = gelu(h[r]);
      if (r == rank) ranks.compare("y", stage.y[i], a);
    }
    for (int r = n - 1; r >= rank; r--) {
      const Tensor dh = gelu_gradient(a, h[r]);
      if (r == rank) add(dw, dw, product(transposed(in[r]), dh));
      a = product(dh, transposed(w[r]));
    }
    ranks.compare("dx", stage.dx[i], a);
  }
  ranks.compare("dw", stage.dw, dw);
}

TEST(context_parallelism_in_thirty_lines_equals_one_rank) {
  Ranks ranks;
  const Tensor x = random_matrix(T, C, 1), A = random_matrix(C, 2 * C, 2),
               B = random_matrix(C, C, 3);
  const Positions all{{0, T}};
  const Tensor kv = product(x, A), probabilities({H, T, T}, f64, Memory::activations);
  Step whole{{}, Tensor(x.shape(), f64, Memory::activations), {}, {}};
  const Tensor o(x.shape(), f64, Memory::activations), dkv(kv.shape(), f64, Memory::activations);
  const AttentionInputs in{x, kv, 1, H, all, all};
  attention_plain_forward(o, {}, probabilities, in);
  whole.y = product(o, B);
  const Tensor d_o = product(whole.y, transposed(B)), delta({1, H, T}, f64, Memory::workspace);
  attention_delta(delta, d_o, o);
  attention_plain_backward(whole.dx, dkv, d_o, delta, {}, probabilities, in);
  add(whole.dx, whole.dx, product(dkv, transposed(A)));
  whole.da = product(transposed(x), dkv);
  whole.db = product(transposed(o), whole.y);
  ranks.compare(context_parallel(rows(x), A, B),
                {rows(whole.y), rows(whole.dx), whole.da, whole.db});
}

int main(int argc, char** argv) { return run_mpi_tests(argc, argv); }
