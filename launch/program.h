// program.h: what train_gpt and generate share: from the command line to the mesh, and back.
// test      tests/test_cli.sh, tests/test_failures.sh
#pragma once
#include "launch/environment.h"
#include "launch/first_minute.h"
#include "launch/options.h"
#include "launch/signals.h"
#include "launch/watch.h"

// On every rank without a word to the others: reads the options, of which `table` knows, opens the
// device, and calls prepare(job), which says what every rank must have been given alike. Then
// work(job, mesh, watch) does what the options ask for. Returns main's status.
template <class Options, class Prepare, class Work>
int run_program(const char* name, const char* usage, int argc, char** argv, Options& o,
                OptionTable (*table)(Options&), Prepare prepare, Work work) {
  fetch_signals();
  Job job(&argc, &argv);
  try {
    NamedValues given;
    // what is wrong for one rank ends all, with one message
    std::string error = job.agree(error_of([&] {
      job.check_launcher();
      const std::string help = help_text(usage, table(o));
      o.given = parse(argc, argv, table(o));
      if (o.help) {
        given = {{"--help", "given"}};
        if (job.speaks) fputs(help.c_str(), stdout);
        return;
      }
      open_device(job.local_rank % device_count(), o.device_memory << 20);
      matmul_backend = o.matmul == "own" ? MatmulBackend::own : MatmulBackend::cublas;
      given = prepare(job);
      check_products();
    }));
    if (error.empty()) error = differences(given);
    if (!error.empty()) {
      if (job.speaks) fprintf(stderr, "%s: %s\n", name, printable(error).c_str());
      return job.leave(1);
    }
    if (o.help) {
      check_printed();
      return job.leave(0);
    }
    // of NCCL's stand-in: the watch speaks first
    setenv("THREEFOLD_TIMEOUT", sentence(o.timeout + 10).c_str(), 0);
    // A switch that adds (NVLS) does so in an order of its own, but the copies on tp ranks of what
    // all of them hold must get the same bits (docs/tensor_parallel.md).
    if (o.layout["tp"] > 1 &&
        std::max(o.layout["fsdp"] * o.layout["cp"], o.layout["replicate"]) > 2)
      setenv("NCCL_NVLS_ENABLE", "0", 0);
    {
      Watch watch(job, o.timeout);
      Mesh mesh = open_mesh(o.layout);
      watch.observe(mesh);
      check_mesh(mesh);
      const std::string advice = advice_on_nodes(mesh, job);
      if (job.speaks && !advice.empty()) fprintf(stderr, "%s: %s\n", name, advice.c_str());
      watch.step(0);
      work(job, mesh, watch);
      watch.observe(Mesh());
      close_mesh(mesh);
    }
    close_device();
    check_printed();
    return job.leave(0);
  } catch (const std::exception& e) {
    fflush(stdout);
    job.abort(words_of(e));
  }
}
