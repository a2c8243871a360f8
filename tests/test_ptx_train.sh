#!/usr/bin/env bash
# test_ptx_train.sh: what nvcc compiled trains a very small GPT to the losses of the CPU build.
set -u
cd "$(dirname "$0")/.."
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
args="--model tiny --layers 2 --width 32 --heads 2 --context 32 --batch 4 --steps 3 --dtype f32"
losses() { sed -n 's/.*"loss":\([^,]*\),.*/\1/p' "$1"; }
build/ptx/train_gpt $args --metrics "$dir/ptx.jsonl" >"$dir/out" 2>&1
build/cpu/train_gpt $args --metrics "$dir/cpu.jsonl" >>"$dir/out" 2>&1
worst=$(paste <(losses "$dir/ptx.jsonl") <(losses "$dir/cpu.jsonl") | awk 'function abs(x) { return x < 0 ? -x : x } { d = abs($1 - $2) / $1; if (d > w) w = d } END { if (NR == 3) print w + 0; else print 1 }')
# f32 sums in another order: a few units in the 24th bit, spread over 3 steps
if awk "BEGIN { exit !($worst <= 1e-6) }"; then echo "ok   three_steps_equal_the_cpu_build  largest relative difference of the loss $worst"; echo "1 passed, 0 failed"; exit 0; fi
echo "FAIL three_steps_equal_the_cpu_build  $worst: $(tail -2 "$dir/out")"; echo "0 passed, 1 failed"; exit 1
