#!/usr/bin/env bash
# test_checkpoint.sh: checkpoints as a user meets them: any layout resumes what any other saved,
# kills and signals lose nothing, damage is noticed and passed over, and Hugging Face's files go out
# and come back.
set -u
cd "$(dirname "$0")/.."
train=build/cpu/train_gpt tool=build/cpu/checkpoint generate=build/cpu/generate root=$PWD
. tests/lib.sh
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive

# ---- 8 layouts, 64 pairs

settings="pp=1 replicate=2 fsdp=3,zero=1 fsdp=4 tp=3,by_rows=1 pp=2,tp=2,schedule=zb"
settings="$settings replicate=2,fsdp=3,zero=2"
settings="$settings pp=2,fsdp=2,tp=2,schedule=interleaved,chunks=2,by_rows=1"
ranks() { # of a setting: the product of its axes
  tr , '\n' <<<"$1" | grep -vE '^(zero|schedule|chunks|by_rows|dtype)=' \
    | awk -F= 'BEGIN { n = 1 } { n *= $2 } END { print n }'
}
for dtype in f64 bf16; do
  saved="" pairs=0
  for s in $settings; do
    $MPIEXEC -n "$(ranks "$s")" build/cpu/tests/test_checkpoint save "$dir/$dtype-$s" \
      "$s,dtype=$dtype" >"$dir/out" 2>&1 || fail "saving_$s" "$(tail -2 "$dir/out")"
    saved="$saved $dir/$dtype-$s"
  done
  : >"$dir/pairs"
  for s in $settings; do
    # in the same layout only: elsewhere bf16's sums differ
    [ $dtype = bf16 ] && saved="$dir/$dtype-$s"
    $MPIEXEC -n "$(ranks "$s")" build/cpu/tests/test_checkpoint resume "$s,dtype=$dtype" $saved \
      2>"$dir/err" \
      | awk -v to="$dir/$dtype-$s" '{ print $1 == to ? "same" : "other", $2 }' >>"$dir/pairs" \
      || cat "$dir/err"
  done
  pairs=$(grep -cE ' [0-9.]+(e[-+][0-9]+)?$' "$dir/pairs") # a difference of inf is none
  worst=$(awk '$2 > w { w = $2 } END { print w + 0 }' "$dir/pairs")
  same=$(awk '$1 == "same" && $2 == 0' "$dir/pairs" | wc -l)
  if [ $dtype = f64 ]; then
    check what_one_layout_saves_every_layout_resumes \
      "[ $pairs = 64 ] && at_most $worst 1e-12" \
      "$pairs pairs of 8 layouts on 1 to 8 ranks: 5 losses within $worst" "$pairs pairs, $worst"
  fi
  check resuming_in_the_same_layout_gives_the_same_bits_$dtype "[ $same = 8 ]" "8 layouts" \
    "$same of 8"
done

# ---- copies

differ() { # SETTING PARAMETER 'what differs, with places'
  rm -rf "$dir/copies"
  $MPIEXEC -n "$(ranks "$1")" build/cpu/tests/test_checkpoint differ "$dir/copies" "$1" "$2" \
    >"$dir/out" 2>"$dir/err"
  # of three steps with --keep 1, the last with copies that differ
  local said="nothing older is removed, since copies of a weight differ (.*): $3" left="00002 00003"
  [ -n "$3" ] || said="removed step-00000002" left=00003
  check "copies_that_differ_are_named_$1" \
    "sed -n 2p $dir/out | grep -qx 'removed step-00000001' &&
    sed -n 3p $dir/out | grep -qx '$said' &&
    [ '$(cd "$dir/copies" && echo step-*)' = '$(printf 'step-000%s\n' $left | paste -sd' ')' ]" \
    "$(sed -n 3p "$dir/out")" "$(cat "$dir/out" "$dir/err")"
}
differ replicate=3,fsdp=2 h.0.mlp.c_fc.weight "h.0.mlp.c_fc.weight, elements .*, on ranks 1 and 5"
differ tp=3 h.1.ln_1.weight "h.1.ln_1.weight, .*, on ranks 0 and 2"
differ pp=2,tp=2,by_rows=1 wte.weight "wte.weight (slices .*), elements .*, on ranks 1 and 3"
differ fsdp=2,tp=2,dtype=bf16 h.0.attn.c_attn.weight "" # of which there are no copies

mkdir "$dir/partial"
leaves_out() { # PARAMETER 'what is said'
  $MPIEXEC -n 2 build/cpu/tests/test_checkpoint lacks "$dir/partial" fsdp=2 "$1" >"$dir/out" \
    2>"$dir/err"
  check "a_partition_that_leaves_out_some_of_$1_is_not_saved" \
    "[ $? != 0 ] && [ -z '$(ls "$dir/partial")' ] && grep -q '$2' $dir/err" "" \
    "$(cat "$dir/out" "$dir/err")"
}
leaves_out h.6.mlp.c_fc.weight "h.6.mlp.c_fc.weight of shape (20, 80) ends after 464 elements"
leaves_out h.6.mlp.c_proj.bias "no rank has saved h.6.mlp.c_proj.bias"

# ---- size

$MPIEXEC -n 8 $train --model tiny --layers 4 --width 256 --heads 4 --context 32 --batch 8 --pp 2 \
  --fsdp 2 --tp 2 --steps 1 --checkpoint "$dir/size" >"$dir/out" 2>&1
bytes=$(du -bc "$dir"/size/step-*/* | tail -1 | cut -f1)
once=$((((256 + 32) * 256 + 4 * (12 * 256 * 256 + 13 * 256) + 2 * 256) * 12))
more=$(awk "BEGIN { printf \"%.2f\", ($bytes - $once) * 100 / $once }")
check weights_and_moments_are_written_once \
  "[ $bytes -le $((once + once / 100)) ] && [ $bytes -ge $once ]" \
  "$bytes bytes on 8 ranks, $more % more than weights and moments" \
  "$bytes of $once: $(tail -1 "$dir/out")"

# ---- names that are no UTF-8, which a manifest is

latin=$dir/caf$'\xe9'.txt
cp README.md "$latin"
least="--model tiny --layers 1 --width 16 --heads 1 --context 16 --batch 2"
on_latin() { $train $least --data "$latin" --checkpoint "$dir/latin" "$@" >>"$dir/out" 2>&1; }
check data_of_any_name_is_saved_and_resumed \
  "on_latin --steps 2 && on_latin --steps 3 --resume && $tool verify $dir/latin >/dev/null" "" \
  "$(tail -1 "$dir/out")"

# ---- killed at random, stopped by signals

shape="--model tiny --heads 2 --context 32 --batch 8"
small="$shape --layers 2 --width 64 --steps 300"
same_weights() {
  rm -rf "$dir/a" "$dir/b"
  $tool export "$1" "$dir/a" >/dev/null && $tool export "$2" "$dir/b" >/dev/null \
    && cmp -s "$dir/a/model.safetensors" "$dir/b/model.safetensors"
}
$MPIEXEC -n 2 $train $small --fsdp 2 --checkpoint "$dir/whole" --metrics "$dir/whole.jsonl" \
  >"$dir/out" 2>&1 || fail an_uninterrupted_run "$(tail -2 "$dir/out")"
RANDOM=7 kills=0 saves=0 runs=0 resumed=""
while :; do
  : >"$dir/out"
  $MPIEXEC -n 2 $train $small --fsdp 2 --checkpoint "$dir/killed" --save-every 1 --metrics \
    "$dir/killed.jsonl" $resumed >"$dir/out" 2>"$dir/err" &
  job=$! resumed=--resume
  if [ $kills -lt 10 ]; then
    until grep -q '^step' "$dir/out" || ! kill -0 $job 2>/dev/null; do sleep 0.02; done
    sleep "0.$((RANDOM % 4))$((RANDOM % 10))"
    victim=$(rank_pids "$dir/killed" | sed -n "$((RANDOM % 2 + 1))p")
    if [ -n "$victim" ] && kill -KILL "$victim" 2>/dev/null; then kills=$((kills + 1)); fi
    ls -d "$dir"/killed/step-* 2>/dev/null | while read -r s; do
      [ -f "$s/manifest.json" ] || echo x
    done | grep -q x && saves=$((saves + 1))
  fi
  wait $job
  # ended, and not by a kill: by the status, and by what is printed at the end
  if grep -q "give more --steps" "$dir/out" \
    || { grep -q '^step 300/300' "$dir/out" && grep -q '^speed' "$dir/out"; }; then
    [ $kills -ge 10 ] && break
    rm -rf "$dir/killed" "$dir/killed.jsonl" # the kills came too late: once more from the start
    resumed=""
  fi
  [ $((runs += 1)) -gt 40 ] && break
done
check killed_runs_resume_to_the_uninterrupted_weights \
  "[ $kills -ge 10 ] && same_weights $dir/whole $dir/killed" \
  "$kills kills, $saves of them left an unfinished save" \
  "after $kills kills: $(tail -n 2 "$dir/err")"
check metrics_of_resumed_runs_have_every_step_once \
  '[ "$(grep -o "\"step\":[0-9]*" "$dir/killed.jsonl" | sort -u | wc -l)" = 300 ] &&
    [ "$(grep -c "\"step\"" "$dir/killed.jsonl")" = 300 ]' \
  "300 steps"

for how in "TERM mpiexec" "INT mpiexec" "TERM rank"; do
  name=${how// /_to_}
  for _ in 1 2 3; do # a signal that comes too late stops nothing
    rm -rf "$dir/stop" "$dir/stop.jsonl"
    $MPIEXEC -n 2 $train $small --fsdp 2 --checkpoint "$dir/stop" --metrics "$dir/stop.jsonl" \
      >"$dir/out" 2>"$dir/err" &
    job=$!
    until [ "$(grep -s '"step"' "$dir/stop.jsonl" | wc -l)" -ge 5 ] \
      || ! kill -0 $job 2>/dev/null; do
      sleep 0.02
    done
    whom=$job
    [ "${how#* }" = mpiexec ] || whom=$(rank_pids "$dir/stop" | tail -1)
    before=$(wc -l <"$dir/stop.jsonl")
    kill -${how% *} $whom
    wait $job
    status=$?
    stopped=$(sed -n 's/^step \([0-9]*\).*stopped by a signal.*/\1/p' "$dir/out")
    [ -z "$stopped" ] && [ "$before" -ge 250 ] || break
  done
  $MPIEXEC -n 2 $train $small --fsdp 2 --checkpoint "$dir/stop" --resume >"$dir/out2" 2>&1
  check "a_run_stopped_by_SIG${name}_is_saved_and_resumes" \
    "[ $status = 0 ] && [ -n '$stopped' ] && [ '${stopped:-300}' -lt 300 ] &&
    same_weights $dir/whole $dir/stop" \
    "after step $stopped" \
    "status $status, stopped at '$stopped': $(tail -1 "$dir/err") $(tail -1 "$dir/out2")"
done

rm -rf "$dir/stop" "$dir/stop.jsonl" # in the last step: while it is evaluated
$train --model tiny --layers 2 --width 256 --context 512 --batch 1 --steps 1 --eval-every 1 \
  --checkpoint "$dir/stop" --metrics "$dir/stop.jsonl" >"$dir/out" 2>"$dir/err" &
job=$!
for _ in $(seq 500); do
  grep -qs '^step 1/1' "$dir/out" && break
  sleep 0.02
done
kill -TERM $job
wait $job
status=$?
check a_signal_in_the_last_step_promises_nothing \
  "[ $status = 0 ] && grep -q 'checkpoint saved' $dir/out &&
    ! grep -q 'goes on from here' $dir/out" \
  "" "status $status: $(tail -2 "$dir/out")"

# ---- damage: the checkpoint before stays good and is found

$MPIEXEC -n 2 $train $shape --layers 2 --width 64 --steps 20 --fsdp 2 --checkpoint "$dir/good" \
  --save-every 10 >"$dir/out" 2>&1
fresh() {
  rm -rf "$dir/d"
  cp -r "$dir/good" "$dir/d"
  last=$dir/d/step-00000020
}
flip() { printf 'x' | dd of="$1" bs=1 seek=9000 conv=notrunc 2>/dev/null; }
resumes() { # NAME 'what is said': resuming says it, goes on from step 10 and ends well
  if $MPIEXEC -n 2 $train $shape --layers 2 --width 64 --steps 30 --tp 2 --checkpoint "$dir/d" \
    --resume >"$dir/out" 2>"$dir/err" && grep -q -- "passed over: .*$2" "$dir/out" \
    && grep -q '^resume .*step-00000010, saved on' "$dir/out"; then
    ok "$1" "$(grep -o 'passed over.*' "$dir/out" | sed "s#$dir/##g" | cut -c1-120)"
  else fail "$1" "$(cat "$dir/err") $(grep '^resume' "$dir/out")"; fi
}
fresh
rm "$last/weights-1.safetensors"
resumes a_missing_file_is_passed_over "weights-1.safetensors is missing"
fresh
truncate -s 5000 "$last/optimizer-0.safetensors"
resumes a_truncated_file_is_passed_over "optimizer-0.safetensors is damaged: it has 5000 bytes of"
fresh
flip "$last/weights-0.safetensors"
resumes a_flipped_byte_is_passed_over "its checksum is not the manifest's"
check the_damaged_one_is_kept \
  "[ -d $dir/d/damaged-step-00000020 ] &&
    grep -q 'step-00000020 is now .*damaged-step-00000020' $dir/out" \
  "" "$(ls "$dir/d")"
flip "$dir/d/step-00000030/weights-0.safetensors"
mkdir "$dir/d/damaged-step-00000030"
resumes what_is_damaged_again_is_passed_over "its checksum is not the manifest's"
check and_kept_under_a_free_name "[ -f $dir/d/damaged-step-00000030-again/manifest.json ]" "" \
  "$(ls "$dir/d")"
fresh
truncate -s 300 "$last/manifest.json"
$tool info "$dir/d" >"$dir/out"
check damage_is_said_without_the_librarys_prefix \
  "grep -q 'manifest.json is damaged: parse error' $dir/out" "" "$(cat "$dir/out")"
resumes a_damaged_manifest_is_passed_over "manifest.json is damaged"
fresh
sed -i '0,/"end":[0-9]*/s//"end":0/' "$last/manifest.json"
resumes a_manifest_that_reads_well_but_is_not_as_it_was_is_passed_over "manifest.json is damaged"
for change in '/"begin":[0-9]*,"end":[0-9]*/s//"begin":9,"end":2/' '/"end":[0-9]*,/s///' \
  '/"step":20/s//"step":21/' '/"dtype":"f32"/s//"dtype":"f16"/'; do
  fresh
  sed -i "0,$change" "$last/manifest.json"
  $tool info "$dir/d" >"$dir/out"
  status=$?
  check "a_change_in_the_manifest_is_noticed_${change//[^a-z0-9]/}" \
    "[ $status = 1 ] && ! $tool verify $dir/d >>$dir/out &&
    [ \$(grep -c 'step-00000020/manifest.json is damaged' $dir/out) = 2 ] &&
    grep -q 'step-00000010: whole' $dir/out" \
    "" "$(cat "$dir/out")"
done
fresh
mv "$last" "$dir/d/step-00000030"
check a_renamed_step_is_noticed \
  "! $tool verify $dir/d >$dir/out &&
    grep -q 'step-00000030 holds another step than its name says: 20' $dir/out" \
  "" "$(cat "$dir/out")"
fresh
rm "$last/manifest.json"
resumes a_save_that_did_not_end_is_passed_over "is not complete"
fresh
truncate -s 300 "$dir"/d/step-*/manifest.json
$MPIEXEC -n 2 $train $shape --layers 2 --width 64 --steps 30 --tp 2 --checkpoint "$dir/d" --resume \
  >"$dir/out" 2>"$dir/err"
check where_nothing_is_whole_training_does_not_start \
  "[ $? != 0 ] && grep -q 'none is whole' $dir/err" \
  "$(grep -o 'of the checkpoints.*none is whole' "$dir/err" | sed "s#$dir/##g")" \
  "$(cat "$dir/err")"
fresh
check verify_finds_what_is_damaged \
  "$tool verify $dir/d >$dir/out && flip $last/weights-0.safetensors &&
    ! $tool verify $dir/d >$dir/out && grep -q 'is damaged' $dir/out" \
  "" "$(cat "$dir/out")"

check damaged_weights_are_not_exported \
  "! $tool export $dir/d $dir/hf >$dir/out 2>$dir/err && grep -q 'is damaged' $dir/err &&
    [ ! -e $dir/hf ]" \
  "" "$(cat "$dir/err")"
$MPIEXEC -n 2 $generate --tp 2 --checkpoint "$dir/d" --prompt x --tokens 2 >"$dir/out" 2>"$dir/err"
check damaged_weights_write_no_text \
  "[ $? != 0 ] && grep -q 'is damaged' $dir/err && [ ! -s $dir/out ]" \
  "" "$(cat "$dir/err")"
fresh
mkdir "$dir/d/step-notes" "$dir/d/step-backup"
echo notes >"$dir/d/step-by-step.md"
cp -r "$last" "$last-best"
cp -r "$dir/d" "$dir/mine"
head -c 5000 README.md >"$dir/text"
$train $shape --layers 2 --width 64 --steps 21 --checkpoint "$dir/d" --resume --keep 1 \
  --data "$dir/text" >"$dir/out" 2>&1
check what_else_is_in_the_directory_stays \
  "[ $? = 0 ] && grep -q '^resume .*step-00000020, saved' $dir/out &&
    rm -r $dir/mine/step-*0 $dir/d/step-*1 && diff -r $dir/mine $dir/d" \
  "" "$(tail -3 "$dir/out")"
check another_text_is_said \
  "grep -q '^resume .*trained on .*sources and docs of this project, .*now on $dir/text' $dir/out"

# ---- what cannot be saved or resumed: a sentence, and what was there stays

refuses() { # NAME 'what is said' ARGS...
  refused "$1" "$2" $MPIEXEC -n 2 $train $shape "${@:3}"
  ! grep '^step *[0-9]*/' "$dir/out" || fail "$1" "a step was taken"
}
fresh
refuses another_width_is_refused \
  "holds a model of 2 layers, width 64, 2 heads" --layers 2 --width 32 \
  --fsdp 2 --checkpoint "$dir/d" --resume
refuses another_number_of_layers_is_refused "holds a model of 2 layers, width 64" --layers 3 \
  --width 64 --fsdp 2 --checkpoint "$dir/d" --resume
refuses more_steps_than_are_asked_for_are_refused "has 20 steps already" --layers 2 --width 64 \
  --steps 19 --fsdp 2 --checkpoint "$dir/d" --resume
echo mine | tee "$dir/t.json" >"$dir/t.jsonl"
$MPIEXEC -n 2 $train $shape --layers 2 --width 64 --steps 20 --tp 2 --checkpoint "$dir/d" \
  --resume --trace "$dir/t.json" --metrics "$dir/t.jsonl" >"$dir/out" 2>"$dir/err"
check a_run_that_is_done_has_nothing_left_to_do "[ $? = 0 ] &&
  [ \"\$(cat $dir/t.json $dir/t.jsonl | sort -u)\" = mine ] && ! grep -q '^step [0-9]' $dir/out &&
  grep -q '^resume .*step-00000020 has all of the 20 steps' $dir/out && diff -r $dir/good $dir/d" \
  "" "$(cat "$dir/out" "$dir/err")"
refuses a_directory_in_use_is_refused "holds checkpoints already" --fsdp 2 --checkpoint "$dir/d"
refuses keep_without_a_directory_is_refused "give --checkpoint DIR" --fsdp 2 --keep 5
refuses resume_without_a_directory_is_refused "give --checkpoint DIR" --fsdp 2 --resume
refuses a_directory_that_cannot_be_is_refused "cannot be created" --fsdp 2 --steps 2 --checkpoint \
  "$dir/out/below-a-file"
large="--model tiny --layers 2 --width 768 --heads 8 --context 16 --batch 2 --fsdp 2"
rm -rf "$dir/f"
$MPIEXEC -n 2 $train $large --steps 1 --checkpoint "$dir/f" >"$dir/out" 2>&1
if (
  trap '' XFSZ
  ulimit -f 40000
  $MPIEXEC -n 2 $train $large --steps 2 --checkpoint "$dir/f" --resume >"$dir/out" 2>"$dir/err"
); then
  fail a_full_disk_is_said_and_older_checkpoints_stay "exit status 0"
elif grep -q 'cannot be written: File too large' "$dir/err" \
  && [ "$(ls "$dir/f")" = step-00000001 ] && $tool verify "$dir/f" >/dev/null; then
  ok a_full_disk_is_said_and_older_checkpoints_stay \
    "$(grep -o 'step-.*cannot be written.*' "$dir/err" | head -1)"
else fail a_full_disk_is_said_and_older_checkpoints_stay "$(cat "$dir/err"); $(ls "$dir/f")"; fi

# ---- Hugging Face's files, out and back

printf '%99s' '' | tr ' ' a >"$dir/ab"
echo '{"a": 0, "b": 1}' >"$dir/d/vocab.json"
echo '#version: 0.2' >"$dir/d/merges.txt"
flip "$last/optimizer-0.safetensors" # not needed for this
$tool export "$dir/d" "$dir/hf" >/dev/null && $tool import "$dir/hf" "$dir/back" >/dev/null
$MPIEXEC -n 2 $train $shape --layers 2 --width 64 --tp 2 --checkpoint "$dir/back" --resume \
  --steps 3 --data "$dir/ab" >"$dir/out" 2>&1
check exported_weights_come_back "[ $? = 0 ] && same_weights $dir/d $dir/back/step-00000000" \
  "and train" "$(tail -2 "$dir/out")"
prompt="12 200 7 99 31"
check exported_weights_give_the_same_logits \
  "build/cpu/tests/test_checkpoint logits $dir/d $prompt >$dir/one &&
    build/cpu/tests/test_checkpoint logits $dir/back/step-00000000 $prompt >$dir/two &&
    [ \$(wc -l <$dir/one) = 256 ] && cmp $dir/one $dir/two"
said=0
cd "$dir/back"
# "z" is in no vocabulary but that of bytes
for path in ../back/step-00000000/ step-00000000 step-00000000/.; do
  ! "$root/$generate" --checkpoint $path --prompt z --tokens 1 2>"$dir/err" >"$dir/out" \
    && grep -q "the vocabulary has no token for 'z'" "$dir/err" && said=$((said + 1))
done
cd "$root"
check the_tokenizer_comes_along \
  "[ $said = 3 ] && cmp $dir/d/vocab.json $dir/hf/vocab.json &&
    cmp $dir/d/merges.txt $dir/back/merges.txt"
cp "$dir/hf/model.safetensors" "$dir/before"
export_to_a_full_disk() (
  trap '' XFSZ
  ulimit -f 100
  $tool export "$dir/d" "$dir/hf" >"$dir/out" 2>"$dir/err"
)
check a_full_disk_leaves_the_export_before "! export_to_a_full_disk &&
    grep -q 'cannot be written' $dir/err && cmp $dir/before $dir/hf/model.safetensors &&
    [ \$(ls $dir/hf | wc -l) = 4 ]" "" "$(cat "$dir/err") $(ls "$dir/hf")"
check and_the_next_takes_its_place "rm $dir/hf/model.safetensors &&
    $tool export $dir/d $dir/hf >$dir/out && cmp $dir/before $dir/hf/model.safetensors" "" \
  "$(cat "$dir/out")"
cp -r "$dir/hf" "$dir/theirs"
sed -i 's/"n_ctx"/"n_special": 0, &/' "$dir/theirs/config.json"
cp -r "$dir/theirs" "$dir/kept"
check an_export_replaces_no_other_weights \
  "! $tool export $dir/d $dir/theirs 2>$dir/err && grep -q 'theirs has other files than' $dir/err &&
    diff -r $dir/theirs $dir/kept && rm $dir/theirs/config.json &&
    ! $tool export $dir/d $dir/theirs 2>$dir/err && grep -q 'theirs has other files' $dir/err" \
  "" "$(cat "$dir/err")"
mkdir -p "$dir/others/step-00000009"
echo mine >"$dir/others/step-00000009/model.pt"
small="--model tiny --layers 1 --width 16 --heads 1 --context 16 --batch 2 --data README.md"
check what_others_keep_in_a_directory_stays \
  "$train $small --steps 2 --save-every 1 --checkpoint $dir/others >$dir/out 2>&1 &&
    grep -qx mine $dir/others/step-00000009/model.pt && [ -e $dir/others/step-00000002 ]" \
  "" "$(tail -1 "$dir/out")"
mkdir -p "$dir/others/step-00000004" "$dir/linked"
ln -s "$dir/linked" "$dir/others/step-00000005"
echo mine | tee "$dir/linked/notes.txt" >"$dir/others/step-00000004/notes.txt"
check what_is_in_the_way_of_a_save_is_kept \
  "$train $small --steps 5 --save-every 1 --keep 0 --checkpoint $dir/others --resume \
      >$dir/out 2>&1 && grep -qx mine $dir/others/others-step-00000004/notes.txt &&
    grep -qx mine $dir/linked/notes.txt && [ -e $dir/others/step-00000005/manifest.json ]" \
  "" "$(tail -1 "$dir/out")"
rm -r "$dir/others/others-step-00000004"
for n in 06 07 08 10; do cp -r "$dir/others/step-00000005" "$dir/others/step-000000$n"; done
mv "$dir"/others/step-00000006/manifest.json{,.off}
rm "$dir"/others/step-000000{07,08,10}/manifest.json
echo mine >"$dir/others/step-00000007/weights-best.pt"
mkdir "$dir/others/step-00000008/weights-0.safetensors.partial"
cp -r "$dir/others" "$dir/kept-too"
check only_a_checkpoints_own_files_are_removed_and_that_is_said \
  "$train $small --steps 6 --keep 0 --checkpoint $dir/others --resume >$dir/out 2>&1 &&
    diff -r $dir/kept-too/step-00000006 $dir/others/others-step-00000006 &&
    diff -r $dir/kept-too/step-00000007 $dir/others/step-00000007 &&
    diff -r $dir/kept-too/step-00000008 $dir/others/step-00000008 &&
    [ ! -e $dir/others/step-00000010 ] &&
    grep -q 'removed step-00000010, which had no manifest.json' $dir/out &&
    grep -q 'step-00000006 is now .*others-step-00000006' $dir/out" "" "$(tail -3 "$dir/out")"
rm -r "$dir"/others/{others-step-00000006,step-0000000[678]}
echo mine >"$dir/others/step-00000006"
check so_is_a_file_in_the_way \
  "$train $small --steps 6 --keep 0 --checkpoint $dir/others --resume >$dir/out 2>&1 &&
    grep -qx mine $dir/others/others-step-00000006 &&
    [ -e $dir/others/step-00000006/manifest.json ]" "" "$(tail -1 "$dir/out")"
rm -rf "$dir"/others/step-0000000[3456]
cp -r "$dir/others" "$dir/gone"
mv "$dir/gone/step-00000002" "$dir/gone/step-00000003"
build/cpu/tests/test_checkpoint later "$dir/gone" 2 >"$dir/out" 2>&1
check of_a_step_that_is_gone_only_later_ones_are_put_aside \
  "[ -e $dir/gone/step-00000001 ] && [ -e $dir/gone/later-step-00000003 ]" "" "$(cat "$dir/out")"
check later_steps_stay_until_training_goes_on \
  "! $train $small --steps 3 --checkpoint $dir/others --resume --resume-step 1 \
      --trace /nowhere/t >$dir/out 2>&1 && [ -e $dir/others/step-00000002 ] &&
    $train $small --steps 3 --checkpoint $dir/others --resume --resume-step 1 >$dir/out 2>&1 &&
    [ ! -e $dir/others/step-00000002 ] && [ -e $dir/others/later-step-00000002 ]" \
  "" "$(tail -1 "$dir/out")"
# a shard of which only the part that is held out has a token that is none
{
  printf '%b' '\x88\xd8\x34\x01\x01\x00\x00\x00\x20\xd6\x13\x00' # 20240520, 1, 1300000
  head -c 1012 /dev/zero
  head -c 2340010 /dev/zero
  printf '%b' '\x2c\x01'
  head -c 259988 /dev/zero
} >"$dir/bad.bin"
check a_fault_of_held_out_text_costs_no_training \
  "! $MPIEXEC -n 2 $train ${small/README.md/$dir/bad.bin} --replicate 2 --steps 3 \
      --eval-every 3 --sample 5 --checkpoint $dir/held >$dir/out 2>&1 &&
    grep -q 'step 3, which is saved' $dir/out &&
    [ -e $dir/held/step-00000003/manifest.json ]" "" "$(tail -1 "$dir/out")"
echo mine >"$dir/back/vocab.json"
check an_import_beside_checkpoints_is_refused \
  "! $tool import $dir/hf $dir/back 2>$dir/err && grep -q 'holds checkpoints already' $dir/err &&
    [ \"\$(cat $dir/back/vocab.json)\" = mine ]" \
  "" "$(cat "$dir/err")"
refused=0
for change in n_head\":2/n_head\":{0,3} n_embd\":64/n_embd\":0 n_layer\":2/n_layer\":{1,0,-1,2.9} \
  tie_word_embeddings\":true/tie_word_embeddings\":false \
  n_ctx\":32/scale_attn_by_inverse_layer_idx\":true n_ctx\":32/n_inner\":5; do
  mkdir -p "$dir/hf2"
  ln -sf "$dir/hf/model.safetensors" "$dir/hf2"
  sed "s/: /:/; s/\"${change/\//\/\"}/" "$dir/hf/config.json" >"$dir/hf2/config.json"
  $tool import "$dir/hf2" "$dir/back2" >"$dir/out" 2>"$dir/err"
  if [ $? = 1 ] && [ "$(wc -l <"$dir/err")" = 1 ] && grep -q 'config.json' "$dir/err" \
    && [ ! -e "$dir/back2" ]; then
    refused=$((refused + 1))
  else
    echo "$change: $(cat "$dir/err")"
  fi
done
check what_this_model_is_not_is_refused "[ $refused = 10 ]" "10 changes of config.json" \
  "$refused of 10"
for end in mkfifo "ln -s /dev/zero"; do
  rm "$dir/hf2/config.json"
  $end "$dir/hf2/config.json"
  check "what_has_no_end_is_refused: $end" "! timeout 20 $tool import $dir/hf2 $dir/back2 \
    2>$dir/err && grep -q 'config.json is not a regular file' $dir/err" "" "$(cat "$dir/err")"
done
sed -i 's/"n_embd": 64/"n_embd": 32/' "$dir/hf/config.json"
check an_import_that_contradicts_its_config_is_refused \
  "! $tool import $dir/hf $dir/back2 2>$dir/err &&
    grep -q 'by config.json it should be' $dir/err && [ ! -e $dir/back2 ]" \
  "$(sed "s#$dir/##g" "$dir/err" | cut -c1-140)" "$(cat "$dir/err")"

sums_up
