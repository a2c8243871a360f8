#!/usr/bin/env bash
# gpu_check.sh: `make gpu-check`, whether Threefold holds on the GPUs of this machine, and how fast
# it is there, in at most 15 minutes (with several GPUs 40). Each step has a limit and a log of its
# own; one that fails is noted, and the next one runs.
#   LIBCUDART=dir   with no GPU: the same steps under a PTX runner (tests/run.sh), with small models
#   MINUTES=60      for all of it in place of these; what no time is left for is left out
# build/gpu-check.txt is what to read and to attach to a report; build/gpu-check/ has the logs.
set -u
cd "$(dirname "$0")/.."
. tests/lib.sh
logs=build/gpu-check report=build/gpu-check.txt
left_out=0
rm -rf "$logs"
mkdir -p "$logs"
: >"$report"
say() { echo "$*" | tee -a "$report"; }

# ---- what is here

gpus=$(launch/detect.sh gpus)
limit=$((${MINUTES:-$((gpus > 1 ? 40 : 15))} * 60))
if [ "$gpus" != 0 ]; then
  backend=cuda built=build/cuda sharing=build/cuda/comm-mpi
elif [ -n "${LIBCUDART:-}" ]; then
  backend=ptx built=build/cuda/ptx sharing=build/cuda/ptx
  export PTXRUN_RACE=1 # a race in shared memory is an error
else
  why=$(sed -n 's/^WHY := //p' build/detected.mk)
  say "SKIP gpu_check.sh: there is no GPU${why:+: $why} (LIBCUDART=dir names a PTX runner)"
  exit 0
fi
say "Threefold $(git describe --always --dirty 2>/dev/null), $backend, $(date -u '+%F %H:%M')," \
  "$cores cores, $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1)"
nvcc=$(sed -n 's/^NVCC ?= //p' build/detected.mk)
say "$("$nvcc" --version | sed -n 's/.*release \(.*\),.*/CUDA \1/p')," \
  "$($MPICXX --version | head -1)," \
  "$($MPIEXEC --version | sed -n 's/^ *Version: */MPICH /p')"
[ "$gpus" = 0 ] || nvidia-smi --format=csv,noheader \
  --query-gpu=name,memory.total,driver_version,compute_cap,pcie.link.gen.max | tee -a "$report"

# ---- steps

# step NAME SECONDS COMMAND...: a line says how it ended, with the last that it printed
step() {
  local name=$1 most=$2 began=$SECONDS rest=$((limit - SECONDS)) log status word=ok
  shift 2
  log=$logs/$(tr -cs 'A-Za-z0-9._=\n-' _ <<<"$name").log
  if [ $rest -lt 10 ]; then
    say "SKIP        $name: no time is left"
    left_out=$((left_out + 1))
    return 1
  fi
  timeout -k 5 $((most < rest ? most : rest)) "$@" >"$log" 2>&1 </dev/null
  status=$?
  [ $status = 0 ] && ! grep -q '^fakecudart:' "$log" || word=FAIL
  say "$(printf '%-4s %4d s  %-44s %s' $word $((SECONDS - began)) "$name" \
    "$([ $status != 124 ] || echo "stopped after $most s: ")$(tail -1 "$log" | cut -c1-100)")"
  if [ $word = ok ]; then
    passed=$((passed + 1))
    return 0
  fi
  grep -aE '^(FAIL|fakecudart)|[Ee]rror' "$log" | grep -v '^ok' | head -5 | cut -c1-200 \
    | sed 's/^/            /' | tee -a "$report"
  failed=$((failed + 1))
  return 1
}
# shows PATTERN: those lines of the last step's log go to the report
shows() {
  grep -aE "$1" "$(ls -t "$logs"/*.log | head -1)" | sed 's/^/            /' | tee -a "$report"
}
run() { # run RANKS PROGRAM ARGS...
  OMP_NUM_THREADS=$(threads "$1") OMP_WAIT_POLICY=passive $MPIEXEC -n "$@"
}
export -f run threads
export cores

# ---- build

kernels="test_golden test_tensor test_kernels test_matmul test_attention test_decode test_autograd"
strategies="test_trainer test_fsdp test_tensor_parallel test_pipeline test_context_parallel \
test_generator"
programs="build"
[ $backend = cuda ] || programs=build/cuda/ptx/train_gpt
programs="$programs $(printf "$built/tests/%s " $kernels $strategies test_parity)"
[ $backend = ptx ] || programs="$programs $(printf "$built/tests/%s " bench_kernels bench_nccl) \
  $sharing/train_gpt $(printf "$sharing/tests/%s " $strategies test_parity)"
step "build" 420 make -k -j"$cores" BACKEND=${backend/ptx/cuda} $programs

# ---- one rank

for test in $kernels $strategies; do
  step "$test" 120 "$built/tests/$test"
done

# ---- every strategy trains to the losses of one rank, in f64

tiny="--model tiny --layers 4 --width 32 --heads 4 --context 32 --batch 8 --steps 3 --dtype f64"
trains() { # trains RANKS PROGRAM OPTIONS...
  run "$1" "$2" $tiny "${@:3}" --metrics "$dir/m.jsonl" || return
  local difference
  difference=$(worst 3 "$dir/one.jsonl" "$dir/m.jsonl")
  echo "largest relative difference of the losses: $difference"
  at_most "$difference" 1e-12
}
resumes() { # resumes PROGRAM: saves while --fsdp 2 trains, and goes on from step 2 with --tp 2
  run 2 "$1" $tiny --fsdp 2 --checkpoint "$dir/c" --save-every 1 --metrics "$dir/m.jsonl" \
    && trains 2 "$1" --tp 2 --checkpoint "$dir/c" --resume --resume-step 2
}
export -f trains resumes losses worst at_most
export tiny dir
step "train, one rank" 60 bash -c 'run 1 "$0" $tiny --metrics "$dir/one.jsonl"' $built/train_gpt
# layouts HOW PROGRAM MOST: all that have at most so many ranks
layouts() {
  local ranks options
  while read -r ranks options; do
    [ "$ranks" -gt "$3" ] \
      || step "train $options, $1" 60 bash -c 'trains "$@"' - "$ranks" "$2" $options
  done <<'END'
2 --replicate 2
2 --fsdp 2 --zero 1
2 --fsdp 2
2 --tp 2 --sequence-parallel
2 --cp 2
2 --pp 2 --schedule 1f1b --microbatch 2
2 --pp 2 --schedule zbv --microbatch 2
4 --pp 2 --tp 2
8 --pp 2 --fsdp 2 --tp 2 --sequence-parallel --microbatch 2
END
}
if [ "$gpus" -gt 1 ]; then
  layouts NCCL $built/train_gpt "$gpus"
  for test in $strategies; do
    step "$test, $gpus ranks" 300 bash -c 'run "$@"' - "$gpus" "$built/tests/$test"
  done
  step "test_parity, $gpus ranks" 300 bash -c 'run "$@"' - "$gpus" "$built/tests/test_parity" first
elif [ "$gpus" = 1 ]; then
  # NCCL takes ranks that share a GPU if it believes them on other hosts: it goes through sockets
  cat >"$dir/as_host" <<END
#!/usr/bin/env bash
export NCCL_HOSTID=rank-\$PMI_RANK NCCL_NET=Socket NCCL_SOCKET_IFNAME=lo NCCL_IB_DISABLE=1
exec $PWD/$built/train_gpt "\$@"
END
  chmod +x "$dir/as_host"
  layouts "NCCL, ranks of one GPU" "$dir/as_host" 4
fi
layouts "COMM=mpi" $sharing/train_gpt 8
step "saved by --fsdp 2, resumed by --tp 2" 60 bash -c 'resumes "$@"' - $sharing/train_gpt
for test in $strategies "test_parity first_setting"; do
  step "$test, 4 ranks, COMM=mpi" 120 bash -c 'run "$@"' - 4 $sharing/tests/$test
done

# ---- the sanitizer; a PTX runner looks for races by itself

sanitizer=$(command -v compute-sanitizer || ls "${nvcc%/nvcc}/compute-sanitizer" 2>/dev/null)
if [ $backend = ptx ]; then
  say "            no compute-sanitizer under a PTX runner, which checks addresses and races itself"
elif [ -z "$sanitizer" ]; then
  say "SKIP        compute-sanitizer is not here"
  left_out=$((left_out + 1))
else
  for tool in memcheck racecheck initcheck; do
    step "$tool, train in bf16, own products" 90 "$sanitizer" --tool $tool --error-exitcode 9 \
      $built/train_gpt ${tiny/f64/bf16} --matmul own
  done
fi

# ---- speed

if [ $backend = ptx ]; then
  step "train gpt2's blocks in bf16, own products" 120 $built/train_gpt --model gpt2 --layers 1 \
    --width 64 --heads 1 --context 128 --vocab 257 --batch 1 --steps 1 --dtype bf16 --matmul own
  say "            speed is not measured: there is no GPU"
else
  for dtype in bf16 f32; do
    step "kernels, $dtype" 60 $built/tests/bench_kernels $dtype && shows '%|^(copy|read)'
  done
  profile=$($built/train_gpt --help | grep -o -- --profile | head -1)
  for options in "bf16 --batch 16" "bf16 --batch 64" "f32 --batch 16"; do
    step "gpt2, T 1024, --dtype $options" 60 $built/train_gpt --model gpt2 --steps 12 \
      --dtype $options $profile && shows '^(speed|  all)|%'
  done
  if python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
    for compile in "" --compile; do
      step "PyTorch, gpt2, T 1024, batch 16 $compile" 120 python3 tests/bench_pytorch.py \
        --model gpt2-1024 --device cuda --warmup 3 --steps 10 $compile && shows .
    done
  fi
  for ((n = 2; n <= gpus; n *= 2)); do
    for axis in replicate fsdp tp cp pp; do
      shape="--batch $((16 * n))"
      [ $axis != cp ] || shape="--batch 16 --context $((1024 * n))" # it is for long sequences
      step "gpt2, bf16, --$axis $n $shape" 60 bash -c 'run "$@"' - $n $built/train_gpt \
        --model gpt2 --steps 12 --dtype bf16 $shape --$axis $n $profile && shows '^(speed|  all)|%'
    done
    step "NCCL, $n ranks" 60 bash -c 'run "$@"' - $n $built/tests/bench_nccl && shows MiB
  done
fi

say "$passed steps passed, $failed failed, $left_out left out, in $SECONDS s; logs are in $logs"
[ $failed = 0 ]
