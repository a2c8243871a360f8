#!/usr/bin/env bash
# parity.sh: `make parity`, the whole matrix: one mpiexec a world size of 1 to 8 ranks, one table.
#   tests/parity.sh cpu|cuda   on GPUs: up to as many ranks as there are; the other sizes are
#                              skipped, and the last line says so
set -u
cd "$(dirname "$0")/.."
[ $# = 1 ] && [ -x "build/$1/tests/test_parity" ] || {
  echo "usage: tests/parity.sh BACKEND, for which build/BACKEND/tests/test_parity has been built" \
    "(make parity does both)"
  exit 1
}
. tests/lib.sh
failed=0 began=$SECONDS equal="" skipped=""
log=$dir/log
echo "every mesh of up to 8 ranks against one rank in f64: largest relative difference over all" \
  "settings, 5 steps each"
echo "  ranks  settings       loss gradients     norm  weights   mesh"
for n in 1 2 3 4 5 6 7 8; do
  OMP_NUM_THREADS=$(threads $n) OMP_WAIT_POLICY=passive \
    $MPIEXEC -n $n "build/$1/tests/test_parity" whole >"$log" 2>&1
  status=$?
  grep -E '^  |^(FAIL|SKIP)' "$log"
  sed -n 's/^ok  *whole[a-z0-9_]*  /ok    /p' "$log"
  if [ $status = 0 ] && grep -qx '0 passed, 0 failed, 1 skipped' "$log"; then
    skipped="$skipped $n"
  elif [ $status = 0 ] && grep -qx '1 passed, 0 failed' "$log"; then
    equal="$equal $n"
  else
    failed=1
    tail -3 "$log"
  fi
done
verdict="every mesh of${equal:- no} ranks equals one rank to 1e-12"
verdict="$verdict${skipped:+; skipped, for want of GPUs:$skipped ranks}"
[ $failed = 0 ] || verdict="NOT EQUAL: see above"
echo "$((SECONDS - began)) s; $verdict"
[ $failed = 0 ] && [ -n "$equal" ]
