#!/usr/bin/env bash
# kernel_mutants.sh: faults in the kernels that multiply in tensor cores: each barrier and each wait
# for copies taken out, a number in another lane, a mask off by one, a head left out; padding that
# the loss reads or leaves; and packs at an address that nobody has looked at. In FAITHFUL a test
# must fail, or the stand-in report it; unchanged, the test must have passed before.
#   tests/kernel_mutants.sh [NAME]
# The fault is put into a copy of its file (a header is found there before the real one); the
# kernels are compiled from there and linked into the test in the real ones' place.
set -u
cd "$(dirname "$0")/.."
only=${1:-}
make="make -s --no-print-directory BACKEND=faithful"
work=build/faithful/mutants
for test in attention matmul kernels; do $make build/faithful/tests/test_$test || exit 1; done
compile=$($make print-compile) link=$($make print-link) objects=$($make print-objects)
passed=0 failed=0

declare -A known
# unchanged TEST FILTER: whether the test passes as it is; each is run once
unchanged() {
  if [ -z "${known[$*]:-}" ]; then
    known[$*]=fails
    timeout 600 "build/faithful/tests/$1" "$2" >$work/unchanged.out 2>&1 && known[$*]=passes
  fi
  [ "${known[$*]}" = passes ]
}

# mutant NAME FILE KERNELS TEST FILTER SED
mutant() {
  local name=$1 file=$2 kernels=$3 test=$4 filter=$5 change=$6 place=$work/$1
  [ -z "$only" ] || [ "$only" = "$name" ] || return 0
  failed=$((failed + 1))  # until it is caught
  mkdir -p "$place/kernels"
  cp "$kernels" "$place/$kernels"
  sed -E "$change" "$file" >"$place/$file"
  cmp -s "$file" "$place/$file" && { echo "FAIL $name  no longer applies to $file"; return; }
  sed -z -E -f cpu/cuda/launch.sed "$place/$kernels" >"$place/kernels.cpp"
  $compile -I"$place" -Wno-error -c "$place/kernels.cpp" -o "$place/kernels.o" 2>"$place/log" ||
    { echo "FAIL $name  does not compile: $(grep -m1 error "$place/log")"; return; }
  $link "build/faithful/obj/tests/$test.cpp.o" "$place/kernels.o" -o "$place/test" \
    $(echo $objects | tr ' ' '\n' | grep -v "obj/$kernels.o") -ldnnl -lxxhash -fopenmp \
    2>"$place/log" || { echo "FAIL $name  does not link: $(head -1 "$place/log")"; return; }
  unchanged "$test" "$filter" || { echo "FAIL $name  $test $filter fails unchanged"; return; }
  if { timeout 600 "$place/test" "$filter" >"$place/out" 2>&1; } 2>/dev/null; then
    echo "FAIL $name  lives: $test passed with it"
  else
    local said; said=$(grep -m1 -E '^(FAIL|CUDA stand-in)' "$place/out" | cut -c1-120)
    printf 'ok   %-36s %s\n' "$name" "$said"
    passed=$((passed + 1)) failed=$((failed - 1))
  fi
}

attention="kernels/attention_mma.cu kernels/attention_mma.cu test_attention any_pieces"
order="kernels/attention.cuh kernels/attention_mma.cu test_attention every_head_of_many"
product="kernels/matmul.cu kernels/matmul.cu test_matmul own_bf16_equals"
loss="kernels/cross_entropy.cu kernels/cross_entropy.cu test_kernels cross_entropy_gives"
parts="kernels/cross_entropy.cu kernels/cross_entropy.cu test_kernels cross_entropy_in_parts"
norm="kernels/layernorm.cu kernels/layernorm.cu test_kernels layernorm_backward"
biases="kernels/elementwise.cu kernels/elementwise.cu test_kernels a_bias_is_added"
lanes="kernels/mma.cuh kernels/attention_mma.cu test_attention any_pieces"
lanes_of_product="kernels/mma.cuh kernels/matmul.cu test_matmul own_bf16_equals"
drop() { echo "/ $1\(/,/^}/{/$2/d}"; }  # what matches is deleted from that kernel
wait=wait_for_copies barrier=__syncthreads

for kernel in forward backward_q backward_kv; do
  mutant ${kernel}_does_not_wait $attention "$(drop attention_$kernel $wait)"
  mutant ${kernel}_has_no_barrier $attention "$(drop attention_$kernel $barrier)"
done
mutant the_product_does_not_wait $product "$(drop matmul_tensor $wait)"
mutant the_product_has_no_barrier $product "$(drop matmul_tensor $barrier)"
mutant a_slice_is_read_too_early $product 's/(wait_for_copies<kBuffers) - 2/\1 - 1/'
mutant a_buffer_is_filled_too_early $product 's/buffer \+ kBuffers - 1\) %/buffer + kBuffers) %/'
mutant the_last_band_is_taken_for_a_whole_one $product 's/rest < kBand \? rest : kBand/kBand/'
mutant the_last_group_has_as_many_heads $order 's/(first_head\(\) \+ group_heads) < heads/\1 > 0/'
mutant a_query_sees_a_key_too_many $attention 's/(strip_column\(j, e\)) >= seen/\1 > seen/'
mutant a_key_is_seen_too_late $attention 's/(strip_column\(j, e\)) < seen_from/\1 <= seen_from/'
mutant earlier_sums_are_not_rescaled $attention 's/ x \*= factor\[e \/ 2\];/;/'
mutant the_rows_of_a_strip_are_swapped $lanes 's|/ 4 \+ e / 2 \* 8|/ 4 + (1 - e / 2) * 8|'
mutant two_numbers_of_an_operand_swap $lanes 's/pair\(low\[2\], low\[3\]\)/pair(low[3], low[2])/'
mutant an_operand_is_not_transposed $lanes_of_product 's/ldmatrix<true>\(a/ldmatrix<false>(a/'
mutant the_softmax_reads_padding $loss 's/(row_softmax<N>)\(x, V\), scale/\1(x, ld), scale/'
mutant a_part_s_softmax_reads_padding $parts 's/(all = row_softmax<N>)\(x, V\)/\1(x, ld)/'
mutant the_gradient_of_padding_stays $loss '/x\[i\] = store<T>\(A\(0\)\)/d'
mutant a_gain_is_read_in_packs_unseen $norm 's/, &gain\}\), *$/}),/'
mutant a_bias_is_read_in_packs_unseen $biases 's/, &bias\}\)/})/'

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
