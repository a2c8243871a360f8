#!/usr/bin/env bash
# parity.sh: `make parity`, the whole matrix: one mpiexec a world size of 1 to 8 ranks, one table. On GPUs: up to as many ranks as there are.
set -u
cd "$(dirname "$0")/.."
backend=$(sed 's/.*= *//' build/detected.mk); [ -x "build/$backend/tests/test_parity" ] || backend=cpu
cores=$(nproc) failed=0 began=$SECONDS
log=$(mktemp); trap 'rm -f "$log"' EXIT
echo "every mesh of up to 8 ranks against one rank in f64: largest relative difference over all settings, 5 steps each"
echo "  ranks   pp replicate  fsdp  tp  settings       loss gradients     norm  weights"
for n in 1 2 3 4 5 6 7 8; do
  threads=$((cores / n)); [ $threads -gt 0 ] || threads=1
  OMP_NUM_THREADS=$threads OMP_WAIT_POLICY=passive mpiexec -n $n "build/$backend/tests/test_parity" whole >"$log" 2>&1 || failed=1
  grep -E '^  ' "$log"
  grep -E '^(FAIL|SKIP)' "$log"
  grep -qE '^[1-9][0-9]* passed|^0 passed, 0 failed, 1 skipped' "$log" || { failed=1; tail -3 "$log"; }
  sed -n 's/^ok  *whole[a-z0-9_]*  /ok    /p' "$log"
done
echo "$((SECONDS - began)) s; $([ $failed = 0 ] && echo "every mesh equals one rank to 1e-12" || echo "NOT EQUAL: see above")"
exit $failed
