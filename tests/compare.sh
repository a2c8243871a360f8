#!/usr/bin/env bash
# compare.sh: the strategies side by side, `make compare`: the same model, batch and seed serially and in each layout, as mpiexec jobs; then tables and
# build/report.html (tests/compare.cpp).
#   ONLY=pp       run again only the jobs whose names begin so (serial, replicate, fsdp, tp, pp, 3d, generate); the others stay as they were
#   STEPS=20      training steps of each job
#   NP=4          ranks of a layout (3d has 8); with GPUs as many as there are
set -u
cd "$(dirname "$0")/.."
only=${ONLY:-} steps=${STEPS:-20} cores=$(nproc)
backend=$(readlink build/train_gpt | cut -d/ -f1)
gpus=0; [ "$backend" = cuda ] && gpus=$(nvidia-smi -L | wc -l)
shared=$(readlink build/train_gpt | grep -c comm-mpi)  # ranks may share a GPU
np=${NP:-4}; [ "$backend" = cuda ] && [ "$shared" = 0 ] && np=${NP:-$gpus}
dir=build/compare; mkdir -p $dir
common="--model tiny --layers 8 --batch 16 --steps $steps --dtype f32"
micro="--microbatch 2"

jobs() {
  printf '%s\t%s\t%s\n' serial 1 "" \
    replicate "$np" "--replicate $np" \
    fsdp-zero1 "$np" "--fsdp $np --zero 1" fsdp-zero2 "$np" "--fsdp $np --zero 2" fsdp-zero3 "$np" "--fsdp $np" \
    tp "$np" "--tp $np" tp-rows "$np" "--tp $np --sequence-parallel" \
    pp-gpipe "$np" "--pp $np --schedule gpipe $micro" pp-1f1b "$np" "--pp $np --schedule 1f1b $micro" \
    pp-interleaved "$np" "--pp $np --schedule interleaved $micro" pp-zb "$np" "--pp $np --schedule zb $micro" \
    3d 8 "--pp 2 --fsdp 2 --tp 2 --sequence-parallel $micro"
}
fits() { [ "$backend" = cpu ] || [ "$shared" = 1 ] || [ "$1" -le "$gpus" ]; }  # a GPU for each rank
again() { [ -z "$only" ] || [ "${1#"$only"}" != "$1" ]; }

began=$SECONDS failed=0
[ -z "$only" ] || { jobs | cut -f1; echo generate; } | grep -q "^$only" || { echo "make compare: ONLY is '$only', expected the beginning of one of: $(jobs | cut -f1 | tr '\n' ' ')generate"; exit 1; }
: >$dir/jobs.txt
printf '%s\n%s\n' "$common" "$(build/train_gpt --model tiny --layers 1 --steps 1 | sed -n 's/^device *//p'), $cores cores" >$dir/about.txt
while IFS=$'\t' read -r name ranks options; do
  if ! fits "$ranks"; then echo "  $name needs $ranks GPUs, here are $gpus: left out (COMM=mpi lets ranks share them)"; continue; fi
  printf '%s\t%s\t%s\n' "$name" "$ranks" "$options" >>$dir/jobs.txt
  if again "$name" || [ ! -e "$dir/$name.jsonl" ]; then
    threads=$((cores / ranks)); [ $threads -gt 0 ] || threads=1
    printf '  %-15s mpiexec -n %s build/train_gpt %s ' "$name" "$ranks" "$options"
    rm -f "$dir/$name.jsonl" "$dir/$name.trace.json"
    start=$SECONDS
    OMP_NUM_THREADS=$threads OMP_WAIT_POLICY=passive mpiexec -n "$ranks" build/train_gpt $common $options --metrics "$dir/$name.jsonl" \
      $(case $options in *--pp*) echo "--trace $dir/$name.trace.json";; esac) >"$dir/$name.out" 2>&1 </dev/null || { echo "FAILED"; tail -3 "$dir/$name.out"; failed=1; continue; }
    echo "($((SECONDS - start)) s)"
  fi
done < <(jobs)
[ $failed = 0 ] || exit 1
if again generate && { [ "$backend" = cpu ] || [ "$gpus" -ge 2 ] || [ "$shared" = 1 ]; }; then
  echo "  generate        mpiexec -n 1 and 2 build/generate --model gpt2 --tp 1 and 2"
  for n in 1 2; do
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive mpiexec -n $n build/generate --tp $n --model gpt2 --prompt "1 2 3" --tokens 30 --temperature 0 2>"$dir/generate-$n.out" >/dev/null </dev/null || { tail -3 "$dir/generate-$n.out"; exit 1; }
    echo "$([ $n = 1 ] && echo one || echo tp) $(sed -n 's/.*median \([0-9.]*\).*/\1/p' "$dir/generate-$n.out" | head -1)"
  done >$dir/tokens.txt
fi
"build/$backend/tests/compare" $dir build/report.html
status=$?
echo "all of it took $((SECONDS - began)) s"
exit $status
