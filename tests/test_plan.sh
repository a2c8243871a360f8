#!/usr/bin/env bash
# test_plan.sh: build/plan as a user meets it: its memory is what runs measure, and bad input gets a
# sentence.
set -u
cd "$(dirname "$0")/.."
. tests/lib.sh
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
plan=build/cpu/plan

# refuses NAME 'part of the sentence' ARGS...
refuses() {
  local name=$1 part=$2
  shift 2
  if timeout 60 $plan "$@" >"$dir/out" 2>"$dir/err"; then
    fail "$name" "exit status 0"
  elif [ "$(wc -l <"$dir/err")" != 1 ] || ! grep -qF -- "$part" "$dir/err"; then
    fail "$name" "said: $(head -c 300 "$dir/err")"
  else ok "$name" "$(cut -c1-120 "$dir/err")"; fi
}
refuses unknown_machine "there is no machine and no file 'b200'" --machine b200
printf 'peak 1\n' >"$dir/machine"
refuses machine_without_sources "line 1: peak needs a source" --machine "$dir/machine"
refuses heads_that_do_not_divide "does not divide by" --heads 5
refuses kv_heads_that_do_not_divide "does not divide the" --heads 8 --kv-heads 3
refuses ranks_of_a_layout "and --nodes 1 with --devices 8 have 8" --layout --tp 4
refuses no_layout "no layout of 8 devices" --batch 3 --pp 1 --tp 1 --cp 1
refuses a_number "--nodes takes a whole number" --nodes 0
refuses a_schedule "is about a pipeline" --layout --tp 2 --devices 2 --schedule zb

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
    start = [os.environ.get("MPIEXEC", "mpiexec"), "-n", str(ranks), "build/cpu/train_gpt"]
    done = subprocess.run(start + ["--steps", "1", "--metrics", metrics] + words,
                          capture_output=True, text=True, timeout=100)
    planned = subprocess.run(["build/cpu/plan", "--layout", "--json", "--devices", str(ranks)]
                             + words, capture_output=True, text=True)
    if done.returncode or planned.returncode:
        wrong.append(f"{' '.join(words)}: {done.stderr} {planned.stderr}")
        continue
    plan = json.loads(planned.stdout)
    summary = json.loads(open(metrics).read().splitlines()[-1])
    measured = next(r for r in summary["memory"] if r["rank"] == plan["memory_rank"])
    for what in ("parameters", "gradients", "optimizer"):
        if measured[what]["now"] != plan["memory"][what]:
            wrong.append(f"{what} of {' '.join(words)}: {measured[what]['now']}, planned "
                         f"{plan['memory'][what]}")
    if measured["kept_activations"]["bytes"] != plan["memory"]["activations"]:
        wrong.append(f"activations of {' '.join(words)}")
    if measured.get("gather", {}).get("at_peak", 0) > plan["memory"].get("gather", 0):
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
sums_up
