// ptx_extra.cpp: the calls of the CUDA runtime that we use and a PTX runner may lack. Weak: a
// runtime that has them wins. Streams run immediately there.
#include <cuda_runtime.h>

#define WEAK __attribute__((weak))
extern "C" {
WEAK cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) {
  *pool = nullptr;
  return cudaSuccess;
}
WEAK cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) {
  return cudaSuccess;
}
WEAK cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* argument) {
  function(argument);
  return cudaSuccess;
}
WEAK cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = *greatest = 0;
  return cudaSuccess;
}
WEAK cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
  return cudaStreamCreateWithFlags(stream, flags);
}
WEAK cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
WEAK cudaError_t cudaHostRegister(void*, size_t, unsigned) { return cudaSuccess; }
}
