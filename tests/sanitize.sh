#!/usr/bin/env bash
# sanitize.sh: `make sanitize`: the tests that are small, under AddressSanitizer and
# UndefinedBehaviorSanitizer; any report fails. Leaks are not looked for: MPICH and oneDNN keep what
# they allocate until the process ends.
set -u
cd "$(dirname "$0")/.."
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0 UBSAN_OPTIONS=print_stacktrace=1 \
  OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
. tests/lib.sh
alone="test_cpu test_support test_schedule test_tensor test_golden"
ranks="test_comm test_parity test_generator" # of the parity matrix one setting a mesh
targets=""
for t in $alone $ranks; do targets="$targets build/sanitize/tests/$t"; done
make --no-print-directory -j"$cores" BACKEND=sanitize build/sanitize/train_gpt $targets || exit 1
log=$dir/log
run() {
  local label=$1
  shift
  if timeout 900 "$@" >"$log" 2>&1 && ! grep -qE 'runtime error|AddressSanitizer' "$log"; then
    ok "$label" "$(tail -1 "$log")"
  else
    fail "$label"
    grep -m5 -E 'runtime error|AddressSanitizer|^FAIL' "$log" || tail -5 "$log"
  fi
}
for t in $alone; do run "$t" build/sanitize/tests/$t; done
for t in $ranks; do
  run "$t, 2 ranks" $MPIEXEC -n 2 build/sanitize/tests/$t \
    $([ $t = test_parity ] && echo first_setting)
done
run "test_parity, 4 ranks" $MPIEXEC -n 4 build/sanitize/tests/test_parity first_setting
small="--layers 2 --width 32 --heads 2 --context 32 --batch 8 --steps 3"
for layout in "--replicate 2" "--fsdp 2" "--tp 2 --sequence-parallel" "--pp 2 --schedule zb"; do
  run "train_gpt $layout" $MPIEXEC -n 2 build/sanitize/train_gpt $small $layout --sample 20 \
    --checkpoint "$dir/${layout//[ -]/}"
done
sums_up
