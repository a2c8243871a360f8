// program.h: what train_gpt and generate share: from the command line to the mesh, and back.
// test      tests/test_cli.sh, tests/test_failures.sh
#pragma once
#include <unistd.h>

#include <optional>

#include "launch/environment.h"
#include "launch/first_minute.h"
#include "launch/signals.h"
#include "launch/watch.h"

struct Start {
  Layout layout;
  int64_t timeout;  // seconds
  // what every rank must have been given alike: names, and what they stand for
  NamedValues given;
};

// prepare(job) reads the options, on every rank without a word to the others; nothing: they only
// asked for help. work(job, mesh, watch) does what they ask for. Returns main's status.
template <class Prepare, class Work>
int run_program(const char* name, int argc, char** argv, Prepare prepare, Work work) {
  if (const std::string error = error_of(fetch_signals); !error.empty()) {
    fprintf(stderr, "%s: %s\n", name, error.c_str());
    return 1;
  }
  Job job(&argc, &argv);
  try {
    std::optional<Start> start;
    // what is wrong for one rank ends all, with one message
    std::string error = job.agree(error_of([&] {
      job.check_launcher();
      start = prepare(job);
      if (start) check_products();
    }));
    if (error.empty()) error = differences(start ? start->given : NamedValues{{"--help", "given"}});
    if (!error.empty() && job.speaks) fprintf(stderr, "%s: %s\n", name, error.c_str());
    if (!error.empty()) return job.leave(1);
    if (!start) {
      check_printed();
      return 0;
    }
    // of NCCL's stand-in: the watch speaks first
    setenv("THREEFOLD_TIMEOUT", sentence(start->timeout + 10).c_str(), 0);
    {
      Watch watch(job, double(start->timeout));
      Mesh mesh = open_mesh(start->layout);
      watch.observe(mesh);
      check_mesh(mesh);
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
