// signals.cpp: see signals.h.
#include "launch/signals.h"

#include <poll.h>
#include <sys/resource.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <optional>
#include <system_error>

#include "support/check.h"

// ---- before the libraries are initialised: UCX takes signals, and needs a stack, when it is

static sigset_t ignored;
constexpr int kMeaningEnd[] = {SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2, SIGXCPU};

static void before_libraries() {
  sigemptyset(&ignored);
  for (const int signal : kMeaningEnd) {
    struct sigaction before = {};
    sigaction(signal, nullptr, &before);
    if (before.sa_handler == SIG_IGN) sigaddset(&ignored, signal);
  }
  rlimit stack;
  if (getrlimit(RLIMIT_STACK, &stack) || stack.rlim_cur >= 64 << 10) return;
  dprintf(STDERR_FILENO, "a stack of %d KiB (ulimit -s) is too small for this program\n",
          int(stack.rlim_cur >> 10));
  _exit(1);
}
__attribute__((section(".preinit_array"), used)) static void (*const first)() = before_libraries;

// ---- then

Signals::Signals() {
  sigset_t blocked;
  sigemptyset(&blocked);
  sigemptyset(&fetched_);
  for (const int signal : kMeaningEnd) {
    sigaddset(&blocked, signal);
    if (!sigismember(&ignored, signal)) sigaddset(&fetched_, signal);
  }
  for (sigset_t* set : {&blocked, &fetched_}) sigaddset(set, SIGRTMIN);  // ends our thread
  pthread_sigmask(SIG_BLOCK, &blocked, nullptr);
  // a reader that leaves and a file that may not grow are errors of write(), with a sentence
  for (const int signal : {SIGPIPE, SIGXFSZ}) std::signal(signal, SIG_IGN);
  try {
    thread_ = std::thread([this] { fetch(); });
  } catch (const std::system_error& e) {
    throw Error(sentence("not even one thread more can be started here: ", e.what()));
  }
}

Signals::~Signals() {
  stop_ = true;
  pthread_kill(thread_.native_handle(), SIGRTMIN);
  thread_.join();
}

void Signals::fetch() {
  using Clock = std::chrono::steady_clock;
  std::optional<Clock::time_point> asked;  // to end, first
  for (int signal; sigwait(&fetched_, &signal) == 0 && !stop_;) {
    const bool asks = signal == SIGTERM || signal == SIGINT;
    // mpiexec may deliver a signal twice
    const bool insists = asks && asked && Clock::now() - *asked > std::chrono::seconds(1);
    if (listens_ && !insists) {
      if (asks && !asked) asked = Clock::now();
      came_ = true;
      continue;
    }
    std::signal(signal, SIG_DFL);
    sigset_t one;
    sigemptyset(&one);
    sigaddset(&one, signal);
    pthread_sigmask(SIG_UNBLOCK, &one, nullptr);
    raise(signal);
  }
}

bool Signals::Listener::came() const {
  pollfd output{STDOUT_FILENO, 0, 0};
  if (poll(&output, 1, 0) == 1 && (output.revents & (POLLERR | POLLHUP)) &&
      freopen("/dev/null", "w", stdout)) {
    fprintf(stderr, "whoever read the output has left: ending as after a signal\n");
    came_ = true;
  }
  return came_;
}
