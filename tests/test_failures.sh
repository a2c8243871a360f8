#!/usr/bin/env bash
# test_failures.sh: a rank that dies, stops or throws ends the whole job in seconds, with its number
# and a non-zero status.
set -u
cd "$(dirname "$0")/.."
train=build/cpu/train_gpt
. tests/lib.sh
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
long="--model tiny --layers 3 --width 32 --heads 2 --context 32 --batch 12 --steps 1000000"

# strikes NAME RANK SIGNAL SECONDS 'part of the message' ARGS...: starts 3 ranks, sends SIGNAL to
# one when training is under way
strikes() {
  local name=$1 rank=$2 signal=$3 limit=$4 part=$5
  shift 5
  rm -f "$dir/m.jsonl"
  timeout 120 $MPIEXEC -n 3 $train $long --metrics "$dir/m.jsonl" "$@" >"$dir/out" 2>"$dir/err" &
  local job=$!
  for _ in $(seq 300); do
    [ -f "$dir/m.jsonl" ] && [ "$(wc -l <"$dir/m.jsonl")" -ge 3 ] && break
    sleep 0.1
  done
  local victim
  victim=$(rank_pids "$dir/m.jsonl" "$rank" | tail -1)
  [ -n "$victim" ] || {
    fail "$name" "no process of rank $rank: $(head -c 200 "$dir/err")"
    kill $job
    wait $job
    return
  }
  local began
  began=$(date +%s.%N)
  kill -"$signal" "$victim"
  wait $job
  local status=$?
  local took
  took=$(awk "BEGIN { print $(date +%s.%N) - $began }")
  sleep 0.3
  if [ $status -eq 0 ] && status_counts; then
    fail "$name" "exit status 0"
  elif ! grep -q -- "$part" "$dir/err"; then
    fail "$name" "said: $(head -c 400 "$dir/err")"
  elif ! at_most "$took" "$limit"; then
    fail "$name" "took $took s"
  else
    ok "$name" "status $status after $took s: $(grep -m1 -- "$part" "$dir/err" | cut -c1-140)"
  fi
}
# says NAME 'part' RANKS ARGS...
says() { refused "$1" "$2" $MPIEXEC -n "$3" $train "${@:4}"; }

for rank in 0 1 2; do
  strikes "a_killed_rank_${rank}_is_named_and_ends_the_job" $rank KILL 20 \
    "^rank $rank on .* (process .*ended without finishing" --replicate 3
done
for rank in 0 2; do
  strikes "a_stopped_rank_${rank}_is_named" $rank STOP 25 "rank $rank: .*DOES NOT RUN" --fsdp 3 \
    --timeout 3
done
# stages enter different numbers of collectives: none of them is behind for that
strikes a_stopped_stage_is_named 1 STOP 25 "rank 1: .*DOES NOT RUN" --pp 3 --microbatch 1 \
  --timeout 3
check other_stages_are_not_said_to_be_behind "! grep behind '$dir/err'" "" \
  "$(grep behind "$dir/err")"

says a_loss_that_is_not_finite_on_every_rank_is_said_once "at step 2 the loss is" 3 \
  ${long/1000000/9} --replicate 3 --lr 1e30 --clip 0
check no_rank_is_blamed_for_what_another_explained "! grep -q 'killed, or it crashed' $dir/err"
says what_does_not_fit_on_any_rank_is_said_once "out of device memory" 3 ${long/1000000/9} \
  --replicate 3 --device-memory 1
says a_mesh_that_does_not_match_is_refused_once "mpiexec started 2" 2 --fsdp 3
says a_batch_that_does_not_divide_over_ranks_is_refused_once "give --batch 8" 2 --replicate 2 \
  --batch 7 --microbatch 1
says zero_4_is_refused "--zero" 1 --zero 4
says a_negative_prefetch_is_refused "--prefetch" 1 --prefetch -1
says a_missing_file_is_said_once "nowhere.txt" 3 --replicate 3 --batch 12 --data "$dir/nowhere.txt"

# headline REFUSED TRAINED STEPS MIB STRATEGY OPTIONS: what one rank refuses under a cap trains on
# four under the same cap, to the loss of one rank without it
headline() {
  local refused=$1 trained=$2 steps=$3 cap=$4 strategy=$5 worst
  shift 5
  says "$refused" "out of device memory" 1 "$@" --steps "$steps" --device-memory "$cap"
  rm -f "$dir/one.jsonl" "$dir/four.jsonl"
  timeout 300 $MPIEXEC -n 1 $train "$@" --steps "$steps" --metrics "$dir/one.jsonl" >/dev/null 2>&1
  timeout 300 $MPIEXEC -n 4 $train "$@" --steps "$steps" "--$strategy" 4 --device-memory "$cap" \
    --metrics "$dir/four.jsonl" >"$dir/out" 2>"$dir/err" || {
    fail "$trained" "$(head -c 300 "$dir/err")"
    return
  }
  worst=$(worst "$steps" "$dir/one.jsonl" "$dir/four.jsonl")
  if at_most "$worst" 1e-4; then
    ok "$trained" \
      "$cap MiB a rank; relative difference of the loss $worst; $(grep -E '^  all' "$dir/out")"
  else
    fail "$trained" "difference $worst"
  fi
}
headline one_rank_refuses_what_does_not_fit \
  four_ranks_train_what_one_refuses_under_the_same_cap 4 48 fsdp --model tiny --layers 6 \
  --width 256 --heads 4 --context 32 --batch 8 --microbatch 1 --recompute --dtype f32
headline one_rank_refuses_a_context_that_does_not_fit \
  four_ranks_train_on_a_context_that_one_refuses_under_the_same_cap 2 12 cp --model tiny \
  --layers 2 --width 64 --heads 4 --context 2048 --batch 1 --dtype f32

# A step of many micro-batches without a collective, and a trace that takes its time
if ! OMP_NUM_THREADS=1 timeout 120 $MPIEXEC -n 2 $train --model tiny --layers 2 --width 64 \
  --heads 2 --context 128 --batch 1024 --microbatch 1 --replicate 2 --steps 1 --timeout 2 \
  --trace "$dir/t.json" --metrics "$dir/m.jsonl" >"$dir/out" 2>&1; then
  fail a_step_longer_than_the_timeout_is_no_hang "$(tail -3 "$dir/out")"
elif took=$(sed -n 's/.*"step_ms":\([0-9]*\).*/\1/p' "$dir/m.jsonl") && [ "$took" -gt 2000 ]; then
  ok a_step_longer_than_the_timeout_is_no_hang "$took ms with --timeout 2"
else
  skip a_step_longer_than_the_timeout_is_no_hang "it took $took ms"
fi
mkdir "$dir/here" "$dir/there"
alike="$PWD/$train --model tiny --layers 1 --width 16 --heads 1 --context 16 --batch 2 --steps 2"
alike="$alike --data $PWD/README.md --replicate 2 --checkpoint c"
refused ranks_with_two_directories_of_one_name_are_refused 'is it the same directory?' \
  $MPIEXEC -wdir "$dir/here" -n 1 $alike : -wdir "$dir/there" -n 1 $alike

# Every rank's timeline, and its share of time in communication
if OMP_NUM_THREADS=1 timeout 120 $MPIEXEC -n 4 $train --pp 2 --tp 2 --schedule zb --recompute \
  --layers 2 --width 32 --heads 2 --context 32 --steps 2 --trace "$dir/t.json" \
  --metrics "$dir/m.jsonl" >"$dir/out" 2>&1 \
  && [ "$(grep -o process_name "$dir/t.json" | wc -l)" = 4 ] \
  && [ "$(grep -o '"cat":"part"' "$dir/t.json" | wc -l)" -ge 64 ] \
  && grep -qE '"communication_share":\[[0-9.e-]+(,[0-9.e-]+){3}\]' "$dir/m.jsonl" \
  && grep -q -- '--recompute replays .* without it' "$dir/out" \
  && grep -q 'communicating, with waiting for other ranks' "$dir/out"; then
  ok the_trace_has_every_rank_and_the_report_says_what_recompute_costs_zb
else
  fail the_trace_has_every_rank_and_the_report_says_what_recompute_costs_zb "$(tail -3 "$dir/out")"
fi

# Theory beside measurement, in the metrics' summary of every rank: whatever rows its stage has
for layout in "--replicate 2 --fsdp 2" "--pp 4 --schedule zb" \
  "--pp 2 --tp 2 --sequence-parallel"; do
  name="the_summary_holds_measured_and_predicted_bytes_of_every_rank $layout:"
  timeout 120 $MPIEXEC -n 4 $train --model tiny --layers 4 --width 32 --heads 2 --context 32 \
    --batch 8 --steps 3 $layout --metrics "$dir/m.jsonl" >"$dir/out" 2>&1
  rows=$(tail -1 "$dir/m.jsonl" | grep -oE '"bytes":[0-9]+(,"predicted_bytes":[0-9]+)?')
  if grep -q '"summary":true' "$dir/m.jsonl" && ! grep -q DIFFERS "$dir/out" \
    && [ "$(wc -l <<<"$rows")" -ge 12 ] && [ "$(awk -F'[:,]' '$2 != $4' <<<"$rows" | wc -l)" = 0 ] \
    && [ "$(tail -1 "$dir/m.jsonl" | grep -oE '"rank":[0-9]+,"axis"' | sort -u | wc -l)" = 4 ]; then
    ok "$name" "$(wc -l <<<"$rows") rows"
  else fail "$name" "$(tail -3 "$dir/out")"; fi
done

sums_up
