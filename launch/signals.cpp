// signals.cpp: see signals.h.
#include "launch/signals.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/resource.h>
#include <unistd.h>

#include <csignal>
#include <optional>
#include <thread>

#include "support/check.h"
#include "support/stopwatch.h"

// ---- before the libraries are initialised: UCX takes signals, and needs a stack, when it is

static sigset_t fetched;  // those that were not ignored
constexpr int kMeaningEnd[] = {SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2, SIGXCPU};

static void before_libraries() {
  // a standard stream that is closed would become whatever a library opens first
  for (int fd = 0; fd < 3; fd++)
    if (fcntl(fd, F_GETFD) < 0) open("/dev/null", O_RDWR);
  sigemptyset(&fetched);
  for (const int signal : kMeaningEnd) {
    struct sigaction before = {};
    sigaction(signal, nullptr, &before);
    if (before.sa_handler != SIG_IGN) sigaddset(&fetched, signal);
  }
  rlimit stack;
  if (getrlimit(RLIMIT_STACK, &stack) || stack.rlim_cur >= 512 << 10) return;
  dprintf(STDERR_FILENO, "a stack of %d KiB (ulimit -s) is too small for this program\n",
          int(stack.rlim_cur >> 10));
  _exit(1);
}
__attribute__((section(".preinit_array"), used)) static void (*const first)() = before_libraries;

// ---- then

static std::atomic<bool> listens = false, has_come = false;

[[noreturn]] static void fetch() {
  std::optional<Stopwatch> asked;  // to end, first
  while (true) {
    int signal;
    sigwait(&fetched, &signal);
    const bool asks = signal == SIGTERM || signal == SIGINT;
    // mpiexec may deliver a signal twice
    const bool insists = asks && asked && asked->seconds() > 1;
    if (listens && !insists) {
      if (asks && !asked) asked.emplace();
      has_come = true;
      continue;
    }
    if (std::atomic<int>* const place = ended_by) *place = signal;
    std::signal(signal, SIG_DFL);
    pthread_sigmask(SIG_UNBLOCK, &fetched, nullptr);
    raise(signal);
  }
}

void fetch_signals() {
  sigset_t blocked;
  sigemptyset(&blocked);
  for (const int signal : kMeaningEnd) sigaddset(&blocked, signal);
  pthread_sigmask(SIG_BLOCK, &blocked, nullptr);
  // a reader that leaves and a file that may not grow are errors of write(), with a sentence
  for (const int signal : {SIGPIPE, SIGXFSZ}) std::signal(signal, SIG_IGN);
  try {
    std::thread(fetch).detach();
  } catch (const std::system_error& e) {
    fprintf(stderr, "not even one thread more can be started here: %s\n", e.what());
    _exit(1);
  }
}

void listen_for_signals() { listens = true; }

bool look_for_end() {
  pollfd output{STDOUT_FILENO, 0, 0};
  if (poll(&output, 1, 0) == 1 && (output.revents & (POLLERR | POLLHUP)) &&
      freopen("/dev/null", "w", stdout)) {
    fprintf(stderr, "whoever read the output has left: ending as after a signal\n");
    has_come = true;
  }
  return has_come;
}
