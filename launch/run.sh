#!/usr/bin/env bash
# run.sh: `make run`, `make replay` and `make generate`. What was given to make comes through the
# environment, so that no sign in a name means anything; ARGS and TRAIN_ARGS are the shell's words.
#   launch/run.sh run        BACKEND MPIEXEC THREADS, and perhaps DATA STRATEGY NP ARGS
#   launch/run.sh replay     the same, and perhaps PAGE
#   launch/run.sh generate   the same, and perhaps PROMPT CHECKPOINT TRAIN_ARGS
set -u
cd "$(dirname "$0")/.."
refuse() {
  echo "make $what: $*" >&2
  exit 1
}
what=$1 default=replicate
[ "$what" != replay ] || default=fsdp
strategy=${STRATEGY:-$default}
[ "$what" = generate ] || TRAIN_ARGS=
for name in ARGS TRAIN_ARGS; do
  bash -nc "args=(${!name:-})" 2>/dev/null \
    || refuse "$name is no list of words, as a shell reads them: ${!name}"
done
eval "args=(${ARGS:-}) train_args=(${TRAIN_ARGS:-})"
[ -z "${WHY:-}" ] || [ "$BACKEND" != cpu ] || echo "no GPU is used: $WHY"

# start RANKS PROGRAM ARGS...
start() {
  local ranks=$1
  shift
  export OMP_NUM_THREADS=$((THREADS > ranks ? THREADS / ranks : 1))
  [ "$BACKEND" = cuda ] || export OMP_WAIT_POLICY=passive
  echo "OMP_NUM_THREADS=$OMP_NUM_THREADS ${OMP_WAIT_POLICY:+OMP_WAIT_POLICY=$OMP_WAIT_POLICY }"\
"$MPIEXEC -n $ranks$(printf ' %q' "$@")"
  # a container may have little: Docker 64 MiB
  local shared need=$((ranks * 5000))
  shared=$(df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 { print $4 }')
  [ "${shared:-$need}" -ge $need ] \
    || echo "make $what: /dev/shm has $shared KiB, and each of the $ranks ranks may need 5000:" \
      "start a container with --shm-size=1g" >&2
  # mpiexec reads the standard input even where no rank does, and may die of a long one
  local word reads=no
  for word in "$@"; do [ "$word" != - ] || reads=yes; done
  if [ $reads = yes ]; then $MPIEXEC -n "$ranks" "$@"
  else $MPIEXEC -n "$ranks" "$@" </dev/null; fi
}
# has OPTION: whether ARGS has it
has() {
  local given
  for given in "${args[@]}"; do [ "$given" != "$1" ] || return 0; done
  return 1
}
# default OPTION VALUE: adds it to the command, unless ARGS has the option
default() { has "$1" || command+=("$1" "$2"); }

for word in "${args[@]}" "${train_args[@]}" "${DATA:-}" "${PROMPT:-}" "${CHECKPOINT:-}"; do
  [ "$word" != : ] || refuse "to mpiexec the word ':' is the end of a program's options: give" \
    "another name, or a text in a file, with ARGS=\"--prompt-file FILE\""
done
# what make's variables say, ARGS and TRAIN_ARGS cannot say again
for word in "${args[@]/#/$what}" "${train_args[@]/#/train}"; do
  case $word in
    generate--tp) refuse "--tp comes from NP" ;;
    generate--prompt) refuse "--prompt comes from PROMPT" ;;
    generate--checkpoint | train--checkpoint) refuse "--checkpoint comes from CHECKPOINT" ;;
    train--resume) refuse "--resume is among the options already" ;;
    run--data | replay--data | train--data) [ -z "${DATA:-}" ] || refuse "--data comes from DATA" ;;
  esac
  [[ ! $word =~ ^(run|replay|train)--(pp|replicate|fsdp|cp|tp)$ ]] \
    || refuse "--${BASH_REMATCH[2]} comes from STRATEGY and NP; for another layout start" \
      "build/train_gpt itself, with mpiexec"
done

# ---- ranks: one a GPU; without GPUs one a core, to look at four, and for 3d eight

if [ -n "${NP:-}" ]; then
  ranks=$NP
elif [ "$BACKEND" = cuda ]; then
  ranks=$(launch/detect.sh gpus)
  [ "$ranks" != 0 ] || ranks=1
else
  ranks=$(env -u OMP_NUM_THREADS nproc)
  [ "$what" != replay ] || ranks=4
  [ "$strategy" != 3d ] || ranks=8
fi
# what the default models can be cut into
case $strategy in tp | tp-sequence | pp)
  if [ -z "${NP:-}" ] && [ "$ranks" -gt 4 ] && [ "$what" != generate ] \
    && ! has --model && ! has --heads && ! has --layers; then
    echo "make $what: on 4 of $ranks ranks, which divide the default model"
    ranks=4
  fi
  ;;
esac
[[ $ranks =~ ^[1-9][0-9]{0,3}$ ]] \
  || refuse "NP is '$ranks', expected a number of ranks from 1 to 9999"

# ---- generate: with tensor parallelism on two ranks, from a checkpoint made on first use

if [ "$what" = generate ]; then
  [ -n "${NP:-}" ] || ranks=$((ranks > 1 ? 2 : 1))
  checkpoint=${CHECKPOINT:-build/generate-model}
  has_model() {
    local manifest
    for manifest in "$checkpoint"/manifest.json "$checkpoint"/step-*/manifest.json; do
      [ ! -e "$manifest" ] || return 0
    done
    return 1
  }
  # an empty file, there until the model that was begun here is trained
  unfinished=$checkpoint/.make-generate-unfinished
  is_unfinished() { [ -f "$unfinished" ] && [ ! -L "$unfinished" ] && [ ! -s "$unfinished" ]; }
  if is_unfinished || ! has_model; then
    heads=4 # of the default models: as many ranks can share them
    [ "$BACKEND" != cuda ] || heads=6
    [ "$ranks" -le "$heads" ] || [[ ${TRAIN_ARGS:-} =~ --(model|heads) ]] \
      || refuse "NP is $ranks, but the model that would be trained first has $heads heads"
    if has_model; then echo "make generate: training the model in $checkpoint further"
    else echo "make generate: no model in $checkpoint yet: training one"; fi
    was_unfinished=
    ! is_unfinished || was_unfinished=yes
    mkdir -p -- "$checkpoint" && touch -- "$unfinished" || exit
    is_unfinished || refuse "$unfinished is in the way: it is not the empty file of that name"
    trap 'refuse "the next call goes on with what has been saved in $checkpoint"' INT
    DEFAULT_SAMPLE=0 ARGS="--checkpoint $(printf %q "$checkpoint") --resume ${TRAIN_ARGS:-}" \
      launch/run.sh run || {
      has_model || { # the mark may be that of another call, which trains it
        [[ $was_unfinished && -e $checkpoint/lock ]] || rm -- "$unfinished"
        refuse "no model was trained (above)"
      }
      refuse "the model in $checkpoint is not trained to its end: call again with the same" \
        "TRAIN_ARGS, or remove $unfinished to take it as it is"
    }
    trap - INT
    rm -- "$unfinished"
  fi
  prompt=${PROMPT:-}
  has --prompt-file || prompt=${prompt:-// tensor}
  start "$ranks" build/generate --checkpoint "$checkpoint" ${prompt:+--prompt "$prompt"} \
    --tp "$ranks" "${args[@]}"
  exit
fi

# ---- run and replay

command=(build/train_gpt)
case $strategy in
  serial)
    [ "${NP:-1}" = 1 ] || refuse "STRATEGY=serial is one rank, but NP is $NP"
    ranks=1
    ;;
  replicate | fsdp | cp | tp | pp) command+=("--$strategy" "$ranks") ;;
  zero1) command+=(--fsdp "$ranks" --zero 1) ;;
  tp-sequence) command+=(--tp "$ranks" --sequence-parallel) ;;
  3d)
    [ $((ranks % 4)) = 0 ] || refuse "STRATEGY=3d is pp 2 x fsdp NP/4 x tp 2, but NP is $ranks:" \
      "choose a multiple of 4"
    command+=(--pp 2 --fsdp $((ranks / 4)) --tp 2 --sequence-parallel)
    ;;
  *)
    refuse "STRATEGY is '$strategy', expected serial, replicate, zero1, fsdp, cp, tp," \
      "tp-sequence, pp or 3d"
    ;;
esac
# DATA is one file, whatever its name, or several whose names have no spaces.
if [ -e "${DATA:-}" ]; then
  command+=(--data "$DATA")
elif [ -n "${DATA:-}" ]; then
  for file in $DATA; do
    [ -e "$file" ] || refuse "DATA is '$DATA', and there is no file '$file' in $PWD"
  done
  command+=(--data $DATA)
fi
if [ "$what" = replay ]; then
  ! has --trace \
    || refuse "the replay has a --trace of its own; PAGE=file.html says where"
  # short sequences, so that activations do not dwarf the weights
  page=${PAGE:-build/replay.html}
  trace=${page%.html}.json
  [[ ! -d $page && $page != -* ]] || refuse "PAGE is '$page', expected the name of a file"
  [ ! -e "$page" ] || grep -q '<title>Replay' "$page" || refuse "$page is there, and is no replay"
  new=$trace.$$ # that of this run alone
  trap 'rm -f "$new"' EXIT
  command+=(--trace "$new")
  default --context 32
  sequences=$ranks
  [[ $strategy != pp && $strategy != 3d ]] || sequences=$((2 * ranks)) # more micro-batches
  default --batch $sequences
  default --steps 3
  start "$ranks" "${command[@]}" "${args[@]}" || exit
  [ -s "$new" ] || refuse "the run has ended before the step that is traced"
  # where PAGE says, a file of that name may be anybody's
  mv -f ${PAGE:+--backup=numbered} "$new" "$trace" || exit
  report/replay.sh "$trace" "$page" || exit
  echo "replay: $page"
  exit
fi
if [ "$BACKEND" = cuda ]; then
  default --model char
elif ! has --model; then
  # enough for its sample to look like what it read, and a minute or two on two cores
  command+=(--model tiny)
  default --steps 850
  default --lr 4e-3
fi
default --sample "${DEFAULT_SAMPLE:-400}" # none for `make generate`
default --eval-every 100
# a page of it, unless its files are wanted elsewhere; for `make generate` a checkpoint is enough
page=build/run.html
if has --metrics || has --trace || has --checkpoint; then
  page=
elif [ ! -w build ]; then
  echo "make run: $PWD/build cannot be written to, so this run has no page"
  page=
else
  new=build/run.$$ # that of this run alone: the last run's stay until this one has a page
  trap 'rm -f "$new".json "$new".jsonl' EXIT
  command+=(--metrics $new.jsonl --trace $new.json)
fi
start "$ranks" "${command[@]}" "${args[@]}" || exit
[ -n "$page" ] || exit 0
[ -s $new.json ] || {
  echo "this run has no page, since it has ended before the step that is traced"
  exit
}
for kind in json jsonl; do mv -f $new.$kind build/run.$kind || exit; done
report/replay.sh build/run.json $page build/run.jsonl && echo "look at it: $page"
