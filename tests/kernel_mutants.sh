#!/usr/bin/env bash
# kernel_mutants.sh: faults in the kernels: barriers and waits for copies taken out, a number in
# another lane, a mask off by one, a head left out; a maximum that is not taken off; padding that
# the loss reads or leaves; and packs at an address that nobody has looked at. In FAITHFUL a test
# must fail, or the stand-in or a check in the kernel say what is wrong; unchanged, the test must
# have passed before.
#   tests/kernel_mutants.sh [NAME]      those with NAME in their name; all without
# The fault is put into a copy of its file (a header is found there before the real one); the
# kernels are compiled from there and linked into the test in the real ones' place.
set -u
cd "$(dirname "$0")/.."
only=${1:-}
make="make -s --no-print-directory BACKEND=faithful"
work=build/faithful/mutants
$make build/faithful/tests/test_{attention,decode,kernels,matmul} || exit 1
compile=$($make print-compile) link=$($make print-link) objects=$($make print-objects)
. tests/lib.sh

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
  [[ $name == *"$only"* ]] || return 0
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
  { timeout 600 "$place/test" "$filter" >"$place/out" 2>&1; } 2>/dev/null
  local status=$? said
  said=$(grep -m1 -E '^(FAIL|CUDA stand-in|  what\(\):)' "$place/out" | cut -c1-120)
  # (device memory ends at a page that nobody may touch)
  [ $status -eq 139 ] && said=${said:-"SIGSEGV: it ran past the end of its memory"}
  if [ $status -eq 0 ]; then
    echo "FAIL $name  lives: $test passed with it"
  elif [ -z "$said" ]; then
    echo "FAIL $name  ends with status $status and nobody says why: $(tail -1 "$place/out")"
  else
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
sums="kernels/sums.cu kernels/sums.cu test_kernels add_sum"
reduction="kernels/common.cuh kernels/layernorm.cu test_kernels layernorm_backward"
adam="kernels/adamw.cu kernels/adamw.cu test_kernels adamw_takes"
flash="kernels/attention_flash.cu kernels/attention_flash.cu test_attention"
merge="kernels/attention_merge.cu kernels/attention_merge.cu test_attention"
decode="kernels/attention_decode.cu kernels/attention_decode.cu test_decode"
vectors="kernels/matvec.cu kernels/matvec.cu test_decode a_few_rows"
drop() { echo "/ $1\(/,/^}/{/$2/d}"; }  # what matches is deleted from that kernel

# barriers FILE KERNEL TEST FILTER: each barrier of that kernel taken out
barriers() {
  local line n=0
  for line in $(sed -nE "/ $2\(/,/^}/{/__syncthreads/=}" "$1"); do
    n=$((n + 1))
    mutant "${2}_lacks_barrier_$n" "$1" "$1" "$3" "$4" "${line}d"
  done
  [ $n -gt 0 ] || fail "$2" "it has no barrier in $1"
}

for kernel in forward backward_q backward_kv; do
  mutant ${kernel}_does_not_wait $attention "$(drop attention_$kernel wait_for_copies)"
  barriers kernels/attention_mma.cu attention_$kernel test_attention any_pieces
  barriers kernels/attention_flash.cu flash_$kernel test_attention flash_f32
done
mutant the_product_does_not_wait $product "$(drop matmul_tensor wait_for_copies)"
barriers kernels/matmul.cu matmul_tensor test_matmul own_bf16_equals
barriers kernels/matmul.cu matmul_simt test_matmul own_f32_equals
barriers kernels/matvec.cu columns_kernel test_decode a_few_rows
barriers kernels/attention_decode.cu decode_kernel test_decode a_new_token
barriers kernels/attention_merge.cu merge_kernel test_attention any_pieces
mutant a_reduction_reads_before_all_have_written $reduction \
  '/lane == 0\) part\[warp\] = v;/{n;d}'
mutant a_reduction_writes_before_all_have_read $reduction '/may be reused immediately/d'
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

# what large numbers show
mutant a_row_s_largest_logit_is_not_taken_off \
  kernels/cross_entropy.cu kernels/cross_entropy.cu test_kernels cross_entropy_of_large \
  '/top = Max<A>::combine\(top, v\)/d; s/mine = SoftmaxSum<A>::identity/mine{0, 0}/'
mutant a_row_s_largest_score_is_not_taken_off \
  kernels/attention_mma.cu kernels/attention_mma.cu test_attention scores_of_hundreds \
  's/now\[h\] = reduce_lanes<Max<float>, 4>\(now\[h\]\)/now[h] = 0/'
mutant decoding_takes_no_largest_score_off $decode scores_of_hundreds \
  's/most = Max<A>::combine\(most, score\[u\]\)/most = 0/'
mutant merging_takes_no_largest_lse_off $merge are_merged \
  's/most = Max<A>::combine\(a, b\)/most = 0/'
mutant the_variance_is_taken_in_one_pass \
  kernels/layernorm.cu kernels/layernorm.cu test_kernels layernorm_of_rows \
  's/A d = load\(p\[k\]\) - m;/A d = load(p[k]);/; s/(\(squares\) \/ C) \+/\1 - m * m +/'
mutant a_sum_of_many_chunks_is_dropped $sums 's/if \(chunks > 1\) add_sum.*//'
mutant adam_s_steps_end_at_three $adam 's/o\.step\)/std::min<int64_t>(o.step, 3))/'

# packs at an address that nobody has looked at
odd="$flash odd_addresses"
mutant delta_reads_packs_unseen $odd 's/\(D, \{&dout, &out\}/(D, {\&out}/'
mutant flash_reads_keys_in_packs_unseen $odd 's/\{&out, &in.q, &in.kv\}/{\&out, \&in.q}/'
mutant flash_s_backward_reads_dout_unseen $odd 's/&dkv, &dout, &in.q/\&dkv, \&in.q/'
mutant a_row_s_weights_are_read_unseen $vectors 's/\(K, \{&w, &x\}/(K, {\&x}/'
mutant a_column_s_weights_are_read_unseen $vectors 's/\(columns, \{&w\}/(columns, {}/'

[ $((passed + failed)) -gt 0 ] || fail "$only" "no mutant has this in its name"
sums_up
