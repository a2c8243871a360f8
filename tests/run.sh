#!/usr/bin/env bash
# run.sh: the whole suite. Builds the test programs, runs them two at a time, and closes with the
# sum: `N passed, N failed` alone on a line.
#   tests/run.sh [cpu|faithful|cuda|ptx]...   without arguments: cpu and faithful
#   COMM=mpi        for cuda: ranks share GPUs
#   LIBCUDART=dir   for ptx: a CUDA runtime library (libfakecudart.so) that runs PTX without a GPU
set -u
cd "$(dirname "$0")/.."
. tests/lib.sh
[ $# -gt 0 ] || set -- cpu faithful

# the core, in every form
kernels="test_cpu test_tensor test_kernels test_matmul test_attention test_decode test_autograd"
kernels="$kernels test_golden"
# plain C++
alone="test_support test_schedule test_plan test_fuzz"
# under mpiexec -n 1, 2, 3, 4, 8
strategies="test_fsdp test_tensor_parallel test_context_parallel test_pipeline"
ranks="$strategies test_trainer test_generator"
# a sample under mpiexec -n 4, 8; `make parity` runs all
parity="test_parity"
# under mpiexec -n 1, 2, 4, 8
comm="test_comm"
# under mpiexec -n 1, 4, 8
trace="test_trace"
# under mpiexec -n 8
referee="test_nccl"
export OMP_WAIT_POLICY=passive # two tests share the processors

# Ctrl-C ends them, too: a lane ignores it, and timeout puts what it starts into a group of its own
with_children() { # with_children PROCESS...: these, and all that they have started
  local process
  for process in "$@"; do
    echo "$process"
    with_children $(cat "/proc/$process/task/$process/children" 2>/dev/null)
  done
}
trap 'kill $(with_children $(jobs -p)) 2>/dev/null; rm -rf "$dir"' EXIT

# run LABEL COMMAND...: for the lanes
labels=() commands=()
run() {
  labels+=("$1")
  shift
  commands+=("$(printf '%q ' "$@")")
}

closing='^[0-9]+ passed, [0-9]+ failed(, [0-9]+ skipped)?$'
# conduct NUMBER: runs that test, then shows its lines in one piece; its sums go to $dir/sums
conduct() {
  local label=${labels[$1]} log=$dir/log.$1 status sum passed=0 failed=0 skipped=0
  local TIMEFORMAT='%0R s; of a processor %0U + %0S s'
  { time eval "timeout 900 ${commands[$1]}" >"$log" 2>&1; } 2>"$log.time"
  status=$?
  problem() {
    echo "FAIL $label  $1" >>"$log"
    failed=$((failed + 1))
  }
  sum=$(grep -aE "$closing" "$log" | tail -1)
  read -r passed failed skipped _ <<<"$(tr -dc '0-9 ' <<<"$sum") 0 0 0"
  if grep -aq '^fakecudart:' "$log"; then problem "the PTX runner reports a race or an error"; fi
  if [ -z "$sum" ]; then
    problem "ended with status $status and no closing line"
  elif [ $((passed + failed + skipped)) = 0 ]; then
    problem "checked nothing"
  elif [ "$status" -ne 0 ] && [ "$failed" -eq 0 ]; then
    problem "ended with status $status"
  fi
  flock "$dir/sums" cat - "$log.time" <<<"== $label
$(grep -avE "$closing" "$log")"
  echo "$passed $failed $skipped" >>"$dir/sums"
}

# lanes: runs all, one lane from the first on, the other from the last on, until they meet: what
# computes on many ranks comes first, what mostly waits last
lanes() {
  : >"$dir/sums"
  local last=$((${#labels[@]} - 1)) order number
  for order in "0 1 $last" "$last -1 0"; do
    for number in $(seq $order); do
      mkdir "$dir/taken.$number" 2>/dev/null || break
      conduct "$number"
    done &
  done
  wait
}

for backend in "$@"; do
  built=build/$backend
  [ "$backend-${COMM:-}" = cuda-mpi ] && built=build/cuda/comm-mpi
  [ "$backend" = ptx ] && built=build/cuda/ptx
  programs="$kernels"
  [ "$backend" = cpu ] && programs="$kernels $alone $comm $ranks $parity $trace $referee"
  [ "$backend" = cuda ] && programs="${kernels#test_cpu } $ranks $parity"
  [ "$backend" = ptx ] && programs="${kernels#test_cpu }"
  targets=$(printf "$built/tests/%s " $programs)
  # the last are not run: they compile
  [ "$backend" = cpu ] && targets="$targets programs build/cpu/tests/test_checkpoint \
      $(printf 'build/cpu/tests/%s ' compare listings bench_kernels bench_links bench_nccl)"
  [ "$backend" = ptx ] && targets="$targets $built/train_gpt build/cuda/null/train_gpt \
      build/cuda/null/generate"
  make --no-print-directory -j"$cores" BACKEND="${backend/ptx/cuda}" $targets || {
    echo "FAIL the $backend build"
    failed=$((failed + 1))
    continue
  }
  for p in $programs; do
    filter=""
    sizes=""
    [[ " $ranks " == *" $p "* ]] && sizes="1 2 3 4 8"
    case $p in
      $comm) sizes="1 2 4 8" ;;
      $trace) sizes="1 4 8" ;;
      $parity) sizes="4 8" filter=first_setting ;;
      $referee) sizes=8 ;;
    esac
    [ -n "$sizes" ] || run "$backend/$p" "$built/tests/$p"
    for n in $sizes; do
      run "$backend/$p, $n ranks" env OMP_NUM_THREADS="$(threads "$n")" \
        $MPIEXEC -n "$n" "$built/tests/$p" $filter
    done
  done
  [ "$backend" = ptx ] \
    && run "the CUDA build trains to the CPU build's losses" tests/test_ptx_train.sh \
    && run "what the host asks of the device" tests/test_host_calls.sh
  [ "$backend" = cpu ] || continue
  # on 2 ranks `mutants.sh waits` runs them
  for test in $strategies; do
    run "cpu/$test, 4 ranks, queued streams" env THREEFOLD_STREAMS=queued:4 THREEFOLD_REFEREE=1 \
      OMP_NUM_THREADS=1 $MPIEXEC -n 4 build/cpu/tests/$test one_rank_in_f64
  done
  run "tp ranks with unlike slices, 6 ranks" env OMP_NUM_THREADS=1 $MPIEXEC -n 6 \
    build/cpu/tests/test_tensor_parallel what_all_tp_ranks_hold
  run "the parity matrix covers every pair of settings" build/cpu/tests/test_parity any_two
  run "queued streams on 2 ranks; removed event waits are caught" tests/mutants.sh waits
  run "which backend is found" tests/test_detect.sh
  run "train_gpt from outside" tests/test_cli.sh
  run "checkpoints" tests/test_checkpoint.sh
  run "faults, kills, and what they must not cost" tests/test_faults.sh
  run "files of others" tests/test_formats.sh
  run "ranks that die, stop and refuse" tests/test_failures.sh
  run "what the machine gives or forbids" tests/test_environment.sh
  run "several nodes" tests/test_network.sh
  run "the planner from outside" tests/test_plan.sh
done

lanes
while read -r -a sum; do
  passed=$((passed + sum[0])) failed=$((failed + sum[1])) skipped=$((skipped + sum[2]))
done <"$dir/sums"
ended=$(wc -l <"$dir/sums")
if [ "$ended" -ne ${#labels[@]} ]; then
  echo "FAIL ${#labels[@]} tests were to run, and $ended ended"
  failed=$((failed + 1))
fi
sums_up
