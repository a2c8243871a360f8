#!/usr/bin/env bash
# detect.sh: which backend this machine can run, found by compiling a probe and running it. What it
# prints, the Makefile includes as build/detected.mk. Where it takes the CPU although there are
# signs of a GPU, WHY is a sentence, and standard error has it, too.
#   launch/detect.sh        CUDA_HOME and NCCL_HOME say where they are, if not in the usual places;
#                           MPICXX is the compiler of the host's code
#   launch/detect.sh gpus   how many GPUs a program may use now; CUDA_VISIBLE_DEVICES counts, a
#                           line of MIG does not
set -u
cd "$(dirname "$0")/.."
work=build/detect

if [ "${1:-}" = gpus ]; then
  "$work/probe" 2>/dev/null | sed -n 's/^gpus //p' | grep . || echo 0
  exit
fi
mkdir -p "$work"
nvcc=${CUDA_HOME:+$CUDA_HOME/bin/nvcc}
nvcc=${nvcc:-$(command -v nvcc || ls /{opt,usr/local}/cuda/bin/nvcc 2>/dev/null | tail -1)}
[ -x "$nvcc" ] || nvcc=""
cuda=${CUDA_HOME:-$(realpath "${nvcc:-/usr/bin/nvcc}" | sed 's#/bin/nvcc$##')}
# conda has them elsewhere
for include in "$cuda"/{include,targets/*-linux/include,include}; do
  [ -e "$include/cuda_runtime.h" ] && break
done
for lib in "$cuda"/{lib64,lib,targets/*-linux/lib,lib64}; do
  [ -e "$lib/libcublas.so" ] && break
done
libraries="-L$lib -Xlinker -rpath=$lib"
# the same as in the build, though nvcc may have another of its own
host=$(command -v "${MPICXX:-}") ccbin=${host:+-ccbin $host}

# found BACKEND [WHY]
found() {
  [ -z "${2:-}" ] || echo "no GPU is used: $2. After a change: make detect" >&2
  cat <<EOF
DETECTED := $1
WHY := ${2:-}
LOOKED_IN := ${CUDA_HOME:-}:${NCCL_HOME:-}
NVCC ?= ${nvcc:-nvcc}
CUDA := $cuda
CUDA_INCLUDE := $include
CUDA_LIBS := $libraries
NCCL_FLAGS := ${nccl_flags:-}
NCCL_LIBS := ${nccl_libs:--lnccl}
GPU_GENCODE :=${gencode:-}
EOF
  exit
}

# ---- the compiler

# on WSL 2 /dev/dxg is there for everybody's GPU, this library for NVIDIA's alone
driver=$(command -v nvidia-smi \
  || ls /dev/nvidiactl /usr/lib/wsl/lib/libcuda.so.1 2>/dev/null | head -1)
[ -n "$nvcc$driver" ] || found cpu
[ -n "$nvcc" ] || found cpu "$driver is here, but ${CUDA_HOME:+$CUDA_HOME/bin/}nvcc is not: \
install the CUDA Toolkit, or give its CUDA_HOME"
version=$("$nvcc" --version | sed -n 's/.*release \([0-9]*\).*/\1/p')
[ "${version:-0}" -ge 12 ] || found cpu "$nvcc is of CUDA ${version:-unknown}, which has no C++20: \
install CUDA 12 or newer, or give CUDA_HOME"

# ---- NCCL: NCCL_HOME, the usual places, conda, the HPC SDK, pip; also where no GPU is, for a build
# that runs elsewhere

# has_nccl [DIR]: sets nccl_flags and nccl_libs if a program compiles, links and runs with it
has_nccl() {
  nccl_flags="" nccl_libs="-lnccl"
  if [ $# -gt 0 ]; then
    local lib
    for lib in "$1"/lib "$1"/lib64; do
      [ -e "$lib/libnccl.so.2" ] && break
    done
    nccl_flags="-I$1/include"
    nccl_libs="-L$lib -l:libnccl.so.2 -Xlinker -rpath=$lib"
  fi
  echo '#include <nccl.h>
    int main() { int v; return ncclGetVersion(&v) || v < 21800; }' >"$work/nccl.cu"
  "$nvcc" $ccbin $nccl_flags "$work/nccl.cu" -o "$work/nccl" $libraries $nccl_libs \
    >"$work/nccl.log" 2>&1 && "$work/nccl" >>"$work/nccl.log" 2>&1
}
if [ -n "${NCCL_HOME:-}" ]; then
  has_nccl "$NCCL_HOME" || no_nccl="NCCL_HOME is $NCCL_HOME, and no program builds and runs with \
the NCCL there (2.18 or newer is needed; see $work/nccl.log)"
else
  places=$(ls -d ${CONDA_PREFIX:-} ${NVHPC_ROOT:+$NVHPC_ROOT/comm_libs/nccl} \
    /opt/nvidia/hpc_sdk/*/*/comm_libs/nccl 2>/dev/null)
  pip=$(python3 -c 'import nvidia.nccl; print(list(nvidia.nccl.__path__)[0])' 2>/dev/null)
  has_nccl || {
    for place in $places $pip; do
      has_nccl "$place" && break
      place=""
    done
    [ -n "${place:-}" ] || no_nccl="the GPUs and CUDA work, but NCCL 2.18 or newer is not found: \
install libnccl-dev (Arch: nccl; or with pip for the python3 in PATH nvidia-nccl-cu12, -cu13 for \
CUDA 13), or give NCCL_HOME (make BACKEND=cuda COMM=mpi run does without)"
  }
fi
[ -z "${no_nccl:-}" ] || nccl_flags="" nccl_libs=""

# ---- the GPUs

cat >"$work/probe.cu" <<'EOF'
// Prints what the GPUs are and whether a kernel runs on each.
#include <cuda_runtime.h>
#include <cstdio>
__global__ void answer(int* to) { *to = 42; }
int main() {
  int gpus = 0;
  cudaError_t error = cudaGetDeviceCount(&gpus);
  if (error != cudaSuccess) return printf("error %s\n", cudaGetErrorString(error)), 1;
  for (int i = 0; i < gpus; i++) {
    int major = 0, minor = 0, got = 0, *memory = nullptr;
    cudaSetDevice(i);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, i);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, i);
    printf("capability %d.%d\n", major, minor);
    if (major < 8) continue;
    cudaMalloc(&memory, sizeof(int));
    answer<<<1, 1>>>(memory);
    error = cudaGetLastError();
    if (error == cudaSuccess)
      error = cudaMemcpy(&got, memory, sizeof(int), cudaMemcpyDeviceToHost);
    if (error != cudaSuccess || got != 42) printf("error %s\n", cudaGetErrorString(error));
  }
  printf("gpus %d\n", gpus);
}
EOF
rm -f "$work/probe"
# A driver that is older than the toolkit runs machine code, but compiles none from PTX.
"$nvcc" $ccbin -gencode arch=compute_80,code=[compute_80,sm_80] \
  -gencode arch=compute_90,code=sm_90 "$work/probe.cu" -o "$work/probe" $libraries \
  >"$work/log" 2>&1 \
  || found cpu "$nvcc does not compile a small program${host:+ with $host} ($work/log): if the \
host's compiler is too new for it, MPICH_CXX=g++-13 make detect, and so at each make"
"$work/probe" >"$work/gpus" 2>&1 || echo "error the probe ended with status $?" >>"$work/gpus"
error=$(sed -n 's/^error //p' "$work/gpus" | head -1)
if [ -n "$error" ] || grep -qx 'gpus 0' "$work/gpus"; then
  # with no sign of a GPU, a compiler alone is no reason for a warning
  [ -n "$driver" ] && found cpu "CUDA finds none that it can use: ${error:-no device}"
  found cpu
fi
capabilities=$(sed -n 's/^capability //p' "$work/gpus" | sort -u)
for capability in $capabilities; do
  [ "${capability%.*}" -ge 8 ] || found cpu "one has compute capability $capability, and 8.0 \
(A100, RTX 30) is the oldest that works: leave it out with CUDA_VISIBLE_DEVICES"
done

# Built for the GPUs that are here, where the compiler knows all of them.
known=$("$nvcc" --list-gpu-arch)
for capability in $capabilities; do
  arch=${capability/./}
  grep -qx "compute_$arch" <<<"$known" || unknown=yes
  gencode="${gencode:-} -gencode arch=compute_$arch,code=sm_$arch"
done
# For others, which a home on several machines may meet, the driver compiles.
gencode="${gencode:-} -gencode arch=compute_80,code=compute_80"
[ -z "${unknown:-}" ] || gencode=""

[ -z "${no_nccl:-}" ] || found cpu "$no_nccl"
found cuda
