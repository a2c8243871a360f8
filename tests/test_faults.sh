#!/usr/bin/env bash
# test_faults.sh: what was saved stays: calls that fail, kills, damage that is none, weights that
# are not finite, links, two runs in one directory, files of an earlier run.
#   tests/test_faults.sh [FAULTS [KILLS [SEED]]]   how many random faults and kills; `make faults`
#                                                  runs 20 and 50 of them
set -u
cd "$(dirname "$0")/.."
. tests/lib.sh
faults=${1:-4} kills=${2:-4} RANDOM=${3:-7}
train=build/cpu/train_gpt tool=build/cpu/checkpoint generate=build/cpu/generate
library=$PWD/build/cpu/tests/libfaults.so
make -s --no-print-directory BACKEND=cpu "${library#"$PWD/"}" || exit 1
chmod 755 "$dir"
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
seq 100000 >"$dir/text"
small="--layers 2 --width 32 --heads 2 --context 16 --batch 4 --data $dir/text"
flat="--lr 0.001 --min-lr 0.001 --warmup 0" # whatever --steps is
one() { timeout 120 $train $small "$@" >"$dir/out" 2>"$dir/err"; }
two() { timeout 120 $MPIEXEC -n 2 $train $small --fsdp 2 "$@" >"$dir/out" 2>"$dir/err"; }
# with_fault VARIABLE=VALUE... -- COMMAND...: one call of the command fails
with_fault() {
  local settings=()
  while [ "$1" != -- ]; do
    settings+=("$1")
    shift
  done
  shift
  timeout 120 env "${settings[@]}" LD_PRELOAD="$library" "$@"
}
two_with_fault() { # VARIABLE=VALUE... -- ARGS...
  local settings=()
  while [ "$1" != -- ]; do
    settings+=("$1")
    shift
  done
  shift
  timeout 120 $MPIEXEC -n 2 env "${settings[@]}" LD_PRELOAD="$library" \
    $train $small --fsdp 2 "$@" >"$dir/out" 2>"$dir/err"
}
steps_in() { (cd "$1" && echo *); }
whole() { $tool verify "$1" >/dev/null; }

two $flat --steps 4 --save-every 2 --keep 0 --checkpoint "$dir/base" \
  || fail a_first_run "$(cat "$dir/err")"
fresh() {
  rm -rf "$dir/c"
  cp -r "$dir/base" "$dir/c"
  last=$dir/c/step-00000004
}

# ---- an error is not damage: resuming stops with file and reason, and touches nothing

said=0 tries=0
for fault in "open 13 Permission denied" "open 116 Stale file handle" "open 12 Cannot allocate" \
  "read 5 Input/output error"; do
  read -r call errno reason <<<"$fault"
  for file in manifest.json optimizer-1.safetensors; do
    fresh
    tries=$((tries + 1))
    if two_with_fault FAULT_PATH="step-00000004/$file" FAULT_CALL="$call" FAULT_AT=1 \
      FAULT_ERRNO="$errno" -- --steps 5 --resume --checkpoint "$dir/c"; then
      echo "$fault: status 0"
    elif ! grep -q "step-00000004/$file cannot be .*: $reason" "$dir/err" \
      || ! diff -r "$dir/base" "$dir/c"; then
      echo "$fault of $file: $(cat "$dir/err")"
    else said=$((said + 1)); fi
  done
done
check an_error_while_reading_is_not_called_damage "[ $said = $tries ]" "$said errors" "of $tries"
fresh
# after what is read when a file is opened and compared
two_with_fault FAULT_PATH="$dir/text" FAULT_CALL=read FAULT_AT=90 FAULT_ERRNO=5 FAULT_RANK=1 -- \
  --steps 100 --resume --checkpoint "$dir/c"
check a_disk_error_in_the_data_costs_no_training "[ $? != 0 ] && whole $dir/c &&
  grep -q 'text cannot be read: Input/output error: stopped after step .*saved' $dir/err" \
  "$(grep -o 'stopped after.*' "$dir/err")" "$(cat "$dir/err")"
fresh
chmod 000 "$last"
chown -R 65534 "$dir/c"
nobody() { setpriv --reuid=65534 --regid=65534 --clear-groups "$@"; }
[ "$(id -u)" = 0 ] || nobody() { "$@"; }
nobody $train $small --steps 5 --resume --checkpoint "$dir/c" >"$dir/out" 2>"$dir/err"
status=$?
for command in "$tool verify" "$tool info" "$generate --prompt x --checkpoint"; do
  nobody $command "$dir/c" >>"$dir/err" 2>&1 && status=0
done
check a_step_without_rights_is_said "[ $status = 1 ] && [ -d $last ] &&
  [ \$(grep -c 'manifest.json cannot be examined: Permission denied' $dir/err) = 4 ]" \
  "by training, verify, info and generate" "status $status: $(cat "$dir/err")"
fresh
chmod 000 "$dir/c"
chown -R 65534 "$dir/c"
nobody $train $small --steps 5 --resume --checkpoint "$dir/c" >"$dir/out" 2>"$dir/err"
check a_directory_without_rights_is_said \
  "[ $? = 1 ] && grep -q 'c.* cannot be .*: Permission denied' $dir/err" \
  "$(sed "s#$dir/##" "$dir/err")" "$(cat "$dir/err")"
fresh
mkdir "$dir/c/step-00000005"
echo mine >"$dir/c/step-00000005/weights-0.safetensors"
chown -R 65534 "$dir/c"
chown -R 0 "$dir/c/step-00000005"
chmod 555 "$dir/c/step-00000005"
nobody $train $small --steps 5 --resume --checkpoint "$dir/c" >"$dir/out" 2>"$dir/err"
check what_cannot_be_removed_does_not_stop_a_save \
  "[ $? = 0 ] && grep -qx mine $dir/c/others-step-00000005/weights-0.safetensors &&
    whole $dir/c/step-00000005" "" "$(cat "$dir/err")"
chmod 755 "$dir"/c/*step-00000005
fresh
sed -i 's/checkpoint, version [0-9]*/checkpoint, version 99/' "$last/manifest.json"
one --steps 5 --resume --checkpoint "$dir/c"
check another_format_is_not_called_damage \
  "[ $? = 1 ] && grep -q 'is of another format' $dir/err && [ -d $last ]" "" "$(cat "$dir/err")"

# ---- weights that are not finite

# the weights' gradients overflow, from 1.6e5 to 2.7e5 on this text; their loss does
for rate in 2e5 1e38; do
  diverges="--lr $rate --min-lr $rate --warmup 0 --clip 0"
  for ranks in one two; do
    rm -rf "$dir/c"
    $ranks --steps 2 --checkpoint "$dir/c"
    $ranks --steps 9 $diverges --save-every 1 --keep 1 --resume --checkpoint "$dir/c"
    status=$?
    check "weights_without_a_next_step_are_not_saved_${rate}_on_$ranks" "[ $status != 0 ] &&
      grep -q 'update of step 3 made weights .* not finite' $dir/err &&
      [ '$(steps_in "$dir/c")' = step-00000002 ] && whole $dir/c" "" "$(cat "$dir/err")"
  done
  one --steps 1 $diverges
  check "a_last_update_without_a_next_step_ends_the_run_$rate" \
    "[ $? = 1 ] && grep -q 'update of step 1 made weights' $dir/err" "" "$(tail -2 "$dir/out")"
done
one --steps 3 --resume --checkpoint "$dir/c"
check and_training_goes_on_from_the_good_ones "[ $? = 0 ]" "" "$(cat "$dir/err")"
$generate --layers 2 --width 32 --heads 2 --prompt x --tokens 3 >/dev/null 2>&1 || fail generate
logits=no_token_comes_from_logits_that_are_NaN # of an import of weights that are not finite
if ! command -v python3 >/dev/null; then
  skip $logits "no python3"
else
  python3 - "$dir" <<'PY'
import json, os, struct, sys
d = sys.argv[1] + "/nan"
os.mkdir(d)
C, T, V = 8, 16, 256
shapes = {"wte.weight": [V, C], "wpe.weight": [T, C], "ln_f.weight": [C], "ln_f.bias": [C]}
for name, shape in {"ln_1": [C], "ln_2": [C]}.items():
    shapes |= {f"h.0.{name}.weight": shape, f"h.0.{name}.bias": shape}
for name, (m, n) in {"attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C), "mlp.c_fc": (C, 4 * C),
                     "mlp.c_proj": (4 * C, C)}.items():
    shapes |= {f"h.0.{name}.weight": [m, n], f"h.0.{name}.bias": [n]}
header, data = {}, b""
for name, shape in shapes.items():
    n = 1
    for s in shape: n *= s
    begin = len(data)
    data += struct.pack("<f", 3e38 if name == "wpe.weight" else 0.1) * n
    header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, len(data)]}
text = json.dumps(header).encode()
open(d + "/model.safetensors", "wb").write(struct.pack("<Q", len(text)) + text + data)
json.dump({"model_type": "gpt2", "n_layer": 1, "n_embd": C, "n_head": 1, "n_positions": T,
           "vocab_size": V}, open(d + "/config.json", "w"))
PY
  $tool import "$dir/nan" "$dir/poor" >/dev/null
  for how in "--temperature 0" "--temperature 1" "--top-k 5"; do
    $generate --checkpoint "$dir/poor" --prompt ab --tokens 2 $how >"$dir/out" 2>"$dir/err"
    check "${logits}_${how//[- ]/}" \
      "[ $? = 1 ] && grep -q 'logits are not all finite' $dir/err" \
      "" "$(cat "$dir/err")"
  done
fi

# ---- what --keep removes

fresh
mkdir "$dir/archive"
mv "$dir"/c/step-00000002 "$dir/archive"
ln -s "$dir/archive/step-00000002" "$dir/c"
ln -s "$dir/archive/nowhere" "$dir/c/step-00000003"
cp -r "$dir/archive" "$dir/before"
two --steps 8 --save-every 1 --keep 1 --resume --checkpoint "$dir/c"
check keep_removes_nothing_behind_a_link "[ $? = 0 ] && diff -r $dir/before $dir/archive &&
  [ '$(steps_in "$dir/c")' = 'step-00000002 step-00000003 step-00000004 step-00000008' ]" \
  "$(steps_in "$dir/c")" "$(steps_in "$dir/c"): $(cat "$dir/err")"
rm "$dir"/archive/step-00000002/manifest.json
two --steps 9 --resume --checkpoint "$dir/c"
check nor_does_the_next_save "[ $? = 0 ] && [ -f $dir/archive/step-00000002/weights-0.safetensors ]"
rm -rf "$dir/c" "$dir/archive"
mkdir "$dir/archive" "$dir/c"
ln -s "$dir/archive" "$dir/c/step-00000002"
echo mine >"$dir/archive/weights-0.safetensors"
one --steps 2 --checkpoint "$dir/c"
check a_save_does_not_go_through_a_link "[ $? = 0 ] && whole $dir/c &&
  [ ! -L $dir/c/step-00000002 ] && [ \"\$(cat $dir/archive/*)\" = mine ]" "" "$(cat "$dir/err")"
fresh
for more in 6 8 10; do two --steps $more --save-every 1 --resume --checkpoint "$dir/c"; done
check what_was_saved_with_keep_0_stays \
  "[ '$(steps_in "$dir/c")' = 'step-00000002 step-00000004 step-00000009 step-00000010' ] &&
  grep -q 'saved: .*; removed step-00000008$' $dir/out" "and every other removal is said" \
  "$(steps_in "$dir/c")"

rm -rf "$dir/k"
one --steps 6 --save-every 1 --keep 2 --checkpoint "$dir/k"
echo mine >"$dir/k/step-00000005/notes"
ln -s step-00000001 "$dir/k/step-00000001"
one --steps 8 --save-every 1 --keep 2 --resume --checkpoint "$dir/k"
check what_has_other_files_stays_and_what_cannot_be_examined_stops_nothing "[ $? = 0 ] &&
  [ '$(steps_in "$dir/k")' = 'step-00000001 step-00000005 step-00000007 step-00000008' ] &&
  grep -q 'saved: .*; removed step-00000006, step-00000005 stays, since it has other f' $dir/out &&
  grep -q 'passed over: .*step-00000001/ cannot be examined: Too many levels' $dir/out &&
  ! $tool verify $dir/k >$dir/said && grep -q '00001/ cannot be examined' $dir/said &&
  [ \$(grep -c whole $dir/said) = 3 ]" "" "$(steps_in "$dir/k"): $(cat "$dir/err" "$dir/out")"
ln -s step-00000009 "$dir/k/step-00000009"
one --steps 9 --resume --checkpoint "$dir/k"
check but_of_the_newest_it_is_refused \
  "[ $? = 1 ] && grep -q 'step-00000009/ cannot be examined' $dir/err" "" "$(cat "$dir/err")"

rm "$dir/k/step-00000009"
one --steps 9 --resume --checkpoint "$dir/k" --metrics "$dir/k.jsonl" \
  || fail metrics_of_a_resumed_run "$(cat "$dir/err")"
printf '{"step":12}\n' >>"$dir/k.jsonl"
cp "$dir/k.jsonl" "$dir/whole.k"
with_fault FAULT_PATH=k.jsonl.partial FAULT_CALL=write FAULT_AT=1 FAULT_ERRNO=28 -- \
  $train $small --steps 10 --resume --checkpoint "$dir/k" --metrics "$dir/k.jsonl" \
  >"$dir/out" 2>"$dir/err"
check metrics_that_cannot_be_cut_stay "[ $? = 1 ] && cmp $dir/k.jsonl $dir/whole.k &&
  [ ! -e $dir/k.jsonl.1 ] && grep -q 'k.jsonl cannot be written: No space' $dir/err" "" \
  "$(cat "$dir/out" "$dir/err")"

# ---- where to go on

fresh
one --steps 5 --resume --checkpoint "$dir/c" --lr 0.5
check other_options_are_said \
  "grep -q '^resume .*with the options .*--lr 0.001 .*--steps 4' $dir/out" "" "$(cat "$dir/out")"
check the_same_data_is_no_news "! grep -q 'is now on' $dir/out" "" "$(cat "$dir/out")"
cp "$dir/text" "$dir/same"
tr 1-8 2-9 <"$dir/same" >"$dir/text"
one --steps 7 --resume --checkpoint "$dir/c"
check another_text_of_the_same_size_is_said \
  "grep -q '^resume .*trained on .*/text, text: .*is now on .*/text, text: ' $dir/out" "" \
  "$(cat "$dir/out")"
cp "$dir/same" "$dir/text"

fresh
two --steps 5 --resume --resume-step 2 --checkpoint "$dir/c" --metrics "$dir/m.jsonl" --eval-every 2
check a_step_is_chosen "[ $? = 0 ] &&
  grep -q '^step 3.*step-00000004 is now .*later-step-' $dir/out &&
  [ '$(steps_in "$dir/c")' = 'later-step-00000004 step-00000002 step-00000005' ] &&
  diff -r $dir/base/step-00000004 $dir/c/later-step-00000004" "" "$(cat "$dir/out" "$dir/err")"
check held_out_losses_are_in_the_metrics \
  "[ \"\$(sed -n 's/^{\"step\":\([0-9]*\),\"loss\":.*\"held_out_loss\":[0-9.]*}/\1/p' \
    $dir/m.jsonl | tr '\n' ' ')\" = '4 5 ' ]" "" "$(cat "$dir/m.jsonl")"
fresh
one --steps 5 --resume --resume-step 3 --checkpoint "$dir/c"
check a_step_that_is_not_there_is_refused \
  "[ $? = 1 ] && grep -q 'no complete checkpoint of step 3 in $dir/c' $dir/err" "" \
  "$(cat "$dir/err")"
printf x | dd of="$last/weights-0.safetensors" bs=1 seek=9000 conv=notrunc 2>/dev/null
one --steps 5 --resume --resume-step 4 --checkpoint "$dir/c"
check a_damaged_step_that_was_chosen_stays_where_it_is "[ $? = 1 ] && [ -d $last ] &&
  grep -q 'resume-step: .*weights-0.safetensors is damaged' $dir/err" "" "$(cat "$dir/err")"
one --steps 5 --resume-step 2 --checkpoint "$dir/none"
check a_step_without_resume_is_refused "[ $? = 1 ] && grep -q 'give both' $dir/err"

# ---- one run in a directory

kernel=$(cat /proc/sys/kernel/random/boot_id)
rm -rf "$dir/c"
$train $small --steps 100000 --save-every 1 --checkpoint "$dir/c" >"$dir/first" 2>&1 &
job=$!
until grep -qs 'checkpoint saved' "$dir/first" || ! kill -0 $job 2>/dev/null; do
  sleep 0.05
done
one --steps 9 --resume --checkpoint "$dir/c"
check a_second_run_is_told_who_holds_the_directory \
  "[ $? = 1 ] && grep -q 'in use by process $job on $(uname -n)' $dir/err" \
  "$(sed "s#$dir/##" "$dir/err")" "$(cat "$dir/err")"
kill -KILL $job
wait $job 2>/dev/null
check a_killed_run_leaves_its_lock "grep -qx '$(uname -n) $job $kernel' $dir/c/lock"
newest=$(steps_in "$dir/c" | grep -o 'step-[0-9]*' | tail -1)
one --steps $((10#${newest#step-} + 2)) --resume --checkpoint "$dir/c"
check which_the_next_takes_over "[ $? = 0 ] && [ ! -e $dir/c/lock ]" "" "$(cat "$dir/err")"
# run_until_it_saves: in $dir/c, on one rank; its next saves are each a few seconds later
run_until_it_saves() {
  rm -rf "$dir/c" "$dir/first"
  $train $small --steps 12000 --save-every 2000 --checkpoint "$dir/c" >"$dir/first" 2>"$dir/err" &
  job=$!
  until grep -qs 'checkpoint saved' "$dir/first" || ! kill -0 $job 2>/dev/null; do sleep 0.02; done
}
run_until_it_saves
mv "$dir/c" "$dir/moved"
until ls "$dir"/c/step-*/manifest.json >"$dir/out" 2>&1 || ! kill -0 $job 2>/dev/null; do
  sleep 0.05
done
check a_run_whose_directory_is_gone_makes_it_again \
  "grep -qx '$(uname -n) $job $kernel' $dir/c/lock && whole $dir/moved" "" "$(cat "$dir/err")"
kill -KILL $job
wait $job 2>/dev/null
one --steps 2000 --seed 5 --checkpoint "$dir/other" # which ended with the same step
cp -r "$dir/other" "$dir/other-too"
run_until_it_saves
mv "$dir/c" "$dir/moved-too" && mv "$dir/other" "$dir/c"
wait $job
check and_touches_nothing_of_a_run_that_has_been_there \
  "[ $? = 1 ] && diff -r $dir/other-too $dir/c && whole $dir/moved-too &&
    grep -q 'has checkpoints of another run by now' $dir/err" "" "$(cat "$dir/err")"
rm -rf "$dir/c"
$tool export "$dir/base" "$dir/exported" >/dev/null
$tool import "$dir/exported" "$dir/c" >/dev/null
$train $small --steps 1000 --resume --checkpoint "$dir/c" >"$dir/first" 2>"$dir/err" &
job=$!
until grep -qs '^resume ' "$dir/first" || ! kill -0 $job 2>/dev/null; do sleep 0.02; done
rm "$dir/c/lock"
wait $job
check but_what_it_goes_on_from_is_its_own_if_imported_too \
  "[ $? = 0 ] && whole $dir/c/step-00001000" "" "$(cat "$dir/err")"
run_until_it_saves
rm "$dir/c/lock"
exec 8>"$dir/c/lock"
flock -w 5 8 || fail a_lock_that_was_removed "is held"
echo "elsewhere 77" >&8
before=$(steps_in "$dir/c")
wait $job
check a_run_whose_directory_is_anothers_saves_no_more "[ $? = 1 ] && whole $dir/c &&
  [ '$(steps_in "$dir/c")' = '$before' ] && grep -q 'in use by process 77 on elsewhere' $dir/err" \
  "" "$(steps_in "$dir/c"), $before: $(cat "$dir/err")"
exec 8>&-
fresh
echo "elsewhere 1234" >"$dir/c/lock"
cp -r "$dir/c" "$dir/locked"
one --steps 9 --resume --checkpoint "$dir/c"
check a_lock_of_another_host_is_never_taken "[ $? = 1 ] && diff -r $dir/c $dir/locked &&
  grep -q 'by process 1234 on elsewhere, says $dir/c/lock: .* if that run has ended' $dir/err" \
  "$(sed "s#$dir/##g" "$dir/err")" "$(cat "$dir/err")"
echo "container 1234 $kernel" >"$dir/c/lock"
one --steps 5 --resume --checkpoint "$dir/c"
check but_that_of_a_dead_container_of_this_one_is "[ $? = 0 ] && [ ! -e $dir/c/lock ]" "" \
  "$(cat "$dir/err")"
fresh
echo "$(uname -n) 99999999 $kernel" >"$dir/c/lock"
chown -R 65534 "$dir/c"
chown 0 "$dir/c/lock"
chmod 444 "$dir/c/lock"
nobody $train $small --steps 9 --resume --checkpoint "$dir/c" >"$dir/out" 2>"$dir/err"
check a_lock_of_another_user_is_read_and_left "[ $? = 1 ] && [ -e $dir/c/lock ] &&
  grep -q 'by process 99999999 on $(uname -n), says .* remove this file' $dir/err" "" \
  "$(cat "$dir/err")"
# a file system without locks; with OTHER another machine writes into the lock after this one
$MPICXX -w -shared -fPIC -x c++ - -o "$dir/noflock.so" <<<'#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
extern "C" int flock(int, int) { return errno = ENOLCK, -1; }
extern "C" int fsync(int fd) {
  char link[64], name[4096] = "";
  sprintf(link, "/proc/self/fd/%d", fd);
  readlink(link, name, sizeof name - 1);
  if (getenv("OTHER") && strstr(name, "/c/lock")) pwrite(fd, "elsewhere 7 x\n", 14, 0);
  return 0;
}'
fresh
echo "$(uname -n) 99999999 $kernel" >"$dir/c/lock"
LD_PRELOAD=$dir/noflock.so one --steps 5 --resume --checkpoint "$dir/c"
check without_locks_too_that_of_a_dead_process_is_taken "[ $? = 0 ] && [ ! -e $dir/c/lock ]" "" \
  "$(cat "$dir/err")"
echo "$(uname -n) 99999999 another-machine" >"$dir/c/lock"
LD_PRELOAD=$dir/noflock.so one --steps 9 --resume --checkpoint "$dir/c"
check but_not_that_of_another_machine_of_the_same_name \
  "[ $? = 1 ] && grep -q 'by process 99999999 on $(uname -n), says' $dir/err" "" \
  "$(cat "$dir/err")"
rm "$dir/c/lock"
OTHER=yes LD_PRELOAD=$dir/noflock.so one --steps 9 --resume --checkpoint "$dir/c"
check of_two_that_start_together_without_locks_one_ends \
  "[ $? = 1 ] && grep -q 'both have started at the same time' $dir/err && [ -e $dir/c/lock ]" "" \
  "$(cat "$dir/err")"
fresh
echo mine >"$dir/file"
ln -sf "$dir/file" "$dir/c/lock"
one --steps 9 --resume --checkpoint "$dir/c"
check a_lock_is_not_written_through_a_link "[ $? = 1 ] && [ \"\$(cat $dir/file)\" = mine ]"

# ---- files of an earlier run

one --steps 3 --metrics "$dir/a.jsonl"
cp "$dir/a.jsonl" "$dir/three"
one --steps 1 --metrics "$dir/a.jsonl"
check metrics_of_an_earlier_run_are_put_aside "cmp $dir/a.jsonl.1 $dir/three &&
  [ \$(grep -c '\"step\"' $dir/a.jsonl) = 1 ] && grep -q '^metrics .*a.jsonl.1 now' $dir/out"
ln -s "$dir/three" "$dir/link.jsonl"
cp "$dir/three" "$dir/before.jsonl"
one --steps 1 --metrics "$dir/link.jsonl"
check metrics_do_not_go_through_a_link \
  "cmp $dir/three $dir/before.jsonl && [ ! -L $dir/link.jsonl ]"
fresh
one --steps 5 --resume --checkpoint "$dir/c" --metrics "$dir/a.jsonl"
cp "$dir/a.jsonl" "$dir/whole.a"
with_fault FAULT_PATH=a.jsonl FAULT_CALL=read FAULT_AT=1 FAULT_ERRNO=5 -- \
  $train $small --steps 6 --resume --checkpoint "$dir/c" --metrics "$dir/a.jsonl" \
  >"$dir/out" 2>"$dir/err"
check metrics_that_cannot_be_read_are_not_cut "[ $? = 1 ] && cmp $dir/a.jsonl $dir/whole.a &&
  [ \$(grep -c '\"step\"' $dir/a.jsonl) = 2 ] && grep -q 'a.jsonl cannot be read' $dir/err" "" \
  "$(cat "$dir/out" "$dir/err")"
for run in 1 2; do
  timeout 120 $MPIEXEC -n 2 $train $small --pp 2 --steps $run --trace "$dir/t.json" >"$dir/out" 2>&1
done
check a_trace_of_an_earlier_run_is_put_aside "[ -s $dir/t.json.1 ] && [ -s $dir/t.json ]"
ln -s "$dir/three" "$dir/z.svg"
build/cpu/show_schedule zb --svg "$dir/z.svg" >/dev/null
check a_drawing_does_not_go_through_a_link "cmp $dir/three $dir/before.jsonl && [ -s $dir/z.svg ]"

# ---- import and export

$tool export "$dir/base" "$dir/hf" >/dev/null
echo '{"a": 0}' >"$dir/hf/vocab.json"
echo '#version' >"$dir/hf/merges.txt"
(
  ulimit -c 0
  ulimit -f 20
  $tool import "$dir/hf" "$dir/in" >"$dir/out" 2>"$dir/err"
)
check a_file_size_limit_is_a_sentence "[ $? = 1 ] && grep -q 'File too large' $dir/err &&
  [ -z \"\$(find $dir/in -name '*.safetensors*' -o -name lock)\" ]" "" "$(cat "$dir/err")"
mkdir "$dir/in/step-00000000"
echo x >"$dir/in/step-00000000/weights-0.safetensors.partial"
check what_a_killed_import_left_is_replaced "$tool import $dir/hf $dir/in >/dev/null &&
  whole $dir/in &&
  [ ! -e $dir/in/step-00000000/weights-0.safetensors.partial ]"
for name in model.safetensors vocab.json; do
  echo mine >"$dir/mine.$name"
  ln -sf "$dir/mine.$name" "$dir/hf/$name"
done
echo "0123456789012345678901234567890123456789" >"$dir/hf/config.json.partial"
cp "$dir/in/vocab.json" "$dir/base"
cp "$dir/in/merges.txt" "$dir/base"
$tool export "$dir/base" "$dir/hf" >/dev/null
check an_export_does_not_go_through_links \
  "[ \"\$(cat $dir/mine.* | sort -u)\" = mine ] && cmp $dir/hf/vocab.json $dir/in/vocab.json &&
  [ ! -e $dir/hf/config.json.partial ] && $tool import $dir/hf $dir/in2 >/dev/null"
rm "$dir"/base/vocab.json "$dir"/base/merges.txt
exec 7>"$dir/hf/model.safetensors.partial"
flock 7
check what_another_process_writes_is_not_touched "! $tool export $dir/base $dir/hf 2>$dir/err &&
  grep -q 'model.safetensors is being written by another process' $dir/err" "" "$(cat "$dir/err")"
exec 7>&-

rm -rf "$dir/in"
for what in import export generate; do
  case $what in
    import) command=("$tool" import "$dir/hf" "$dir/in") file=hf/model.safetensors ;;
    export) command=("$tool" export "$dir/base" "$dir/hf") file=step-00000004/weights-1 ;;
    generate) command=("$generate" --checkpoint "$dir/base" --prompt x --tokens 3)
      file=step-00000004/weights-1 ;;
  esac
  : >"$dir/log"
  with_fault FAULT_PATH=$file FAULT_CALL=read FAULT_LOG="$dir/log" -- "${command[@]}" \
    >"$dir/out" 2>"$dir/err" || fail "$what" "$(cat "$dir/err")"
  [ $what != import ] || rm -r "$dir/in"
  with_fault FAULT_PATH=$file FAULT_CALL=read FAULT_AT="$(wc -l <"$dir/log")" FAULT_ERRNO=5 -- \
    "${command[@]}" >"$dir/out" 2>"$dir/err"
  check "a_disk_that_cannot_read_weights_is_a_sentence_of_$what" \
    "[ $? = 1 ] && [ \$(wc -l <$dir/log) -gt 5 ] &&
      grep -q '$file.* cannot be read: Input/output error' $dir/err" "" "$(cat "$dir/err")"
  with_fault FAULT_PATH=$file FAULT_CALL=read FAULT_AT="$(wc -l <"$dir/log")" FAULT_ERRNO=0 -- \
    "${command[@]}" >"$dir/out" 2>"$dir/err"
  check "but_a_read_of_less_goes_on_in_$what" "[ $? = 0 ]" "" "$(cat "$dir/err")"
done
check and_the_weights_are_the_same "$tool export $dir/in $dir/hf-again >$dir/out &&
  cmp $dir/hf/model.safetensors $dir/hf-again/model.safetensors" "" "$(cat "$dir/out")"
fresh
with_fault FAULT_PATH=c/lock FAULT_CALL=read FAULT_AT=1 FAULT_ERRNO=5 -- \
  $train $small --steps 9 --resume --checkpoint "$dir/c" >"$dir/out" 2>"$dir/err"
check a_lock_that_cannot_be_read_is_named \
  "[ $? = 1 ] && grep -q '$dir/c/lock cannot be read: Input/output error' $dir/err" "" \
  "$(cat "$dir/err")"
# the first looks for checkpoints, and then waits for the lock while they come
rm -rf "$dir/in"
mkdir "$dir/in"
exec 7>"$dir/in/lock"
flock 7
$tool import "$dir/hf" "$dir/in" >"$dir/out" 2>"$dir/err" 7>&- &
job=$!
until ls -l /proc/$job/fd 2>/dev/null | grep -q 'in/lock' || ! kill -0 $job 2>/dev/null; do
  sleep 0.01
done
cp -r "$dir/base/step-00000004" "$dir/in"
exec 7>&-
wait $job
check of_two_imports_at_the_same_time_one_ends "[ $? = 1 ] && [ ! -e $dir/in/step-00000000 ] &&
  grep -q 'in holds checkpoints already' $dir/err" "" "$(cat "$dir/err")"

# ---- a power cut: the order in which a save, an import and an export ask the disk for things

rm -rf "$dir/p" "$dir/log"
mkdir "$dir/p"
with_fault FAULT_PATH="$dir/p" FAULT_LOG="$dir/log" -- $MPIEXEC -n 2 $train $small --fsdp 2 \
  --steps 2 --save-every 1 --keep 1 --checkpoint "$dir/p/new/c" >"$dir/out" 2>"$dir/err" \
  || fail a_run_that_is_listened_to "$(cat "$dir/err")"
with_fault FAULT_PATH="$dir/p" FAULT_LOG="$dir/log" -- $tool import "$dir/hf" "$dir/p/in" \
  >>"$dir/out" 2>"$dir/err" || fail an_import_that_is_listened_to "$(cat "$dir/err")"
with_fault FAULT_PATH="$dir/p" FAULT_LOG="$dir/log" -- $tool export "$dir/base" "$dir/p/hf" \
  >>"$dir/out" 2>"$dir/err" || fail an_export_that_is_listened_to "$(cat "$dir/err")"
# of each line the call and the path, below $dir/p
sed "s#$dir/p/*##" "$dir/log" | awk '
  function directory(path) { sub(/\/?[^\/]*$/, "", path); return path }
  function bad(what) { print what; failed = 1 }
  $1 == "write" { synced[$2] = 0 }
  $1 == "fsync" {
    synced[$2] = 1
    for (path in waiting) if (waiting[path] == $2) delete waiting[path]
  }
  $1 == "rename" && $2 !~ /lock/ {
    if (!synced[$2 ".partial"]) bad($2 " has its name before its bytes")
    if (done[directory($2)]) bad($2 " comes after the manifest")
    done[directory($2)] = $2 ~ /manifest.json$/
    waiting[$2] = directory($2)
    renames++
    if (!done[directory($2)]) next
    waiting[directory($2)] = directory(directory($2))
    manifests++
  }
  $1 == "unlink" && $2 ~ /step-00000001\/manifest.json$/ {
    for (path in waiting) bad("step 1 is removed before the disk has the name of " path)
    first = 1
  }
  $1 == "unlink" && $2 ~ /step-00000001/ && !first { bad($2 " goes before the manifest") }
  END {
    for (path in waiting) bad("the name of " path " is not on the disk at the end")
    print renames + 0, manifests + 0, first + 0
    exit failed
  }' >"$dir/order"
check names_come_after_bytes_manifests_last_and_directories_are_synced \
  "[ $? = 0 ] && [ '$(tail -1 "$dir/order")' = '14 3 1' ] &&
    grep -q '^fsync $dir/p/new\$' $dir/log && grep -q '^fsync $dir/p/*\$' $dir/log" \
  "renames, manifests, removals: $(tail -1 "$dir/order")" "$(cat "$dir/order")"

# ---- random faults: one call of a run fails

two $flat --steps 6 --checkpoint "$dir/whole" || fail the_run_without_faults "$(cat "$dir/err")"
same() { cmp -s "$1/weights-0.safetensors" "$2/weights-0.safetensors" \
  && cmp -s "$1/weights-1.safetensors" "$2/weights-1.safetensors" \
  && cmp -s "$1/optimizer-0.safetensors" "$2/optimizer-0.safetensors" \
  && cmp -s "$1/optimizer-1.safetensors" "$2/optimizer-1.safetensors"; }
rm -rf "$dir/hf" "$dir/in"
$tool export "$dir/base" "$dir/hf" >/dev/null
cp "$dir/hf/model.safetensors" "$dir/model"
# one run of KIND with the variables given, in fresh directories below $dir/x
run_once() {
  local kind=$1
  shift
  rm -rf "$dir/x"
  mkdir "$dir/x"
  cp -r "$dir/base" "$dir/x/c"
  cp -r "$dir/hf" "$dir/x/hf"
  case $kind in
    save | resume) two_with_fault "$@" FAULT_PATH="$dir/x" -- $flat --steps 5 --resume \
      --checkpoint "$dir/x/c" ;;
    import) with_fault "$@" FAULT_PATH="$dir/x" -- $tool import "$dir/x/hf" "$dir/x/in" ;;
    export) with_fault "$@" FAULT_PATH="$dir/x" -- $tool export "$dir/x/c/step-00000002" \
      "$dir/x/hf" ;;
  esac >"$dir/out" 2>"$dir/err"
}
errnos=(1 5 11 12 13 23 24 28 30 39 116 122)
good=0 ended=0
for ((i = 0; i < faults; i++)); do
  kinds=(save resume import export)
  kind=${kinds[i % 4]} rank=$((RANDOM % 2)) pick=""
  [ $((i % 4)) -lt 2 ] || rank=""
  : >"$dir/log"
  run_once "$kind" FAULT_RANK=$rank FAULT_LOG="$dir/log" \
    || fail "a_run_of_$kind" "$(cat "$dir/err")"
  case $kind in # which of its calls: a save's come with the new step
    save) lines=$(grep -n 'step-00000005\|unlink\|x/c$' "$dir/log" | cut -d: -f1) ;;
    resume) lines=$(grep -n 'step-0000000[24]\|lock' "$dir/log" | cut -d: -f1) ;;
    *) lines=$(seq "$(wc -l <"$dir/log")") ;;
  esac
  # first which kind of call, so that many reads do not hide the few others
  call=$(sed -n "$(sed 's/$/p/' <<<"$lines" | tr '\n' ';')" "$dir/log" | cut -d' ' -f1 | sort -u \
    | sed -n "$((RANDOM % $(sed -n "$(sed 's/$/p/' <<<"$lines" | tr '\n' ';')" "$dir/log" \
      | cut -d' ' -f1 | sort -u | wc -l) + 1))p")
  pick=$(for n in $lines; do sed -n "${n}s/^$call .*/$n/p" "$dir/log"; done | shuf -n 1 \
    --random-source=<(yes $RANDOM))
  errno=${errnos[RANDOM % ${#errnos[@]}]}
  case $call in read | write) [ $((RANDOM % 2)) = 0 ] || errno=0 ;; esac # it moves less
  run_once "$kind" FAULT_RANK=$rank FAULT_AT="$pick" FAULT_ERRNO="$errno"
  status=$?
  what="$kind: $(sed -n "${pick}p" "$dir/log" | sed "s#$dir/x/##") fails with $errno"
  problem=""
  [ -n "$pick" ] || problem="no call to choose from"
  if [ $status != 0 ]; then
    ended=$((ended + 1))
    [ $status = 1 ] && [ -s "$dir/err" ] && ! grep -q 'crashed\|terminate called' "$dir/err" \
      || problem="no sentence, status $status"
  fi
  said=$(sed "s#$dir/x/##g" "$dir/err" | head -1)
  diff -r "$dir/base/step-00000004" "$dir/x/c/step-00000004" >/dev/null \
    || problem="$problem; the good checkpoint is not as it was"
  case $kind in
    save | resume)
      [ $status != 0 ] || whole "$dir/x/c/step-00000005" || problem="$problem; saved badly"
      two $flat --steps 6 --resume --checkpoint "$dir/x/c" \
        || problem="$problem; it does not go on, status $?: $(cat "$dir/err") $(tail -1 "$dir/out")"
      [ ! -e "$dir/x/c/lock" ] || problem="$problem; the lock is left"
      same "$dir/whole/step-00000006" "$dir/x/c/step-00000006" \
        || problem="$problem; other weights"
      ;;
    import)
      # an error after the last write, as it is described, leaves a complete one
      [ -e "$dir/x/in/step-00000000/manifest.json" ] \
        || $tool import "$dir/x/hf" "$dir/x/in" >"$dir/out" 2>"$dir/err" \
        || problem="$problem; no second import: $(cat "$dir/err")"
      whole "$dir/x/in" && $tool export "$dir/x/in" "$dir/x/again" >/dev/null \
        && cmp -s "$dir/model" "$dir/x/again/model.safetensors" \
        || problem="$problem; imported badly"
      ;;
    export)
      [ $status = 0 ] || cmp -s "$dir/model" "$dir/x/hf/model.safetensors" \
        || $tool import "$dir/x/hf" "$dir/x/in" >/dev/null || problem="$problem; half an export"
      $tool export "$dir/x/c" "$dir/x/hf" >/dev/null \
        && cmp -s "$dir/model" "$dir/x/hf/model.safetensors" \
        || problem="$problem; no second export"
      ;;
  esac
  if [ -z "$problem" ]; then good=$((good + 1)); else echo "$what, $said: $problem"; fi
  [ $faults -lt 10 ] || echo "     $what: status $status ${said:+, $said}"
done
check what_was_complete_survives_any_call_that_fails "[ $good = $faults ]" \
  "$good random faults of save, resume, import and export, $ended of which ended the run"

# ---- random kills: the uninterrupted run's weights

wide="--layers 2 --width 128 --heads 2 --context 16 --batch 12 --steps 10 --data $dir/text"
layouts=("" "" "--fsdp 2" "--fsdp 3" "--fsdp 2 --tp 2") # by number of ranks
ranks_of() { timeout 120 $MPIEXEC -n "$1" bash -c \
  'echo $$ >"$1.$PMI_RANK"; shift; exec "$@"' - "$dir/pid" $train $wide ${layouts[$1]} \
  --save-every 1 --checkpoint "$2" "${@:3}"; }
reached=0 saving=0 resuming=0 killed=0
for ((i = 0; i < kills; i++)); do
  n=$((i % 4 + 1)) c=$dir/k$((i % 4 + 1))
  [ -d "$dir/r$n" ] || ranks_of $n "$dir/r$n" >"$dir/out" 2>&1 || fail reference "$(cat "$dir/out")"
  # half of them while a checkpoint is resumed, or soon after a save has begun; the others anywhere
  rm -rf "$c"
  when=$(((i + i / 4) % 4)) resume=""
  if [ $when = 0 ]; then
    resume=--resume
    mkdir "$c"
    cp -r "$dir/r$n/step-00000009" "$c"
  fi
  rm -f "$dir"/pid.*
  : >"$dir/out"
  ranks_of $n "$c" $resume >"$dir/out" 2>"$dir/err" &
  job=$!
  case $when in
    0)
      until [ -e "$c/lock" ] || ! kill -0 $job 2>/dev/null; do sleep 0.01; done
      sleep 0.0$((RANDOM % 5))
      ;;
    1)
      until [ "$(ls -d "$c"/step-* 2>/dev/null | wc -l)" -ge $((1 + RANDOM % 2)) ] \
        || ! kill -0 $job 2>/dev/null; do sleep 0.005; done
      sleep 0.0$((RANDOM % 3))
      ;;
    *)
      until grep -qs '^step ' "$dir/out" || ! kill -0 $job 2>/dev/null; do sleep 0.02; done
      sleep "0.$((RANDOM % 7))$((RANDOM % 10))"
      ;;
  esac
  if kill -KILL "$(cat "$dir/pid.$((RANDOM % n))" 2>/dev/null)" 2>/dev/null; then
    killed=$((killed + 1))
  fi
  wait $job 2>/dev/null
  if [ $when = 0 ] && ! grep -q '^step [0-9]' "$dir/out"; then
    resuming=$((resuming + 1))
  elif [ -n "$(for s in "$c"/step-*; do [ -e "$s/manifest.json" ] || echo x; done)" ]; then
    saving=$((saving + 1))
  fi
  ranks_of $n "$c" --resume >"$dir/out" 2>"$dir/err"
  status=$?
  [ $status = 0 ] || echo "after a kill: $(cat "$dir/err")"
  equal=yes
  for file in "$dir/r$n"/step-00000010/*.safetensors; do
    cmp -s "$file" "$c/step-00000010/${file##*/}" || equal="no: ${file##*/}"
  done
  [ "$equal" = yes ] && reached=$((reached + 1)) || echo "$n ranks: $equal; $(steps_in "$c")"
done
check killed_runs_end_with_the_uninterrupted_weights \
  "[ $reached = $kills ] && [ $killed -ge $((kills > 0)) ]" \
  "$killed kills over 1 to 4 ranks, $saving during a save, $resuming during a resume" \
  "$reached of $kills, $killed kills"

sums_up
