#!/usr/bin/env bash
# test_host_calls.sh: what the host asks of the device in one steady step of the CUDA build, counted
# on a device that computes nothing (tests/null_device.cpp): calls of a run with one more step, less
# those without it. A step makes the host wait once, at its end; it allocates and copies nothing
# that would.
set -u
cd "$(dirname "$0")/.."
. tests/lib.sh
export OMP_NUM_THREADS=1

# difference SHORT LONG: what the longer run has more of, a line a call, to $dir/step
difference() {
  awk '{ n = $1; $1 = ""; sub(/^ /, "") }
    NR == FNR { before[$0] = n; next }
    n != before[$0] { print n - before[$0], $0 }' "$dir/$1" "$dir/$2" >"$dir/step"
}
# step OPTIONS...: of a step
step() {
  local steps
  for steps in 3 4; do
    THREEFOLD_CALLS=$dir/$steps timeout 120 build/cuda/null/train_gpt "$@" --steps $steps \
      --metrics "$dir/m.jsonl" >"$dir/out" 2>&1 || fail "$*" "$(tail -1 "$dir/out")"
  done
  difference 3 4
}
calls() { awk -v pattern="$1" '$0 ~ pattern { n += $1 } END { print n + 0 }' "$dir/step"; }

waits='Synchronize|not pinned|cudaMalloc$|cudaFree$|Host$|cudaStreamDestroy'
checks() { # checks NAME MICRO-BATCHES OPTIONS...
  local name=$1 microbatches=$2
  shift 2
  step "$@"
  if [ "$(calls "$waits")" = 1 ] && [ "$(calls 'to the device')" = "$microbatches" ]; then
    ok "$name" "$(calls 'kernel') kernels, $(calls cublas) products, $(calls '') calls in all"
  else
    fail "$name" "$(tr '\n' ',' <"$dir/step")"
  fi
}
gpt2="--model gpt2 --batch 16 --dtype bf16"
checks a_step_of_gpt2_waits_once 1 $gpt2
cp "$dir/step" "$dir/gpt2"
checks four_micro_batches_are_four_uploads_and_one_wait 4 $gpt2 --microbatch 4
checks activations_that_are_recomputed_wait_for_nothing 1 $gpt2 --recompute --attention plain
checks own_products_wait_for_nothing 2 --model tiny --dtype bf16 --matmul own --microbatch 8

# a token of eight texts: their logits come in one piece
for tokens in 4 5; do
  THREEFOLD_CALLS=$dir/$tokens timeout 120 build/cuda/null/generate --model tiny \
    --prompt $(seq 8) --temperature 0 --tokens $tokens >"$dir/out" 2>&1 \
    || fail generate "$(tail -1 "$dir/out")"
done
difference 4 5
check a_token_of_eight_texts_waits_once '[ "$(calls "$waits")" = 1 ]' \
  "$(calls kernel) kernels, $(calls '') calls in all" "$(tr '\n' ',' <"$dir/step")"

# What the planner counts (theory/): kernels of a block beside its products, 5 forward and 19
# backward, and of flash attention 1 and 3; of a new token 10 a block, products among them, and 4.
for layers in 1 2; do
  step --model tiny --layers $layers --dtype bf16
  cp "$dir/step" "$dir/layers-$layers"
done
difference layers-1 layers-2
check a_block_starts_as_many_kernels_as_the_planner_counts \
  '[ "$(calls "a kernel") $(calls cublas)" = "28 12" ]' "28, and 12 products" \
  "$(tr '\n' ',' <"$dir/step")"
for layers in 1 2; do
  for tokens in 4 5; do
    THREEFOLD_CALLS=$dir/$tokens timeout 120 build/cuda/null/generate --model tiny \
      --layers $layers --prompt 1 --temperature 0 --tokens $tokens >"$dir/out" 2>&1 \
      || fail generate "$(tail -1 "$dir/out")"
  done
  difference 4 5
  check "a_token_of_${layers}_blocks_starts_as_many_kernels_as_the_planner_counts" \
    '[ "$(calls "kernel|cublas")" = $((10 * layers + 4)) ]' "$((10 * layers + 4))" \
    "$(tr '\n' ',' <"$dir/step")"
done

# full WHEN: an allocation fails; what the host then did, to $dir/full
full() {
  THREEFOLD_FULL=$1 THREEFOLD_CALLS=$dir/full timeout 120 $MPIEXEC -n 1 \
    build/cuda/null/train_gpt --model tiny --steps 2 --metrics "$dir/m.jsonl" >"$dir/out" 2>&1
}
check an_allocation_that_fails_once_is_tried_again_when_the_device_is_idle \
  "full 300 && grep -qx '3 cudaMemPoolSetAttribute' $dir/full" "" "$(tail -1 "$dir/out")"
check one_that_fails_again_is_refused_in_a_sentence \
  "full 300-; grep -q 'out of device memory: .* in what .* has left' $dir/out" "" \
  "$(tail -1 "$dir/out")"
sed 's/^/     /' "$dir/gpt2"
THREEFOLD_CALLS=/dev/null build/cuda/null/train_gpt $gpt2 --steps 40 --metrics "$dir/m.jsonl" \
  >"$dir/out" 2>&1
echo "     the host's own time a step of gpt2, median:" \
  "$(grep -o '"step_ms":[0-9.]*' "$dir/m.jsonl" | cut -d: -f2 | sort -n | sed -n 20p) ms"
sums_up
