#!/usr/bin/env bash
# test_formats.sh: files of others as a user meets them: weights under other names and in parts,
# tokenizers in both forms, and texts for a model of byte pairs.
set -u
cd "$(dirname "$0")/.."
train=build/cpu/train_gpt tool=build/cpu/checkpoint generate=build/cpu/generate
make=build/cpu/tests/test_support
. tests/lib.sh
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive

# ---- a model with a vocabulary of 304 of which a tokenizer has 260, as Hugging Face has it

small="--layers 2 --width 16 --heads 2 --context 16 --batch 2"
size="--layers 2 --width 16 --heads 2 --context 16 --vocab 304"
mkdir "$dir/one" "$dir/two" "$dir/hf"
: >"$dir/err"
$make vocabulary "$dir"
$train $size --batch 2 --steps 1 --checkpoint "$dir/c" --data README.md >"$dir/out" 2>&1
$tool export "$dir/c" "$dir/plain" >"$dir/out" 2>&1
check without_a_tokenizer_no_token_ends_a_text \
  "grep -q '\"eos_token_id\": null' $dir/plain/config.json" "" "$(cat "$dir/out")"

# ---- weights

imports() { # CHANGE: it is imported as what it was
  mkdir -p "$dir/$1"
  cp "$dir/plain/config.json" "$dir/$1"
  $make weights "$dir/plain/model.safetensors" "$dir/$1" "$1" || return 1
  $tool import "$dir/$1" "$dir/in-$1" >"$dir/out" 2>"$dir/err" \
    && $tool export "$dir/in-$1" "$dir/back-$1" >"$dir/out" 2>"$dir/err" \
    && cmp -s "$dir/back-$1/model.safetensors" "$dir/plain/model.safetensors"
}
refuses() { # NAME 'what is said' DIRECTORY
  alone=yes refused "$1" "$2" $tool import "$3" "$dir/in-$1"
  [ ! -e "$dir/in-$1" ] || fail "$1" "was imported"
}
check a_tied_matrix_under_the_heads_name_is_imported "imports head" "" "$(cat "$dir/err")"
check a_tied_matrix_under_both_names_is_imported "imports both" "" "$(cat "$dir/err")"
check weights_in_parts_are_imported "imports parts" "" "$(cat "$dir/err")"
imports differs
refuses a_head_of_its_own_is_refused "lm_head.weight is not wte.weight" "$dir/differs"
imports twice
refuses a_matrix_that_is_there_twice_is_refused "which is there already" "$dir/twice"
cp -r "$dir/parts" "$dir/lost"
rm "$dir/lost/model-00002-of-00002.safetensors"
refuses a_missing_part_is_said "model-00002-of-00002.safetensors cannot be opened" "$dir/lost"
for map in '{"metadata":{},"weight_map":{}}' '{}' '{"weight_map":{"a":7}}' 'x'; do
  echo "$map" >"$dir/lost/model.safetensors.index.json"
  refuses "a_damaged_index_is_said_${map//[^a-z0-9]/}" "safetensors.index.json is damaged" \
    "$dir/lost"
done
echo '{"weight_map":{"a":"../plain/model.safetensors"}}' >"$dir/lost/model.safetensors.index.json"
refuses a_part_of_another_directory_is_refused "names a file of another directory" "$dir/lost"

# ---- tokenizers

for form in one two; do
  cp "$dir/plain/model.safetensors" "$dir/plain/config.json" "$dir/$form"
  $tool import "$dir/$form" "$dir/run-$form" >"$dir/out" 2>"$dir/err" \
    || fail "import_$form" "$(cat "$dir/err")"
  $tool export "$dir/run-$form" "$dir/out-$form" >"$dir/out" 2>"$dir/err"
  files=$(cd "$dir/$form" && ls tokenizer.json vocab.json merges.txt 2>/dev/null)
  same=yes
  for f in $files; do cmp -s "$dir/$form/$f" "$dir/out-$form/$f" || same=no; done
  check "the_tokenizer_goes_in_and_out_in_${files//[^a-z]/_}" \
    "[ $same = yes ] && grep -q '\"eos_token_id\": 259' $dir/out-$form/config.json &&
     grep -q '\"bos_token_id\": 259' $dir/out-$form/config.json"
  $generate --checkpoint "$dir/run-$form" --prompt "<|endoftext|> the the" --tokens 99 \
    >"$dir/out" 2>"$dir/err"
  check "a_prompt_is_byte_pairs_and_end_of_text_is_one_$form" \
    "grep -q 'prompt 1 of 3 tokens and --tokens 99' $dir/err" "" "$(cat "$dir/err")"
done
short=0
for seed in 1 2 3 4 5 6; do
  bytes=$($generate --checkpoint "$dir/run-two" --prompt " the" --tokens 15 --seed $seed \
    --temperature 5 2>"$dir/err" | wc -c)
  [ "$bytes" -ge 20 ] || short=$((short + 1))
done
check tokens_without_a_text_are_not_drawn "[ $short = 0 ]" "6 times 15, of 260 of 304" \
  "$short of 6 texts are too short: $(cat "$dir/err")"
mkdir "$dir/archive"
step=$(basename "$dir"/run-two/step-*)
mv "$dir/run-two/$step" "$dir/archive"
ln -s "../archive/$step" "$dir/run-two/$step"
$tool export "$dir/run-two" "$dir/linked" >"$dir/out" 2>"$dir/err"
check the_tokenizer_is_that_of_the_directory_that_was_named \
  "cmp $dir/two/vocab.json $dir/linked/vocab.json" "" "$(cat "$dir/err")"
$tool export "$dir/run-two/$step" "$dir/beside" >"$dir/out" 2>"$dir/err"
check the_tokenizer_beside_a_link_is_found_if_the_link_is_named \
  "cmp $dir/two/vocab.json $dir/beside/vocab.json" "" "$(cat "$dir/err")"
rm "$dir/run-two/$step"
mv "$dir/archive/$step" "$dir/run-two"
ln -s "$dir/run-two/$step" "$dir/archive/last"
$tool export "$dir/archive/last" "$dir/there" >"$dir/out" 2>"$dir/err"
check else_the_tokenizer_where_the_link_leads \
  "cmp $dir/two/vocab.json $dir/there/vocab.json" "" "$(cat "$dir/err")"
cp -r "$dir/plain" "$dir/unnamed"
sed -i '/n_positions/d' "$dir/unnamed/config.json"
refuses what_a_config_lacks_is_said "of another kind: key 'n_positions' not found" "$dir/unnamed"
cp -r "$dir/plain" "$dir/unigram"
echo '{"model":{"type":"Unigram"},"pre_tokenizer":{"type":"Metaspace"}}' \
  >"$dir/unigram/tokenizer.json"
refuses another_kind_of_tokenizer_is_said "is not of GPT-2's encoding" "$dir/unigram"
echo '{}' >"$dir/unigram/tokenizer.json"
refuses a_tokenizer_that_is_none_is_said "tokenizer.json is damaged, or of another kind" \
  "$dir/unigram"
head -c 1000000 /dev/zero | tr '\0' a >"$dir/long"
check a_long_prompt_is_refused_before_it_is_encoded \
  "! timeout 20 $generate --checkpoint $dir/run-two --prompt-file $dir/long 2>$dir/err >$dir/out &&
   grep -q 'prompt 1 has 1000000 bytes, at least' $dir/err" "" "$(cat "$dir/err")"

# ---- texts for a model of byte pairs

for i in 1 2 3 4 5 6 7 8; do
  echo "the other $i<|endoftext|> the end, and then the"
done >"$dir/my.txt"
loss() { grep -o '^loss .*' "$dir/out"; }
$MPIEXEC -n 2 $train --checkpoint "$dir/run-two" --resume --data "$dir/my.txt" --batch 2 --steps 2 \
  --fsdp 2 --sample 5 >"$dir/out" 2>"$dir/err"
status=$? shard=$(ls "$dir"/my.txt.*.bin || echo "$dir/none") text=$(loss)
check an_imported_model_is_trained_on_text_by_one_command \
  "[ $status = 0 ] && [ -f '$shard' ] && grep -q '^model .* 2 layers, width 16' $dir/out &&
   [ \$(grep -c '^tokens .*my.txt is encoded and kept as' $dir/out) = 1 ]" "$text" \
  "status $status: $(cat "$dir/err") $(grep '^tokens' "$dir/out")"
check its_sample_is_text "grep -q 'the' <(sed -n '/a sample/,\$p' $dir/out | tail -n +2)" "" \
  "$(sed -n '/a sample/,$p' "$dir/out")"
cp "$shard" "$dir/kept.bin"
rm "$shard"
cp -r "$dir/run-two" "$dir/run-three"
exec 8>"$shard.partial"
flock 8
$train --checkpoint "$dir/run-three" --resume --data "$dir/my.txt" --batch 2 --steps 3 \
  >"$dir/out" 2>"$dir/err" 8>&- &
job=$!
until grep -qs 'by another process: waiting' "$dir/out" || ! kill -0 $job 2>/dev/null; do
  sleep 0.1
done
exec 8>&-
wait $job
status=$?
check a_shard_that_another_process_writes_is_waited_for \
  "[ $status = 0 ] && cmp $shard $dir/kept.bin && grep -q 'by another process: waiting' $dir/out" \
  "" "status $status: $(cat "$dir/err") $(grep '^tokens' "$dir/out")"
mkdir "$dir/tmp"
head -c "$(stat -c %s "$shard")" /dev/zero >"$dir/tmp/${shard##*/}"
rm "$shard"
TMPDIR=$dir/tmp $train --checkpoint "$dir/run-three" --resume --data "$dir/my.txt" --batch 2 \
  --steps 4 >"$dir/out" 2>"$dir/err"
status=$?
check a_shard_that_anybody_can_have_made_is_not_taken \
  "[ $status = 0 ] && cmp $shard $dir/kept.bin" "" "status $status: $(cat "$dir/err")"
printf '%s\0' "$(cat "$dir/my.txt")" | $make encode "$dir/two" | tr ' ' '\n' | grep -c . >"$dir/n"
tokens=$(($(stat -c %s "$shard") / 2 - 512))
check the_shard_has_the_texts_tokens "[ $tokens = $(($(cat "$dir/n") + 1)) ]" "$tokens, the last \
one a new line" "$tokens and $(cat "$dir/n")"
$tool import "$dir/two" "$dir/run-shard" >"$dir/out" 2>&1
$MPIEXEC -n 2 $train --checkpoint "$dir/run-shard" --resume --data "$shard" --batch 2 --steps 2 \
  --fsdp 2 >"$dir/out" 2>"$dir/err"
check and_so_it_is_on_the_shard_itself "[ '$(loss)' = '$text' ]" "" "$(loss), $text"
# told the model's sizes, but not that its vocabulary is larger than the tokenizer's
$train ${size% --vocab*} --checkpoint "$dir/run-two" --resume --data "$dir/my.txt" --batch 2 \
  --steps 3 >"$dir/out" 2>"$dir/err"
check a_text_is_encoded_once \
  "grep -q '^resume .*step-00000002' $dir/out && ! grep -q '^tokens' $dir/out" "" \
  "$(cat "$dir/err") $(grep '^tokens' "$dir/out")"
$train --layers 2 --width 16 --heads 2 --context 16 --batch 2 --steps 2 --tokenizer "$dir/one" \
  --data "$dir/my.txt" --checkpoint "$dir/fresh" >"$dir/out" 2>"$dir/err"
check a_fresh_model_takes_a_tokenizer_and_its_vocabulary \
  "grep -q 'vocabulary 260:' $dir/out && cmp $dir/one/tokenizer.json $dir/fresh/tokenizer.json &&
   $generate --checkpoint $dir/fresh --prompt ' the' --tokens 4 >$dir/out 2>$dir/err" "" \
  "$(cat "$dir/err")"
# a model that repeats what it has read: its second text ends immediately
end="<|endoftext|>"
{ printf ' the%.0s' $(seq 60) && printf "$end%.0s" $(seq 60); } >"$dir/repeats.txt"
$train $size --batch 8 --steps 60 --lr 1e-2 --tokenizer "$dir/one" --data "$dir/repeats.txt" \
  --checkpoint "$dir/repeats" --sample 3 >"$dir/out" 2>&1
check a_sample_says_where_the_model_ends_the_text \
  "grep -q '^--- here the model ended the text$' $dir/out" "" "$(tail -3 "$dir/out")"
$generate --checkpoint "$dir/repeats" --prompt " the the" $end$end --tokens 2 --temperature 0 \
  >"$dir/out" 2>"$dir/err"
made=$(sed -n 's/each token *median \([0-9.]*\) ms.* \([0-9.]*\) tokens.*/\1 \2/p' "$dir/err" \
  | awk '{ print $1 * $2 / 1000 }')
check only_the_tokens_of_texts_that_have_not_ended_count \
  "grep -q '^ the the the the$' $dir/out && grep -qxF '$end$end' $dir/out &&
   grep -q '^ended  *1 of 2 texts' $dir/err &&
   awk 'BEGIN { exit !($made > 0.8 && $made < 1.2) }'" "$made of 2 tokens" \
  "$made: $(cat "$dir/out" "$dir/err")"
# the same model, whose texts end with " the"
$tool export "$dir/repeats" "$dir/ends" >"$dir/out" 2>&1
sed -i 's/"eos_token_id": 259/"eos_token_id": 258/' "$dir/ends/config.json"
$tool import "$dir/ends" "$dir/in-ends" >"$dir/out" 2>&1
$generate --checkpoint "$dir/in-ends" --prompt " the the" --tokens 5 --temperature 0 >"$dir/text" \
  2>"$dir/err"
$train --checkpoint "$dir/in-ends" --resume --data "$dir/repeats.txt" --batch 2 --steps 1 \
  >>"$dir/out" 2>&1
$tool export "$dir/in-ends" "$dir/trained" >>"$dir/out" 2>&1
check the_token_that_ends_a_text_is_the_configs_and_stays_it_in_training \
  "[ '$(cat "$dir/text")' = ' the the' ] && [ -e $dir/in-ends/step-00000001 ] &&
   grep -q '\"eos_token_id\": 258' $dir/trained/config.json" "" "$(cat "$dir/text" "$dir/out")"
cp -r "$dir/ends" "$dir/beyond"
sed -i 's/"eos_token_id": 258/"eos_token_id": 50256/' "$dir/beyond/config.json"
$tool import "$dir/beyond" "$dir/in-beyond" >"$dir/out" 2>&1
$tool export "$dir/in-beyond" "$dir/again" >>"$dir/out" 2>&1
check an_end_of_text_that_the_vocabulary_does_not_have_is_the_tokenizers \
  "grep -q '\"eos_token_id\": 259' $dir/again/config.json" "" "$(cat "$dir/out")"
sed -i 's/"eos_token_id": 50256/"eos_token_id": [258, 259]/' "$dir/beyond/config.json"
refuses texts_that_end_with_one_of_several_tokens_are_refused "eos_token_id is [258,259]" \
  "$dir/beyond"
says() { # NAME 'what is said' OPTIONS...
  refused "$1" "$2" $train --batch 2 --steps 9 --data "$dir/my.txt" "${@:3}"
}
says another_tokenizer_than_the_checkpoints_is_refused "is not the one in" \
  --checkpoint "$dir/run-two" --resume --tokenizer "$dir/one"
says a_directory_without_a_tokenizer_is_refused "has neither tokenizer.json nor vocab.json" \
  $size --tokenizer "$dir/plain"
cp -r "$dir/head" "$dir/numbers"
sed -i '/"tokens": "bytes"/d' "$dir/numbers/config.json"
$tool import "$dir/numbers" "$dir/in-numbers" >"$dir/out" 2>&1
says bytes_for_a_model_of_other_tokens_are_refused "was not trained on bytes" \
  --checkpoint "$dir/in-numbers" --resume
for of in c in-head; do
  check "text_continues_a_model_that_was_trained_on_bytes ($of)" \
    "timeout 60 $generate --checkpoint $dir/$of --prompt hello --tokens 3 >$dir/out 2>$dir/err" \
    "" "$(cat "$dir/err")"
  check "and_trains_it_on ($of)" \
    "timeout 60 $train --batch 2 --steps 2 --data $dir/my.txt --checkpoint $dir/$of --resume \
      >$dir/out 2>$dir/err" "" "$(cat "$dir/err")"
done
cp -r "$dir/run-two" "$dir/moved"
rm "$dir"/moved/{vocab.json,merges.txt}
check a_tokenizer_that_is_gone_is_said \
  "$tool verify $dir/moved >$dir/out && grep -q 'tokenizer, whose files are gone' $dir/out &&
   $tool export $dir/moved $dir/out-moved >$dir/out && grep -q 'whose files are gone' $dir/out" "" \
  "$(cat "$dir/out")"
says and_for_one_that_went_on_from_them_without_its_tokenizer "was not trained on bytes" \
  --checkpoint "$dir/moved" --resume

# ---- files that were exchanged, damaged, or put somewhere by hand

truncate -s -2 "$shard"
cp -r "$dir/run-two" "$dir/done"
$train --checkpoint "$dir/run-two" --resume --data "$dir/my.txt" --batch 2 --steps 3 \
  --eval-every 9 >"$dir/out" 2>"$dir/err"
check a_damaged_shard_is_made_again "[ $? = 0 ] && cmp $shard $dir/kept.bin" "" "$(cat "$dir/err")"
check a_run_that_is_done_is_evaluated \
  "grep -q '^step 3/3  held-out loss [0-9]' $dir/out && diff -r $dir/run-two $dir/done" "" \
  "$(cat "$dir/out")"
$train --checkpoint "$dir/run-two" --resume --data "$dir"/my.txt* --batch 2 --steps 4 \
  --eval-every 9 >"$dir/out" 2>"$dir/err"
check a_shard_of_a_text_that_is_given_is_left_out \
  "[ $? = 0 ] && grep -q '^tokens .*.bin is left out: its name says .*my.txt\$' $dir/out &&
   ! grep -q 'is now on' $dir/out" "" "$(cat "$dir/out" "$dir/err")"
cp "$dir/my.txt" "$dir/log"
cp "$dir/my.txt" "$dir/log.20260101"
$train $small --steps 1 --tokenizer "$dir/one" --data "$dir/log" "$dir/log.20260101" >"$dir/more" \
  2>"$dir/err"
check a_text_whose_name_ends_in_digits_is_no_shard \
  "[ $? = 0 ] && grep -q '^data  *2 files' $dir/more" "" "$(cat "$dir/more" "$dir/err")"
check a_checkpoint_that_is_resumed_is_evaluated_first \
  "grep -A1 '^step 3/4  held-out loss [0-9]' $dir/out | grep -q '^step 4/4  loss'" "" \
  "$(cat "$dir/out")"
mkdir "$dir/by-hand"
cp "$dir/one/tokenizer.json" "$dir/by-hand"
$train $small --steps 1 --data "$dir/my.txt" --checkpoint "$dir/by-hand" >"$dir/out" 2>"$dir/err"
check a_tokenizer_without_checkpoints_is_used_too \
  "[ $? = 0 ] && grep -q 'vocabulary 260:' $dir/out && [ ! -e $dir/by-hand/tokenizer.json.1 ]" "" \
  "$(cat "$dir/out" "$dir/err")"
sed -i '1s/^/ /' "$dir/by-hand/tokenizer.json"
check the_tokenizer_of_a_checkpoint_cannot_be_exchanged \
  "! $generate --checkpoint $dir/by-hand --prompt the >$dir/out 2>$dir/err &&
   grep -q 'was saved with other tokenizer files' $dir/err &&
   ! $tool verify $dir/by-hand >$dir/out &&
   grep -q 'was saved with other tokenizer files' $dir/out" "" "$(cat "$dir/out" "$dir/err")"
says and_training_does_not_go_on_with_them "was saved with other tokenizer files" \
  --checkpoint "$dir/by-hand" --resume
says byte_pairs_for_a_model_of_bytes_are_refused "was trained on bytes last" \
  --checkpoint "$dir/c" --resume --tokenizer "$dir/one"
# the first million tokens of a file are checked when it is opened
head -c 1024 "$shard" >"$dir/bad.bin"
head -c 2400000 /dev/zero >>"$dir/bad.bin"
head -c 200000 /dev/zero | tr '\0' '\377' >>"$dir/bad.bin"
printf '\040\326\023\000' | dd of="$dir/bad.bin" bs=1 seek=8 conv=notrunc status=none
$train --checkpoint "$dir/run-two" --resume --data "$dir/bad.bin" --batch 2 --steps 9 \
  --eval-every 9 >"$dir/out" 2>"$dir/err"
check a_first_evaluation_that_cannot_be_read_ends_a_run_before_it_trains \
  "[ $? = 1 ] && grep -q 'outside the vocabulary of 304' $dir/err &&
   ! grep -q '^step 5/9' $dir/out && [ ! -e $dir/run-two/step-00000005 ]" "" \
  "$(cat "$dir/out" "$dir/err")"
says weights_that_were_not_imported_are_refused "build/checkpoint import makes a checkpoint" \
  --checkpoint "$dir/one" --resume

# ---- tokenizers of others

mkdir "$dir"/{stale,added,padded,bom,nan}
cp "$dir/one/tokenizer.json" "$dir/stale"
$tool export "$dir/run-one" "$dir/sent" >"$dir/out" 2>&1
$tool import "$dir/two" "$dir/stale" >"$dir/out" 2>&1
$tool export "$dir/stale" "$dir/sent" >>"$dir/out" 2>&1
for to in stale sent; do
  check "another_tokenizer_that_was_there_is_put_aside_$to" "[ ! -e $dir/$to/tokenizer.json ] &&
    cmp $dir/one/tokenizer.json $dir/$to/tokenizer.json.1 &&
    cmp $dir/two/vocab.json $dir/$to/vocab.json" "" "$(cat "$dir/out")"
done
cp "$dir"/two/* "$dir/added"
echo '{"<|user|>": 260}' >"$dir/added/added_tokens.json"
printf '<|user|>%.0s' $(seq 50) >"$dir/users.txt"
$tool import "$dir/added" "$dir/run-added" >"$dir/out" 2>&1
$train --checkpoint "$dir/run-added" --resume --data "$dir/users.txt" --batch 2 --steps 1 \
  >>"$dir/out" 2>&1
tokens=$(($(stat -c %s "$dir"/users.txt.*.bin) / 2 - 512))
check what_added_tokens_lists_is_one_token_each \
  "[ $tokens = 50 ] && [ -e $dir/run-added/added_tokens.json ]" "" "$tokens: $(cat "$dir/out")"
cp "$dir"/one/* "$dir/padded"
sed -i 's/"added_tokens": *\[/&{"id":304,"content":"[PAD]","special":true},/' \
  "$dir/padded/tokenizer.json"
$tool import "$dir/padded" "$dir/run-padded" >"$dir/out" 2>&1
status=$?
check an_added_token_that_the_model_does_not_have_is_left_out \
  "[ $status = 0 ] && grep -q PAD $dir/padded/tokenizer.json" "" "$(cat "$dir/out")"

# ---- what is refused

cp "$dir"/plain/* "$dir/bom"
cp "$dir"/plain/* "$dir/nan"
python3 - "$dir" <<'PYTHON'
import sys
whole = open(sys.argv[1] + "/plain/model.safetensors", "rb").read()
n = int.from_bytes(whole[:8], "little")
header = b"\xef\xbb\xbf" + whole[8:8 + n]
with open(sys.argv[1] + "/bom/model.safetensors", "wb") as bom:
    bom.write(len(header).to_bytes(8, "little") + header + whole[8 + n:])
with open(sys.argv[1] + "/nan/model.safetensors", "wb") as nan:
    nan.write(whole[:-4] + b"\x00\x00\xc0\x7f")
PYTHON
not_imported() { # NAME 'what is said' DIRECTORY
  $tool import "$dir/$3" "$dir/run-$1" >"$dir/out" 2>"$dir/err"
  status=$?
  check "$1" "[ $status = 1 ] && grep -qF -- '$2' $dir/err" \
    "$(sed "s#$dir/##g" "$dir/err" | head -c 140)" "status $status: $(cat "$dir/err")"
}
not_imported a_header_that_begins_with_a_mark_is_refused "byte-order mark" bom
not_imported weights_that_are_no_numbers_are_refused "not finite" nan
mkdir "$dir/llama"
sed 's/"gpt2"/"llama"/; /n_layer/d' "$dir/plain/config.json" >"$dir/llama/config.json"
not_imported a_model_of_another_kind_is_named 'its model_type is "llama"' llama
mkdir "$dir/deep" "$dir/deep-manifest"
cp "$dir"/plain/* "$dir/deep"
printf '[%.0s' $(seq 66000) | sed 's/^/{"n_layer":/' >"$dir/deep/config.json"
not_imported a_config_that_is_nested_deeply_is_refused "nested more than 100 deep" deep
printf '[%.0s' $(seq 200000) | sed 's/^/{"ranks":/' >"$dir/deep-manifest/manifest.json"
$tool verify "$dir/deep-manifest" >"$dir/out" 2>&1
status=$?
check a_manifest_that_is_nested_deeply_is_refused \
  "[ $status = 1 ] && grep -q 'manifest.json is damaged: it is nested more' $dir/out" "" \
  "status $status: $(cat "$dir/out")"
mkdir "$dir/bin"
cp "$dir/plain/config.json" "$dir/bin"
not_imported weights_of_another_kind_get_a_hint "save_pretrained" bin

sums_up
