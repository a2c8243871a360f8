# lib.sh: what the scripts share. Each sources it from the project's root.
MPICXX=${MPICXX:-$(command -v mpicxx.mpich || echo mpicxx)}
MPIEXEC=${MPIEXEC:-${MPICXX/mpicxx/mpiexec}} # of the same MPI
cores=$(env -u OMP_NUM_THREADS nproc)        # nproc obeys that variable
dir=$(mktemp -d)                             # removed at the end
trap "rm -rf '$dir'" EXIT
passed=0 failed=0 skipped=0

ok() {
  echo "ok   $1  ${2:-}"
  passed=$((passed + 1))
}
fail() {
  echo "FAIL $1  ${2:-}"
  failed=$((failed + 1))
}
skip() {
  echo "SKIP $1  ${2:-}"
  skipped=$((skipped + 1))
}
# check NAME CONDITION [ON SUCCESS] [ON FAILURE]
check() {
  if eval "$2"; then
    ok "$1" "${3:-}"
  else
    fail "$1" "${4:-}"
  fi
}
# sums_up: the closing line, and the script's exit status
sums_up() {
  local more=""
  [ $skipped = 0 ] || more=", $skipped skipped"
  echo "$passed passed, $failed failed$more"
  [ $failed -eq 0 ]
}

# losses FILE: the loss of each step in a metrics file
losses() { sed -n 's/.*"loss":\([^,]*\),.*/\1/p' "$1"; }
# worst STEPS FILE FILE: the largest relative difference of their losses; 1 unless both have STEPS,
# all of them numbers
worst() {
  paste <(losses "$2") <(losses "$3") | awk -v steps="$1" '
    /^[-+.0-9e]+\t[-+.0-9e]+$/ {
      d = ($1 - $2) / $1
      if (d < 0) d = -d
      if (d > worst) worst = d
      rows++
    }
    END { print rows == steps && rows == NR ? worst + 0 : 1 }'
}
# at_most NUMBER BOUND: neither of them below 0; nothing, nan and inf are no numbers
at_most() {
  local number='^[0-9.]+(e[-+]?[0-9]+)?$'
  [[ ${1:-} =~ $number && ${2:-} =~ $number ]] \
    && awk -v number="$1" -v bound="$2" 'BEGIN { exit !(number + 0 <= bound + 0) }'
}

# rank_pids WORD [RANK]: the ranks (or that rank) of the jobs that have this word on their command
# line. A rank has threads, which the helper process that it starts has not.
rank_pids() {
  local process
  for process in $(grep -laF -- "$1" /proc/[0-9]*/cmdline 2>/dev/null); do
    process=${process%/cmdline}
    grep -qzx "PMI_RANK=${2:-[0-9]*}" "$process/environ" 2>/dev/null \
      && ! grep -qx 'Threads:[[:space:]]*1' "$process/status" 2>/dev/null \
      && echo "${process#/proc/}"
  done
}

# status_counts: whether mpiexec's exit status can be trusted. MPICH 4.2's is 0 in about half of the
# jobs of which a rank was killed, whatever program it runs: there only what is printed tells.
status_counts() { ! "$MPIEXEC" --version 2>/dev/null | grep -qE '^ *Version: +4\.2'; }
