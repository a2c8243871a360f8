// job.cpp: see job.h.
#include "launch/job.h"

#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <nlohmann/json.hpp>
#include <thread>

std::string host_name() {
  char name[256] = "";
  gethostname(name, sizeof name - 1);
  return name;
}

std::vector<std::string> gather_text(const std::string& mine) {
  int ranks = 1;
  MPI_Comm_size(MPI_COMM_WORLD, &ranks);
  REQUIRE(mine.size() <= INT_MAX, "a rank has ", mine.size(),
          " bytes to tell the others, and 2 GiB are the most: trace fewer steps");
  const int length = mine.size();
  std::vector<int> lengths(ranks);
  MPI_Iallgather(&length, 1, MPI_INT, lengths.data(), 1, MPI_INT, MPI_COMM_WORLD, UntilDone());
  const int longest = *std::ranges::max_element(lengths);
  std::string padded = mine, all(size_t(longest) * ranks, ' ');
  padded.resize(longest);
  MPI_Iallgather(padded.data(), longest, MPI_CHAR, all.data(), longest, MPI_CHAR, MPI_COMM_WORLD,
                 UntilDone());
  std::vector<std::string> texts;
  for (const int bytes : lengths) texts.push_back(all.substr(texts.size() * longest, bytes));
  return texts;
}

std::vector<nlohmann::json> gather(const nlohmann::json& mine) {
  // as bytes: the name of a file may be no UTF-8, which JSON's text is
  const std::vector<uint8_t> bytes = nlohmann::json::to_cbor(mine);
  std::vector<nlohmann::json> all;
  for (const std::string& rank : gather_text({bytes.begin(), bytes.end()}))
    all.push_back(nlohmann::json::from_cbor(rank));
  return all;
}

Job::Job(int* argc, char*** argv) {
  int provided;
  const char* on_node = getenv("MPI_LOCALRANKID");  // of mpiexec
  if ((!on_node || std::string(on_node) == "0") && access("/dev/shm", F_OK) == 0 &&
      access("/dev/shm", W_OK))
    fprintf(stderr, "/dev/shm cannot be written to, where ranks share memory: MPI may not start\n");
  MPI_Init_thread(argc, argv, MPI_THREAD_MULTIPLE, &provided);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, rank, MPI_INFO_NULL, &node);
  MPI_Comm_rank(node, &local_rank);
  MPI_Comm_size(node, &local_size);
  speaks = rank == 0;
  // for cpu/cuda/runtime.cpp, where another launcher than MPICH's mpiexec does not say it
  if (local_size > 1) setenv("MPI_LOCALNRANKS", sentence(local_size).c_str(), 0);
  // the watch's thread asks other nodes while a rank waits for its peers
  if (provided < MPI_THREAD_MULTIPLE) abort("this MPI lets only one thread of a rank call it");
}

// Launchers tell their processes how many there are, and each its number. Where each is a world of
// its own, they do not speak with the MPI that the program was built with.
static constexpr struct {
  const char *tasks, *task, *why;
} kLaunchers[] = {
    {"PMI_SIZE", "PMI_RANK",
     "the launcher belongs to another MPI than the program, which was built with MPICH, or to an "
     "MPICH that is broken, as Ubuntu 24.04's package 4.2.0-5build3 is (README.md, Where it runs)"},
    {"OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK",
     "this mpiexec belongs to Open MPI, and the program was built with MPICH"},
    {"SLURM_STEP_NUM_TASKS", "SLURM_PROCID",
     "srun did not connect them: give it --mpi=pmi2 (srun --mpi=list says what there is)"}};

bool Job::prints_to_terminal() const {
  return isatty(STDOUT_FILENO) || std::ranges::any_of(kLaunchers, [](auto& launcher) {
           return getenv(launcher.tasks) != nullptr;
         });
}

void Job::check_launcher() {
  for (const auto& [tasks, task, why] : kLaunchers) {
    const char *told = getenv(tasks), *number = getenv(task);
    if (!told) continue;
    if (size > 1 || atoi(told) < 2) return;
    speaks = !number || atoi(number) == 0;
    throw Error(sentence("the launcher started ", told, " processes (", tasks,
                         "), but each sees a world of 1 rank: ", why,
                         "; if one rank is meant, start one"));
  }
}

Job::~Job() {
  barrier();
  MPI_Finalize();
}

// The ranks of one node have memory in common, unless UCX is told what to use.
int Job::leave(int status) const {
  if (size == 1 || (local_size == size && !getenv("UCX_TLS"))) return status;
  fflush(nullptr);
  if (!by_mpiexec_) {
    barrier();
    std::thread([status] {
      sleep(30);
      // Who ends without MPI's goodbye is taken for crashed once its connection to the launcher
      // closes, unless all have ended by then: a child holds it open meanwhile, and nothing else.
      const char* told = getenv("PMI_FD");
      if (told && fork() == 0) {
        for (int fd = 0; fd < 1024; fd++)
          if (fd != atoi(told)) close(fd);
        sleep(5);
      }
      _exit(status);
    }).detach();
    return status;
  }
  MPI_Request everybody;
  MPI_Ibarrier(MPI_COMM_WORLD, &everybody);
  // After that barrier what it has sent must still go out. Then mpiexec's own barrier, and its end,
  // in the words of PMI-1, are what MPI_Finalize, too, asks for: who ends without a word takes the
  // others along.
  const char* told = getenv("PMI_FD");
  pollfd mpiexec{told ? atoi(told) : -1, POLLIN, 0};
  double end = MPI_Wtime() + 60;
  for (int met = 0, any = 0; MPI_Wtime() < end && poll(&mpiexec, 1, 1) < 1;) {
    MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, MPI_COMM_WORLD, &any, MPI_STATUS_IGNORE);
    if (met) continue;
    MPI_Test(&everybody, &met, MPI_STATUS_IGNORE);
    if (!met) continue;
    if (told) dprintf(mpiexec.fd, "cmd=barrier_in\n");
    else end = MPI_Wtime() + 0.5;
  }
  if (char answer[64]; mpiexec.revents & POLLIN && read(mpiexec.fd, answer, sizeof answer) > 0) {
    dprintf(mpiexec.fd, "cmd=finalize\n");
    poll(&mpiexec, 1, 5000);
  }
  _exit(status);
}

std::string Job::agree(const std::string& error) const {
  for (const std::string& text : gather_text(error))
    if (!text.empty()) return text;
  return "";
}

void Job::abort(const std::string& why) const {
  const bool first = !explained || !explained->exchange(true);
  if (first) fprintf(stderr, "rank %d: %s\n", rank, printable(why).c_str());
  // mpiexec passes the words on before it hears of the end; the others do not end the job before
  // that, and those of other nodes can say where they stand, too
  usleep(first && local_size == size ? 300'000 : 1'000'000);
  MPI_Abort(MPI_COMM_WORLD, 1);
  _exit(1);
}
