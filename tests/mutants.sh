#!/usr/bin/env bash
# mutants.sh: one-line faults, each of which the suite must catch.
#   tests/mutants.sh          all of them
#   tests/mutants.sh waits    only the removed event waits, with queued streams: part of `make test`
# A mutant is a sed expression on one file; the file is compiled beside the real one and linked into the test that has to fail.
set -u
cd "$(dirname "$0")/.."
only=${1:-}
compile=$(make -s --no-print-directory BACKEND=cpu print-compile)
link=$(make -s --no-print-directory BACKEND=cpu print-link)
objects=$(make -s --no-print-directory BACKEND=cpu print-objects)
work=build/mutants; mkdir -p $work
passed=0 failed=0
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive THREEFOLD_TIMEOUT=20

# mutant GROUP NAME FILE SED RANKS STREAMS TEST [FILTER]
mutant() {
  local group=$1 name=$2 file=$3 change=$4 ranks=$5 streams=$6 test=$7 filter=${8:-}
  [ -z "$only" ] || [ "$only" = "$group" ] || return 0
  sed -E "$change" "$file" >"$work/$name.cpp"
  if cmp -s "$file" "$work/$name.cpp"; then echo "FAIL $name  the change no longer applies to $file"; failed=$((failed + 1)); return; fi
  $compile -I"$(dirname "$file")" -Wno-error -c "$work/$name.cpp" -o "$work/$name.o" 2>"$work/$name.log" ||
    { echo "FAIL $name  does not compile: $(head -1 "$work/$name.log")"; failed=$((failed + 1)); return; }
  local others; others=$(echo $objects | tr ' ' '\n' | grep -v "obj/$file.o")
  $link "build/cpu/obj/tests/$test.cpp.o" $others "$work/$name.o" -o "$work/$name" -ldnnl -fopenmp
  local seeds="0"; [ "$streams" = queued ] && seeds="1 2 3"
  for seed in $seeds; do
    [ "$streams" = queued ] && export THREEFOLD_STREAMS=queued:$seed || unset THREEFOLD_STREAMS
    if ! timeout 120 mpiexec -n "$ranks" "$work/$name" $filter >"$work/$name.out" 2>&1; then
      echo "ok   $name  caught by $test${filter:+ ($filter)}$([ "$streams" = queued ] && echo ", queued streams, seed $seed"): $(grep -m1 FAIL "$work/$name.out" | cut -c1-110)"
      passed=$((passed + 1)); unset THREEFOLD_STREAMS; return
    fi
  done
  unset THREEFOLD_STREAMS
  echo "FAIL $name  lives: $test passed with it"; failed=$((failed + 1))
}
parity=data_parallel_and_fsdp
formulas=bytes_sent

mutant waits compute_does_not_wait_for_the_gather fsdp.cpp '/parameters must have arrived/d' 2 queued test_fsdp $parity
mutant waits reduce_does_not_wait_for_the_gradients fsdp.cpp '/the gradients must have been computed/d' 2 queued test_fsdp $parity
mutant waits optimizer_does_not_wait_for_the_sums fsdp.cpp '/the optimizer reads what the last/d; /u.reduced.make_wait/d' 2 queued test_fsdp $parity

mutant faults the_reduce_scatter_is_dropped fsdp.cpp '/NCCL_CHECK\(ncclReduceScatter/d' 2 immediate test_fsdp $parity
mutant faults the_all_reduce_over_replicate_is_dropped fsdp.cpp 's/NCCL_CHECK\(ncclAllReduce\(u.own_grad.raw.*/NCCL_CHECK(ncclSuccess);/; /^ +mesh_.stream\)\);$/d' 2 immediate test_fsdp $parity
mutant faults the_shards_are_swapped fsdp.cpp 's/Tensor mine = u.full_grad.part\(mesh_.fsdp.rank/Tensor mine = u.full_grad.part((mesh_.fsdp.size - 1 - mesh_.fsdp.rank)/' 2 immediate test_fsdp $parity
mutant faults the_loss_is_scaled_twice trainer.cpp 's/1.0 \/ double\(options_.batch/2.0 \/ double(options_.batch/' 2 immediate test_fsdp $parity
mutant faults a_rank_repeats_the_sequences_of_another trainer.cpp 's/data_ranks\(\) \+ data_rank\(\)\) \* b/data_ranks()) * b/' 2 immediate test_fsdp $parity
mutant faults the_tied_gradient_is_forgotten fsdp.cpp '/if \(p->tied\) add_into/d' 1 immediate test_fsdp $parity
mutant faults the_norm_is_not_summed_over_shards fsdp.cpp 's/all_reduce_here\(mesh_, mesh_.fsdp, squares, computed_\);//' 2 immediate test_fsdp $parity
mutant faults the_weights_are_gathered_once_for_all_steps fsdp.cpp 's/u.gathered = mesh_.fsdp.size == 1;.*/;/; s/  for \(Unit& u : units_\) give_back\(u\);.*//' 2 immediate test_fsdp $parity
mutant faults only_the_last_micro_batch_counts fsdp.cpp 's/  add_into\(u.own_grad, u.full_grad/  copy(u.own_grad, u.full_grad/' 2 immediate test_fsdp $parity
mutant faults a_unit_is_gathered_once_too_often fsdp.cpp 's/if \(returns && \(!tape.recording\(\) \|\| backward != Backward::keeps\)\)/if (returns)/' 2 immediate test_fsdp $formulas
mutant faults nothing_is_given_back fsdp.cpp 's/  u.full = Tensor\(\);.*//' 2 immediate test_fsdp $formulas

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
