#!/usr/bin/env bash
# test_detect.sh: launch/detect.sh, with stand-ins for nvcc and nvidia-smi, in a copy of its own: it
# takes CUDA where a kernel runs, builds for the GPUs that are there, and else says why not. Also
# what make and `make deps` say about the machine.
set -u
cd "$(dirname "$0")/.."
. tests/lib.sh
unset CUDA_HOME NCCL_HOME CONDA_PREFIX NVHPC_ROOT
mkdir -p "$dir/launch" "$dir/bin" "$dir/nvcc/bin" "$dir/nccl/lib" "$dir/nccl/include"
cp launch/detect.sh "$dir/launch"
touch "$dir/nccl/lib/libnccl.so.2"

# The compiler: VERSION is CUDA's; what it builds prints PROBE; a program of NCCL builds when NCCL
# stands among the arguments; nothing builds where REFUSED does.
cat >"$dir/nvcc/bin/nvcc" <<'END'
#!/usr/bin/env bash
case "$*" in
  --version) echo "Cuda compilation tools, release $VERSION, V$VERSION.1" ;;
  --list-gpu-arch) printf 'compute_80\ncompute_89\ncompute_90\n' ;;
  *"${REFUSED:-nothing}"*) exit 1 ;;
  *nccl.cu* | *cuda/probe.cpp*) [[ "$*" == *"$NCCL"* ]] || exit 1 ;;&
  *.cu*)
    [[ "$*" =~ -o\ ([^ ]+) ]]
    printf '#!/usr/bin/env bash\nprintf "%s"\n%s\n' "$PROBE" "${THEN:-}" >"${BASH_REMATCH[1]}"
    chmod +x "${BASH_REMATCH[1]}"
    ;;
esac
END
printf '#!/bin/sh\n' >"$dir/bin/nvidia-smi"
chmod +x "$dir/bin/nvidia-smi" "$dir/nvcc/bin/nvcc"
# No nvcc of this machine: a PATH with the tools that the script needs, and no more.
for tool in bash cat sed grep awk sort mkdir rm ls head dirname realpath printf env chmod tr sh mv \
  make touch find nproc id uname mktemp; do
  ln -s "$(command -v $tool)" "$dir/bin/$tool"
done

# detects NAME BACKEND 'part of what is said, or printed' [VARIABLE=value]...
detects() {
  local name=$1 backend=$2 part=$3
  shift 3
  env -i PATH="$dir/bin" VERSION=12.4 NCCL=-lnccl PROBE='capability 8.9\ngpus 1\n' \
    CUDA_HOME="$dir/nvcc" "$@" "$dir/launch/detect.sh" >"$dir/out" 2>"$dir/err"
  if grep -qx "DETECTED := $backend" "$dir/out" && grep -qF -- "$part" "$dir/out" "$dir/err"; then
    ok "$name" "$(head -c 150 "$dir/err")"
  else
    fail "$name" "$(head -3 "$dir/out") $(cat "$dir/err")"
  fi
}
detects a_gpu_is_taken_and_built_for cuda \
  "GPU_GENCODE := -gencode arch=compute_89,code=sm_89 -gencode arch=compute_80,code=compute_80"
detects an_unknown_gpu_is_built_for_by_the_default cuda "GPU_GENCODE :=" \
  PROBE='capability 12.0\ngpus 1\n'
check so_it_is 'grep -qx "GPU_GENCODE :=" "$dir/out"'
detects an_old_gpu_is_refused cpu "capability 7.5, and 8.0" PROBE='capability 7.5\ngpus 1\n'
detects a_kernel_that_does_not_run_is_said cpu "no kernel image" \
  PROBE='capability 8.0\nerror no kernel image\ngpus 1\n'
detects a_crash_is_no_gpu cpu "the probe ended with status 139" PROBE='capability 8.9\n' \
  THEN='kill -SEGV $$'
detects cuda_11_is_refused cpu "of CUDA 11, which has no C++20" VERSION=11.8
detects a_compiler_of_the_host_that_nvcc_refuses_is_named cpu \
  "does not compile a small program with $dir/bin/nvidia-smi" MPICXX=nvidia-smi \
  REFUSED="-ccbin $dir/bin/nvidia-smi"
mkdir -p "$dir"/nvcc/targets/x86_64-linux/{include,lib}
touch "$dir"/nvcc/targets/x86_64-linux/{include/cuda_runtime.h,lib/libcublas.so}
detects condas_headers_are_found cuda "CUDA_INCLUDE := $dir/nvcc/targets/x86_64-linux/include"
check and_its_libraries 'grep -q "^CUDA_LIBS := -L$dir/nvcc/targets/x86_64-linux/lib " "$dir/out"'
detects a_missing_nccl_is_said cpu "NCCL 2.18 or newer is not found" NCCL=nowhere
detects nccl_home_is_taken cuda "-Xlinker -rpath=$dir/nccl/lib" NCCL="-I$dir/nccl/include" \
  NCCL_HOME="$dir/nccl"
detects a_conda_environment_is_looked_at cuda "-I$dir/nccl/include" NCCL="-I$dir/nccl/include" \
  CONDA_PREFIX="$dir/nccl"
detects a_wrong_nccl_home_is_said cpu "NCCL_HOME is /nowhere" NCCL=absent NCCL_HOME=/nowhere
# what a program of the build is compiled with finds that NCCL, too
mkdir "$dir"/{cpu,network,tests}
cp Makefile "$dir"
cp -r launch "$dir"
for part in cpu/cpu.mk network/network.mk tests/tests.mk; do cp $part "$dir/$part"; done
env -i PATH="$dir/bin" VERSION=12.4 NCCL="-I$dir/nccl/include" PROBE='capability 8.9\ngpus 1\n' \
  make -C "$dir" CUDA_HOME="$dir/nvcc" NCCL_HOME="$dir/nccl" build/cuda/ready >"$dir/out" 2>&1
check the_build_looks_for_nccl_there "[ -e $dir/build/cuda/ready ]" "" "$(tail -3 "$dir/out")"
mv "$dir/nvcc" "$dir/away"
env -i PATH="$dir/bin" make -C "$dir" CUDA_HOME="$dir/nvcc" NCCL_HOME="$dir/nccl" -n clean \
  >"$dir/out" 2>&1
check a_cuda_that_is_gone_is_looked_for_again \
  "grep -q 'nvidia-smi is here, but $dir/nvcc/bin/nvcc is not' $dir/out"
mv "$dir/away" "$dir/nvcc"
for sign in '#' "'" ' b'; do
  export CUDA_HOME="/tmp/a$sign"
  check "no_directory_with_a_sign_of_make_or_the_shell: $sign" \
    "! timeout 20 env PATH='$dir/bin' make -C $dir help >$dir/out 2>&1 &&
    grep -q 'CUDA_HOME and NCCL_HOME may have no' $dir/out" "" "$(tail -1 "$dir/out")"
done
unset CUDA_HOME
mkdir -p "$dir/build/portable/etc/cron.d"
check whole_systems_in_build_are_passed_over \
  "env -i PATH='$dir/bin' make -C $dir BACKEND=cpu -n clean >$dir/out 2>&1" "" \
  "$(tail -1 "$dir/out")"
# makes COMMAND...: make in that copy, with no GPU; $status
makes() {
  env -i PATH="$dir/bin" make -C "$dir" BACKEND=cpu "$@" >"$dir/out" 2>"$dir/err"
  status=$?
}
makes -n clean INSTALL=install VERBOSE=1
check what_packagers_give_is_taken "[ $status = 0 ]"
touch "$dir/tests/faults.cpp"
makes V=1 MPICXX=: build/cpu/tests/libfaults.so
check V_shows_commands "grep -q '^: -std=c++20 -shared ' $dir/out"
makes CXXFLAGS=-g -n clean
check flags_that_would_take_the_place_of_the_projects_are_refused \
  "[ $status = 2 ] && grep -q 'CXXFLAGS cannot be given: MPICH_CXX=' $dir/err"
makes BACKEND= -n clean
check no_backend_is_none "[ $status = 2 ] && grep -q \"BACKEND is '', expected\" $dir/err"
touch -d '1 hour' "$dir/launch/detect.sh"
check a_date_in_the_future_is_no_reason_to_look_for_ever \
  "timeout 20 env -i PATH='$dir/bin' make -C $dir -n clean >$dir/out 2>&1"
touch "$dir/launch/detect.sh"
mkdir -p "$dir/home/launch"
rm "$dir/build/detected.mk"
env -i PATH="$dir/bin" CDPATH="$dir/home" make -C "$dir" -n clean >"$dir/out" 2>&1
check no_script_of_make_follows_CDPATH "[ $? = 0 ] && [ ! -e $dir/home/build ]"
makes -j2 -n built
check a_number_of_jobs_is_taken_without_a_warning \
  "grep -q -- '--no-print-directory  build' $dir/out && ! grep -q 'forced in submake' $dir/err"
mkdir "$dir/elsewhere"
for said in 'uname Darwin' 'id 0' 'apt-get' 'dpkg-query 4.2.0-5build3'; do
  printf '#!/bin/sh\necho %s\n' "${said#* }" >"$dir/elsewhere/${said% *}"
done
chmod +x "$dir"/elsewhere/*
env -i PATH="$dir/elsewhere:$dir/bin" make -C "$dir" help >"$dir/out" 2>"$dir/err"
check macos_is_refused "[ $? = 2 ] && grep -q 'runs on Linux alone' $dir/err"
env -i PATH="$dir/elsewhere:$dir/bin" "$dir/launch/packages.sh" install >"$dir/out" 2>"$dir/err"
check a_broken_mpich_is_said "[ $? = 0 ] && grep -q 'every rank is a world of its own' $dir/err"
mv "$dir/nvcc" "$dir/away"
detects a_missing_compiler_is_said cpu "nvidia-smi is here, but $dir/nvcc/bin/nvcc is not"
mv "$dir/away" "$dir/nvcc"
rm "$dir/bin/nvidia-smi"
detects a_compiler_without_gpus_is_no_reason_for_a_warning cpu "WHY :=" PROBE='gpus 0\n'
check nothing_is_said "[ ! -s $dir/err ] || [ -e /dev/nvidiactl ] ||
  [ -e /usr/lib/wsl/lib/libcuda.so.1 ]"
detects nccl_home_is_taken_for_gpus_elsewhere cpu "NCCL_FLAGS := -I$dir/nccl/include" \
  PROBE='gpus 0\n' NCCL="-I$dir/nccl/include" NCCL_HOME="$dir/nccl"
sums_up
