#!/usr/bin/env bash
# experiment.sh: `make network`: what each strategy asks of the network, predicted and measured. The
# same model in each layout of the list below, over two nodes (nodes.sh) whose link is fast, or
# 1 Gbit/s, or slower, or far; then a table of how many times slower a step is than over the fast
# link, beside what build/plan predicts from a calibration of links and machine.
#   network/experiment.sh [LAYOUT]...    only these layouts (names of the table)
#   network/experiment.sh crossover      below and above R = 4.5 C rows: who loses more, FSDP or TP
#   network/experiment.sh decode         the time a token of build/generate --tp 2
#   STEPS=4   steps of a run, of which the first does not count
#   RANKS=2   only the layouts of so many ranks (2: one a node, 4: two a node)
#   LAB=3f    with what the names of its nodes begin
# The cells of a layout take turns over the links; the fast one, with which the others are compared,
# is the first and the last, and the mean of both counts. Others may use the hardware: so before
# and after a layout's cells each rank trains alone, and if that takes 1.3 times as long as is
# predicted of it, the predictions of this layout are for a machine that is 1.3 times slower. Then
# the planner's first choice is held against the rest over 1 Gbit/s: it, and all that take at most a
# quarter longer than the fastest, are measured three times more, alternating (in the file the link
# is called "again", and there is no prediction), and the fastest of all four counts.
# Writes build/network/cells.tsv: ranks a node, link, layout, ms, predicted ms, bytes that rank 0
# sends a step by its ledger, and by the count of its node's interface, options, and how many times
# slower the machine is taken to be than when it was calibrated. Until all is measured the file is
# cells.new; then that of an earlier run is kept as cells.tsv.~1~.
set -u
cd "$(dirname "$0")/.."
. tests/lib.sh
steps=${STEPS:-4} failed=0
[[ $steps =~ ^[1-9][0-9]*$ ]] && [ "$steps" -gt 1 ] || {
  echo "network/experiment.sh: STEPS is '$steps', expected 2 or more: the first does not count" >&2
  exit 1
}
for ranks in ${RANKS:-2 4}; do
  [[ $ranks = [24] ]] || {
    echo "network/experiment.sh: RANKS is '$RANKS', expected 2, 4 or both" >&2
    exit 1
  }
done

# ---- the layouts

# layouts RANKS: NAME OPTIONS; mixed ones the right way round, and with ranks spread the wrong one;
# cp with one rank a node alone: of two only one at a time would send over the node's cable, and how
# fast that is is not calibrated
layouts() {
  local n=$1 micro="--microbatch 2"
  row() { printf '%s\t%s\n' "$1" "${*:2}"; }
  row replicate --replicate "$n"
  row zero1 --fsdp "$n" --zero 1
  row zero1-wait --fsdp "$n" --zero 1 --prefetch 0
  row zero3 --fsdp "$n"
  row zero3-wait --fsdp "$n" --prefetch 0
  row tp --tp "$n"
  row tp-sequence --tp "$n" --sequence-parallel
  row 1f1b --pp "$n" --schedule 1f1b $micro
  row zb --pp "$n" --schedule zb $micro
  row zbv --pp "$n" --schedule zbv $micro
  if [ "$n" = 2 ]; then
    row cp --cp 2
    return
  fi
  row pp-of-tp --pp 2 --tp 2 $micro
  row tp-of-pp --spread --pp 2 --tp 2 $micro
  row copies-of-fsdp --replicate 2 --fsdp 2
  row fsdp-of-copies --spread --replicate 2 --fsdp 2
}

for name in "$@"; do
  [[ $* = crossover || $* = decode ]] && break
  { layouts 2 && layouts 4 && echo first-choice; } | cut -f 1 | grep -qxF -- "$name" || {
    echo "network/experiment.sh: there is no layout '$name'" >&2
    exit 1
  }
done

# ---- the lab

# a thread a rank, and one for what travels beside it
export OMP_NUM_THREADS=1 THREEFOLD_STREAMS=queued
nodes=network/nodes.sh own=${LAB:-3f}-$$ out=build/network cells=build/network/cells.new
links="fast 1gbit 300mbit 100mbit 1ms"
rate_of() { case $1 in fast) echo 0 ;; 1ms) echo 1gbit 1000 ;; *) echo "$1" ;; esac; }
clean() {
  local link
  trap '' INT TERM HUP
  for link in $links; do LAB=$own-$link $nodes down; done
  rm -rf "$dir"
}
trap clean EXIT
# make passes on to it what all have been sent: a second signal would end what cleans up
trap "trap '' INT TERM HUP; exit 130" INT TERM HUP
for link in $links; do
  # shellcheck disable=SC2046
  if ! LAB=$own-$link $nodes up 2 $(rate_of "$link") >"$dir/up" 2>&1; then
    reason=$(tail -1 "$dir/up")
    grep -qE "$no_nodes_here" <<<"$reason" || {
      echo "network/experiment.sh: $reason" >&2
      exit 1
    }
    echo "SKIP make network: $reason"
    exit 0
  fi
done
mkdir -p $out
rm -f $out/failed-*
shape="--model tiny --layers 8 --width 192 --dtype f32" model="$shape --batch 12"

# in_lab LINK COMMAND...: nodes.sh run; in the background, so that a signal need not wait for it.
# MPICH over TCP sometimes fails in MPI_Finalize: who calls this tries it twice.
in_lab() {
  export LAB=$own-$1
  timeout -k 5 $((300 + 10 * steps)) $nodes run "${@:2}" >"$dir/out" 2>"$dir/err" </dev/null &
  wait $!
}
in_lab_twice() { in_lab "$@" || in_lab "$@"; }

# on_both COMMAND...: on both nodes at the same time, since cores share memory's bandwidth; what
# node i says is in $dir/node.i
on_both() {
  local i
  for i in 1 2; do
    LAB=$own-fast $nodes on $i "$@" >"$dir/node.$i" 2>&1 &
  done
  wait -n && wait -n || {
    cat "$dir"/node.? >&2
    return 1
  }
}

# median_step METRICS...: ms; the first of each does not count
median_step() {
  local file
  for file in "$@"; do sed -n 's/.*"step_ms":\([0-9.]*\).*/\1/p' "$file" | tail -n +2; done | median
}

# ends with what the last commands have said
give_up() {
  echo "network/experiment.sh: this cannot go on:"
  tail -n 12 "$dir"/{out,err,node.?} 2>/dev/null
  exit 1
}

# ---- calibration: a node while both work, and every link

# machine LINK RANKS: the file of the calibration
machine() { echo "$out/machine-$1-$(($2 / 2)).txt"; }
calibrate() {
  local ranks=$1 link measured="between|overlap"
  [ "$ranks" = 2 ] || measured="$measured|inside"
  on_both build/cpu/plan --machine this --devices $((ranks / 2)) --layout --fsdp $((ranks / 2)) \
    || return
  for link in "${@:2}"; do
    in_lab_twice "$link" -n "$ranks" build/cpu/tests/bench_links || return
    {
      grep ' : ' "$dir/node.1" | grep -vE "^($measured)"
      grep -v ^short "$dir/out"
    } >"$(machine "$link" "$ranks")"
    sed -n 's/^short //p' "$dir/out" >"$out/short-$link-$ranks.txt"
  done
  # inside a node all is the same, whatever joins it to others
  local files rate latency
  files=$(for link in "${@:2}"; do machine "$link" "$ranks"; done)
  # shellcheck disable=SC2086
  {
    rate=$(sed -n 's/^inside //p' $files | cut -d ' ' -f 1 | median)
    latency=$(sed -n 's/^inside //p' $files | cut -d ' ' -f 2 | median)
    sed -i "s/^inside .* : measured/inside $rate $latency : measured, the median/" $files
  }
}
# predict MACHINE RANKS OPTIONS: what build/plan says of layouts of so many ranks
predict() {
  build/cpu/plan --machine "$1" --profile threefold-cpu --nodes 2 --devices $(($2 / 2)) --json \
    "${@:3}"
}
number() { sed -n "s/.*\"$1\": *\([0-9.e+-]*\).*/\1/p" | head -1; }

# slower FILE TIMES: the machine of a file, so many times slower
slower() {
  awk -v times="$2" '/^(peak|f32|copy|read) / { $2 /= times }
    /^product / { $3 /= times }
    /^launch / { $2 *= times }
    { print }' "$1"
}

# alone RANKS OPTIONS: each rank trains half a batch by itself, in micro-batches as with these
# options where they divide it, all of them together. Appends to $dir/alone how many times as long a
# step takes as is predicted from the calibration.
alone() {
  local options="$shape --batch 6" predicted ranks i
  [[ "$*" =~ --microbatch\ [1-3]( |$) ]] && options+=" ${BASH_REMATCH[0]}"
  # shellcheck disable=SC2086
  predicted=$(build/cpu/plan --machine "$(machine fast "$1")" --profile threefold-cpu --devices 1 \
    --layout --json $options | number step_seconds)
  ranks=$(for i in $(seq $(($1 / 2))); do
    printf ' build/cpu/train_gpt --seed 1 --data README.md --steps %s --metrics %s %s & %s;' \
      "$steps" "$dir/rank.\$\$.$i" "$options" 'all+=" $!"'
  done)
  rm -f "$dir"/rank.*
  on_both bash -c "'$ranks for rank in \$all; do wait \$rank || exit; done'" || return
  median_step "$dir"/rank.* | awk -v s="$predicted" '{ print $1 / 1000 / s }' >>"$dir/alone"
}

# ---- a cell

# train LINK RANKS OPTIONS: sets ms (the median of the steps but the first), ledger and wire (bytes
# a step that rank 0 sends, by its ledger and by its node's interface)
train() {
  local link=$1 ranks=$2 spread="" before attempt metrics=$dir/metrics.jsonl
  shift 2
  if [ "$1" = --spread ]; then
    spread=$1
    shift
  fi
  export LAB=$own-$link
  for attempt in 1 2; do
    rm -f "$metrics"
    before=$($nodes sent 1)
    # shellcheck disable=SC2086
    in_lab "$link" -n "$ranks" $spread build/cpu/train_gpt --seed 1 --data README.md \
      --steps "$steps" "$@" --metrics "$metrics" && break
    [ $attempt = 1 ] || return
  done
  # the program looks at the last update with one more forward and backward
  wire=$((($($nodes sent 1) - before) / (steps + 1)))
  ms=$(printf '%.1f' "$(median_step "$metrics")")
  ledger=$(grep -o '"traffic".*' "$metrics" | tr '{' '\n' | grep '"rank":0,' \
    | grep -o '"bytes":[0-9]*' | awk -F: -v n="$steps" '{ s += $2 } END { printf "%.0f", s / n }')
}
# cell LINK RANKS NAME OPTIONS: appends link, ms, ledger and wire to $dir/row
cell() {
  local link=$1 over=${1/again/1gbit} ranks=$2 name=$3 ms ledger wire
  shift 3
  # shellcheck disable=SC2086
  if ! train "$over" "$ranks" "$@" $model; then
    cat "$dir/out" "$dir/err" >"$out/failed-$ranks-$over-$name.txt"
    printf ' FAILED over %s (%s)' "$over" "$out/failed-$ranks-$over-$name.txt"
    failed=1
    return
  fi
  echo "$link $ms $ledger $wire" >>"$dir/row"
  printf ' %s %s ms' "$over" "$ms"
}
# predicted RANKS NAME OPTIONS: the row as lines of cells.tsv, with what is predicted for a machine
# as slow as it was around it
predicted() {
  local ranks=$1 name=$2 times link ms ledger wire seconds
  shift 2
  times=$(tail -2 "$dir/alone" | awk '{ sum += $1 } END { print sum / NR }')
  # of a link's two cells, the mean; the fast link first, by which make compare divides the others
  awk 'BEGIN { link[1] = "fast"; links = order["fast"] = 1 }
    { ms[$1] += $2; n[$1]++; sent[$1] = $3 " " $4 }
    !($1 in order) { order[$1] = ++links; link[links] = $1 }
    END {
      for (i = 1; i <= links; i++) {
        l = link[i]
        if (n[l]) print l, ms[l] / n[l], sent[l]
      }
    }' "$dir/row" >"$dir/means"
  while read -r link ms ledger wire; do
    slower "$(machine "$link" "$ranks")" "$times" >"$dir/slower"
    # shellcheck disable=SC2086
    seconds=$(predict "$dir/slower" "$ranks" --layout $model "$@" | number step_seconds)
    [ -n "$seconds" ] || return
    printf '%s\t%s\t%s\t%.1f\t%s\t%s\t%s\t%s\t%s\n' "$((ranks / 2))" "$link" "$name" "$ms" \
      "$(awk -v s="$seconds" 'BEGIN { printf "%.1f", 1000 * s }')" "$ledger" "$wire" "$*" "$times"
  done <"$dir/means"
}

# may_be_fastest NAME: over 1 Gbit/s
may_be_fastest() {
  awk -F '\t' -v name="$1" -v ranks="$((ranks / 2))" '$1 == ranks && $2 == "1gbit" {
      if (!best || $4 < best) best = $4
      if ($3 == name) own = $4
    }
    END { exit !own || (name != "first-choice" && own > 1.25 * best) }' "$cells"
}

# ---- other questions

# block OPTIONS: bytes that rank 0 sends for a block, and ms that a step loses for it: a quarter of
# the difference between a model of 8 layers and one of 4. Lost is what a step takes longer over a
# slow link than over the fast one. Streams run immediately, so that nothing overlaps.
block() {
  local link=100mbit l over figures=()
  for l in 4 8; do
    for over in fast $link; do
      train $over 2 --model tiny --width 256 --dtype f32 --layers $l "$@" \
        || { cat "$dir/err" >&2; return 1; }
      figures+=("$ms" "$wire")
    done
  done
  echo "${figures[@]}" \
    | awk '{ printf "%.3f MB %6.1f ms", ($8 - $4) / 4e6, ($7 - $5 - $3 + $1) / 4 }'
}
crossover() {
  unset THREEFOLD_STREAMS
  local batch
  measure() { printf '%s' "$1" && block "${@:2}" && echo; }
  echo "a block of width 256, f32, over 100 Mbit/s: sent and lost"
  measure "FSDP, whatever R is    " --batch 8 --fsdp 2 || return
  for batch in 4 8 12; do
    measure "TP, R = $((batch / 2)) C            " --batch $batch --tp 2 || return
    measure "TP + SP, R = $((batch / 2)) C       " --batch $batch --tp 2 --sequence-parallel \
      || return
  done
}

# The time a token takes with tp 2 over each link, measured and predicted. How fast weights are read
# and kernels are started is what decoding without tp shows, on both nodes at once: a model with
# hardly any weights, and one with half of the layers. The latter has as many weights as a rank of
# tp has, so as large a part of them stays in the processor's cache.
decode() {
  local link turn weights shape="--model tiny --heads 8 --dtype f32"
  local model="$shape --layers 8 --width 512" text="--prompt Once --tokens 100"
  local narrow half launch read latency rate delayed sending
  unset THREEFOLD_STREAMS
  out=$dir
  # shellcheck disable=SC2086
  calibrate 2 $links || give_up
  token() { sed -n 's/.*median \([0-9.]*\) ms.*/\1/p' "$@"; }
  for turn in 1 2 3 4 5; do
    # shellcheck disable=SC2086
    on_both build/cpu/generate $shape --layers 8 --width 32 $text || exit
    token "$dir"/node.? >>"$dir/alone-narrow"
    # shellcheck disable=SC2086
    on_both build/cpu/generate $shape --layers 4 --width 512 $text || exit
    token "$dir"/node.? >>"$dir/alone-half"
    for link in $links; do
      # shellcheck disable=SC2086
      in_lab_twice "$link" -n 2 build/cpu/generate $model --tp 2 $text || give_up
      token "$dir/err" "$dir/out" >>"$dir/tokens-$link"
    done
  done
  narrow=$(median <"$dir/alone-narrow") half=$(median <"$dir/alone-half")
  weights=$(sed -n 's/^memory *\([0-9.]*\) MiB.*/\1/p' "$dir/node.1") # of the last, with half
  printf '%-8s %10s %10s\n' link measured predicted
  # decoding MODEL FACT...: what build/plan says of it, of a machine with these facts
  decoding() {
    {
      grep -vE '^(between|launch|read)' "$(machine fast 2)"
      printf '%s : measured\n' "${@:2}"
    } >"$dir/facts"
    # shellcheck disable=SC2086
    build/cpu/plan --machine "$dir/facts" --nodes 2 --devices 1 --decode --json --tp 2 $1
  }
  # kernels LAYERS: how many a token starts, by the seconds that they take where each takes one
  kernels() { decoding "$shape --layers $1" "between 1 0" "read 1" "launch 1e6" | number kernels; }
  # decoding_over RATE LATENCY: of the whole model over such a link
  decoding_over() { decoding "$model" "between $1 $2" "launch $launch" "read $read"; }
  read -r launch read < <(awk -v weights="$weights" -v narrow="$narrow" -v half="$half" \
    -v of_8="$(kernels 8)" -v of_4="$(kernels 4)" 'BEGIN {
      launch = narrow / of_8
      print 1000 * launch, weights * 1.048576 / (half - launch * of_4) }') && [ "$read" ] || give_up
  for link in $links; do
    # A token bucket lets what is short pass at once, whatever its rate, until it is empty: so a
    # token takes as long as with a link that only delays, or as what it sends takes at that rate.
    latency=$(cut -d ' ' -f 1 "$out/short-$link-2.txt")
    rate=$(sed -n 's/^between \([^ ]*\) .*/\1/p' "$(machine "$link" 2)")
    delayed=$(decoding_over 1e6 "$latency" | number token_seconds)
    sending=$(decoding_over "$rate" 0 | number sums)
    [ "$delayed" ] && [ "$sending" ] || give_up
    printf '%-8s %7.2f ms %7.2f ms\n' "$link" "$(median <"$dir/tokens-$link")" \
      "$(awk -v a="$delayed" -v b="$sending" 'BEGIN { print 1000 * (a > b ? a : b) }')"
  done
}

# ---- the experiment

began=$SECONDS
case ${1:-} in
  crossover | decode)
    "$1"
    exit
    ;;
esac
: >$cells
for ranks in ${RANKS:-2 4}; do
  over=$links
  [ "$ranks" = 2 ] || over="fast 1gbit 1ms"
  # shellcheck disable=SC2086
  calibrate "$ranks" $over || give_up
  # shellcheck disable=SC2086
  first=$(predict "$(machine 1gbit "$ranks")" "$ranks" $model --top 1 \
    | sed -n 's/.*"options": "\(.*\)",/\1/p' | head -1)
  {
    layouts "$ranks"
    printf 'first-choice\t%s\n' "$first"
  } >"$dir/layouts"
  for turn in "$over fast" again again again; do
    while IFS=$'\t' read -r name options; do
      [ $# = 0 ] || [[ " $* " == *" $name "* ]] || continue
      [ "$turn" != again ] || may_be_fastest "$name" || continue
      printf '  %s rank%s a node  %-15s' "$((ranks / 2))" "$([ "$ranks" = 2 ] || echo s)" "$name"
      : >"$dir/row"
      # shellcheck disable=SC2086
      [ "$turn" = again ] || alone "$ranks" $options || give_up
      for link in $turn; do
        # shellcheck disable=SC2086
        cell $link "$ranks" "$name" $options
      done
      if [ "$turn" = again ]; then
        awk -v OFS='\t' -v ranks="$((ranks / 2))" -v name="$name" -v options="$options" \
          '{ print ranks, $1, name, $2, "-", $3, $4, options, "-" }' "$dir/row" >>$cells
      else
        # shellcheck disable=SC2086
        alone "$ranks" $options && predicted "$ranks" "$name" $options >>$cells || give_up
      fi
      echo
    done <"$dir/layouts"
  done
done
mv --backup=numbered $cells $out/cells.tsv
awk -f network/table.awk $out/cells.tsv | tee $out/table.txt
echo "all of it took $((SECONDS - began)) s"
[ $failed = 0 ]
