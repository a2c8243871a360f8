#!/usr/bin/env bash
# experiment.sh: `make network`: what each strategy asks of the network, measured. The same model in
# each layout over two nodes (nodes.sh) whose link is fast, or 1 Gbit/s, or slower, or far; then a
# table of how many times slower a step is than over the fast link.
#   network/experiment.sh [LAYOUT]...   only these layouts (names of the table)
#   STEPS=4   steps of each cell, of which the first does not count
# The cells of a layout take turns over the links, so that what else the machine does meets all
# alike. Writes build/network/cells.tsv: nodes' ranks, link, layout, ms, slowdown, bytes that
# rank 0 sends a step by its ledger, and by the count of its node's device.
set -u
cd "$(dirname "$0")/.."
. tests/lib.sh
steps=${STEPS:-4}
export OMP_NUM_THREADS=1
nodes=network/nodes.sh own=3f$$ out=build/network
links="fast 1gbit 300mbit 100mbit 1ms"
rate_of() { case $1 in fast) echo 0 ;; 1ms) echo 1gbit 1000 ;; *) echo "$1" ;; esac; }
clean() {
  local link
  for link in $links; do LAB=$own-$link $nodes down; done
  rm -rf "$dir"
}
trap clean EXIT
trap 'exit 130' INT TERM HUP
for link in $links; do
  # shellcheck disable=SC2046
  if ! LAB=$own-$link $nodes up 2 $(rate_of "$link") >"$dir/up" 2>&1; then
    echo "SKIP make network: $(tail -1 "$dir/up")"
    exit 0
  fi
done
mkdir -p $out
rm -f $out/failed-*
model="--model tiny --layers 8 --width 256 --batch 16 --dtype f32 --seed 1 --data README.md"

# layouts RANKS: NAME OPTIONS; mixed ones the right way round, and with ranks spread the wrong one
layouts() {
  local n=$1 micro="--microbatch 2"
  row() { printf '%s\t%s\n' "$1" "${*:2}"; }
  row replicate --replicate "$n"
  row zero1 --fsdp "$n" --zero 1
  row zero1-wait --fsdp "$n" --zero 1 --prefetch 0
  row zero3 --fsdp "$n"
  row zero3-wait --fsdp "$n" --prefetch 0
  row tp --tp "$n"
  row tp-rows --tp "$n" --sequence-parallel
  row 1f1b --pp "$n" --schedule 1f1b $micro
  row zb --pp "$n" --schedule zb $micro
  row zbv --pp "$n" --schedule zbv $micro
  [ "$n" = 4 ] || return
  row pp-of-tp --pp 2 --tp 2 $micro
  row tp-of-pp --spread --pp 2 --tp 2 $micro
  row copies-of-fsdp --replicate 2 --fsdp 2
  row fsdp-of-copies --spread --replicate 2 --fsdp 2
}

# cell RANKS LINK NAME OPTIONS: appends a line to cells.tsv
cell() {
  local ranks=$1 link=$2 name=$3 spread="" before after
  shift 3
  if [ "$1" = --spread ]; then
    spread=$1
    shift
  fi
  local metrics=$dir/metrics.jsonl
  rm -f "$metrics"
  export LAB=$own-$link
  before=$($nodes sent 1)
  # shellcheck disable=SC2086
  timeout -k 5 300 $nodes run -n "$ranks" $spread build/train_gpt $model --steps "$steps" "$@" \
    --metrics "$metrics" >"$dir/out" 2>&1 </dev/null &
  wait $! || { # (in the background, so that a signal need not wait for it)
    cp "$dir/out" "$out/failed-$ranks-$link-$name.txt"
    printf ' FAILED over %s (%s)' "$link" "$out/failed-$ranks-$link-$name.txt"
    failed=1
    return
  }
  after=$($nodes sent 1)
  local ms ledger
  ms=$(sed -n 's/.*"step_ms":\([0-9.]*\).*/\1/p' "$metrics" | tail -n +2 | sort -n \
    | awk '{ x[NR] = $1 } END { printf "%.1f", (x[int((NR + 1) / 2)] + x[int(NR / 2 + 1)]) / 2 }')
  ledger=$(grep -o '"traffic".*' "$metrics" | tr '{' '\n' | grep '"rank":0,' \
    | grep -o '"bytes":[0-9]*' | awk -F: -v n="$steps" '{ s += $2 } END { printf "%.0f", s / n }')
  # the program looks at the last update with one more forward and backward
  printf '%s\t%s\t%s\t%s\t%s\t%s\t%s\n' "$((ranks / 2))" "$link" "$name" "$ms" "$ledger" \
    "$(((after - before) / (steps + 1)))" "${spread:+$spread }$*" >>$out/cells.tsv
  printf ' %s %s ms' "$link" "$ms"
}

began=$SECONDS
: >$out/cells.tsv
for ranks in 2 4; do
  over=$links
  [ $ranks = 2 ] || over="fast 1gbit 1ms"
  while IFS=$'\t' read -r name options; do
    [ $# = 0 ] || [[ " $* " == *" $name "* ]] || continue
    printf '  %s rank%s a node  %-15s' "$((ranks / 2))" "$([ $ranks = 2 ] || echo s)" "$name"
    for link in $over; do
      # shellcheck disable=SC2086
      cell $ranks "$link" "$name" $options
    done
    echo
  done < <(layouts $ranks)
done
[ $failed = 0 ] || exit 1

# ---- the table: slowdowns, and the bytes of a step

awk -F'\t' '
  { ms[$1, $2, $3] = $4; wire[$1, $3] = $6; ledger[$1, $3] = $5 }
  !(($1, $3) in seen) { seen[$1, $3] = 1; order[++n] = $1 SUBSEP $3 }
  END {
    printf "\nA step, how many times slower than over the fast link:\n"
    printf "%-7s %-15s %8s %7s %8s %8s %6s   %s\n", "a node", "layout", "fast, ms", "1gbit",
      "300mbit", "100mbit", "1ms", "MB a step by the ledger of rank 0, by its device"
    for (i = 1; i <= n; i++) {
      split(order[i], k, SUBSEP)
      fast = ms[k[1], "fast", k[2]]
      printf "%-7s %-15s %8.0f", k[1], k[2], fast
      split("1gbit 300mbit 100mbit 1ms", link, " ")
      split("7 8 8 6", width, " ")
      for (j = 1; j <= 4; j++) {
        x = ms[k[1], link[j], k[2]]
        printf " %*s", width[j], x == "" ? "-" : sprintf("%.2f", x / fast)
      }
      printf "   %.2f %.2f\n", ledger[k[1], k[2]] / 1e6, wire[k[1], k[2]] / 1e6
    }
  }' $out/cells.tsv | tee $out/table.txt
echo "all of it took $((SECONDS - began)) s"
