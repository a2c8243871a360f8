#!/usr/bin/env bash
# test_plan.sh: build/plan as a user meets it: its memory is what runs measure, and bad input gets a
# sentence.
set -u
cd "$(dirname "$0")/.."
. tests/lib.sh
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
plan=build/cpu/plan

# refuses NAME 'part of the sentence' ARGS...
refuses() { alone=yes refused "$1" "$2" $plan "${@:3}"; }
refuses unknown_machine "there is no machine and no file 'b200'" --machine b200
printf 'peak 1\n' >"$dir/machine"
refuses machine_without_sources "line 1: peak needs a source" --machine "$dir/machine"
refuses heads_that_do_not_divide "does not divide by" --heads 5
refuses kv_heads_that_do_not_divide "does not divide the" --heads 8 --kv-heads 3
refuses ranks_of_a_layout "and --nodes 1 with --devices 8 have 8" --layout --tp 4
refuses a_layout_of_fewer_heads_than_ranks "--tp is at most 2" --layout --model gpt2 --tp 4 \
  --devices 4 --kv-heads 2
refuses a_batch_that_the_schedule_takes_is_named "give --batch 12" --layout --pp 2 --replicate 3 \
  --devices 6 --batch 8 --schedule interleaved --layers 4
refuses chunks_of_a_layout "schedule gpipe has one chunk a stage, not 3" --layout --pp 2 \
  --devices 2 --layers 4 --schedule gpipe --chunks 3
refuses a_machine_without_end "/dev/zero is not a regular file" --machine /dev/zero
refuses a_batch_of_a_layout "a batch of 3 does not divide" --layout --fsdp 8 --batch 3
refuses micro_batches_of_a_layout "that --schedule takes" --layout --pp 2 --devices 2 --batch 6 \
  --microbatch 2 --schedule interleaved
refuses a_context_of_a_layout "cuts a sequence into 16 pieces" --layout --cp 8 --context 8
refuses no_layout "no layout of 8 devices" --batch 3 --pp 1 --tp 1 --cp 1
refuses a_number "--nodes takes a whole number" --nodes 0
refuses a_schedule "is about a pipeline" --layout --tp 2 --devices 2 --schedule zb

# ---- options that would do nothing
refuses a_schedule_without_a_pipeline "--schedule is about a pipeline" --pp 1 --schedule zb
refuses chunks_without_a_pipeline "--chunks is about a pipeline" --pp 1 --chunks 2
refuses chunks_of_a_schedule_that_has_one "schedule zb has one chunk a stage, not 3" \
  --schedule zb --chunks 3
refuses reshard_without_zero3 "is about the parameters that ZeRO-3 gathers" \
  --zero 2 --reshard-after-forward no
refuses zero_without_shards "--zero shards over the ranks of" --fsdp 1 --cp 1 --zero 2
refuses rows_without_tp "--sequence-parallel splits activations" --tp 1 --sequence-parallel
refuses sequences_of_a_training "--sequences is about inference" --sequences 2
refuses a_spread_over_one_node "--spread is about several nodes" --spread
refuses a_search_of_one_layout "--top is about a search" --layout --devices 1 --top 3
for option in "replicate 2" "fsdp 2" "cp 2" "batch 8" "microbatch 2" "zero 1" "prefetch 2" \
  "reshard-after-forward no" "schedule zb" "chunks 2" sequence-parallel recompute layout "top 3"; do
  refuses "decode_with_${option% *}" "--${option% *} is about training" --decode --$option
done

refuses a_map_of_a_model "--model would do nothing: --map draws models" \
  --map "$dir/map.svg" --model gpt2

# ---- what is asked for is tried
wide="--layout --devices 1 --layers 2 --width 640 --heads 4"
refuses wide_heads_of_this_codes_flash_attention "heads of at most 128 channels" $wide
check heads_are_as_wide_as_software_of_others_takes_them \
  "$plan $wide --profile megatron-2021 >$dir/out 2>$dir/err &&
    grep -q 'about times alone' $dir/out"
check and_a_long_context_is_not_taken_for_whole_scores \
  "$plan --profile megatron-2021 --layers 96 --width 12288 --heads 96 --context 131072 --devices 8 \
    --nodes 8 --layout --tp 64 --batch 1 2>&1 | grep -q 'a rank needs'" "" ""
check a_machine_may_come_from_a_pipe \
  "$plan --layout --devices 1 --machine <(sed -n '/^peak 312/,/^between/p' theory/machine.cpp) \
    >$dir/out 2>$dir/err"
check chunks_beyond_those_that_are_tried_by_themselves \
  "$plan --model gpt2 --schedule interleaved --pp 2 --chunks 6 --top 1 | grep -q -- '--chunks 6'"
check chunks_are_not_those_of_another_schedule \
  "$plan --model gpt2 --devices 2 --pp 2 --chunks 3 --top 50 >$dir/out 2>$dir/err &&
    grep -q interleaved $dir/out && ! grep -q 'zbv\|1f1b' $dir/out"
check the_batch_fits_the_ranks_that_are_asked_for \
  "$plan --model gpt2 --nodes 16 --fsdp 128 --top 1 | grep -q -- '--fsdp 128'"
check a_batch_of_a_billion \
  "timeout 20 $plan --model tiny --devices 8 --batch 1000000000 --top 1 | grep -q 'layouts '"
refuses more_forwards_than_a_schedule_has "a schedule has at most 1000000 forwards" \
  --devices 2 --pp 2 --schedule zbv --batch 400000 --microbatch 1
check decoding_of_two_tokens_has_two_ranks_at_most \
  "$plan --decode --width 128 --heads 4 --vocab 2 --devices 4 | grep -c '^ *[0-9] ' | grep -qx 2"
check a_context_of_one_token "$plan --context 1 --devices 1 --top 1 | grep -q 'layouts '"

# ---- what does not fit
refuses bytes_beyond_counting "too many bytes to count" --layers 10000 --width 1000000 \
  --heads 10000 --context 10000000
refuses a_map_in_place_of_a_device "/dev/null is no file" --map /dev/null
refuses scores_beyond_counting "give --attention flash" --attention plain --context 10000000
refuses decode_more_stages_than_layers "4 layers cannot be cut into 50000 stages" \
  --decode --pp 50000 --devices 1
refuses decode_more_ranks_than_devices "be at most 2 (with --pp 4;" --decode --tp 4 --pp 4
refuses decode_more_ranks_than_heads "--tp 8 has more ranks than there are attention heads (4)" \
  --decode --tp 8
refuses decode_ranks_that_do_not_divide "it must divide the 8 devices" \
  --decode --tp 3
refuses decode_weights_that_do_not_fit "a rank needs 3.194 GiB, and a device has 0.0009766" \
  --decode --model gpt2-xl --memory 1 --devices 1
refuses decode_cache_that_does_not_fit "a rank needs 3.516e+04 GiB, and a device has 73.6" \
  --decode --model gpt2 --sequences 1000000 --devices 1 --json
refuses no_layout_fits "a rank needs 0.01495 GiB, and a device has 0.0009766" \
  --memory 1 --devices 1
check its_memory_has_digits \
  'grep -q "^  parameters *0.001569 GiB " "$dir/out" \
  && grep -q "^  gradients *0.003261 GiB " "$dir/out" \
  && grep -q "^  optimizer *0.009416 GiB " "$dir/out"'
refuses no_layout_fits_in_json "does not fit" --memory 1 --devices 1 --json
refuses one_layout_does_not_fit "does not fit" --layout --memory 1 --devices 1
refuses one_layout_does_not_fit_in_json "does not fit" --layout --memory 1 --devices 1 --json
check its_memory_is_in_json 'grep -A40 smallest_that_does_not_fit "$dir/out" | grep -q memory_bytes'

# ---- the map: its file is opened first, and an older one stays until the new one is whole
refuses a_map_nowhere "/nowhere/x.svg.partial cannot be opened" --map "$dir/nowhere/x.svg"
echo older >"$dir/map.svg"
timeout 2 $plan --map "$dir/map.svg"
status=$?
check an_interrupted_map_leaves_the_older "[ $status = 124 ] && grep -qx older '$dir/map.svg'"

# ---- memory: 40 random runs of 1 to 8 ranks, each rank's bytes
python3 - "$dir" <<'PYTHON'
import json, os, random, subprocess, sys
random.seed(7)
wrong = []
for run in range(40):
    while True:
        sizes = {axis: random.choice([1, 1, 2, 3, 4]) for axis in
                 ("pp", "replicate", "fsdp", "cp", "tp")}
        ranks = 1
        for n in sizes.values():
            ranks *= n
        if ranks <= 8:
            break
    data = sizes["replicate"] * sizes["fsdp"]
    microbatch, m = random.choice([1, 2]), sizes["pp"] * random.choice([1, 2])
    words = ["--layers", 8, "--width", 48, "--heads", 4, "--context", 32, "--vocab", 256,
             "--dtype", "f32", "--batch", data * microbatch * m, "--microbatch", microbatch]
    for axis, n in sizes.items():
        words += ["--" + axis, n]
    if sizes["fsdp"] * sizes["cp"] > 1:
        words += ["--zero", random.choice([1, 2, 3])]
        if words[-1] == 3:
            words += ["--reshard-after-forward", random.choice(["yes", "no"])]
    if sizes["pp"] > 1:
        words += ["--schedule", random.choice(["gpipe", "1f1b", "interleaved", "zb", "zbv"])]
    if sizes["tp"] > 1 and random.random() < 0.5:
        words += ["--sequence-parallel"]
    if random.random() < 0.3:
        words += ["--recompute"]
    words = [str(word) for word in words]
    metrics = f"{sys.argv[1]}/{run}.jsonl"
    start = [os.environ["MPIEXEC"], "-n", str(ranks), "build/cpu/train_gpt"]
    done = subprocess.run(start + ["--steps", "1", "--metrics", metrics] + words,
                          capture_output=True, text=True, timeout=300)
    planned = subprocess.run(["build/cpu/plan", "--layout", "--json", "--devices", str(ranks)]
                             + words, capture_output=True, text=True)
    if done.returncode or planned.returncode:
        wrong.append(f"{' '.join(words)}: {done.stderr} {planned.stderr}")
        continue
    plan, = json.loads(planned.stdout)["fastest"]
    summary = json.loads(open(metrics).read().splitlines()[-1])
    measured = next(r for r in summary["memory"] if r["rank"] == plan["memory_rank"])
    for what in ("parameters", "gradients", "optimizer"):
        if measured[what]["now"] != plan["memory"][what]:
            wrong.append(f"{what} of {' '.join(words)}: {measured[what]['now']}, planned "
                         f"{plan['memory'][what]}")
    if measured["kept_activations"]["bytes"] != plan["memory"]["activations"]:
        wrong.append(f"activations of {' '.join(words)}")
    # with what runs again, and gradients of activations: at most 8 of width C
    activation = microbatch * 32 * 48 * 4
    if measured["activations"]["at_peak"] > (
            plan["memory"]["activations"] + plan["memory"]["workspace"] + 8 * activation):
        wrong.append(f"activations at the peak of {' '.join(words)}")
    if measured["gather buffers"]["at_peak"] > plan["memory"]["gather buffers"]:
        wrong.append(f"gather buffers of {' '.join(words)}")
for line in wrong:
    print(line, file=sys.stderr)
sys.exit(bool(wrong))
PYTHON
if [ $? = 0 ]; then ok memory_is_what_40_runs_measure; else fail memory_is_what_40_runs_measure; fi

# ---- what programs read
$plan --model tiny --devices 2 --batch 16 --json --top 2 >"$dir/plan.json"
if python3 -c '
import json, sys
plan = json.load(open(sys.argv[1]))
assert len(plan["fastest"]) == 2 and plan["fitting"] <= plan["layouts"]
assert plan["fastest"][0]["step_seconds"] <= plan["fastest"][1]["step_seconds"]' "$dir/plan.json"
then ok json_lists_the_fastest; else fail json_lists_the_fastest; fi
$plan --model gpt2-xl --devices 8 --decode >"$dir/decode"
if grep -q '^   1 ' "$dir/decode"; then ok decode_says_a_time; else fail decode_says_a_time; fi
$plan --model gpt2-xl --devices 4 --decode --memory 2000 >"$dir/decode"
check decode_says_which_tp_fits \
  '[ $? = 0 ] && grep -q "^   1 .* 3.194  does not fit$" "$dir/decode" \
  && grep -q "^   2 .* 1.624$" "$dir/decode"'

if $plan --model gpt2-xl --devices 4 --decode --json >"$dir/decode" && python3 -c '
import json, math, sys
rows = json.load(open(sys.argv[1]))["decode"]
assert [row["tp"] for row in rows] == [1, 2, 4]
for row in rows:
  assert math.isclose(sum(row["seconds"].values()), row["token_seconds"])
  assert row["memory_bytes"] > 1e9 / row["tp"]' "$dir/decode"
then ok json_has_the_parts_of_a_token; else fail json_has_the_parts_of_a_token; fi
check sizes_that_are_not_given_are_named \
  "$plan --width 256 --heads 4 --top 1 | grep -q 'as in tiny: --layers --context --vocab$' &&
    $plan --model gpt2 --top 1 >$dir/out 2>$dir/err && ! grep -q 'as in tiny' $dir/out"

check an_option_without_use_is_said \
  "$plan --tp 8 --heads 8 --zero 3 | grep -qx -- '--zero has no use in these layouts' &&
    $plan --fsdp 8 --zero 3 --batch 8 >$dir/out 2>$dir/err && ! grep -q 'no use' $dir/out"

# the context is full with a prompt of one byte and 127 tokens
for axes in "--tp 2" "--pp 2 --tp 1 --vocab 5000"; do # the fullest stage is the first
  model="--model tiny --dtype f32 --layers 8 $axes"
  $MPIEXEC -n 2 build/cpu/generate $model --prompt 1 2 --tokens 127 >"$dir/out" 2>&1
  held=$(sed -n 's/^memory *\(.*\) MiB of weights, \(.*\) MiB of keys.*/\1 \2/p' "$dir/out" \
    | awk '{ print $1 + $2 }')
  planned=$($plan $model --devices 2 --decode --sequences 2 \
    | awk '$1 ~ /^[12]$/ && NF == 8 { print 1024 * $8 }')
  check "decode_memory_is_what_generate_holds_with_${axes// /_}" \
    'awk -v a="$held" -v b="$planned" "BEGIN { d = a - b; exit !(a > 4 && d * d < 0.01) }"' \
    "$held MiB, planned $planned" "$held MiB, planned $planned"
done
sums_up
