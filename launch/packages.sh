#!/usr/bin/env bash
# packages.sh: what has to be installed.
#   launch/packages.sh probe BACKEND COMM LINK LIBS   compiles and links a program with what the
#                                                     backend needs; a sentence where that fails,
#                                                     and status 2 where packages are no help
#   launch/packages.sh install                        `make deps`
set -u
cd "$(dirname "$0")/.."
packages="mpich libmpich-dev libdnnl-dev nlohmann-json3-dev libxxhash-dev"

# probe BACKEND COMM LINK LIBS
probe() {
  local dir=build/$1 headers="mpi.h nlohmann/json_fwd.hpp xxhash.h" call need
  mkdir -p "$dir" 2>/dev/null && [ -w "$dir" ] || {
    echo "make: nothing can be built here, since $PWD/$dir cannot be written to" >&2
    return 2
  }
  if [ "$1" = cuda ]; then
    headers="$headers cublas_v2.h"
    call="cublasHandle_t handle; int version = 0; int bad = cublasCreate(&handle);"
    need="the CUDA Toolkit with cuBLAS"
    if [ "$2" != mpi ]; then
      headers="$headers nccl.h"
      call="$call bad += ncclGetVersion(&version);"
      need="$need, and NCCL (NCCL_HOME says where it is; COMM=mpi does without)"
    fi
  else
    headers="$headers oneapi/dnnl/dnnl.h"
    call="int bad = dnnl_version() == 0, version = 0;"
    need="oneDNN with OpenMP, and with clang OpenMP (libomp-dev)"
  fi
  {
    printf '#include <%s>\n' $headers
    echo "#ifndef MPICH_VERSION"
    echo "#error this MPI is not MPICH"
    echo "#endif"
    echo "#if defined DNNL_RUNTIME_OMP && DNNL_CPU_THREADING_RUNTIME != DNNL_RUNTIME_OMP"
    echo "#error this oneDNN was not built with OpenMP, by which ranks share the cores"
    echo "#endif"
    echo "int main() { MPI_Init(0, 0); $call return bad + (version < 0); }"
  } >"$dir/probe.cpp"
  $3 "$dir/probe.cpp" -o "$dir/probe" $4 2>"$dir/probe.log" || {
    {
      cat "$dir/probe.log"
      echo "make: the $1 backend needs MPICH, nlohmann/json, xxHash and $need, and a program that" \
        "uses them does not compile (above)"
    } >&2
    return 1
  }
}

# One at a time: apt-get has a lock, and the second would fail on it.
install() {
  if ! command -v apt-get >/dev/null; then
    echo "make deps: install MPICH, oneDNN, nlohmann/json and xxHash with this system's package" \
      "manager (Debian, Ubuntu: $packages; Fedora: gcc-c++ mpich-devel onednn-devel json-devel" \
      "xxhash-devel, then module load mpi/mpich-x86_64), or without root (README.md, Where it" \
      "runs); where MPICH's mpicxx is not in PATH, give MPICXX=/path/mpicxx" >&2
    return 1
  fi
  local sudo="" log
  if [ "$(id -u)" != 0 ]; then
    sudo=sudo
    if ! command -v sudo >/dev/null || ! { sudo -n true 2>/dev/null || [ -t 0 ]; }; then
      echo "make deps: packages are missing; as root run:" \
        "apt-get update && apt-get install -y $packages; without root: README.md, Where it runs" >&2
      return 1
    fi
    sudo true || return 1 # what it says about a password must not go into the log
  fi
  log=$(mktemp) || return
  # one `make deps` at a time, by a file that nobody else can put in our way
  ! command -v flock >/dev/null || { exec 9</var/lib/dpkg && flock -w 600 9; }
  echo "make deps: installing $packages"
  $sudo apt-get update -qq >"$log" 2>&1 || echo "E: apt-get update failed" >>"$log"
  if ! $sudo env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 \
    install -y -qq --no-install-recommends $packages >>"$log" 2>&1 9>&-; then
    tail -5 "$log" >&2
    echo "make deps: the packages could not be installed (above; all of it is in $log); without" \
      "root: README.md, Where it runs" >&2
    return 1
  fi
  rm -f "$log"
  # its programs compile and link
  case $(dpkg-query -W -f '${Version}' mpich 2>/dev/null) in 4.2.0-5build3*)
    echo "make deps: with this MPICH of Ubuntu 24.04 every rank is a world of its own, so only" \
      "one rank works (make run STRATEGY=serial); another MPICH: README.md, Where it runs" >&2
    ;;
  esac
}

case ${1:-} in
  probe) probe "${@:2}" ;;
  install) install ;;
  *)
    echo "usage: launch/packages.sh probe BACKEND COMM LINK LIBS, or launch/packages.sh install" >&2
    exit 1
    ;;
esac
