// test_comm.cpp: the job and the mesh are what comm.h says, and the ledger enters what was sent.
// Run under mpiexec -n 1, 2, 4, 8.
#include "cpu/nccl/nccl_referee.h"
#include "tests/mpi_test.h"
#include "trainer.h"

namespace {

using nccl_referee::Call;

// every pp x replicate x fsdp x tp of the world's size
template <class Work> void each_layout(Work work) {
  const int n = job().size;
  for (int pp = 1; pp <= n; pp++)
    for (int replicate = 1; pp * replicate <= n; replicate++)
      for (int fsdp = 1; pp * replicate * fsdp <= n; fsdp++)
        if (n % (pp * replicate * fsdp) == 0)
          work(Layout{pp, replicate, fsdp, n / (pp * replicate * fsdp)});
}

// the world's numbers of the ranks on the axis, in its order
std::vector<double> gather_ranks(const Mesh& m, const Axis& axis) {
  const Tensor mine({1}, Dtype::f64, Memory::workspace),
      all({axis.size}, Dtype::f64, Memory::workspace);
  fill(mine, m.rank);
  synchronize();
  NCCL_CHECK(ncclAllGather(mine.raw(), all.raw(), 1, ncclFloat64, axis.comm, m.stream));
  CUDA_CHECK(cudaStreamSynchronize(m.stream));
  return download(all);
}

}  // namespace

TEST(open_mesh_places_ranks_slowest_axis_first) {
  int layouts = 0;
  each_layout([&](const Layout& l) {
    Mesh m = open_mesh(job(), l);
    check_mesh(m);
    for (const Axis* axis : {&m.world, &m.tp, &m.fsdp, &m.replicate, &m.pp})
      for (const Call kind :
           {Call::all_reduce, Call::all_gather, Call::reduce_scatter, Call::broadcast, Call::send})
        if (axis->comm)
          CHECK(nccl_referee::traffic(axis->comm, kind).calls > 0, "kind ", int(kind), " on ",
                axis->name, " of ", to_string(l));
    CHECK_EQ(((m.pp.rank * l.replicate + m.replicate.rank) * l.fsdp + m.fsdp.rank) * l.tp +
                 m.tp.rank,
             m.rank, to_string(l));
    int stride = 1;  // between neighbours on the axis
    for (const Axis* axis : {&m.tp, &m.fsdp, &m.replicate, &m.pp}) {
      CHECK_EQ(axis->comm == nullptr, axis->size == 1, axis->name);
      std::vector<double> expected;
      for (int i = 0; i < axis->size; i++) expected.push_back(m.rank + (i - axis->rank) * stride);
      if (axis->comm) CHECK(gather_ranks(m, *axis) == expected, axis->name, " of ", to_string(l));
      stride *= axis->size;
    }
    close_mesh(m);
    CHECK(!m.world.comm && !m.stream);
    layouts++;
  });
  measured(layouts, " layouts, and check_mesh tries every kind of call on every axis of each");
}

TEST(layouts_that_do_not_fit_the_world_are_refused) {
  CHECK_SAYS(
      check_ranks({1, 3, 2, 1}, 4),
      "pp 1 x replicate 3 x fsdp 2 x tp 1 needs 6 ranks, but mpiexec started 4: mpiexec -n 6");
  CHECK_SAYS(check_ranks({}, 2), "needs 1 rank, but mpiexec started 2: mpiexec -n 1");
  CHECK_SAYS(check_ranks({65536, 1, 65536, 1}, 1), "needs 4294967296 ranks, but mpiexec started 1");
  CHECK_SAYS(check_ranks({1, 1, 0, 2}, 2), "every axis needs at least one rank");
  CHECK_SAYS(open_mesh(job(), {1, 1, 3, 3}), "needs 9 ranks");
  check_ranks({2, 1, 2, 2}, 8);
}

TEST(the_mesh_is_drawn_a_rank_a_line) {
  CHECK_EQ(draw({1, 2, 1, 2}),
           "rank     pp  replicate  fsdp  tp\n"
           "   0      0          0     0   0\n"
           "   1      0          0     0   1\n"
           "   2      0          1     0   0\n"
           "   3      0          1     0   1\n");
}

TEST(all_ranks_agree_on_the_first_failing_ranks_sentence) {
  const int n = job().size;
  CHECK_EQ(job().agree(""), "");
  for (int first = 0; first < n; first++)
    CHECK_EQ(job().agree(job().rank < first ? ""
                                            : sentence("rank ", job().rank, " of ", n,
                                                       std::string(size_t(job().rank), '.'))),
             sentence("rank ", first, " of ", n, std::string(size_t(first), '.')));
}

// Per axis and collective, whatever it served. The stand-in counts by itself, where a call
// completes.
TEST(the_ledger_enters_exactly_what_was_sent) {
  const int n = job().size;
  if (n == 1) skip("one rank sends nothing");
  std::vector<Layout> layouts = {{1, n / 2, 2, 1}, {1, 1, n / 2, 2}};
  if (n == 8) layouts.push_back({1, 2, 2, 2});
  int64_t calls = 0, bytes = 0;
  for (const Layout& layout : layouts)
    for (bool by_rows : {false, true}) {
      GptConfig config{2, 20, 10, 9, 31};
      config.sequence_parallel = by_rows;
      TrainerOptions options;
      options.microbatch = 1, options.batch = 2 * layout.replicate * layout.fsdp;
      Mesh m = open_mesh(job(), layout);
      ledger.rows.clear();
      {
        Trainer trainer(m, config, options);
        const auto sequence = [](int64_t s) {
          return std::vector<int>{1, 2, 3, 4, 5, 6, 7, 8, 9, int(s % 31)};
        };
        for (int step = 0; step < 2; step++) {
          trainer.gradients(sequence);
          trainer.update(1e-3);
        }
        trainer.evaluate(3, sequence);
        trainer.next_logits({1, 2, 3});
      }
      CUDA_CHECK(cudaStreamSynchronize(m.stream));
      for (const Axis* axis : {&m.world, &m.tp, &m.fsdp, &m.replicate}) {
        if (!axis->comm) continue;
        for (const auto& [collective, call] : {std::pair{Collective::all_reduce, Call::all_reduce},
                                               {Collective::all_gather, Call::all_gather},
                                               {Collective::reduce_scatter, Call::reduce_scatter},
                                               {Collective::broadcast, Call::broadcast},
                                               {Collective::send, Call::send}}) {
          Ledger::Row entered;
          for (const auto& [key, row] : ledger.rows)
            if (std::get<0>(key) == axis->name && std::get<1>(key) == collective)
              entered.calls += row.calls, entered.numerator += row.numerator;
          const nccl_referee::Traffic sent = nccl_referee::traffic(axis->comm, call);
          const std::string what =
              sentence(name_of(collective), " on ", axis->name, " of ", to_string(layout));
          CHECK_EQ(entered.calls, sent.calls, what);
          CHECK_EQ(entered.numerator, sent.numerator, what);
          calls += sent.calls, bytes += sent.numerator / sent.n;
        }
      }
      close_mesh(m);
    }
  measured(calls, " calls, ", bytes, " bytes on rank 0");
}

int main(int argc, char** argv) { return run_mpi_tests(argc, argv); }
