#!/usr/bin/env bash
# test_environment.sh: what the machine gives or forbids changes no result: settings of OpenMP and
# oneDNN, affinity, quotas, stacks, limits of memory, signals, slow disks, a job that was stopped,
# ranks that were started differently. It works, or there is a sentence and a non-zero status.
set -u
cd "$(dirname "$0")/.."
train=build/cpu/train_gpt
dir=$(mktemp -d)
groups=()
trap 'rm -rf "$dir"; for g in "${groups[@]}"; do rmdir "$g" 2>/dev/null; done' EXIT
passed=0 failed=0 skipped=0
unset OMP_NUM_THREADS
export OMP_WAIT_POLICY=passive
ok() {
  echo "ok   $1  ${2:-}"
  passed=$((passed + 1))
}
fail() {
  echo "FAIL $1  ${2:-}"
  failed=$((failed + 1))
}
skip() {
  echo "SKIP $1  ${2:-}"
  skipped=$((skipped + 1))
}
check() {
  if eval "$2"; then
    ok "$1" "${3:-}"
  else
    fail "$1" "${4:-$(head -c 300 "$dir/err")}"
  fi
}
losses() { sed -n 's/.*"loss":\([^,]*\),.*/\1/p' "$1"; }
# faults NAME SOURCE: a library of C functions that takes the place of others; its path
faults() {
  echo "$2" | g++ -w -shared -fPIC -x c++ - -o "$dir/$1.so" -ldl
  echo "$dir/$1.so"
}
small="--layers 2 --width 16 --heads 2 --context 16 --batch 4"

# ---- products: the environment gives other threads, cores or instructions; losses stay

work="--model tiny --layers 2 --context 64 --batch 4 --steps 2 --data README.md"
declare -A reference
for kind in f32 bf16; do
  OMP_NUM_THREADS=2 $train $work --dtype $kind --metrics "$dir/$kind.jsonl" >"$dir/out" 2>"$dir/err"
  reference[$kind]=$(losses "$dir/$kind.jsonl" | tail -1)
done
# same NAME COMMAND...: the command before train_gpt, and its losses
same() {
  local name=$1 dtype=${dtype:-f32} bound=1e-5 got
  shift
  [ "$dtype" = f32 ] || bound=2e-3
  rm -f "$dir/m.jsonl"
  "$@" $train $work --dtype $dtype --metrics "$dir/m.jsonl" >"$dir/out" 2>"$dir/err"
  local status=$?
  got=$(losses "$dir/m.jsonl" 2>/dev/null | tail -1)
  local right=${reference[$dtype]}
  if [ $status -eq 0 ] && awk -v got="${got:-1e9}" -v right="$right" -v bound=$bound \
    'BEGIN { d = (got - right) / right; exit !(d < bound && d > -bound) }'; then
    ok "$name" "$(sed -n 's/^device *//p' "$dir/out"), loss $got"
  else
    fail "$name" \
      "status $status, loss ${got:-none}, not ${reference[$dtype]}: $(head -c 300 "$dir/err")"
  fi
}
for setting in OMP_THREAD_LIMIT=1 "OMP_NUM_THREADS=3 OMP_THREAD_LIMIT=2" \
  "OMP_NUM_THREADS=4 OMP_DYNAMIC=true" OMP_MAX_ACTIVE_LEVELS=0 \
  "OMP_NUM_THREADS=4 OMP_PROC_BIND=close OMP_PLACES=threads" \
  "OMP_NUM_THREADS=3 OMP_SCHEDULE=dynamic,1 OMP_MAX_ACTIVE_LEVELS=3" \
  GOMP_CPU_AFFINITY=0 "OMP_NUM_THREADS=2 GOMP_SPINCOUNT=0" DNNL_MAX_CPU_ISA=SSE41 \
  "ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1" \
  "ONEDNN_DEFAULT_FPMATH_MODE=BF16 DNNL_DEFAULT_FPMATH_MODE=BF16" \
  DNNL_PRIMITIVE_CACHE_CAPACITY=0; do
  same "losses_stay_with_${setting//[^A-Za-z0-9_]/_}" env OMP_NUM_THREADS=2 $setting
done
for setting in OMP_THREAD_LIMIT=1 OMP_DYNAMIC=true; do
  dtype=bf16 same "losses_in_bf16_stay_with_${setting//[^A-Za-z0-9_]/_}" env OMP_NUM_THREADS=2 \
    $setting
done
same losses_stay_with_queued_streams_and_a_thread_limit env OMP_NUM_THREADS=2 OMP_THREAD_LIMIT=1 \
  THREEFOLD_STREAMS=queued:1
same losses_stay_on_one_core taskset -c 0 env OMP_NUM_THREADS=2
same losses_stay_with_far_too_many_threads env OMP_NUM_THREADS=1000000 OMP_WAIT_POLICY=passive

# in_group KIND FILE VALUE COMMAND...: under a limit of a control group, version 1 or 2
in_group() {
  local kind=$1 file=$2 value=$3 group=/sys/fs/cgroup/$1/threefold-test-$$
  shift 3
  [ -d "/sys/fs/cgroup/$kind" ] || group=/sys/fs/cgroup/threefold-test-$$
  bash -c \
    "mkdir -p $group && echo $value >$group/$file && echo \$\$ >$group/cgroup.procs || exit 77
      exec \"\$@\"" \
    - "$@"
}
limited() { # NAME KIND FILE-OF-V1 FILE-OF-V2 VALUE
  local file=$3
  [ -d "/sys/fs/cgroup/$2" ] || file=$4
  if in_group "$2" "$file" "$5" true 2>/dev/null; then
    same "$1" in_group "$2" "$file" "$5" env OMP_NUM_THREADS=${threads:-2}
  else
    skip "$1" "no control groups can be made here"
  fi
  groups+=("/sys/fs/cgroup/$2/threefold-test-$$" "/sys/fs/cgroup/threefold-test-$$")
}
limited losses_stay_under_a_quota_of_half_a_core cpu cpu.cfs_quota_us cpu.max 50000
threads=16 limited losses_stay_where_only_eight_tasks_may_run pids pids.max pids.max 8

# A library whose products are wrong is found before training.
wrong=$(faults wrong 'extern "C" int dnnl_sgemm(...) { return 0; }
  extern "C" int dnnl_primitive_execute(...) { return 0; }')
LD_PRELOAD=$wrong $train $work --metrics "$dir/none.jsonl" >"$dir/out" 2>"$dir/err"
status=$?
check a_library_that_multiplies_wrongly_is_refused \
  "[ $status = 1 ] && [ ! -s $dir/none.jsonl ] &&
    grep -q '^train_gpt: this machine multiplies matrices wrongly' $dir/err"
for stack in "OMP_STACKSIZE=16k" "OMP_STACKSIZE=64k"; do
  env OMP_NUM_THREADS=2 $stack $train $small --steps 1 >"$dir/out" 2>"$dir/err"
  status=$?
  check "a_stack_too_small_is_a_sentence_$stack" \
    "[ $status = 1 ] && grep -q '^train_gpt: a thread has a stack of .* KiB here' $dir/err"
done

if [ $skipped -gt 0 ]; then
  echo "$passed passed, $failed failed, $skipped skipped"
else
  echo "$passed passed, $failed failed"
fi
[ $failed -eq 0 ]
