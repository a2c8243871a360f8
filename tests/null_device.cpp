// null_device.cpp: CUDA's runtime and cuBLAS for a device that computes nothing. Every call
// succeeds immediately and is counted. Linked with the objects of the CUDA build
// (build/cuda/null/train_gpt) it shows, with no GPU, what the host asks of a device, and how long
// it takes for that by itself. Results are 0. THREEFOLD_CALLS=file says where the counts go: a line
// a call, count and name. THREEFOLD_FULL=N: the Nth allocation fails; N-: all from it on.
#include <cublas_v2.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <string>

namespace {

// never destroyed: what is static elsewhere still frees memory at the end
std::map<std::string, long>& calls() {
  static auto& all = *new std::map<std::string, long>;
  return all;
}
struct Writer {
  ~Writer() {
    const char* path = getenv("THREEFOLD_CALLS");
    FILE* file = path ? fopen(path, "w") : nullptr;
    if (!file) return;
    for (const auto& [name, count] : calls()) fprintf(file, "%ld %s\n", count, name.c_str());
    fclose(file);
  }
};
long& calls_of(const char* name) {
  static const Writer at_the_end;
  return calls()[name];
}
std::set<const void*>& pinned() {
  static auto& all = *new std::set<const void*>;
  return all;
}
template <class T> T* number() {  // of a stream, an event
  static char* next = nullptr;
  return reinterpret_cast<T*>(++next);
}

}  // namespace

#define COUNT(name)                     \
  static long& calls_ = calls_of(name); \
  calls_++
#define NOTHING(name, ...)        \
  cudaError_t name(__VA_ARGS__) { \
    COUNT(#name);                 \
    return cudaSuccess;           \
  }

extern "C" {

// ---- kernels

void** __cudaRegisterFatBinary(void*) { return new void*(); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaSuccess; }
cudaError_t __cudaGetKernel(void** kernel, const void* function) {
  *kernel = const_cast<void*>(function);
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(void*, dim3, dim3, void**, size_t, void*) {
  COUNT("a kernel is launched");
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
  COUNT("a kernel is launched");
  return cudaSuccess;
}
NOTHING(cudaFuncSetAttribute, const void*, cudaFuncAttribute, int)

// ---- errors, devices

NOTHING(cudaGetLastError)
const char* cudaGetErrorString(cudaError_t) { return "no error"; }
const char* cudaGetErrorName(cudaError_t) { return "cudaSuccess"; }
NOTHING(cudaSetDevice, int)
NOTHING(cudaDeviceSynchronize)
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  *p = {};
  strcpy(p->name, "a device that computes nothing");
  p->major = 9;
  p->sharedMemPerBlockOptin = 227 << 10;
  return cudaSuccess;
}

// ---- streams, events

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = number<CUstream_st>();
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
  return cudaStreamCreateWithFlags(stream, flags);
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
NOTHING(cudaStreamDestroy, cudaStream_t)
NOTHING(cudaStreamSynchronize, cudaStream_t)
NOTHING(cudaStreamWaitEvent, cudaStream_t, cudaEvent_t, unsigned)
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* argument) {
  COUNT("cudaLaunchHostFunc");
  function(argument);
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  COUNT("cudaEventCreateWithFlags");
  *event = number<CUevent_st>();
  return cudaSuccess;
}
NOTHING(cudaEventDestroy, cudaEvent_t)
NOTHING(cudaEventRecord, cudaEvent_t, cudaStream_t)
NOTHING(cudaEventQuery, cudaEvent_t)
NOTHING(cudaEventSynchronize, cudaEvent_t)
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) {
  COUNT("cudaEventElapsedTime");
  *ms = 1e-3f;
  return cudaSuccess;
}

// ---- memory: addresses that nobody reads

cudaError_t cudaMallocAsync(void** data, size_t bytes, cudaStream_t) {
  COUNT("cudaMallocAsync");
  static const char* full = getenv("THREEFOLD_FULL");
  const long from = full ? atol(full) : 0;
  if (full && (strchr(full, '-') ? calls_ >= from : calls_ == from))
    return cudaErrorMemoryAllocation;
  static size_t next = size_t(1) << 46;
  *data = reinterpret_cast<void*>(next);
  next += (bytes + 511) / 512 * 512;
  return cudaSuccess;
}
NOTHING(cudaFreeAsync, void*, cudaStream_t)
NOTHING(cudaDeviceGetDefaultMemPool, cudaMemPool_t*, int)
NOTHING(cudaMemPoolSetAttribute, cudaMemPool_t, cudaMemPoolAttr, void*)
cudaError_t cudaMallocHost(void** data, size_t bytes) {
  COUNT("cudaMallocHost");
  *data = malloc(bytes);
  pinned().insert(*data);
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* data) {
  COUNT("cudaFreeHost");
  pinned().erase(data);
  free(data);
  return cudaSuccess;
}
NOTHING(cudaMemsetAsync, void*, int, size_t, cudaStream_t)
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t) {
  const void* host = kind == cudaMemcpyHostToDevice ? from : to;
  if (kind == cudaMemcpyDeviceToDevice) {
    COUNT("cudaMemcpyAsync on the device");
  } else if (!pinned().count(host)) {
    COUNT("cudaMemcpyAsync of memory that is not pinned");  // waits
  } else if (kind == cudaMemcpyHostToDevice) {
    COUNT("cudaMemcpyAsync to the device");
  } else {
    COUNT("cudaMemcpyAsync to the host");
  }
  if (kind == cudaMemcpyDeviceToHost) memset(to, 0, bytes);
  return cudaSuccess;
}

// ---- cuBLAS

cublasStatus_t cublasCreate_v2(cublasHandle_t* handle) {
  *handle = number<cublasContext>();
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasDestroy_v2(cublasHandle_t) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetStream_v2(cublasHandle_t, cudaStream_t) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasGemmEx(cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int, int,
                            const void*, const void*, cudaDataType, int, const void*, cudaDataType,
                            int, const void*, void*, cudaDataType, int, cublasComputeType_t,
                            cublasGemmAlgo_t) {
  COUNT("cublasGemmEx");
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t, cublasOperation_t, cublasOperation_t, int,
                                          int, int, const void*, const void*, cudaDataType, int,
                                          long long, const void*, cudaDataType, int, long long,
                                          const void*, void*, cudaDataType, int, long long, int,
                                          cublasComputeType_t, cublasGemmAlgo_t) {
  COUNT("cublasGemmStridedBatchedEx");
  return CUBLAS_STATUS_SUCCESS;
}
}
