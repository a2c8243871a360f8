#!/usr/bin/env bash
# compare.sh: the strategies side by side, `make compare`: the same model, batch and seed serially
# and in each layout, as mpiexec jobs; then tables and build/report.html (tests/compare.cpp).
#   ONLY=pp       run again only the jobs whose names begin so (serial, replicate, fsdp, cp, tp, pp,
#                 3d, generate); the others stay as they were, unless their command or the text they
#                 train on is another one now
#   STEPS=20      training steps of each job
#   NP=4          ranks of a layout: 1, 2 or 4 (3d has 8); with GPUs the largest of these that
#                 leaves each rank one
set -u
cd "$(dirname "$0")/.."
. tests/lib.sh
only=${ONLY:-} steps=${STEPS:-20}
trap 'exit 130' INT TERM # a job that is interrupted saves, and ends well
program=$(readlink build/train_gpt) backend=${program%%/*}
refuse() {
  echo "make compare: $*"
  exit 1
}
gpus=0
[ "$backend" = cpu ] || gpus=$(launch/detect.sh gpus)
# a GPU for each rank, unless they share
fits() {
  [ "$backend" = cpu ] || [[ $program == *comm-mpi* ]] || [ "$1" -le "$gpus" ]
}
np=${NP:-$(if fits 4; then echo 4; elif fits 2; then echo 2; else echo 1; fi)}
divides="what the 4 heads, the 8 layers in two chunks a stage and the batch of 16 divide into"
[[ $np =~ ^[124]$ ]] || refuse "NP is '$np', expected 1, 2 or 4: $divides"
[[ $steps =~ ^[0-9]+$ ]] && [ "$steps" -ge 3 ] || refuse "STEPS is '$steps', expected 3 or more"
dir=build/compare
mkdir -p $dir
common="--model tiny --layers 8 --batch 16 --steps $steps --dtype f32"
micro="--microbatch 2"

jobs() {
  job() { printf '%s\t%s\t%s\n' "$1" "$2" "${*:3}"; } # NAME RANKS OPTIONS
  job serial 1
  if [ "$np" != 1 ]; then
    job replicate "$np" --replicate "$np"
    job fsdp-zero1 "$np" --fsdp "$np" --zero 1
    job fsdp-zero2 "$np" --fsdp "$np" --zero 2
    job fsdp-zero3 "$np" --fsdp "$np"
    job cp "$np" --cp "$np"
    job tp "$np" --tp "$np"
    job tp-sequence "$np" --tp "$np" --sequence-parallel
    job pp-gpipe "$np" --pp "$np" --schedule gpipe $micro
    job pp-1f1b "$np" --pp "$np" --schedule 1f1b $micro
    job pp-interleaved "$np" --pp "$np" --schedule interleaved $micro
    job pp-zb "$np" --pp "$np" --schedule zb $micro
    job pp-zbv "$np" --pp "$np" --schedule zbv $micro
  fi
  job 3d 8 --pp 2 --fsdp 2 --tp 2 --sequence-parallel $micro
}
# due NAME COMMAND: whether the job has to run, because ONLY says so or what is there was made by
# another command
due() {
  [[ $1 == "$only"* ]] || [ ! -e "$dir/$1.command" ] || [ "$(cat "$dir/$1.command")" != "$2" ]
}
left_out() {
  echo "  $1: left out, since it needs $2 GPUs and here are $gpus (COMM=mpi lets ranks share them)"
}

began=$SECONDS failed=0
names="$(jobs | cut -f1) generate"
printf '%s\n' $names | grep -q "^$only" \
  || refuse "ONLY is '$only', expected the beginning of one of:" $names
build/train_gpt --model tiny --layers 1 --steps 1 >$dir/about.out 2>&1 || {
  tail -3 $dir/about.out
  refuse "build/train_gpt does not run"
}
printf '%s\n%s\n' "$common" "$(sed -n 's/^device *//p' $dir/about.out), $cores cores" \
  >$dir/about.txt
data=$(sed -n 's/^data *//p' $dir/about.out) # the project's own sources, so it changes with them
: >$dir/jobs.txt
[ "$np" != 1 ] || if fits 2; then
  echo "  NP is 1: replicate, fsdp, tp and pp are left out"
else
  left_out "each of replicate, fsdp, tp and pp" 2
fi
while IFS=$'\t' read -r name ranks options; do
  fits "$ranks" || {
    left_out "$name" "$ranks"
    continue
  }
  printf '%s\t%s\t%s\n' "$name" "$ranks" "$options" >>$dir/jobs.txt
  command="mpiexec -n $ranks $program $common $options on $data"
  due "$name" "$command" || continue
  printf '  %-15s mpiexec -n %s build/train_gpt %s ' "$name" "$ranks" "$options"
  rm -f "$dir/$name.command" "$dir/$name."{jsonl,json,html}
  start=$SECONDS
  OMP_NUM_THREADS=$(threads "$ranks") OMP_WAIT_POLICY=passive $MPIEXEC -n "$ranks" \
    build/train_gpt $common $options --metrics "$dir/$name.jsonl" \
    --trace "$dir/$name.json" >"$dir/$name.out" 2>&1 </dev/null || {
    echo "FAILED"
    tail -3 "$dir/$name.out"
    failed=1
    continue
  }
  report/replay.sh "$dir/$name.json" "$dir/$name.html" || refuse "no replay of $name"
  echo "$command" >"$dir/$name.command"
  echo "($((SECONDS - start)) s)"
done < <(jobs)
[ $failed = 0 ] || refuse "a job failed (above): no report"

generate="mpiexec -n 1 and 2 ${program%train_gpt}generate --tp 1 and 2"
if ! fits 2; then
  rm -f $dir/tokens.txt
  left_out "generate --tp 2" 2
elif due generate "$generate"; then
  echo "  generate        mpiexec -n 1 and 2 build/generate --model gpt2 --tp 1 and 2"
  rm -f $dir/generate.command $dir/tokens.txt
  for n in 1 2; do
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $MPIEXEC -n $n build/generate --tp $n --model gpt2 \
      --prompt "1 2 3" --tokens 30 --temperature 0 >"$dir/generate-$n.out" 2>&1 </dev/null \
      || {
        tail -3 "$dir/generate-$n.out"
        refuse "generate with --tp $n failed (above): no report"
      }
    label=one
    [ $n = 1 ] || label=tp
    echo "$label $(sed -n 's/.*median \([0-9.]*\).*/\1/p' "$dir/generate-$n.out" | head -1)" \
      >>$dir/tokens.txt
  done
  echo "$generate" >$dir/generate.command
fi
"build/$backend/tests/compare" $dir build/report.html
status=$?
echo "all of it took $((SECONDS - began)) s"
exit $status
