#!/usr/bin/env bash
# test_network.sh: ranks on several nodes, which are network namespaces (network/nodes.sh): the same
# losses, the bytes on the wire, and what is said when a rank stops, a node is lost, a cable is
# pulled, a node is slow. Needs root and iproute2.
set -u
cd "$(dirname "$0")/.."
. tests/lib.sh
export LAB=3f$$ OMP_NUM_THREADS=1
nodes=network/nodes.sh
if ! reason=$($nodes up 4 2>&1 >/dev/null); then
  reason=$(tail -1 <<<"$reason")
  if grep -qE "$no_nodes_here" <<<"$reason"; then skip "several nodes on one machine" "$reason"
  else fail "several nodes on one machine" "$reason"; fi
  sums_up
  exit
fi
trap '[ -z "${job:-}" ] || kill -- -"$job" 2>/dev/null; $nodes down; rm -rf "$dir"' EXIT
train="build/cpu/train_gpt --layers 2 --batch 6 --microbatch 1 --dtype f64 --data README.md"

# run NAME RANKS OPTIONS: status.NAME has its status and seconds; to_end at most 60 s
run() {
  local name=$1 ranks=$2 began=$EPOCHREALTIME
  shift 2
  timeout -k 5 60 $nodes run -n "$ranks" $train --metrics "$dir/$name.jsonl" "$@" \
    >"$dir/$name" 2>&1 </dev/null
  echo "$? $(awk -v a="$began" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.1f", b - a }')" \
    >"$dir/status.$name"
}
check a_lab_is_no_pattern \
  "! LAB='.*' $nodes down 2>$dir/err && grep -q 'expected letters' $dir/err"
status() { cut -d' ' -f1 "$dir/status.$1"; }
# rank_on NODE: the process of the rank that runs there
rank_on() {
  local process
  for process in $(ip netns pids "$LAB-$1"); do
    grep -qs train_gpt "/proc/$process/comm" \
      && ! grep -qx 'Threads:[[:space:]]*1' "/proc/$process/status" && echo "$process"
  done
}
# until_step NAME STEP: until it has been taken
until_step() {
  local i
  for i in $(seq 600); do
    grep -qs "\"step\":$2," "$dir/$1.jsonl" && return
    sleep 0.1
  done
  return 1
}

# ---- losses and bytes

$MPIEXEC -n 1 $train --steps 3 --metrics "$dir/alone.jsonl" >/dev/null 2>&1
# what starts and ends a run is on the wire, too: two more steps are what they add
wire=0 ledger=0
for steps in 1 3; do
  before=$($nodes sent 1)
  run fsdp 3 --steps $steps --fsdp 3
  wire=$(($($nodes sent 1) - before - wire))
  ledger=$(($(grep -o '"traffic".*' "$dir/fsdp.jsonl" | tr '{' '\n' | grep '"rank":0,' \
    | grep -o '"bytes":[0-9]*' | awk -F: '{ sum += $2 } END { printf "%.0f", sum }') - ledger))
done
worst=$(worst 3 "$dir/alone.jsonl" "$dir/fsdp.jsonl")
check three_nodes_train_to_the_losses_of_one_rank "at_most $worst 1e-12" "within $worst" \
  "$worst: $(tail -1 "$dir/fsdp")"
check the_wire_carries_the_bytes_of_the_ledger \
  "at_most $wire $((ledger * 11 / 10)) && at_most $((ledger * 99 / 100)) $wire" \
  "$wire bytes for $ledger" "$wire bytes for $ledger"
run shared 6 --steps 2 --tp 2 --pp 1 --fsdp 3
timeout -k 5 60 $nodes run -n 6 --spread $train --steps 2 --tp 2 --fsdp 3 \
  --metrics "$dir/spread.jsonl" >"$dir/spread" 2>&1 </dev/null
worst=$(worst 2 "$dir/shared.jsonl" "$dir/spread.jsonl")
check ranks_are_placed_in_blocks_or_spread "at_most $worst 1e-12" "within $worst" \
  "$(tail -1 "$dir/shared") $(tail -1 "$dir/spread")"
check tp_over_nodes_that_have_room_for_it_is_said \
  "grep -q 'ranks of --tp 2 are on several nodes, though a node has 2 ranks' $dir/spread &&
    ! grep -q 'are on several nodes' $dir/shared" "" "$(grep several "$dir/shared" "$dir/spread")"

make -s --no-print-directory BACKEND=cpu build/cpu/tests/bench_links
# Twenty calls of 1 MiB, or of 4, more than two on 2, 3 and 4 nodes: what starts a job is on the
# wire, too
# calls_on RANKS COLLECTIVE BYTES TIMES: the bytes on the wire, and by the ledger
calls_on() {
  local before ledger
  before=$($nodes sent 1)
  ledger=$(timeout -k 5 60 $nodes run -n "$1" build/cpu/tests/bench_links "${@:2}" 2>&1 </dev/null)
  echo $(($($nodes sent 1) - before)) "$ledger"
}
worst=0 least=9
for ranks in 2 3 4; do
  start=$(calls_on $ranks all_gather 1179648 2)
  for call in all_gather reduce_scatter all_reduce; do
    for bytes in 1179648 4718592; do # (they divide by 2, 3 and 4)
      read -r worst least < <(echo "$start $(calls_on $ranks $call $bytes 22)" \
        | awk -v worst="$worst" -v least="$least" '{
          x = $4 > $2 ? ($3 - $1) / ($4 - $2) : 0 # no job, no ledger
          print(x > worst ? x : worst, x < least ? x : least) }')
    done
  done
done
check large_collectives_send_the_bytes_of_the_ledger "at_most $worst 1.1 && at_most 0.99 $least" \
  "at most $worst times as many, on 2, 3 and 4 nodes" "$worst times as many"

# ---- a rank that stops, a node that is lost, a cable that is pulled, a node that is slow

long="--steps 100000 --fsdp 3 --timeout 4"
run stopped 3 $long &
until_step stopped 2 && kill -STOP "$(rank_on 3)"
wait $!
said=$(grep -c 'rank 2, on another node, DOES NOT ANSWER' "$dir/stopped")
check a_stopped_rank_is_named_on_every_other_node "[ $said = 2 ] && [ $(status stopped) != 0 ]" \
  "after $(cut -d' ' -f2 "$dir/status.stopped") s in all" "$said times, $(tail -2 "$dir/stopped")"
# each of the two other nodes says where its own rank stands, and where the other node's does
check the_ranks_that_wait_are_said_to_run \
  "[ \$(grep -c '^  rank [01]: step .* ([a-z]*)$' $dir/stopped) = 2 ] &&
    [ \$(grep -c '^  rank [01] on node[12]: step .* ([a-z]*)$' $dir/stopped) = 2 ]" "" \
  "$(grep '^  rank' "$dir/stopped")"

run whole 3 --steps 40 --fsdp 3
run lost 3 --steps 40 --fsdp 3 --checkpoint "$dir/c" --save-every 2 &
until_step lost 4 && ip netns pids "$LAB-2" | xargs -r kill -9
wait $!
run resumed 3 --steps 40 --fsdp 3 --checkpoint "$dir/c" --resume
same=$(diff <(losses "$dir/whole.jsonl" | tail -1) <(losses "$dir/resumed.jsonl" | tail -1) \
  && echo yes)
check a_lost_node_ends_the_job_and_resume_goes_on "[ $(status lost) != 0 ] && [ '$same' = yes ]" \
  "ended $(cut -d' ' -f2 "$dir/status.lost") s after its start; the last loss is the same" \
  "status $(status lost); $(tail -1 "$dir/resumed")"

run cut 3 $long &
until_step cut 2 && $nodes cable 3 down && pulled=$EPOCHREALTIME
wait $!
took=$(awk -v a="$pulled" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.1f", b - a }')
check a_pulled_cable_is_named "grep -q 'rank 2, on another node, DOES NOT ANSWER' '$dir/cut'" \
  "the job ended $took s after it, status $(status cut)" "$(tail -2 "$dir/cut")"
$nodes cable 3 up

# large micro-batches: beside another test, too, it is computations that take most of a step
train=${train/--batch 6 --microbatch 1/--batch 24} run slow 3 --steps 12 --fsdp 3 &
until_step slow 1
slow=$(rank_on 3) # it is slow enough: where cores are few it shares one with rank 0
while kill -STOP "$slow" 2>/dev/null; do # it runs for a quarter of the time
  sleep 0.15
  kill -CONT "$slow" 2>/dev/null
  sleep 0.05
done
wait $!
check a_slow_node_is_named "grep -q 'the others wait for rank 2 on node3' '$dir/slow'" \
  "$(grep -o 'the others wait.*' "$dir/slow")" "$(tail -2 "$dir/slow")"

# ---- the lab itself

# interrupted NAME COMMAND: starts it as a job of its own, which Ctrl-C reaches as a terminal sends
# it; sets `job`
interrupted() {
  env --default-signal=INT setsid "${@:2}" >"$dir/$1" 2>&1 </dev/null &
  job=$!
}
# none_left COMMAND: within 10 s it prints nothing more
none_left() {
  local i
  for i in $(seq 100); do
    [ -z "$("$@")" ] && return
    sleep 0.1
  done
  return 1
}
on_nodes() { for i in 1 2 3 4; do ip netns pids "$LAB-$i"; done; }
rm -f "$dir/ended.jsonl"
interrupted ended $nodes run -n 3 $train --fsdp 3 --steps 100000 --metrics "$dir/ended.jsonl"
until_step ended 2 && steps=yes || steps=no
kill -INT -- -$job
check after_ctrl_c_of_mpiexec_no_process_is_left_on_the_nodes \
  "[ $steps = yes ] && none_left on_nodes" "" "$(tail -1 "$dir/ended") $(on_nodes)"

for wrong in "up 4 fast" "up 1" "up 2 0 long" "up 2" up on "sent 9" "cable 2" "cable 9 up"; do
  $nodes $wrong >"$dir/wrong" 2>&1
  check "refused: nodes.sh $wrong" "[ $? = 1 ] && ! grep -q unbound '$dir/wrong'" \
    "$(tail -1 "$dir/wrong")" "$(cat "$dir/wrong")"
done
# stand_in NAME LINE: a command that PATH="$dir/bin:$PATH" finds first
stand_in() {
  rm -rf "$dir/bin"
  mkdir "$dir/bin"
  printf '#!/bin/sh\n%s\n' "$2" >"$dir/bin/$1"
  chmod +x "$dir/bin/$1"
}
stand_in ip "exit 1"
PATH=$dir/bin:$PATH $nodes down
check nodes_that_cannot_be_removed_are_a_failure "[ $? = 1 ]"
$nodes down
# labs: the namespaces of this test, and of the `make network` that it starts, which takes LAB over
labs() { ls /run/netns 2>/dev/null | grep "^$LAB-"; }
check nothing_is_left_behind "! labs >/dev/null" "" "$(labs)"
stand_in sysctl "kill \$PPID"
{ PATH=$dir/bin:$PATH $nodes up 2; } 2>/dev/null # nor that it was ended
check a_signal_leaves_no_half_a_lab "[ $? = 143 ] && ! labs >/dev/null" "" "$(labs)"

# ---- make network

stand_in tc "echo tc has failed >&2; exit 1"
PATH=$dir/bin:$PATH refused make_network_is_skipped_only_where_it_cannot_be "tc has failed" \
  network/experiment.sh
RANKS=3 refused ranks_that_no_layout_has "RANKS is '3'" network/experiment.sh
printf '1\t100mbit\ttp\t9\t9\t1\t1\t-\t1\n' >"$dir/cells.tsv"
check where_the_fast_link_has_failed_nothing_is_divided_by_it \
  "awk -f network/table.awk $dir/cells.tsv | grep -q '^1 *tp *-  *-'"
make -s --no-print-directory BACKEND=cpu build/cpu/tests/compare
mkdir -p "$dir/build/network"
cp "$dir/cells.tsv" "$dir/build/network"
cp "$dir/alone.jsonl" "$dir/serial.jsonl"
printf 'serial\t1\t\n' >"$dir/jobs.txt"
compare=$PWD/build/cpu/tests/compare
(cd "$dir" && timeout 30 "$compare" . report.html >out 2>&1)
check nor_does_make_compare "[ $? = 0 ]" "" "$(tail -1 "$dir/out")"
if [ ! -c /dev/net/tun ]; then
  skip "links that are far away" "there is no /dev/net/tun"
  sums_up
  exit
fi
# under_way SIGNAL: INT comes while links are calibrated, TERM while layouts train
under_way() {
  if [ "$1" = TERM ]; then grep -q replicate "$dir/experiment"; else
    labs | while read -r lab; do ip netns pids "$lab"; done | grep -q .
  fi
}
for signal in INT TERM; do
  interrupted experiment make -s BACKEND=cpu network
  comes=early
  # links are calibrated in less than a minute, but others may use the machine
  for i in $(seq 4000); do
    under_way $signal && comes="under way" && break
    kill -0 $job 2>/dev/null || break
    sleep 0.1
  done
  check make_network_is_under_way_when_${signal}_comes "[ '$comes' = 'under way' ]" "" \
    "$(tail -1 "$dir/experiment")"
  kill -$signal -- -$job
  check make_network_that_is_ended_by_${signal}_leaves_nothing "none_left labs" "" \
    "$(tail -1 "$dir/experiment"); $(labs)"
  kill -KILL -- -$job 2>/dev/null
done
$nodes up 2 1gbit 2000
run late 2 --steps 3 --tp 2
worst=$(worst 3 "$dir/alone.jsonl" "$dir/late.jsonl")
check slow_links_carry_the_same_numbers "at_most $worst 1e-12" "within $worst" \
  "$(tail -1 "$dir/late")"
sums_up
