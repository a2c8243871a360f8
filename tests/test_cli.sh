#!/usr/bin/env bash
# test_cli.sh: train_gpt as a user meets it: it learns, it repeats itself bit for bit, and bad input
# gets a sentence and a non-zero exit.
set -u
cd "$(dirname "$0")/.."
train=build/cpu/train_gpt
. tests/lib.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}

# ends NAME 'part of the sentence' ARGS...
ends() { refused "$1" "$2" $train "${@:3}"; }
# and says nothing else, and takes no step
refuses() { alone=yes ends "$@"; }
# losses_and_norms FILE: of each step in a metrics file
losses_and_norms() { sed -n 's/.*"loss":\([^,]*\),"grad_norm":\([^,]*\).*/\1 \2/p' "$1"; }
# measured FILE COMMAND...: its metrics, and none where the command fails
measured() {
  rm -f "$dir/$1.jsonl"
  "${@:2}" --metrics "$dir/$1.jsonl" >"$dir/out" 2>&1 || rm -f "$dir/$1.jsonl"
}
# same_losses: whether a.jsonl and b.jsonl have the same 12 losses and norms, to the last digit
same_losses() {
  [ "$(losses_and_norms "$dir/a.jsonl" | grep -cE '^[-+.0-9e]+ [-+.0-9e]+$')" = 12 ] \
    && [ "$(losses_and_norms "$dir/a.jsonl")" = "$(losses_and_norms "$dir/b.jsonl")" ]
}
shape="--model tiny --layers 2 --width 32 --heads 2 --context 32 --batch 8"
small="$shape --steps 12"

# ---- what it does

measured a $train $shape --steps 60 --lr 3e-3
first=$(losses "$dir/a.jsonl" | head -1)
last=$(losses "$dir/a.jsonl" | tail -1)
if at_most 5 "$first" && at_most "$last" "$(awk "BEGIN { print 0.75 * $first }")"; then
  ok the_loss_falls_on_real_text "$first to $last in 60 steps"
else
  fail the_loss_falls_on_real_text "$first to $last: $(tail -3 "$dir/out")"
fi

for dtype in f32 bf16 f64; do
  measured a $train $small --dtype $dtype
  measured b $train $small --dtype $dtype
  check two_runs_give_identical_losses_$dtype same_losses "12 steps" "$(tail -1 "$dir/out")"
done

measured a $train $small --warmup 3 --lr 0.001 --min-lr 0.0001
# a line to the highest in 3 steps, then half a wave of the cosine in 9
rates="0.33333 0.66667 1.00000 0.97286 0.89472 0.77500 0.62814 0.47186 0.32500 0.20528 0.12714"
rates="$rates 0.10000"
made=$(sed -n 's/.*"lr":\([^,]*\),.*/\1/p' "$dir/a.jsonl" | awk '{ printf "%.5f\n", 1000 * $1 }')
check the_learning_rate_rises_and_falls_as_documented '[ "$(echo $made)" = "$rates" ]' "" \
  "$(echo $made)"

# A text that repeats "ab"; of its last 2000 bytes, which are held out, all do, the first half of
# the sequences that are read, or none: the others repeat "cd"
held=() trained=()
for same in 2000 992 0; do
  perl -e '($n) = @ARGV; print "ab" x (9000 + $n / 2), "cd" x (1000 - $n / 2)' $same >"$dir/text"
  measured a $train $shape --data "$dir/text" --steps 60 --lr 1e-2 --eval-every 60
  trained+=("$(losses "$dir/a.jsonl" | tail -1)")
  held+=("$(sed -n 's/^step 60.*held-out loss //p' "$dir/out")")
done
check the_held_out_loss_is_that_of_the_last_tenth \
  'at_most "${trained[2]}" 1 && at_most "${held[0]}" 1 && at_most 4 "${held[2]}"' \
  "training ${trained[2]}, held out ${held[0]} of the same, ${held[2]} of another" \
  "training ${trained[*]}, held out ${held[*]}"
apart=$(awk "BEGIN { d = 2 * ${held[1]} - ${held[0]} - ${held[2]}; print(d < 0 ? -d : d) }")
check and_the_mean_of_all_its_sequences 'at_most "$apart" 4e-4' \
  "${held[1]} between them" "${held[*]}"

# profiled NAME RANKS OPTIONS...: --profile changes no bit; its rows add up to its sums (of rounded
# numbers, within a unit of each), those and what is in no row to the step, and names are once there
profiled() {
  local name=$1 ranks=$2 text
  shift 2
  measured a $MPIEXEC -n $ranks $train $small "$@"
  measured b $MPIEXEC -n $ranks $train $small "$@" --profile
  text=$(sed -n '/^profile of rank/,$p' "$dir/out" | awk '
    /^  the step/ { step = $(NF - 1) }
    /^op, / { inside = 1; next }
    /^  all |^  in no row/ { sums += $(NF - 1); inside = 0 }
    inside {
      name = substr($0, 3, 32)
      if (name in seen) twice = name
      seen[name] = 1
      rows += substr($0, 45, 10)
      n++
    }
    /in no row/ { left = $(NF - 1) }
    function abs(x) { return x < 0 ? -x : x }
    END {
      if (!n || twice != "" || left < -0.01) exit 1
      if (abs(sums - step) > 0.01 || abs(rows + left - step) > 0.001 * (n + 3)) exit 1
      printf "%d ops take %.1f %% of a step of %s ms", n, 100 * (1 - left / step), step
    }')
  if [ -n "$text" ] && same_losses; then
    ok "$name" "$text"
  else
    fail "$name" "$(sed -n '/^profile/,$p' "$dir/out" | tr '\n' ';' | cut -c1-400)"
  fi
}
profiled a_profile_adds_up_to_the_step 1
profiled a_profile_of_one_micro_batch_at_a_time_adds_up 1 --microbatch 1 --recompute
OMP_NUM_THREADS=1 profiled a_profile_of_four_ranks_adds_up 4 --pp 2 --fsdp 2
OMP_NUM_THREADS=1 profiled a_profile_of_split_layers_adds_up 2 --tp 2 --sequence-parallel
$train $small --profile --device-memory 60 >"$dir/out" 2>"$dir/err"
check a_profile_copies_what_there_is_room_for_and_says_so \
  "grep -qE '^  a copy of [1-9][0-9.]* MiB' $dir/out && ! grep -q 'a copy of 128 MiB' $dir/out"

for matmul in cublas own; do for attention in plain flash; do
  measured a $train $small --matmul $matmul --attention $attention
  measured b $train $small --matmul $matmul --attention $attention --recompute
  check recompute_gives_the_same_bits_${matmul}_$attention same_losses \
    "$(losses "$dir/a.jsonl" | tail -1)" "$(tail -1 "$dir/out")"
done; done
measured a $train $small --dtype f64
measured b $train $small --dtype f64 --microbatch 2
worst=$(worst 12 "$dir/a.jsonl" "$dir/b.jsonl")
if at_most "$worst" 1e-12; then
  ok four_micro_batches_equal_one_batch_f64 \
    "largest relative difference of the loss $worst in 12 steps"
else
  fail four_micro_batches_equal_one_batch_f64 "$worst"
fi

# ---- what it refuses

printf 'short' >"$dir/short.txt"
: >"$dir/empty.txt"
seq 4000 >"$dir/good.txt"
head -c 2048 /dev/zero >"$dir/magic.bin"
bin() { # bin FILE TOKENS_PROMISED TOKENS_WRITTEN VALUE: llm.c's format
  perl -e '
    my ($file, $promised, $written, $value) = @ARGV;
    open(F, ">", $file);
    binmode F;
    print F pack("l<256", 20240520, 1, $promised, (0) x 253), pack("v*", ($value) x $written)' "$@"
}
bin "$dir/good.bin" 5000 5000 7
bin "$dir/cut.bin" 5000 100 7
bin "$dir/vocab.bin" 5000 5000 300

refuses an_unknown_option_is_refused "there is no option --lerning-rate" --lerning-rate 1
refuses a_missing_value_is_refused "--steps needs a value" --steps
refuses zero_steps_are_refused "--steps takes a whole number from 1" --steps 0
refuses a_negative_batch_is_refused "--batch takes a whole number from 1" --batch -3
refuses a_rate_that_is_no_number_is_refused "--lr takes a number above 0" --lr fast
refuses an_unknown_model_is_refused "--model takes tiny|char" --model gpt5
refuses a_missing_file_is_refused "nowhere.txt cannot be opened: No such file" --data \
  "$dir/nowhere.txt"
refuses an_empty_file_is_refused "empty.txt is empty" --data "$dir/empty.txt"
refuses a_short_file_is_refused "a context of 128 needs at least 258 tokens" --data "$dir/short.txt"
refuses a_file_of_another_format_is_refused "is no token shard in llm.c's format" --data \
  "$dir/magic.bin"
refuses a_truncated_shard_is_refused "promises 5000 tokens, which take 11024 bytes" --data \
  "$dir/cut.bin"
ends a_token_outside_the_vocabulary_ends_the_run "has token 300 at position" --data "$dir/vocab.bin"
refuses mixed_formats_are_refused "--data mixes tokens of 16 bits" --data "$dir/good.bin" \
  "$dir/good.txt"
ends an_unwritable_metrics_path_ends_the_run "metrics.jsonl cannot be opened" $small \
  --metrics /nowhere/metrics.jsonl
refuses heads_that_do_not_divide_are_refused "a width of 100 does not divide by 3 heads" --width \
  100 --heads 3
refuses a_batch_that_does_not_divide_is_refused \
  "a batch of 8 does not divide into micro-batches of 3" --batch 8 --microbatch 3
refuses stages_without_shards_are_refused "--zero shards over the ranks of --fsdp" --zero 1
refuses heads_too_wide_for_flash_attention_are_refused \
  "makes them 256 wide: give --attention plain" --width 256 --heads 1
ends a_loss_that_is_not_finite_stops_with_the_step "at step 2 the loss is" $small --lr 1e30 --clip 0
ends what_does_not_fit_says_what_holds_the_memory "out of device memory" --device-memory 5
OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_RANK=0 refuses another_mpis_launcher_is_refused \
  "the launcher started 4 processes" $small
SLURM_STEP_NUM_TASKS=4 SLURM_PROCID=0 refuses one_rank_among_several_tasks_is_told_how_to_start \
  "if one rank is meant, start one" $small
OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_RANK=2 $train $small >"$dir/out" 2>&1
status=$?
check another_mpis_launcher_is_refused_once '[ $status != 0 ] && [ ! -s "$dir/out" ]' "" \
  "status $status, said: $(head -c 300 "$dir/out")"

# Reports are opened before the first step, and never over what is read
OMP_WAIT_POLICY=passive $MPIEXEC -n 2 $train $small --pp 2 --trace /nowhere/t.json \
  >"$dir/out" 2>"$dir/err"
status=$?
check an_unwritable_trace_ends_the_run \
  '[ $status != 0 ] && ! grep -q "^step " "$dir/out" &&
    grep -q "/nowhere/t.json cannot be opened" "$dir/err"' "" \
  "status $status: $(head -c 300 "$dir/err")"
OMP_WAIT_POLICY=passive $MPIEXEC -n 2 $train $small --pp 2 --trace /dev/full \
  --metrics "$dir/m.jsonl" >"$dir/out" 2>"$dir/err"
status=$?
check a_trace_that_does_not_fit_costs_nothing_else \
  '[ $status != 0 ] && grep -q "/dev/full cannot be written: No space" "$dir/err" &&
    grep -q "^executed" "$dir/out" &&
    grep -q "^{\"summary\":true,.*\"pipeline\"" "$dir/m.jsonl"' \
  "" "status $status: $(head -c 300 "$dir/err")"
# ends_at TEXT COMMAND...: sends it a signal once it has printed that, or after a minute
ends_at() {
  local text=$1 job
  shift
  : >"$dir/out"
  timeout 60 "$@" >"$dir/out" 2>"$dir/err" &
  job=$!
  until grep -qs -- "$text" "$dir/out" || ! kill -0 $job 2>/dev/null; do sleep 0.1; done
  kill -TERM $job
  wait $job
}
ends_at '^step ' $train $shape --steps 100000 --trace "$dir/late.json" --trace-steps 99999-100000
check a_trace_whose_steps_never_came_stays_empty \
  '[ -e "$dir/late.json" ] && [ ! -s "$dir/late.json" ] &&
    grep -q "nothing is written to" "$dir/out"' "" \
  "$(ls "$dir") $(tail -1 "$dir/out")"
timeout 60 $train $shape --steps 100000 --trace "$dir/early.json" --trace-steps 2-2 \
  >"$dir/out" 2>&1 &
until tail -c 3 "$dir/early.json" 2>/dev/null | grep -q '}}' || ! kill -0 $! 2>/dev/null; do
  sleep 0.1
done
kill -KILL $(cat /proc/$!/task/$!/children 2>/dev/null) 2>/dev/null
wait $! 2>/dev/null
check a_trace_is_there_once_its_steps_are_done \
  "[ $? = 137 ] && tail -c 3 $dir/early.json | grep -q '}}'" "" "$(tail -1 "$dir/out")"
refuses metrics_over_the_data_are_refused \
  "--metrics $dir/good.txt would overwrite a file of the training data" $small --data \
  "$dir/good.txt" --metrics "$dir/good.txt"
[ "$(wc -l <"$dir/good.txt")" = 4000 ] && ok the_data_are_whole || fail the_data_are_whole
$train $shape --steps 3 --metrics "$dir/kept.jsonl" >/dev/null 2>&1
cp "$dir/kept.jsonl" "$dir/kept"
$train $shape --steps 2 --resume --checkpoint "$dir/mistyped" --metrics "$dir/kept.jsonl" \
  >"$dir/out" 2>&1
if cmp -s "$dir/kept" "$dir/kept.jsonl.1" && [ "$(losses "$dir/kept.jsonl" | wc -l)" = 2 ] \
  && grep -q "^metrics  of an earlier run are in $dir/kept.jsonl.1 now" "$dir/out"; then
  ok metrics_of_an_earlier_run_are_put_aside_where_there_is_no_checkpoint
else
  fail metrics_of_an_earlier_run_are_put_aside_where_there_is_no_checkpoint "$(tail -2 "$dir/out")"
fi
timeout 60 $train --layers 1 --width 4 --heads 4 --context 2 --batch 16384 --microbatch 16384 \
  --steps 1 >"$dir/out" 2>&1
check heads_times_sequences_may_be_65536 "[ $? = 0 ]" "" "$(tail -1 "$dir/out")"

if [ "$($train --help)" = "$($train -h)" ] && $train -h | grep -q -- --device-memory; then
  ok help_lists_the_options
else
  fail help_lists_the_options
fi
$train $shape --data "$dir/good.bin" --steps 2 --sample 3 >"$dir/out" 2>&1
check a_shard_trains "[ $? = 0 ]" "$(grep '^data' "$dir/out")" "$(tail -1 "$dir/out")"

# ---- build/generate

generate=build/cpu/generate
model="--layers 3 --width 48 --heads 4 --context 64 --dtype f64"
export OMP_NUM_THREADS=1
for how in "--temperature 0" "--temperature 1 --seed 9" "--top-k 5 --top-p 0.9"; do
  $MPIEXEC -n 1 $generate $model $how --prompt "Once upon" "a time" --tokens 40 >"$dir/one" \
    2>"$dir/err"
  same=0
  for layout in "2 --tp 2" "3 --tp 3" "4 --tp 4" "2 --pp 2" "4 --tp 2 --pp 2"; do
    OMP_WAIT_POLICY=passive $MPIEXEC -n ${layout%% *} $generate ${layout#* } $model $how --prompt \
      "Once upon" "a time" --tokens 40 >"$dir/many" 2>"$dir/err"
    cmp -s "$dir/one" "$dir/many" && [ -s "$dir/one" ] \
      && grep -q 'sent a token .*predicted' "$dir/err" && ! grep -q DIFFERS "$dir/err" \
      && same=$((same + 1))
  done
  if [ $same = 5 ]; then
    ok "every_layout_writes_the_same_text_${how//[ -]/_}" "5 layouts, 2 texts of 40 tokens"
  else
    fail "every_layout_writes_the_same_text_${how//[ -]/_}" "$same of 5: $(tail -2 "$dir/err")"
  fi
done
from() { $generate $model --temperature 0 --tokens 20 "$@" 2>/dev/null || echo "failed: $*"; }
printf 'Once upon\n' >"$dir/prompt.txt" # without the end of its last line
if [[ "$(from --prompt 'Once upon')" = "Once upon"?* ]] \
  && [ "$(from --prompt 'Once upon')" = "$(from --prompt-file "$dir/prompt.txt")" ] \
  && [ "$(from --prompt 'Once upon')" = "$(from --prompt-file - <"$dir/prompt.txt")" ] \
  && [ "$(from --prompt 'Once upon')" = "$(printf 'Once upon\r\n' | from --prompt-file -)" ]; then
  ok a_prompt_comes_from_words_a_file_or_standard_input
else
  fail a_prompt_comes_from_words_a_file_or_standard_input
fi

train=$generate
refuses no_prompt_is_refused "there is nothing to continue" $model
: >"$dir/empty"
refuses an_empty_prompt_is_refused "prompt 1 is empty" $model --prompt-file "$dir/empty"
refuses a_prompt_without_end_is_refused "/dev/zero is not a regular file" $model --prompt-file \
  /dev/zero
refuses a_prompt_longer_than_the_context_is_refused \
  "at least 100 tokens, and is longer than the model's context of 64" $model --prompt \
  "$(printf '%100s' x)"
refuses more_tokens_than_the_context_are_refused "prompt 2 of 5 tokens and --tokens 100 more do \
not fit the model's context of 64: give --tokens 60" \
  $model --prompt hi hello --tokens 100
check without_tokens_as_many_are_made_as_fit \
  "[ \$($generate $model --prompt $(printf '%60s' x | tr ' ' x) 2>$dir/err | wc -c) -gt 61 ]"
full="--layers 1 --width 8 --heads 1 --vocab 1000 --context 4 --prompt"
refuses numbers_longer_than_the_context_are_refused \
  "prompt 1 of 5 tokens is longer than the model's context of 4" $full "1 2 3 4 5"
check a_prompt_that_fills_the_context_gets_its_next_token \
  "[ \"\$($generate $full '1 2 3 4' 2>$dir/err | wc -w)\" = 5 ] &&
    [ \"\$($generate $full '1 2 3' --tokens 2 2>$dir/err | wc -w)\" = 5 ] &&
    grep -q 'untrained.*1 layers, width 8' $dir/err"
refuses a_missing_checkpoint_is_refused "nowhere does not exist" --checkpoint "$dir/nowhere" \
  --prompt x
mkdir "$dir/none"
refuses a_directory_without_checkpoint_is_refused "none holds no checkpoint" --checkpoint \
  "$dir/none" --prompt x
touch "$dir/none/config.json"
refuses hugging_faces_files_are_told_from_a_checkpoint "build/checkpoint import makes one" \
  --checkpoint "$dir/none" --prompt x
refuses sizes_beside_a_checkpoint_are_refused "sizes are the checkpoint's" --checkpoint \
  "$dir/none" --layers 3 --prompt x
refuses a_model_beside_a_checkpoint_is_refused "leave out --model" --checkpoint "$dir/none" \
  --model gpt2 --prompt x
refuses a_directory_is_no_prompt "$dir is a directory: name a file in it" $model \
  --prompt-file "$dir"
refuses a_prompt_that_looks_like_an_option_is_refused "none of them empty or beginning with --" \
  $model --prompt \
  "-- select"
refuses and_told_what_takes_it "(--prompt-file takes any text)" $model --prompt "-- select"
refuses heads_too_wide_for_decoding_are_refused "which takes at most 256: give more --heads" \
  --width 512 --heads 1 --prompt x
for width in 512 160; do
  build/cpu/train_gpt --attention plain --width $width --heads 1 --layers 1 --context 8 --batch 1 \
    --steps 1 --data README.md --checkpoint "$dir/wide-$width" >"$dir/out" 2>&1
done
refuses a_checkpoint_with_such_heads_is_not_decoded \
  "at most 256: build/generate cannot decode this checkpoint's model" --checkpoint \
  "$dir/wide-512" --prompt x
refuses and_one_that_plain_attention_takes_is_told_so "160 wide: give --attention plain" \
  --checkpoint "$dir/wide-160" --prompt x
check and_not_to_give_more_heads "! grep -q 'more --heads' $dir/err"
for cut in "--top-k 5" "--top-p 0.9"; do
  refuses "no_cut_beside_the_likeliest: $cut" "--temperature 0 always takes the likeliest" $model \
    --prompt x --temperature 0 $cut
done
check cuts_that_cut_nothing_do_no_harm \
  "$generate $model --prompt x --temperature 0 --top-k 0 --top-p 1 >$dir/out 2>$dir/err"
raw() { $MPIEXEC -n 1 $generate $model --tokens 1 --prompt-file "$dir/controls" "$@" 2>"$dir/err"; }
printf 'a\r\033[1mb' >"$dir/controls"
check control_characters_are_shown_as_marks_or_as_they_are \
  "[[ \"\$(raw)\" = a??\[1mb* ]] && [[ \"\$(raw --raw)\" = \"\$(cat $dir/controls)\"* ]]"
refuses more_tp_ranks_than_tokens_are_refused \
  "--tp 5 has more ranks than there are attention heads (6) or tokens in the vocabulary (4)" \
  --width 48 --heads 6 --vocab 4 --tp 5 --prompt 1
refuses more_tp_ranks_than_heads_are_refused \
  "--tp 5 has more ranks than there are attention heads (4)" \
  $model --tp 5 --prompt x
refuses more_stages_than_layers_are_refused "3 layers cannot be cut into 4 stages" $model --pp 4 \
  --prompt x
refuses numbers_are_said_with_all_their_digits "--top-p 1.0000001 is above 1" $model --top-p \
  1.0000001 --prompt x
refuses a_probability_above_one_is_refused "--top-p 2 is above 1" $model --top-p 2 --prompt x
refuses words_without_a_tokenizer_are_refused "'hello' is no token" --layers 1 --width 8 --heads 1 \
  --vocab 1000 --prompt hello

# ---- where a run writes

little="--model tiny --layers 1 --width 16 --heads 1 --context 16 --batch 2 --data README.md"
train=build/cpu/train_gpt
$train $little --steps 4 --save-every 2 --checkpoint "$dir/run" --metrics "$dir/run.jsonl" \
  >"$dir/out" 2>&1
refuses one_step_is_no_run "is one step of a run" --checkpoint "$dir/run/step-00000004" --resume
cp "$dir/run.jsonl" "$dir/was.jsonl"
$train $little --steps 5 --resume --resume-step 2 --checkpoint "$dir/run" \
  --metrics "$dir/run.jsonl" >"$dir/out" 2>&1
check metrics_of_steps_that_come_again_are_put_aside \
  "cmp $dir/was.jsonl $dir/run.jsonl.1 && [ \$(grep -c step\\\" $dir/run.jsonl) = 5 ]" "" \
  "$(tail -1 "$dir/out")"
$train $little --steps 5 --resume --checkpoint "$dir/run" --metrics "$dir/none.jsonl" \
  --trace "$dir/none.json" >"$dir/out" 2>&1
check a_finished_run_says_that_it_writes_nothing \
  "[ \$(grep -c 'nothing is written to --[mt].* $dir/none.json' $dir/out) = 2 ]" "" \
  "$(tail -2 "$dir/out")"
printf 'my notes\n' >"$dir/notes"
$train $little --steps 6 --resume --checkpoint "$dir/run" --metrics "$dir/notes" >"$dir/out" 2>&1
check what_is_no_metrics_is_put_aside "[ '$(cat "$dir/notes.1")' = 'my notes' ]" "" \
  "$(tail -1 "$dir/out")"
$train $little --steps 3 --metrics /dev/stdout 2>"$dir/err" | cat >"$dir/out"
check metrics_go_into_a_pipe "[ \$(grep -c '^{\"step' $dir/out) = 3 ]"
$train $little --steps 3 --metrics /dev/stdout >"$dir/out" 2>"$dir/err"
check metrics_and_what_is_printed_go_into_one_file \
  "[ \$(grep -c '^{\"step' $dir/out) = 3 ] && grep -q '^speed' $dir/out"
for last in 1 2; do
  $train $little --steps $((7 + last)) --resume --checkpoint "$dir/run" --metrics /dev/stdout \
    >>"$dir/log" 2>"$dir/err"
done
check resumed_runs_append_to_what_is_printed \
  "[ \$(grep -c '^{\"step' $dir/log) = 3 ] && [ -L /dev/stdout ]"
$train $little --steps 50 --checkpoint "$dir/full" --metrics /dev/full >"$dir/out" 2>"$dir/err"
status=$?
check metrics_that_cannot_be_written_cost_no_training \
  "[ $status = 1 ] && grep -q 'stopped after step 1, which is saved' $dir/err &&
   build/cpu/checkpoint verify $dir/full >/dev/null" "" "status $status: $(cat "$dir/err")"
head -c 3000000 /dev/urandom >"$dir/shrinks"
timeout 60 $train ${little% --data*} --data "$dir/shrinks" --steps 100000000 \
  --checkpoint "$dir/shrunk" --metrics "$dir/shrunk.jsonl" >"$dir/out" 2>"$dir/err" &
until { [ -e "$dir/shrunk/lock" ] && grep -q '^step 1/' "$dir/out"; } \
  || ! kill -0 $! 2>/dev/null; do
  sleep 0.1
done
: >"$dir/shrinks"
wait $!
status=$?
check data_that_becomes_shorter_costs_no_training \
  "[ $status = 1 ] && grep -q 'has become shorter while it was read: stopped after step' $dir/err &&
   build/cpu/checkpoint verify $dir/shrunk >/dev/null" "" "status $status: $(cat "$dir/err")"
stopped=$(sed -n 's/.*after step \([0-9]*\),.*/\1/p' "$dir/err")
check and_its_last_step_is_in_the_metrics \
  "grep '^{.step' $dir/shrunk.jsonl | tail -1 | grep -q '^{.step.:$stopped,'"
check and_so_is_the_summary "tail -1 $dir/shrunk.jsonl | grep -q '^{.summary'"
ends_at 'a sample' $train $little --steps 2 --sample 100000000 --checkpoint "$dir/long"
check a_signal_ends_the_sample \
  "grep -q 'a sample' $dir/out && grep -q '^speed' $dir/out && [ ! -e $dir/long/lock ]" "" \
  "$(tail -c 300 "$dir/err")"

# ---- make run, make replay and make generate: the command that they come to (without building,
# which would make build/ point to this backend, and without what `make test` was called with)

unset MAKEFLAGS NP STRATEGY DATA ARGS PROMPT CHECKPOINT TRAIN_ARGS PAGE
mkdir "$dir/made"
touch "$dir/made/manifest.json"
NP=4 MPIEXEC='echo mpiexec' make -o built BACKEND=cpu generate CHECKPOINT="$dir/made" \
  ARGS="--tokens 7" PROMPT='`"' >"$dir/out" 2>&1
said="mpiexec -n 4 build/generate --checkpoint $dir/made --prompt \`\" --tp 4 --tokens 7"
check make_generate_takes_NP_and_ARGS 'grep -qxF -- "$said" "$dir/out"' "" "$(tail -3 "$dir/out")"
# a stand-in for mpiexec, which reads the standard input whether or not a rank does
printf '#!/bin/sh\ncat >>"$EATEN"\n' >"$dir/reads"
chmod +x "$dir/reads"
for ARGS in "--tokens 7" "--prompt-file -"; do
  printf 'one\ntwo\n' | while read -r PROMPT; do
    EATEN="$dir/eaten" MPIEXEC="$dir/reads" make -o built BACKEND=cpu NP=1 generate \
      CHECKPOINT="$dir/made" PROMPT="$PROMPT" ARGS="$ARGS" >"$dir/out" 2>&1
    echo "$PROMPT" >>"$dir/prompts"
  done
done
check make_generate_leaves_the_standard_input_unless_it_is_the_prompt \
  '[ "$(tr "\n" " " <"$dir/prompts")" = "one two one " ] && [ "$(cat "$dir/eaten")" = two ]' "" \
  "$(cat "$dir/prompts" "$dir/out")"
MPIEXEC='echo mpiexec' make -o built BACKEND=cpu NP=1 generate CHECKPOINT="$dir/made" \
  ARGS="--prompt-file my.txt" >"$dir/out" 2>&1
said="mpiexec -n 1 build/generate --checkpoint $dir/made --tp 1 --prompt-file my.txt"
check make_generate_continues_a_file_alone 'grep -qxF -- "$said" "$dir/out"' "" \
  "$(tail -3 "$dir/out")"
PROMPT="the shell's" MPIEXEC='echo mpiexec' make -o built BACKEND=cpu NP=1 generate \
  CHECKPOINT="$dir/made" >"$dir/out" 2>&1
check make_generate_takes_no_PROMPT_of_the_environment \
  'grep -q -- "^mpiexec .* --prompt // tensor --tp" "$dir/out"' "" "$(tail -3 "$dir/out")"
MPIEXEC=true make -o built BACKEND=cpu NP=1 generate CHECKPOINT="$dir/made" PROMPT=: \
  >"$dir/out" 2>"$dir/err"
status=$?
check a_colon_would_end_mpiexecs_words \
  '[ $status != 0 ] && grep -q "word .:. is the end of .*--prompt-file FILE" "$dir/err"' "" \
  "status $status: $(cat "$dir/out" "$dir/err")"
MPIEXEC=true make -o built BACKEND=cpu NP=1 generate CHECKPOINT="$dir/made" \
  WHY="it's there" >"$dir/out" 2>&1
check a_reason_may_have_a_quote 'grep -qx "no GPU is used: it.s there" "$dir/out"' "" \
  "$(tail -3 "$dir/out")"
# with eight cores, of which tp would take four
printf '#!/bin/sh\necho 8\n' >"$dir/nproc"
chmod +x "$dir/nproc"
PATH=$dir:$PATH MPIEXEC='echo mpiexec' make -o built BACKEND=cpu STRATEGY=tp generate \
  CHECKPOINT="$dir/made" >"$dir/out" 2>&1
check make_generate_has_ranks_of_its_own \
  'grep -q "^mpiexec -n 2 " "$dir/out" && ! grep -q "on 4 of 8" "$dir/out"' "" \
  "$(tail -3 "$dir/out")"
PATH=$dir:$PATH MPIEXEC='echo mpiexec' make -o built BACKEND=cpu STRATEGY=tp run >"$dir/out" 2>&1
check make_run_takes_as_many_as_divide_the_model \
  'grep -q "^mpiexec -n 4 " "$dir/out" && grep -q "on 4 of 8" "$dir/out"' "" \
  "$(tail -3 "$dir/out")"
rm "$dir/nproc"
echo mine | tee "$dir/made/training" >"$dir/made/.make-generate-unfinished"
MPIEXEC='echo mpiexec' make -o built BACKEND=cpu generate CHECKPOINT="$dir/made" >"$dir/out" 2>&1
check a_finished_model_is_only_read \
  "! grep -q train_gpt $dir/out && grep -q build/generate $dir/out &&
   [ \$(cat $dir/made/training $dir/made/.make-generate-unfinished | grep -c mine) = 2 ]" "" \
  "$(cat "$dir/out")"
for name in "a b.txt" "it's.txt" 'two " $HOME `ls` # %.txt'; do
  echo text >"$dir/$name"
  MPIEXEC='echo mpiexec' make -o built BACKEND=cpu run STRATEGY=fsdp NP=2 DATA="$dir/$name" \
    ARGS="--steps 3 --sample '2 0'" >"$dir/out" 2>&1
  said="mpiexec -n 2 build/train_gpt --fsdp 2 --data $dir/$name"
  check "make_run_takes_data_of_any_name: $name" 'grep -qF -- "$said" "$dir/out" &&
    grep -q -- "--steps 3 --sample 2 0$" "$dir/out"' "" "$(tail -3 "$dir/out")"
done
make -o built BACKEND=cpu run ARGS="--steps 5 --checkpoint it's" >"$dir/out" 2>&1
status=$?
check words_with_half_a_quote_are_refused \
  '[ $status != 0 ] && grep -q "ARGS is no list of words" "$dir/out"' "" "$(tail -1 "$dir/out")"
MPIEXEC='echo mpiexec' make -o built BACKEND=cpu run NP=1 ARGS=$'--steps 3\t--trace own.json' \
  >"$dir/out" 2>&1
check options_are_known_whatever_is_between_them \
  '[ "$(grep -o -e --trace "$dir/out" | wc -l)" = 2 ]' "printed and started" "$(cat "$dir/out")"
MPIEXEC='echo mpiexec' make -o built BACKEND=cpu replay NP=1 ARGS="--data '/x --trace y'" \
  PAGE="$dir/none.html" >"$dir/out" 2>&1
check a_name_that_looks_like_an_option_is_none 'grep -q "^mpiexec" "$dir/out"' "" \
  "$(cat "$dir/out")"
make -o built BACKEND=cpu run NP=two >"$dir/out" 2>&1
status=$?
check a_number_of_ranks_that_is_none_is_refused \
  '[ $status != 0 ] && grep -q "NP is .two., expected a number of ranks" "$dir/out"'
make -o built BACKEND=cpu run STRATEGY=serial NP=2 >"$dir/out" 2>&1
status=$?
check serial_is_one_rank '[ $status != 0 ] && grep -q "serial is one rank, but NP is 2" "$dir/out"'
make -o built BACKEND=cpu run strategy=fsdp >"$dir/out" 2>&1
status=$?
check a_variable_that_is_none_is_refused \
  '[ $status != 0 ] && grep -q "there is no variable strategy" "$dir/out"'
said=0
for call in "run ARGS=--fsdp" "generate ARGS=--tp" "generate ARGS=--prompt" "replay ARGS=--pp"; do
  make -o built BACKEND=cpu MPIEXEC=true $call >"$dir/out" 2>&1
  grep -q -- "make ${call%% *}: --[a-z]* comes from [A-Z]" "$dir/out" && said=$((said + 1))
done
check what_makes_variables_say_args_cannot_say_again "[ $said = 4 ]" "" \
  "$said of 4: $(cat "$dir/out")"
make -o built BACKEND=cpu run DATA="$dir/no such text" >"$dir/out" 2>&1
status=$?
check data_that_is_not_there_is_named_with_its_place \
  '[ $status != 0 ] && grep -q "no file .$dir/no. in $PWD" "$dir/out"' "" "$(cat "$dir/out")"
make -o built BACKEND=cpu generate CHECKPOINT="$dir/none" NP=8 >"$dir/out" 2>&1
status=$?
check more_ranks_than_heads_train_nothing \
  '[ $status != 0 ] && grep -q "NP is 8, but the model that would be trained" "$dir/out"'
# what is wrong in the options of training is named before anything is made; and of a training that
# ends at once nothing stays
for given in "it's" "--tp 2" "--checkpoint x" "--resume"; do
  make -o built BACKEND=cpu MPIEXEC=true generate CHECKPOINT="$dir/never" TRAIN_ARGS="$given" \
    >"$dir/out" 2>"$dir/err"
  status=$?
  check "a_mistake_in_TRAIN_ARGS_makes_nothing: $given" \
    '[ $status != 0 ] && [ ! -e "$dir/never" ] && grep -q "^make generate: " "$dir/err" &&
      ! grep -q "^make run\| ARGS" "$dir/err"' "" "$(cat "$dir/out" "$dir/err")"
done
make -o built BACKEND=cpu MPIEXEC=false generate CHECKPOINT="$dir/never" >"$dir/out" 2>"$dir/err"
status=$?
check a_training_that_makes_no_model_leaves_none_to_take '[ $status != 0 ] &&
  grep -q "no model was trained" "$dir/err" && ! grep -q "as it is" "$dir/err" &&
  [ -z "$(ls -A "$dir/never")" ]' "" "$(cat "$dir/out" "$dir/err")"
# a stand-in for mpiexec: Ctrl-C while it trains, which ends well then, as train_gpt does
cat >"$dir/interrupted" <<'EOF'
#!/bin/sh
trap '' INT
case "$*" in
  *train_gpt*) mkdir -p "$HALF" && touch "$HALF/manifest.json" && kill -INT 0 ;;
  *) echo continues ;;
esac
EOF
chmod +x "$dir/interrupted"
for call in 1 2; do
  HALF="$dir/half" MPIEXEC="$dir/interrupted" setsid -w make -o built BACKEND=cpu generate \
    CHECKPOINT="$dir/half" >"$dir/out" 2>&1
  status=$?
  check half_a_model_is_trained_on_first_$call '[ $status != 0 ] &&
    grep -q "training" "$dir/out" && ! grep -q continues "$dir/out" &&
    [ -f "$dir/half/.make-generate-unfinished" ]'
done
# where another call trains it, the mark that it is unfinished stays
mkdir -p "$dir/busy"
touch "$dir/busy/lock" "$dir/busy/.make-generate-unfinished"
MPIEXEC=false make -o built BACKEND=cpu generate CHECKPOINT="$dir/busy" >"$dir/out" 2>&1
check a_model_that_another_call_trains_stays_unfinished \
  "[ $? != 0 ] && [ -f $dir/busy/.make-generate-unfinished ]" "" "$(tail -1 "$dir/out")"
rm "$dir/busy/.make-generate-unfinished"
MPIEXEC=false make -o built BACKEND=cpu generate CHECKPOINT="$dir/busy" >"$dir/out" 2>&1
check where_this_call_alone_made_the_mark_it_goes \
  "[ $? != 0 ] && [ ! -e $dir/busy/.make-generate-unfinished ]" "" "$(tail -1 "$dir/out")"
# and one that trains it to its end
cat >"$dir/trained" <<'EOF'
#!/bin/sh
case "$*" in
  *"train_gpt"*"--sample 0"*) ;;
  *train_gpt*) exit 1 ;;
  *) echo continues ;;
esac
EOF
chmod +x "$dir/trained"
MPIEXEC="$dir/trained" make -o built BACKEND=cpu generate CHECKPOINT="$dir/half" >"$dir/out" 2>&1
status=$?
check a_model_that_was_trained_further_is_used '[ $status = 0 ] &&
  grep -q continues "$dir/out" && [ ! -e "$dir/half/.make-generate-unfinished" ]' "" \
  "status $status: $(tail -3 "$dir/out")"
make -o built BACKEND=cpu THREADS=two run >"$dir/out" 2>&1
status=$?
check a_number_of_threads_that_is_none_is_refused \
  '[ $status != 0 ] && grep -q "THREADS is .two., expected a whole number" "$dir/out"'
# a stand-in for mpiexec that leaves a trace where --trace says
cat >"$dir/traced" <<'EOF'
#!/bin/sh
while [ "$1" != --trace ]; do shift; done
echo "$TEXT" >"$2"
EOF
chmod +x "$dir/traced"
for text in '{"traceEvents":[],"threefold":{}}' '{"traceEvents":' '{}' ''; do
  echo "an older one" >"$dir/it's.json"
  TEXT=$text MPIEXEC="$dir/traced" make -o built BACKEND=cpu replay PAGE="$dir/it's.html" \
    >"$dir/out" 2>&1
  status=$?
  case $text in
    *threefold*)
      check a_replay_takes_fsdp_and_keeps_an_older_file '[ $status = 0 ] &&
        grep -q -- "--fsdp 4" "$dir/out" && grep -q older "$dir"/it*.json.* &&
        grep -q threefold "$dir/it'"'"'s.html"'
      ;;
    *)
      check "what_is_no_trace_has_no_replay: '$text'" '[ $status != 0 ]' "" \
        "$(tail -2 "$dir/out")"
      ;;
  esac
  rm -f "$dir"/it*
done
echo '{"traceEvents":[],"threefold":{}}' >"$dir/traced.json"
for line in '' '{"step":1,"loss":2}' '{"summary":true}'; do
  echo "$line" >"$dir/half.jsonl"
  refused "what_is_no_metrics_has_no_page: '$line'" "is no metrics of a run that has ended" \
    report/replay.sh "$dir/traced.json" "$dir/page.html" "$dir/half.jsonl"
done
# shellcheck disable=SC2016 # its number stays that of the script
refused a_replay_removes_only_what_it_wrote "cannot overwrite" \
  bash -c 'echo mine >"$1.$$" && exec report/replay.sh "$0" "$1"' "$dir/traced.json" \
  "$dir/page.html"
check and_so_it_stays "grep -q mine $dir/page.html.*"
rm -f "$dir"/page.html*
make -o built BACKEND=cpu replay STRATEGY=zero9 >"$dir/out" 2>&1
status=$?
check a_strategy_that_is_none_is_refused '[ $status != 0 ] &&
  grep -q "make replay: STRATEGY is .zero9., expected serial, replicate, zero1," "$dir/out"'

# ---- build/show_schedule, and output that goes nowhere

train=build/cpu/show_schedule
refuses a_schedule_without_a_name_is_refused "say first which schedule" --stages 3
refuses an_unknown_schedule_is_refused "there is no schedule 'dual'" dual
refuses stages_given_twice_are_refused "--stages is given twice" 1f1b --stages 3 --stages 4
refuses an_empty_svg_is_refused "--svg takes a name, not ''" 1f1b --svg ""
refuses no_stages_are_refused "--stages takes a whole number from 1 to" zb --stages 0
refuses times_that_are_no_numbers_are_refused \
  "--times takes four numbers F,B,W,SEND: the first three from 1e-9" zb --times 1,2
refuses times_that_cannot_be_drawn_are_refused "the first three from 1e-9" zb \
  --times 1e-310,1e-310,1e-310,0
refuses options_of_all_schedules_are_refused "--svg is about one schedule" \
  all --svg "$dir/all.svg" --stages 3
$train all >"$dir/out" 2>&1
if grep -q '^     8   64 .* 1.79 %    8.00$' "$dir/out"; then ok all_schedules_are_compared
else fail all_schedules_are_compared "$(tail -1 "$dir/out")"; fi
$train zb --stages 4 --microbatches 8 --svg "$dir/zb.svg" >"$dir/out" 2>&1
if grep -q '^bubble    11.11 % simulated, 11.11 % by formula' "$dir/out" \
  && grep -q '</svg>' "$dir/zb.svg"; then
  ok a_schedule_is_drawn
else
  fail a_schedule_is_drawn "$(tail -1 "$dir/out")"
fi
for program in "show_schedule zb" "show_schedule --help" "train_gpt --help" "generate --help" \
  "generate $model --prompt x --tokens 3" "checkpoint --help"; do
  name=output_to_a_full_device_fails_${program%% --l*}
  refused "${name// /_}" "could not be written to the standard output" \
    bash -c "exec build/cpu/$program >/dev/full"
done

sums_up
