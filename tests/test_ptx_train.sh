#!/usr/bin/env bash
# test_ptx_train.sh: what nvcc compiled trains a very small GPT to the losses of the CPU build: alone, and on two ranks that share a device, with
# the stand-in for NCCL staging through pinned host memory (what COMM=mpi links) under each strategy.
set -u
cd "$(dirname "$0")/.."
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
args="--model tiny --layers 2 --width 32 --heads 2 --context 32 --batch 4 --steps 3 --dtype f32"
passed=0 failed=0
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
losses() { sed -n 's/.*"loss":\([^,]*\),.*/\1/p' "$1"; }
build/cpu/train_gpt $args --metrics "$dir/cpu.jsonl" >"$dir/out" 2>&1

# trains NAME RANKS OPTIONS...: three steps within 1e-6 of the CPU build's. f32 sums in another order: a few units in the 24th bit, over 3 steps
trains() {
  local name=$1 ranks=$2; shift 2
  rm -f "$dir/ptx.jsonl"
  timeout 600 mpiexec -n "$ranks" build/ptx/train_gpt $args "$@" --metrics "$dir/ptx.jsonl" >"$dir/out" 2>&1
  local worst
  worst=$(paste <(losses "$dir/ptx.jsonl") <(losses "$dir/cpu.jsonl") | awk 'function abs(x) { return x < 0 ? -x : x } { d = abs($1 - $2) / $1; if (d > w) w = d } END { if (NR == 3) print w + 0; else print 1 }')
  if awk "BEGIN { exit !($worst <= 1e-6) }"; then echo "ok   $name  largest relative difference of the loss $worst"; passed=$((passed + 1))
  else echo "FAIL $name  $worst: $(tail -2 "$dir/out")"; failed=$((failed + 1)); fi
}
trains three_steps_equal_the_cpu_build 1
trains two_ranks_on_one_device_with_fsdp 2 --fsdp 2
trains two_ranks_on_one_device_with_tensor_parallelism 2 --tp 2 --sequence-parallel
trains two_ranks_on_one_device_with_a_pipeline 2 --pp 2 --microbatch 2
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
