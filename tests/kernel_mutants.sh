#!/usr/bin/env bash
# kernel_mutants.sh: faults in the kernels that multiply in tensor cores: each barrier and each wait
# for copies taken out, a number in another lane, a mask off by one. In FAITHFUL a test must fail, or
# the stand-in report it; unchanged, the test must have passed before.
#   tests/kernel_mutants.sh [NAME]
# The fault is put into a copy of its file (a header is found there before the real one); the kernels
# are compiled from there and linked into the test in the real ones' place.
set -u
cd "$(dirname "$0")/.."
only=${1:-}
make="make -s --no-print-directory BACKEND=faithful"
work=build/faithful/mutants
$make build/faithful/tests/test_attention build/faithful/tests/test_matmul || exit 1
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
  if timeout 600 "$place/test" "$filter" >"$place/out" 2>&1; then
    echo "FAIL $name  lives: $test passed with it"
  else
    printf 'ok   %-42s %s\n' "$name" "$(grep -m1 -E '^(FAIL|CUDA stand-in)' "$place/out" | cut -c1-120)"
    passed=$((passed + 1)) failed=$((failed - 1))
  fi
}

# in_kernel NAME LINE: a sed expression that deletes what matches in that kernel
in_kernel() { echo "/ $1\(/,/^}/{/$2/d}"; }
attention=kernels/attention_mma.cu matmul=kernels/matmul.cu mma=kernels/mma.cuh
pieces="test_attention any_pieces" product="test_matmul own_bf16_equals"
for kernel in attention_forward attention_backward_q attention_backward_kv; do
  mutant ${kernel}_does_not_wait $attention $attention $pieces "$(in_kernel $kernel wait_for_copies)"
  mutant ${kernel}_has_no_barrier $attention $attention $pieces "$(in_kernel $kernel __syncthreads)"
done
mutant matmul_tensor_does_not_wait $matmul $matmul $product "$(in_kernel matmul_tensor wait_for_copies)"
mutant matmul_tensor_has_no_barrier $matmul $matmul $product "$(in_kernel matmul_tensor __syncthreads)"
mutant one_slice_is_read_too_early $matmul $matmul $product 's/wait_for_copies<kBuffers - 2>/wait_for_copies<kBuffers - 1>/'
mutant one_buffer_is_filled_too_early $matmul $matmul $product 's/kBuffers = 4;/kBuffers = 3;/; s/kBuffers - /4 - /'
mutant a_query_sees_a_key_too_many $attention $attention $pieces 's/(strip_column\(j, e\)) >= seen/\1 > seen/'
mutant a_key_is_seen_too_late $attention $attention $pieces 's/(strip_column\(j, e\)) < seen_from/\1 <= seen_from/'
mutant earlier_sums_are_not_rescaled $attention $attention $pieces 's/ \*= factor\[e/ *= 0 * factor[e/; s/0 \* factor/1 + 0 * factor/'
mutant rows_of_a_strip_are_swapped $mma $attention $pieces 's|/ 4 \+ e / 2 \* 8|/ 4 + (1 - e / 2) * 8|'
mutant halves_of_an_operand_are_swapped $mma $attention $pieces 's|low = c.v\[k / 8\], &high = c.v\[k / 8 \+ 1\]|high = c.v[k / 8], \&low = c.v[k / 8 + 1]|'
mutant an_operand_is_not_transposed $mma $matmul $product 's/ldmatrix<true>\(a/ldmatrix<false>(a/'

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
