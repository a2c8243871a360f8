#!/usr/bin/env bash
# fuzz.sh [SECONDS] [TARGET]: `make fuzz`: libFuzzer on everything that reads files or words of
# others (tests/fuzz_targets.h), under Address- and UndefinedBehaviorSanitizer, SECONDS in all
# (default 60). Needs clang. What is new is kept in build/fuzz/corpus; a finding in
# build/fuzz/found. `tests/fuzz.sh keep` reduces it to the few inputs of tests/corpus.
set -u
cd "$(dirname "$0")/.."
. tests/lib.sh
here="checkpoint/safetensors.cpp checkpoint/checkpoint.cpp inference/tokenizer.cpp
      launch/options.cpp support/data.cpp support/files.cpp tests/fuzz.cpp"
targets="safetensors manifest vocabulary tokenizer_json shard options"
dir=build/fuzz
mkdir -p $dir/obj $dir/corpus $dir/found
make -s --no-print-directory BACKEND=cpu build/cpu/generate || exit 1
objects=""
for o in $(make -s BACKEND=cpu print-objects); do
  name=${o#build/cpu/obj/} name=${name%.o}
  grep -qwF "$name" <<<"$here" || objects="$objects $o"
done
compile=$(make -s BACKEND=cpu print-compile)
flags="${compile#* } -O1 -g1 -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=all"
headers=$(find . -path ./build -prune -o \( -name '*.h' -o -name '*.cuh' \) -print)
for source in $here; do
  object=$dir/obj/$(basename "$source").o
  [ -f "$object" ] && [ -z "$(find "$source" $headers -newer "$object")" ] && continue
  # shellcheck disable=SC2086
  env MPICH_CXX=clang++ $MPICXX $flags -c "$source" -o "$object" || exit 1
done
# shellcheck disable=SC2086
env MPICH_CXX=clang++ $MPICXX -fsanitize=fuzzer,address,undefined $dir/obj/*.o $objects \
  -o $dir/fuzz -ldnnl -lxxhash -lgomp || exit 1

export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 OMP_NUM_THREADS=1
if [ "${1:-}" = keep ]; then
  for t in $targets; do
    mkdir -p $dir/small $dir/corpus/$t && rm -f $dir/small/*
    FUZZ_TARGET=$t $dir/fuzz -merge=1 -max_len=1200 $dir/small tests/corpus/$t $dir/corpus/$t \
      2>$dir/$t.log || {
      tail -3 $dir/$t.log
      exit 1
    }
    rm -rf tests/corpus/$t && mkdir tests/corpus/$t
    # the smallest ones, 14 kB a target
    find $dir/small -type f -printf '%s %p\n' | sort -n \
      | awk '{ sum += $1; if (sum <= 14000) print $2 }' | xargs -r cp -t tests/corpus/$t
  done
  exit 0
fi
seconds=${1:-60} failed=0
[ $# -gt 1 ] && targets=$2
each=$((seconds / $(wc -w <<<"$targets")))
for t in $targets; do
  mkdir -p $dir/corpus/$t
  if FUZZ_TARGET=$t $dir/fuzz -max_total_time=$((each > 0 ? each : 1)) -max_len=4096 -timeout=20 \
    -rss_limit_mb=3000 -artifact_prefix=$dir/found/$t- -print_final_stats=1 $dir/corpus/$t \
    tests/corpus/$t >$dir/$t.log 2>&1; then
    inputs=$(awk '/number_of_executed_units/ { print $2 }' $dir/$t.log)
    echo "ok   $t  $inputs inputs in $each s, $(grep -o 'cov: [0-9]*' $dir/$t.log | tail -1)"
  else
    echo "FAIL $t  $(grep -m1 -E 'ERROR|runtime error|what\(\)|SUMMARY' $dir/$t.log)"
    failed=1
  fi
done
exit $failed
