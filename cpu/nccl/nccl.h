// nccl.h: the part of NCCL's API (level 2.18) that Threefold uses, for ranks that are MPI processes
// and have no NCCL below them.
//
// idea      the same names, types and meaning as the real nccl.h, over memory that the ranks of a
//           node share and over MPI elsewhere. The CPU build includes this file; a CUDA build with
//           COMM=mpi includes the real one and links the same sources: ranks share a GPU.
// referee   stricter than NCCL in most: what could hang or corrupt a cluster fails here with a
//           sentence. See nccl_internal.h for the protocol, and docs/without_a_gpu.md for what
//           passes here and fails with NCCL.
// limits    one device a process; the process that calls ncclGetUniqueId is a member; MPI is
//           initialised first; tags from 1 << 20 up on MPI_COMM_WORLD belong to this stand-in;
//           MPI_THREAD_MULTIPLE wherever MPI carries data of queued streams or of CUDA
// not here  what Threefold does not use: other dtypes and reductions, ncclReduce, ncclCommAbort,
//           configurations
// test      tests/test_nccl.cpp, tests/bench_nccl.cpp
#pragma once
#include <cuda_runtime.h>

#define NCCL_SPLIT_NOCOLOR -1

extern "C" {

typedef struct ncclComm* ncclComm_t;
typedef struct {
  char internal[128];
} ncclUniqueId;

typedef enum {
  ncclSuccess = 0,
  ncclUnhandledCudaError = 1,
  ncclSystemError = 2,
  ncclInternalError = 3,
  ncclInvalidArgument = 4,
  ncclInvalidUsage = 5,
  ncclRemoteError = 6,
  ncclInProgress = 7,
  ncclNumResults = 8
} ncclResult_t;

typedef enum { ncclSum = 0, ncclMax = 2 } ncclRedOp_t;

typedef enum {
  ncclInt32 = 2,
  ncclFloat32 = 7,
  ncclFloat = 7,
  ncclFloat64 = 8,
  ncclDouble = 8,
  ncclBfloat16 = 9
} ncclDataType_t;

typedef struct ncclConfig ncclConfig_t;  // what it tunes does not exist here

// ---- communicators

ncclResult_t ncclGetUniqueId(ncclUniqueId* id);
ncclResult_t ncclCommInitRank(ncclComm_t* comm, int nranks, ncclUniqueId id, int rank);
ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t* newcomm,
                           ncclConfig_t* config);
ncclResult_t ncclCommDestroy(ncclComm_t comm);

// ---- errors

const char* ncclGetErrorString(ncclResult_t result);
// the sentence; of the whole process when comm is null
const char* ncclGetLastError(ncclComm_t comm);
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error);

// ---- communication, in the order of the stream

ncclResult_t ncclAllReduce(const void* send, void* recv, size_t count, ncclDataType_t dtype,
                           ncclRedOp_t op, ncclComm_t comm, cudaStream_t);
ncclResult_t ncclAllGather(const void* send, void* recv, size_t send_count, ncclDataType_t dtype,
                           ncclComm_t comm, cudaStream_t);
ncclResult_t ncclReduceScatter(const void* send, void* recv, size_t recv_count,
                               ncclDataType_t dtype, ncclRedOp_t op, ncclComm_t comm, cudaStream_t);
ncclResult_t ncclBroadcast(const void* send, void* recv, size_t count, ncclDataType_t dtype,
                           int root, ncclComm_t comm, cudaStream_t);
ncclResult_t ncclSend(const void* send, size_t count, ncclDataType_t dtype, int peer,
                      ncclComm_t comm, cudaStream_t);
ncclResult_t ncclRecv(void* recv, size_t count, ncclDataType_t dtype, int peer, ncclComm_t comm,
                      cudaStream_t);
ncclResult_t ncclGroupStart();
ncclResult_t ncclGroupEnd();

}  // extern "C"

#include "nccl_referee.h"
