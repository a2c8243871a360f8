#!/usr/bin/env bash
# test_environment.sh: what the machine gives or forbids changes no result: settings of OpenMP and
# oneDNN, affinity, quotas, stacks, limits of memory, signals, slow disks, a job that was stopped,
# ranks that were started differently. It works, or there is a sentence and a non-zero status.
set -u
cd "$(dirname "$0")/.."
train=build/cpu/train_gpt
. tests/lib.sh
groups=()
trap 'rm -rf "$dir"; for g in "${groups[@]}"; do rmdir "$g" 2>/dev/null; done' EXIT
unset OMP_NUM_THREADS
export OMP_WAIT_POLICY=passive
# faults NAME SOURCE: a library of C functions that takes the place of others; its path
faults() {
  echo "$2" | $MPICXX -w -shared -fPIC -x c++ - -o "$dir/$1.so" -ldl
  echo "$dir/$1.so"
}
shape="--layers 2 --width 16 --heads 2 --context 16" \
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
  if [ $status -eq 0 ] \
    && awk \
      "BEGIN { d = (${got:-1e9} - ${reference[$dtype]}) / ${reference[$dtype]}
        exit !(d < $bound && d > -$bound) }"; then
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

$MPIEXEC -n 2 env -u OMP_NUM_THREADS -u MPI_LOCALNRANKS $train $small --fsdp 2 --steps 1 \
  >"$dir/out" 2>"$dir/err"
threads=$((cores > 1 ? cores / 2 : 1))
check ranks_share_the_cores_whoever_started_them \
  "grep -qE '^device .*, $threads threads?(,|$)' $dir/out" "$(sed -n 's/^device *//p' "$dir/out")" \
  "$(grep '^device' "$dir/out") $(head -c 300 "$dir/err")"
unset threads

# in_group KIND FILE VALUE COMMAND...: under a limit of a control group, version 1 or 2
in_group() {
  local kind=$1 file=$2 value=$3 group=/sys/fs/cgroup/$1/threefold-test-$$
  shift 3
  [ -d "/sys/fs/cgroup/$kind" ] || group=/sys/fs/cgroup/threefold-test-$$
  bash -c \
    "mkdir -p $group && echo $value >$group/$file &&
      echo \$\$ >$group/cgroup.procs || exit 77; exec \"\$@\"" \
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
# and one that refuses them, on a queue's thread, too
refuses=$(faults refuses 'extern "C" int dnnl_sgemm(...) { return 2; }
  extern "C" int dnnl_primitive_execute(...) { return 2; }')
LD_PRELOAD=$refuses THREEFOLD_STREAMS=queued:1 $train $work >"$dir/out" 2>"$dir/err"
status=$?
check a_queued_product_that_is_refused_ends_the_run \
  "[ $status = 1 ] && grep -q '^oneDNN has refused a product' $dir/err"
# with 16 KiB LLVM's runtime crashes by itself, where it looks up its own functions
for stack in $(ldd $train | grep -q libomp || echo OMP_STACKSIZE=16k) OMP_STACKSIZE={20,64}k; do
  env OMP_NUM_THREADS=2 $stack $train $small --steps 1 >"$dir/out" 2>"$dir/err"
  status=$?
  check "a_stack_too_small_is_a_sentence_$stack" \
    "[ $status = 1 ] && grep -q '^train_gpt: a thread has a stack of .* KiB here' $dir/err"
done

# ---- memory: limits are respected, and named where something does not fit

under() { (ulimit "$1" "$2" && shift 2 && exec timeout 60 "$@") >"$dir/out" 2>"$dir/err"; }
export OMP_NUM_THREADS=1
for limit in "-v 8000000" "-v 1000000" "-d 4000000" "-d 500000"; do
  under $limit $train $small --steps 1
  status=$?
  check "a_small_model_trains_under_ulimit_$limit" \
    "[ $status = 0 ] && grep -q '^device .* MiB under ulimit ${limit% *}$' $dir/out" \
    "$(sed -n 's/^device *//p' "$dir/out")" "status $status: $(head -c 300 "$dir/err")"
done
under -v 8000000 $MPIEXEC -n 2 $train $small --fsdp 2 --steps 1
status=$?
check ranks_share_what_ulimit_leaves "[ $status = 0 ]" "$(sed -n 's/^device *//p' "$dir/out")"
under -v 1000000 $train --layers 48 --width 1024 --heads 16 --steps 1
status=$?
check what_does_not_fit_under_a_limit_names_it \
  "[ $status = 1 ] &&
    grep -q '^rank 0: out of device memory: .* MiB under ulimit -v has left' $dir/err" \
  "$(head -1 "$dir/err")"
under -v 27000000 $train --layers 1 --width 16 --heads 1 --context 16 --steps 1 --batch 1000000000
status=$?
check host_memory_that_runs_out_is_a_sentence \
  "[ $status = 1 ] &&
    grep -q '^rank 0: the memory of this machine.*: a step in micro-batches of 1000000000' $dir/err"
for stack in 32 500; do
  under -s $stack $train $small --steps 1
  status=$?
  check a_stack_of_${stack}_KiB_is_too_small_for_the_libraries \
    "[ $status = 1 ] && grep -q '^a stack of $stack KiB (ulimit -s) is too small' $dir/err"
done
file=memory.limit_in_bytes
[ -d /sys/fs/cgroup/memory ] || file=memory.max
if in_group memory $file 800000000 true 2>/dev/null; then
  in_group memory $file 800000000 $train --layers 48 --width 1024 --heads 16 --steps 1 >"$dir/out" \
    2>"$dir/err"
  status=$?
  check a_control_group_limits_the_device \
    "[ $status = 1 ] &&
      grep -q '^rank 0: out of device memory: .* MiB under its control group has left' $dir/err" \
    "" "status $status: $(head -c 300 "$dir/err")"
else skip a_control_group_limits_the_device "no control groups can be made here"; fi
groups+=("/sys/fs/cgroup/memory/threefold-test-$$" "/sys/fs/cgroup/threefold-test-$$")

# ---- signals: all that mean "end soon" save and end, on whichever thread they would have arrived

run="--layers 2 --width 64 --heads 2 --context 64 --batch 8 --data README.md --steps 1000000"
# started COMMAND...: starts it with --metrics and --checkpoint, waits for its third step; $job
started() {
  rm -rf "$dir/m.jsonl" "$dir/c"
  OMP_NUM_THREADS=1 timeout --foreground 100 "$@" --metrics "$dir/m.jsonl" --checkpoint "$dir/c" \
    >"$dir/out" 2>"$dir/err" &
  job=$!
  for _ in $(seq 600); do
    [ "$(cat "$dir/m.jsonl" 2>/dev/null | wc -l)" -ge 3 ] && return
    sleep 0.05
  done
}
# steps_on N: until so many steps more than $before are in the metrics, 20 s at most; $after
steps_on() {
  for _ in $(seq 400); do
    after=$(wc -l <"$dir/m.jsonl")
    [ "$after" -ge $((before + $1)) ] && return
    sleep 0.05
  done
}
# the_child: of $job, of which it is the only one
the_child() { tr -d ' ' <"/proc/$job/task/$job/children"; }
# named: waits until the watch's process has said what ended a rank
named() {
  for _ in {1..100}; do
    grep -q 'was ended by' "$dir/err" && return
    sleep 0.05
  done
}
saved="[ \$status = 0 ] && grep -q 'stopped by a signal; --resume goes on' $dir/out &&
  ls $dir/c/step-*/manifest.json >/dev/null"
for signal in TERM INT HUP USR1 USR2 XCPU; do
  started env --default-signal="$signal" $train $run
  child=$(the_child)
  open=$(grep -h '^SigBlk' /proc/"$child"/task/*/status)
  kill -$signal "$child"
  wait $job
  status=$?
  check "SIG${signal}_saves_and_ends_the_run" "$saved" "$(grep -o '^step.*stopped' "$dir/out")" \
    "status $status: $(tail -2 "$dir/out") $(cat "$dir/err")"
done
# TERM, INT, HUP, USR1, USR2, XCPU are bits 14, 1, 0, 9, 11 and 23
# the one that waits for them shows them as not blocked
free=0
for mask in $(awk '{ print $2 }' <<<"$open"); do
  [ $((0x$mask & 0x804a03)) = $((0x804a03)) ] || free=$((free + 1))
done
check none_of_them_can_interrupt_a_thread "[ -n '$open' ] && [ $free -le 1 ]" \
  "$(tr '\n\t' '  ' <<<"$open")" "$open"
for signal in USR1 HUP XCPU; do
  started $MPIEXEC -n 2 $train $run --fsdp 2
  maps=$(cat "/proc/$(rank_pids "$dir/c" 1)/smaps")
  kill -$signal "$(rank_pids "$dir/c" 1)"
  wait $job
  status=$?
  check "SIG${signal}_to_one_rank_of_two_saves_and_ends_the_run" "$saved" "" \
    "status $status: $(tail -2 "$dir/out") $(cat "$dir/err")"
done
# of this rank and of the other: two each
in_core=$(awk '/^[0-9a-f]+-/ { name = $0 } /^VmFlags/ && name ~ /threefold (device|nccl)/ {
  print / dd/ ? "no" : "yes" }' <<<"$maps" | sort | uniq -c | xargs)
check a_core_has_no_device_memory "[ '$in_core' = '4 no' ]" "" "in a core: $in_core"
started nohup $train $run
child=$(the_child)
kill -HUP "$child"
before=$(wc -l <"$dir/m.jsonl")
steps_on 3
kill -TERM "$child"
wait $job
status=$?
check what_nohup_ignores_stays_ignored "[ $after -gt $((before + 2)) ] && $saved" \
  "$((after - before)) steps after SIGHUP"
# build/generate has nothing to save
for signal in TERM INT; do
  : >"$dir/out"
  OMP_NUM_THREADS=1 timeout --foreground 100 env --default-signal=$signal build/cpu/generate \
    --layers 1 --width 16 --heads 1 --context 300000 --tokens 290000 --prompt x >"$dir/out" \
    2>"$dir/err" &
  job=$!
  until [ -s "$dir/out" ] || ! kill -0 $job 2>/dev/null; do sleep 0.05; done
  kill -$signal "$(the_child)"
  wait $job
  status=$?
  named
  check "SIG${signal}_ends_generate_and_is_named" "[ $status = $((128 + $(kill -l $signal))) ] &&
    [ \$(wc -l <$dir/err) = 1 ] &&
    grep -q '^rank 0 .* was ended by signal $(kill -l $signal) ' $dir/err" "$(cat "$dir/err")" \
    "status $status: $(cat "$dir/err")"
done
# a save that takes 3 s
slow=$(faults once '#include <unistd.h>
#include <cstdlib>
extern "C" int fsync(int) {
  if (unlink(getenv("SLOW")) == 0) sleep(3);
  return 0;
}')
for pause in 0.3 1.5; do
  started env SLOW="$dir/slow" LD_PRELOAD="$slow" $train $run
  touch "$dir/slow"
  child=$(the_child)
  kill -TERM "$child"
  sleep $pause
  kill -TERM "$child"
  wait $job
  status=$?
  [ $pause = 0.3 ] || named
  [ $pause != 0.3 ] || check a_second_TERM_at_once_is_the_same_one "$saved"
done
check a_second_TERM_later_ends_the_run \
  "[ $status = 143 ] && grep -q 'was ended by signal 15' $dir/err &&
    ! ls $dir/c/step-*/manifest.json 2>/dev/null" "$(cat "$dir/err")" \
  "status $status: $(cat "$dir/err")"
rm -rf "$dir/c"
OMP_NUM_THREADS=1 timeout 100 $train $run --checkpoint "$dir/c" 2>"$dir/err" | head -1 >"$dir/out"
status=${PIPESTATUS[0]}
check a_reader_that_leaves_ends_the_run_as_a_signal_does \
  "[ $status = 0 ] && [ \$(wc -l <$dir/out) = 1 ] && ls $dir/c/step-*/manifest.json >/dev/null &&
    grep -q 'has left: ending as after a signal' $dir/err"
OMP_NUM_THREADS=1 timeout 100 build/cpu/generate $shape --prompt x --tokens 15 2>"$dir/err" | :
status=${PIPESTATUS[0]}
check a_text_that_nobody_reads_ends_with_a_sentence \
  "[ $status = 1 ] && grep -q 'could not be written to the standard output' $dir/err"

OMP_NUM_THREADS=1 timeout 60 $train $small --steps 1 --metrics "$dir/closed.jsonl" \
  >&- 2>"$dir/err"
status=$?
check a_run_whose_output_is_closed_trains \
  "[ $status = 0 ] && [ \$(grep -c '\"step\"' $dir/closed.jsonl) = 1 ] && [ ! -s $dir/err ]"

# as under another launcher than MPICH's mpiexec: half a minute, meanwhile others go on
UCX_TLS=tcp,self timeout -k 1 60 $MPIEXEC -n 4 env -u MPI_LOCALNRANKS OMP_NUM_THREADS=1 \
  $train $small --fsdp 4 --steps 1 >"$dir/other" 2>&1 &
other=$!
for again in 1 2; do
  UCX_TLS=tcp,self timeout -k 1 30 $MPIEXEC -n 8 $train ${small/batch 4/batch 8} --fsdp 8 \
    --steps 1 >"$dir/out" 2>"$dir/err"
  status=$?
  check ranks_that_speak_over_tcp_end_$again "[ $status = 0 ] && grep -q '^speed' $dir/out" "" \
    "status $status: $(head -c 300 "$dir/err")"
done

# ---- a tree that cannot be written

mkdir -p "$dir/tree/launch" "$dir/tree/build/cpu"
cp launch/*.sh "$dir/tree/launch"
chmod 755 "$dir"
chmod 555 "$dir/tree/build" "$dir/tree/build/cpu"
nobody() { setpriv --reuid=65534 --regid=65534 --clear-groups "$@"; }
[ "$(id -u)" = 0 ] || nobody() { "$@"; }
nobody "$dir/tree/launch/packages.sh" probe cpu nccl true >"$dir/out" 2>"$dir/err"
status=$?
check a_tree_that_cannot_be_written_is_said_and_no_lack_of_packages \
  "[ $status = 2 ] && [ ! -s $dir/out ] && [ \$(wc -l <$dir/err) = 1 ] &&
    grep -q 'tree/build/cpu cannot be written to' $dir/err"
if nobody test -r Makefile && ! nobody test -w build/cpu; then
  nobody make BACKEND=cpu -W launch/packages.sh build/cpu/packages >"$dir/out" 2>"$dir/err"
  check so_nothing_is_installed_there "[ $? != 0 ] && ! grep -q deps $dir/out &&
    grep -q 'nothing can be built here' $dir/err" "" "$(cat "$dir/out" "$dir/err")"
else skip so_nothing_is_installed_there "everybody can write here"; fi
nobody env BACKEND=cpu THREADS=1 NP=1 MPIEXEC="echo started" "$dir/tree/launch/run.sh" run \
  >"$dir/out" 2>"$dir/err"
status=$?
check a_run_there_has_no_page "[ $status = 0 ] && grep -q '^started' $dir/out &&
  ! grep -q -- '--metrics' $dir/out && grep -q 'build cannot be .* has no page' $dir/out"
chmod 755 "$dir/tree/build" "$dir/tree/build/cpu"
mkdir -p "$dir/tbb/oneapi/dnnl"
cat >"$dir/tbb/oneapi/dnnl/dnnl.h" <<'END'
#include_next <oneapi/dnnl/dnnl.h>
#undef DNNL_CPU_THREADING_RUNTIME
#define DNNL_CPU_THREADING_RUNTIME DNNL_RUNTIME_TBB
END
CPATH=$dir/tbb${CPATH:+:$CPATH} "$dir/tree/launch/packages.sh" probe cpu nccl "$MPICXX" \
  "-ldnnl -lxxhash -fopenmp" 2>"$dir/err"
check a_onednn_without_openmp_is_refused \
  "[ $? = 1 ] && grep -q 'error this oneDNN was not built with OpenMP' $dir/err"
cp build/cpu/train_gpt "$dir/elsewhere" # as through a build/ that is a link to another disk
"$dir/elsewhere" $shape --steps 1 >"$dir/out" 2>"$dir/err"
check the_sources_are_found_where_make_runs "[ $? = 0 ]"
if unshare -m mount -t tmpfs -o ro none /dev/shm 2>"$dir/err"; then
  unshare -m sh -c "mount -t tmpfs -o ro none /dev/shm; build/cpu/train_gpt $shape --steps 1" \
    >"$dir/out" 2>"$dir/err"
  check shared_memory_that_cannot_be_written_is_named \
    "grep -q '^/dev/shm cannot be written to' $dir/err"
else skip shared_memory_that_cannot_be_written_is_named "$(cat "$dir/err")"; fi
printf '#!/bin/sh\necho Available; echo tmpfs 65536 0 65536 0%% /dev/shm\n' >"$dir/df"
chmod 755 "$dir/df"
for ranks in 8 16; do
  PATH=$dir:$PATH BACKEND=cpu THREADS=1 NP=$ranks MPIEXEC="echo started" "$dir/tree/launch/run.sh" \
    run >"$dir/out" 2>"$dir/err"
  check "little_shared_memory_is_said_with_${ranks}_ranks" "grep -q '^started' $dir/out &&
    [ \$(grep -c '/dev/shm has 65536 KiB' $dir/err) = $((ranks / 16)) ]"
done

# ---- the watch: slow is not stuck

two="$MPIEXEC -n 2 $train $small --fsdp 2"
full=$(faults full '#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
extern "C" int posix_fallocate(int fd, long at, long n) {
  const char* r = getenv("PMI_RANK");
  if (r && !strcmp(r, "1")) return ENOSPC;
  return ((int (*)(int, long, long))dlsym(RTLD_NEXT, "posix_fallocate"))(fd, at, n);
}')
LD_PRELOAD=$full timeout 60 $two --steps 1 >"$dir/out" 2>"$dir/err"
status=$?
records=$(sed -n "s|^rank .: the watch.s records.*\(/dev/shm.*\): No space.*|\1|p" "$dir/err" \
  | head -1)
check a_rank_that_cannot_share_its_record_leaves_none \
  "[ $status != 0 ] && [[ '$records' = /dev/shm/threefold-watch-* ]] &&
    [[ '$records' != *XXXXXX ]] && [ ! -e '$records' ]"
slow=$(faults slow '#include <dlfcn.h>
#include <unistd.h>
extern "C" int fsync(int fd) { sleep(3); return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd); }')
rm -rf "$dir/c"
export OMP_NUM_THREADS=1
began=$SECONDS
LD_PRELOAD=$slow timeout 100 $two --steps 2 --timeout 2 --checkpoint "$dir/c" >"$dir/out" \
  2>"$dir/err"
status=$? took=$((SECONDS - began))
check a_disk_slower_than_the_timeout_saves \
  "[ $status = 0 ] && [ $took -ge 3 ] && build/cpu/checkpoint verify $dir/c >/dev/null" \
  "$(grep -o 'checkpoint saved.*' "$dir/out")" \
  "status $status after $took s: $(tail -2 "$dir/out") $(cat "$dir/err")"
slow=$(faults slowread '#include <dlfcn.h>
#include <unistd.h>
extern "C" int XXH3_64bits_update(void* s, const void* p, size_t n) {
  static int calls = 0;
  if (calls++ < 3) sleep(3);
  return ((int (*)(void*, const void*, size_t))dlsym(RTLD_NEXT, "XXH3_64bits_update"))(s, p, n);
}')
began=$SECONDS
LD_PRELOAD=$slow timeout 100 $two --steps 3 --timeout 2 --checkpoint "$dir/c" --resume >"$dir/out" \
  2>"$dir/err"
status=$? took=$((SECONDS - began))
check verifying_for_longer_than_the_timeout_resumes \
  "[ $status = 0 ] && [ $took -ge 3 ] && grep -q '^resume .*step-00000002' $dir/out" "" \
  "status $status after $took s: $(tail -2 "$dir/out") $(cat "$dir/err")"
started $two --steps 1000000 --timeout 2
ranks="$(rank_pids "$dir/c" 0) $(rank_pids "$dir/c" 1)"
kill -STOP $ranks
sleep 4
before=$(wc -l <"$dir/m.jsonl")
kill -CONT $ranks
steps_on 1
kill -TERM ${ranks%% *}
wait $job
status=$?
check a_job_that_was_stopped_goes_on "[ $after -gt $before ] && $saved" \
  "stopped for 4 s with --timeout 2" "status $status, $before and $after steps: $(cat "$dir/err")"
stuck=$(faults stuck '#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
extern "C" int fsync(int) { const char* r = getenv("PMI_RANK"); if (r &&
  !strcmp(r, "1")) raise(SIGSTOP); return 0; }')
rm -rf "$dir/c"
LD_PRELOAD=$stuck timeout 60 $two --steps 2 --timeout 2 --checkpoint "$dir/c" >"$dir/out" \
  2>"$dir/err"
status=$?
check a_rank_that_stops_in_a_save_is_named \
  "[ $status != 0 ] && [ $status != 124 ] &&
    grep -q \"rank 1: .*at files.*DOES NOT RUN\" $dir/err" \
  "$(grep -o 'rank 1: .*' "$dir/err" | head -1)" "status $status: $(cat "$dir/err")"

# ---- ranks that were started differently

# differ NAME 'sentence' OPTIONS-OF-RANK-0 OPTIONS-OF-RANK-1
differ() {
  timeout 60 $MPIEXEC -n 1 $train $small --replicate 2 --steps 3 $3 : -n 1 $train $small \
    --replicate 2 --steps 3 $4 >"$dir/out" 2>"$dir/err"
  status=$?
  check "$1" \
    "[ $status != 0 ] && [ \$(grep -cF -- \"$2\" $dir/err) = 1 ] && ! grep -q ^step $dir/out" \
    "$(head -1 "$dir/err" | cut -c1-160)"
}
differ other_seeds_are_refused \
  "train_gpt: the ranks were not started alike: --seed is 1 on rank 0, 2 on rank 1" "--seed 1" \
  "--seed 2"
differ other_rates_are_refused_to_the_last_digit "--lr is 0.001 on rank 0, 0.0010000001 on rank 1" \
  "" "--lr 1.0000001e-3"
differ other_clips_and_decays_are_named_together \
  "--clip is 0.1 on rank 1, 1 on rank 0; --weight-decay is 0 on rank 1, 0.1 on rank 0" "" \
  "--clip 0.1 --weight-decay 0"
differ a_flag_on_one_rank_is_refused "--recompute is given on rank 1, not given on rank 0" "" \
  "--recompute"
for copy in a b; do
  mkdir -p "$dir/$copy"
  cp README.md "$dir/$copy/text.md"
done
differ other_data_is_refused "the data is " "--data $dir/a/text.md" "--data tests/run.sh"
printf X | dd of="$dir/b/text.md" bs=1 seek=5000 conv=notrunc 2>/dev/null
differ a_stale_copy_of_the_data_is_refused "the data is 1 file of " "--data $dir/a/text.md" \
  "--data $dir/b/text.md"
cp "$dir/a/text.md" "$dir/b/text.md"
timeout 60 $MPIEXEC -n 1 $train $small --replicate 2 --steps 1 --data "$dir/a/text.md" : -n 1 \
  $train $small --replicate 2 --steps 1 --data "$dir/b/text.md" >"$dir/out" 2>"$dir/err"
status=$?
check equal_data_may_lie_elsewhere "[ $status = 0 ]"
cp $train "$dir/train_gpt"
printf x >>"$dir/train_gpt"
timeout 60 $MPIEXEC -n 1 $train $shape --replicate 3 --batch 6 --steps 1 --data README.md : -n 2 \
  "$dir/train_gpt" $shape --replicate 3 --batch 6 --steps 1 --data README.md >"$dir/out" \
  2>"$dir/err"
status=$?
check another_build_is_refused \
  "[ $status != 0 ] && grep -q 'the program is .* on ranks 1 and 2' $dir/err"
timeout 60 $MPIEXEC -n 1 build/cpu/generate $shape --tp 2 --prompt x --tokens 2 --temperature 1 : \
  -n 1 build/cpu/generate $shape --tp 2 --prompt x --tokens 2 --temperature 2 >"$dir/out" \
  2>"$dir/err"
status=$?
check generate_compares_its_options_too \
  "[ $status != 0 ] && grep -q -- '--temperature is 1 on rank 0, 2 on rank 1' $dir/err"

wait $other
status=$?
check ranks_of_another_launcher_end "[ $status = 0 ] && grep -q '^speed' $dir/other" "" \
  "status $status: $(tail -3 "$dir/other")"

sums_up
