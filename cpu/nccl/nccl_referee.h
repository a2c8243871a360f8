// nccl_referee.h: what the NCCL stand-in offers beside NCCL's API: its own count of the bytes, the
// watch, the tests' mode.
//
// cpu/nccl/nccl.h includes it; a program that is compiled for CUDA with COMM=mpi may include it
// after the real nccl.h.
#pragma once
#include <nccl.h>

#include <cstdint>
#include <string>

namespace nccl_referee {

enum class Call : int32_t {
  none,
  all_reduce,
  all_gather,
  reduce_scatter,
  broadcast,
  send,
  recv,
  split
};
constexpr int kCalls = 8;

// What completed calls of one kind sent. By the bandwidth-optimal convention (n ranks, buffer of W
// bytes) a rank sends numerator / n bytes: all-gather and reduce-scatter (n-1)/n W, all-reduce
// 2(n-1)/n W, broadcast and send W. `copied` is counted where the copies are made: bytes
// that this rank read from its peers. It equals numerator / n for all-gather and reduce-scatter,
// and the sum over the receivers equals that of the senders for point-to-point calls.
struct Traffic {
  int64_t calls = 0, numerator = 0;
  int n = 1;
  int64_t copied = 0;
};
Traffic traffic(ncclComm_t comm, Call call);

// for sentences: "on communicator 'fsdp' of ranks 0,2"
void name(ncclComm_t comm, const char* name);
// a call that waits this long is a deadlock; else THREEFOLD_TIMEOUT, or 60
void watch(double seconds);
// THREEFOLD_REFEREE=1: receive buffers start as NaN, send buffers are checksummed
void strict(bool on);
// for communicators made by ncclCommInitRank from now on
void use_shared_memory(bool on);
// each rank's last call, from memory that outlives a stopped or killed rank
std::string where_ranks_stand(ncclComm_t comm);

}  // namespace nccl_referee
