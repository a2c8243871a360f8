#!/usr/bin/env bash
# bench.sh: what `make bench` prints: kernels beside copy bandwidth, collectives beside MPICH's own,
# training steps one process against ranks.
#   ONLY=kernels|collectives|training|inference|checkpoint|pytorch   one part; PyTorch only when
#                                                                    asked for: ONLY=pytorch
#                                                                    PYTHON=python3
#   STEPS=n                                     timed steps a training run (3)
# Compared in one run, medians of the steps after the first; speed is never asserted in tests.
set -u
cd "$(dirname "$0")/.."
only=${ONLY:-} steps=${STEPS:-3}
case $only in
  "" | kernels | collectives | training | inference | checkpoint | pytorch) ;;
  *)
    echo "make bench: ONLY is '$only', expected kernels, collectives, training, inference," \
      "checkpoint or pytorch" >&2
    exit 1
    ;;
esac
program=$(readlink build/train_gpt)
backend=${program%%/*} built=build/${program%/*}/tests
. tests/lib.sh
most=8
[ "$backend" = cpu ] || most=$(launch/detect.sh gpus)
# fits RANKS: on GPUs each rank needs one, unless they share
fits() {
  [ "$1" -le "$most" ] || [[ $program == *comm-mpi* ]] && return
  echo "  left out: $1 ranks need as many GPUs, and here are $most"
  return 1
}
wants() { [ -z "$only" ] || [ "$only" = "$1" ]; }

if wants kernels; then
  echo "== kernels"
  OMP_NUM_THREADS=$cores "$built/bench_kernels"
fi

if wants collectives; then
  for n in 2 4 8; do
    echo "== collectives, $n ranks"
    fits $n || continue
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $MPIEXEC -n $n "$built/bench_nccl"
  done
fi

# step_ms LABEL THREADS RANKS ARGS...: the median time of a step, in ms
step_ms() {
  local label=$1 threads=$2 ranks=$3
  shift 3
  OMP_NUM_THREADS=$threads \
    OMP_WAIT_POLICY=$([ "$ranks" -gt "$cores" ] && echo passive || echo active) \
    $MPIEXEC -n "$ranks" build/train_gpt "$@" --steps $((steps + 1)) --metrics "$dir/m.jsonl" \
    >"$dir/$label.out" 2>&1 || {
    tail -3 "$dir/$label.out" >&2
    echo nan
    return
  }
  sed -n 's/.*"step_ms":\([0-9.e+]*\).*/\1/p' "$dir/m.jsonl" | tail -n +2 | median
}
row() { # row NAME TOKENS MS [BASE_MS]: one line, with the ratio of tokens/s to the base's
  awk -v name="$1" -v tokens="$2" -v ms="$3" -v base="${4:-0}" 'BEGIN {
    printf "  %-42s %9.1f ms a step %9.0f tokens/s", name, ms, tokens / ms * 1000
    if (base > 0) printf "   %5.2f of the line marked *", base / ms
    printf "\n"
  }'
}
# over TOKENS BASE_MS RANKS ARGS...: a row of ranks with one thread each, and the share of the time
# in which they communicated
over() {
  local tokens=$1 base=$2 ranks=$3
  shift 3
  local layout="$*"
  layout="${layout#"$both "}"
  layout="${layout#"$args "}"
  fits "$ranks" || return
  row "$layout" "$tokens" "$(step_ms ranks 1 "$ranks" "$@")" "$base"
  grep -E '^ *(communicating|predicted from|executed)' "$dir/ranks.out" | sed 's/^ */    /'
}
# share LABEL PEAK: the run's GFLOP/s beside the machine's best product
share() {
  sed -n 's/^speed.* \([0-9.]*\) \([GT]\)FLOP.*/\1 \2/p' "$dir/$1.out" \
    | awk -v peak="$2" '{
      rate = $1 * ($2 == "T" ? 1000 : 1)
      printf "    %.1f GFLOP/s, %.0f%% of the best product of the library (%.1f GFLOP/s)\n",
        rate, 100 * rate / peak, peak
    }'
}

if wants training; then
  # GFLOP/s of the best library product: with 1 thread, with all (on a GPU the same)
  peaks=$(OMP_NUM_THREADS=$cores "$built/bench_kernels" "matmul cublas" | awk -F'|' '
    /^matmul/ {
      split($2, a, " ")
      split($NF, b, " ")
      if (a[2] > one) one = a[2]
      if (b[2] > all) all = b[2]
    }
    END { print one, all }')
  for model in char gpt2; do
    if [ $model = char ]; then
      args="--model char --context 256 --batch 16"
      single=16
    else
      args="--model gpt2 --context 256 --batch 4"
      single=4
    fi
    args="$args --vocab $([ $model = char ] && echo 256 || echo 50257)"
    echo "== training $model, $args"
    one=$(step_ms one 1 1 $args)
    row "1 process, 1 thread" $((single * 256)) "$one"
    share one "${peaks% *}"
    two=$(step_ms two "$cores" 1 $args)
    row "1 process, $cores threads" $((single * 256)) "$two"
    share two "${peaks#* }"
    both="${args/--batch $single/--batch 8}"
    echo "== $model over ranks, $both"
    base=$(step_ms base "$cores" 1 $both)
    row "1 process, $cores threads *" 2048 "$base"
    for layout in "2 --replicate 2" "2 --fsdp 2" "8 --fsdp 8"; do
      over 2048 "$base" ${layout%% *} $both ${layout#* }
    done
    row "1 process, $cores threads *" $((single * 256)) "$two"
    for layout in "--tp 2" "--tp 2 --sequence-parallel"; do
      over $((single * 256)) "$two" 2 $args $layout
    done
    # A pipeline of 8 micro-batches: at best 1 - bubble of the line marked *, bubble = 1/9 for 1f1b
    # and 1/25 for zb
    row "1 process, $cores threads *" 2048 "$base"
    for schedule in 1f1b zb; do
      over 2048 "$base" 2 $both --microbatch 1 --pp 2 --schedule $schedule
    done
    [ $model = gpt2 ] && sed -n '/^memory/,$p' "$dir/two.out"
  done
fi

if wants inference; then
  echo "== inference, gpt2, batch 1, one thread a rank"
  # tokens COUNT: a prompt of so many tokens. field NAME FILE: a number that generate printed
  tokens() { seq 1 "$1" | tr '\n' ' '; }
  field() { sed -n "s/.*$1 \([0-9.]*\).*/\1/p" "$2" | head -1; }
  # decode RANKS PROMPT TOKENS: "first median" in ms, medians of 3 runs
  decode() {
    for _ in 1 2 3; do
      OMP_NUM_THREADS=1 OMP_WAIT_POLICY=active $MPIEXEC -n "$1" build/generate --tp "$1" \
        --model gpt2 --dtype f32 --prompt "$(tokens "$2")" --tokens "$3" --temperature 0 \
        >/dev/null 2>"$dir/g"
      echo "$(field 'first token after' "$dir/g") $(field 'median' "$dir/g")"
    done >"$dir/all"
    echo "$(cut -d' ' -f1 "$dir/all" | median) $(cut -d' ' -f2 "$dir/all" | median)"
  }
  weights=497.8 # MB that a token reads: 124.4 M parameters in f32
  reads() {     # reads THREADS: GB/s
    OMP_NUM_THREADS=$1 "$built/bench_kernels" read \
      | sed -n 's/^read.*: *\([0-9.]*\) GB.*/\1/p'
  }
  reads="$(reads 1) $(reads 2)"
  echo "  reading memory: ${reads% *} GB/s on one core, ${reads#* } on two (or the GPU's)"
  two=""
  one=$(decode 1 90 20)
  ! fits 2 || two=$(decode 2 90 20)
  awk -v one="${one#* }" -v two="${two#* }" -v mb=$weights -v reads="$reads" 'BEGIN {
    split(reads, r, " ")
    printf "  a token after about 100: 1 rank %.1f ms, %.1f GB/s of weights, %.0f%% of reading\n",
      one, mb / one, 100 * mb / one / r[1]
    if (two)
      printf "    --tp 2 %.1f ms, %.2fx faster, %.0f%% of what two cores gain (%.2fx)\n",
        two, one / two, 100 * (one / two) / (r[2] / r[1]), r[2] / r[1]
  }'
  long=$(decode 1 990 20)
  awk -v short="${one#* }" -v long="${long#* }" 'BEGIN {
    printf "  a token after about 1000: %.1f ms, %.2fx of that after 100\n", long, long / short
  }'
  one=$(decode 1 512 2)
  [ -z "$two" ] || two=$(decode 2 512 2)
  awk -v one="${one% *}" -v two="${two% *}" 'BEGIN {
    printf "  512 tokens of prompt: 1 rank %.0f ms", one
    if (two) printf ", --tp 2 %.0f ms, %.2fx faster", two, one / two
    printf "\n"
  }'
fi

if wants checkpoint && fits 4; then
  echo "== saving gpt2 on 4 ranks (--fsdp 4) beside dd of as many bytes, in turn, medians of 5"
  for _ in 1 2 3 4 5; do
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $MPIEXEC -n 4 build/train_gpt --model gpt2 --fsdp 4 \
      --context 16 --batch 4 --steps 1 --checkpoint build/bench-checkpoint >"$dir/c" 2>&1
    saved=$(sed -n 's/.*checkpoint saved: \([0-9.]*\) MB in \([0-9.]*\) s.*/\1 \2/p' "$dir/c")
    copied=$(dd if=/dev/zero of=build/bench-file bs=4M count=356 conv=fsync 2>&1 \
      | sed -n 's/.*copied, \([0-9.]*\) s.*/\1/p')
    echo "$saved $copied"
    rm -rf build/bench-checkpoint build/bench-file
  done >"$dir/saves"
  awk -v s="$(cut -d' ' -f2 "$dir/saves" | median)" -v d="$(cut -d' ' -f3 "$dir/saves" | median)" \
    -v mb="$(head -1 "$dir/saves" | cut -d' ' -f1)" 'BEGIN {
    printf "  %.0f MB in %.2f s: %.0f MB/s; dd %.0f MB/s; %.0f%%\n",
      mb, s, mb / s, 1493.2 / d, 100 * (mb / s) / (1493.2 / d)
  }'
fi

if [ "$only" = pytorch ]; then
  "${PYTHON:-python3}" tests/bench_pytorch.py
fi
