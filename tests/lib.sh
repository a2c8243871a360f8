# lib.sh: what the scripts share. Each sources it from the project's root.
MPICXX=${MPICXX:-$(command -v mpicxx.mpich || echo mpicxx)}
export MPIEXEC=${MPIEXEC:-${MPICXX/mpicxx/mpiexec}} # of the same MPI
export LC_ALL=C # numbers have a point, and columns are bytes
cores=$(env -u OMP_NUM_THREADS nproc) # nproc obeys that variable
dir=$(mktemp -d) || exit              # removed at the end
[[ $dir != *[[:space:]\'\"\`\$\\*?[\;\&\|\<\>\(\)#]* ]] || {
  echo "${0##*/}: TMPDIR is '$TMPDIR': it may have no spaces and no signs of the shell" >&2
  rmdir "$dir"
  exit 1
}
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
# check NAME CONDITION [ON SUCCESS] [ON FAILURE, else what was said]
check() {
  if eval "$2"; then
    ok "$1" "${3:-}"
  else
    fail "$1" "${4:-$(head -c 300 "$dir/err" 2>/dev/null)}"
  fi
}
# a_refusal STATUS: a program (1), or make (2), ended by itself and not well. MPICH's mpiexec ends
# with a signal's number where one killed a rank.
a_refusal() { [ "$1" = 1 ] || [ "$1" = 2 ]; }
# refused NAME PART COMMAND...: it does, and says PART on the standard error once; with alone=yes
# nothing else there, and no step is taken
refused() {
  local name=$1 part=$2 status step
  shift 2
  timeout 60 "$@" >"$dir/out" 2>"$dir/err"
  status=$?
  step=$(grep -m1 '^step *[0-9]*/' "$dir/out")
  if a_refusal $status && [ "$(grep -cF -- "$part" "$dir/err")" = 1 ] \
    && [[ -z ${alone:-} || ($(wc -l <"$dir/err") = 1 && -z $step) ]]; then
    ok "$name" "$(grep -F -- "$part" "$dir/err" | cut -c1-150)"
  else
    fail "$name" "status $status: $(head -c 300 "$dir/err") $step"
  fi
}
# sums_up: the closing line, and the script's exit status
sums_up() {
  local more=""
  [ $((passed + failed + skipped)) != 0 ] || fail "${0##*/}" "nothing was checked"
  [ $skipped = 0 ] || more=", $skipped skipped"
  echo "$passed passed, $failed failed$more"
  [ $failed -eq 0 ]
}

# threads RANKS: a rank's share of the cores
threads() { echo $(($1 < cores ? cores / $1 : 1)); }
# median: of the numbers that are read
median() {
  sort -g | awk '{ x[NR] = $1 } END { print (x[int((NR + 1) / 2)] + x[int(NR / 2 + 1)]) / 2 }'
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

# what nodes.sh, kernels and containers say where there can be no nodes: all else is a fault
no_nodes_here='only root|needs iproute2|not permitted|not supported|denied|nknown device'
no_nodes_here+='|kind is unknown|TUN device cannot be made: No such'
