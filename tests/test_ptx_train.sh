#!/usr/bin/env bash
# test_ptx_train.sh: what nvcc compiled trains a very small GPT to the losses of the CPU build:
# alone, and on ranks that share a device, with the stand-in for NCCL staging through pinned host
# memory (what COMM=mpi links) under each strategy and all of them.
set -u
cd "$(dirname "$0")/.."
. tests/lib.sh
args="--model tiny --layers 2 --width 32 --heads 2 --context 16 --batch 4 --steps 3 --dtype f32"
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
unset PTXRUN_RACE # the tests of the kernels look for races
build/cpu/train_gpt $args --metrics "$dir/cpu.jsonl" >"$dir/out" 2>&1

# trains NAME RANKS OPTIONS...: three steps within 1e-6 of the CPU build's. f32 sums in another
# order: a few units in the 24th bit, over 3 steps
trains() {
  local name=$1 ranks=$2
  shift 2
  rm -f "$dir/ptx.jsonl"
  timeout 600 $MPIEXEC -n "$ranks" build/cuda/ptx/train_gpt $args "$@" --metrics "$dir/ptx.jsonl" \
    >"$dir/out" 2>&1
  local worst
  worst=$(worst 3 "$dir/ptx.jsonl" "$dir/cpu.jsonl")
  if at_most "$worst" 1e-6; then
    ok "$name" "largest relative difference of the loss $worst"
  else
    fail "$name" "$worst: $(tail -2 "$dir/out")"
  fi
}
trains three_steps_equal_the_cpu_build 1
trains two_ranks_on_one_device_with_fsdp 2 --fsdp 2
trains two_ranks_on_one_device_with_tensor_parallelism 2 --tp 2 --sequence-parallel
trains two_ranks_on_one_device_with_context_parallelism 2 --cp 2
trains two_ranks_on_one_device_with_a_pipeline 2 --pp 2 --microbatch 2
trains four_ranks_on_one_device_with_a_pipeline_of_shards 4 --pp 2 --fsdp 2 --microbatch 1
trains eight_ranks_on_one_device_with_all_three 8 --pp 2 --fsdp 2 --tp 2 --sequence-parallel \
  --microbatch 1
sums_up
