// test_comm.cpp: the job and the mesh are what comm.h says, and the ledger enters what was sent.
// Run under mpiexec -n 1, 2, 4, 8.
#include "cpu/nccl/nccl_referee.h"
#include "launch/first_minute.h"
#include "tests/mpi_test.h"
#include "trainer.h"

namespace {

using nccl_referee::Call;

// the world's numbers of the ranks on the axis, in its order
std::vector<double> gather_ranks(const Mesh& m, const Axis& axis) {
  const Tensor mine({1}, Dtype::f64, Memory::workspace),
      all({axis.size}, Dtype::f64, Memory::workspace);
  fill(mine, m.rank);
  synchronize();
  NCCL_CHECK(
      ncclAllGather(mine.raw(), all.raw(), 1, ncclFloat64, axis.comm, device().communication));
  CUDA_CHECK(cudaStreamSynchronize(device().communication));
  return download(all);
}

}  // namespace

TEST(open_mesh_places_ranks_slowest_axis_first) {
  const std::vector<Layout> layouts = layouts_of(job().size);
  for (const Layout& l : layouts) {
    Mesh m = open_mesh(l);
    check_mesh(m);
    for (const Axis& axis : m.every_axis())
      for (const Call kind :
           {Call::all_reduce, Call::all_gather, Call::reduce_scatter, Call::broadcast, Call::send})
        if (axis.comm && (kind != Call::send || exchanges(axis)))
          CHECK(nccl_referee::traffic(axis.comm, kind).calls > 0, "kind ", int(kind), " on ",
                axis.name, " of ", to_string(l));
    int rank = 0, stride = m.size;  // between neighbours on the axis
    for (const Axis& axis : m.axes) {
      rank = rank * axis.size + axis.rank;
      stride /= axis.size;
      CHECK_EQ(axis.comm == nullptr, axis.size == 1, axis.name);
      std::vector<double> expected;
      for (int i = 0; i < axis.size; i++) expected.push_back(m.rank + (i - axis.rank) * stride);
      if (axis.comm) CHECK(gather_ranks(m, axis) == expected, axis.name, " of ", to_string(l));
    }
    CHECK_EQ(rank, m.rank, to_string(l));
    close_mesh(m);
    CHECK(!m.world.comm);
  }
  measured(layouts.size(), " layouts, and check_mesh tries what each axis is used for");
}

// The ranks of fsdp and cp joined are numbered slow axis first, and are those that differ from this
// one in the two places only; a reduce-scatter and an all-gather over them give what the world's
// numbers of the ranks say that they must.
TEST(joined_axes_number_their_ranks_slow_axis_first) {
  int joined = 0;
  for (const Layout& l : layouts_of(job().size)) {
    Mesh m = open_mesh(l);
    const Axis &axis = m.shards, &fsdp = m["fsdp"], &cp = m["cp"];
    const bool both = fsdp.size > 1 && cp.size > 1;
    CHECK_EQ(axis.name, both ? "fsdp x cp" : cp.size > 1 ? "cp" : "fsdp");
    // the checks and the watch see it from the first minute on
    CHECK_EQ(m.every_axis().size(), 1 + kAxes.size() + both, to_string(l));
    CHECK_EQ(axis.size, fsdp.size * cp.size, axis.name);
    const int rank = fsdp.rank * cp.size + cp.rank;
    CHECK_EQ(axis.rank, rank, axis.name);
    // the same place without communicators
    const Axis closed = Mesh(l, m.rank).shards;
    CHECK(closed.name == axis.name && closed.size == axis.size && closed.rank == rank);
    CHECK(!closed.comm);
    if (axis.size > 1) {
      const std::vector<double> ranks = gather_ranks(m, axis);
      for (int i = 0; i < axis.size; i++)
        CHECK_EQ(ranks[size_t(i)], m.rank + (i - rank) * m["tp"].size, axis.name);
      // element i of rank r is r i; of the sum, rank i has element i
      std::vector<double> mine;
      double expected = 0;
      for (int i = 0; i < axis.size; i++)
        mine.push_back(m.rank * i), expected += ranks[size_t(i)] * rank;
      const Tensor all({axis.size}, Dtype::f64, Memory::workspace),
          sum({1}, Dtype::f64, Memory::workspace);
      upload(all, mine.data());
      synchronize();
      NCCL_CHECK(ncclReduceScatter(all.raw(), sum.raw(), 1, ncclFloat64, ncclSum, axis.comm,
                                   device().communication));
      CUDA_CHECK(cudaStreamSynchronize(device().communication));
      CHECK_EQ(download(sum)[0], expected, axis.name);
      joined += both;
    }
    check_mesh(m);  // tries it, too
    close_mesh(m);
  }
  measured(joined, " axes joined of two");
}

TEST(layouts_that_do_not_fit_the_world_are_refused) {
  CHECK_SAYS(
      check_ranks(Layout{{"replicate", 3}, {"fsdp", 2}}, 4),
      "pp 1 x replicate 3 x fsdp 2 x cp 1 x tp 1 needs 6 ranks, but mpiexec started 4: mpiexec -n "
      "6");
  CHECK_SAYS(
      check_ranks({}, 2),
      "needs 1 rank, but mpiexec started 2: mpiexec -n 1, or name axes whose sizes multiply to 2");
  CHECK_SAYS(check_ranks(Layout{{"pp", 65536}, {"fsdp", 65536}}, 1),
             "needs 4294967296 ranks, but mpiexec started 1");
  CHECK_SAYS(check_ranks(Layout{{"fsdp", 0}, {"tp", 2}}, 2), "every axis needs at least one rank");
  CHECK_SAYS(open_mesh(Layout{{"fsdp", 3}, {"tp", 3}}), "needs 9 ranks");
  check_ranks(Layout{{"pp", 2}, {"fsdp", 2}, {"tp", 2}}, 8);
}

TEST(the_mesh_is_drawn_a_rank_a_line) {
  CHECK_EQ(draw(Layout{{"replicate", 2}, {"tp", 2}}),
           "rank  pp  replicate  fsdp  cp  tp\n"
           "   0   0          0     0   0   0\n"
           "   1   0          0     0   0   1\n"
           "   2   0          1     0   0   0\n"
           "   3   0          1     0   0   1\n");
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
  std::vector<Layout> layouts = {Layout{{"replicate", n / 2}, {"fsdp", 2}},
                                 Layout{{"fsdp", n / 2}, {"tp", 2}},
                                 Layout{{"fsdp", n / 2}, {"cp", 2}},
                                 Layout{{"pp", 2}, {"fsdp", n / 2}}};
  if (n % 2) layouts = {Layout{{"fsdp", n}}, Layout{{"cp", n}}};
  if (n == 8) layouts.push_back({{"replicate", 2}, {"fsdp", 2}, {"tp", 2}});
  if (n == 8) layouts.push_back({{"pp", 2}, {"fsdp", 2}, {"cp", 2}});
  int64_t calls = 0, bytes = 0;
  for (const Layout& layout : layouts)
    for (bool by_rows : {false, true}) {
      GptConfig config{2, 20, 10, 9, 31};
      config.sequence_parallel = by_rows;
      TrainerOptions options;
      options.microbatch = 1, options.batch = 2 * layout.data_ranks();
      Mesh m = open_mesh(layout);
      ledger.rows.clear();
      {
        Trainer trainer(m, config, options);
        const auto sequence = [](int64_t s) {
          return std::vector<int>{1, 2, 3, 4, 5, 6, 7, 8, 9, int(s % 31)};
        };
        for (int step = 0; step < 2; step++) {
          trainer.gradients(trainer.read(sequence));
          trainer.update(1e-3);
        }
        trainer.evaluate(3, sequence);
        trainer.next_logits({1, 2, 3});
      }
      CUDA_CHECK(cudaStreamSynchronize(device().communication));
      for (const Axis& axis : m.every_axis()) {
        if (!axis.comm) continue;
        for (const auto& [collective, call] : {std::pair{Collective::all_reduce, Call::all_reduce},
                                               {Collective::all_gather, Call::all_gather},
                                               {Collective::reduce_scatter, Call::reduce_scatter},
                                               {Collective::broadcast, Call::broadcast},
                                               {Collective::send, Call::send}}) {
          Ledger::Row entered;
          for (const Axis& same : m.every_axis())  // an axis of all ranks has the world's
            for (const auto& [key, row] : ledger.rows)
              if (same.comm == axis.comm && std::get<0>(key) == same.name &&
                  std::get<1>(key) == collective)
                entered.calls += row.calls, entered.numerator += row.numerator;
          const nccl_referee::Traffic sent = nccl_referee::traffic(axis.comm, call);
          const std::string what =
              sentence(name_of(collective), " on ", axis.name, " of ", to_string(layout));
          CHECK_EQ(entered.calls, sent.calls, what);
          CHECK_EQ(int64_t(entered.numerator), sent.numerator, what);
          calls += sent.calls, bytes += sent.numerator / sent.n;
        }
      }
      close_mesh(m);
    }
  measured(calls, " calls, ", bytes, " bytes on rank 0");
}

int main(int argc, char** argv) { return run_mpi_tests(argc, argv); }
