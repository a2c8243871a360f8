#!/usr/bin/env bash
# sass.sh: what nvcc made of the kernels that multiply in tensor cores, read from the machine code:
# a Markdown table, a row for each kernel and chip.
#   loops      the innermost loops with tensor-core instructions: how many of these, and of all
#   shared     bytes of shared memory a block; dynamic ones are the last number of a kernel's name
#   blocks     a multiprocessor holds at a time, by registers, shared memory and threads
# Fails where a kernel reads or writes shared memory by generic instructions, or spills registers;
# of chips after sm_90 the latter is only said, as by check-spills in tests.mk.
#   tests/sass.sh OBJECT...      (`make cuda` runs it)
set -u
cuobjdump=$(command -v cuobjdump || ls "${CUDA_HOME:-/usr/local/cuda}/bin/cuobjdump" 2>/dev/null)
{ [ -n "$cuobjdump" ] && PATH=$PATH:$(dirname "$cuobjdump") command -v nvdisasm >/dev/null; } || {
  echo "SKIP sass.sh: no cuobjdump with nvdisasm (pip install nvidia-cuda-cuobjdump" \
    "nvidia-cuda-nvdisasm)"
  exit
}
read_objects() {
  for object in "$@"; do
    "$cuobjdump" -res-usage "$object"
    "$cuobjdump" -sass "$object"
  done 2>&1
}
read_objects "$@" | c++filt | awk '
  function hex(text) { return substr("00000000", 1, 8 - length(text)) text }  # ordered as strings
  function up(x, unit) { return int((x + unit - 1) / unit) * unit }
  function least(a, b) { return a < b ? a : b }
  function innermost(l,   other) {
    for (other = 1; other <= loops; other++)
      if (other != l && from[other] >= from[l] && to[other] <= to[l]) return 0
    return 1
  }
  function finish(  l, i, in_loop, products_in, products, all, threads, memory, registers, blocks) {
    if (!tensor) return
    for (l = 1; l <= loops; l++) {
      if (!innermost(l)) continue
      in_loop = products_in = 0
      for (i = 1; i <= n; i++)
        if (at[i] >= from[l] && at[i] <= to[l]) { in_loop++; products_in += op[i] ~ /^HMMA/ }
      if (products_in) { products += products_in; all += in_loop }
    }
    threads = kernel ~ /^matmul/ ? 256 : 128
    match(kernel, /[0-9]+>$/)
    memory = shared[chip, name] - (substr(chip, 4) + 0 < 90 ? 0 : 1024)  # of the system
    if (RSTART) memory += substr(kernel, RSTART, RLENGTH - 1)
    registers = up(regs[chip, name] * 32, 256) * threads / 32
    blocks = least(int(65536 / registers), int(most_threads[chip] / threads))
    blocks = least(blocks, int(most_shared[chip] / (memory / 1024 + 1)))
    if (!(chip in most_threads)) blocks = "-"
    sub(/, [0-9]+>$/, ">", kernel)
    rows++
    printf "| `%s` | %s | %d / %d | %.1f | %d | %d | %s |\n", kernel, chip, products, all,
           all / products, regs[chip, name], memory, blocks
    if (spills || stack[chip, name]) {
      tuned = substr(chip, 4) + 0 <= 90
      print (tuned ? "FAIL  " : "") "it spills registers"
      bad += tuned
    }
    if (generic) { print "FAIL  it has " generic " generic loads and stores"; bad = 1 }
  }
  function start() { n = loops = tensor = spills = generic = 0 }
  /^arch = sm_/ { resources_of = $3 }
  /^ Function / { sub(/^ Function /, ""); sub(/:$/, ""); function_name = $0 }
  /^  REG:/ {
    split($0, field, /[: ]+/)
    regs[resources_of, function_name] = field[3]
    stack[resources_of, function_name] = field[5]
    shared[resources_of, function_name] = field[7]
  }
  /code for sm_/ { finish(); start(); chip = $3 }
  /Function : / {
    finish(); start()
    sub(/.*Function : /, ""); name = kernel = $0
    sub(/\(anonymous namespace\)::/, "", kernel); sub(/^void /, "", kernel); sub(/\(.*/, "", kernel)
  }
  match($0, /\/\*[0-9a-f][0-9a-f][0-9a-f][0-9a-f]+\*\/ +[^ ]/) {
    address = hex(substr($1, 3, length($1) - 4))
    line = $0; sub(/^ *\t*\/\*[0-9a-f]+\*\/ */, "", line); sub(/^@!?U?P[0-9T]+ +/, "", line)
    at[++n] = address; op[n] = line
    if (line ~ /^HMMA/) tensor = 1
    if (line ~ /^(LDL|STL)/) spills = 1
    if (line ~ /^(LD|ST)[. ]/) generic++
    if (line ~ /^BRA/ && match(line, /0x[0-9a-f]+/)) {
      target = hex(substr(line, RSTART + 2, RLENGTH - 2))
      if (target <= address) { from[++loops] = target; to[loops] = address }
    }
  }
  BEGIN {
    # of a multiprocessor: threads, KiB of shared memory (CUDA programming guide, "Compute
    # capabilities")
    split("80 2048 164 86 1536 100 87 1536 164 89 1536 100 90 2048 228 100 2048 228 120 1536 100",
          known, " ")
    for (i = 1; i in known; i += 3) {
      most_threads["sm_" known[i]] = known[i + 1]
      most_shared["sm_" known[i]] = known[i + 2]
    }
    print "| kernel | chip | HMMA / all in loops | all per HMMA | registers | shared | blocks |"
    print "|---|---|---|---|---|---|---|"
  }
  END {
    finish()
    if (!rows) print "FAIL  no kernel that multiplies in tensor cores was found"
    exit bad || !rows
  }'
