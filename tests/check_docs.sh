#!/usr/bin/env bash
# check_docs.sh: `make check-docs` fails when README.md or a page of docs/ lies.
#   commands   a ``` block is one of commands when its first line is a command: begins with build/,
#              mpiexec, make, tests/ or OMP_...=, or has a pipe into build/ or mpiexec. Each of its
#              lines, but for comments, must be a command, and runs. A comment with "refuses" says
#              that the command must fail. `make run` and `make generate` train for 3 steps here,
#              the latter into a checkpoint of its own in place of build/generate-model; of make
#              test, bench, compare, ... only the rule is looked up.
#   output     the next block shows what a block of commands prints, if it is no block of commands
#              itself, names no language after its ``` and only prose, no heading, stands between.
#              Each line of it must come out again: exactly for schedules, traffic and memory,
#              elsewhere with any numbers (times, losses) in the places of numbers. A line "..."
#              stands for lines left out. Other blocks are not looked at.
#   listings   the first C++ block of a strategy's page computes on 2 and on 3 ranks what one rank
#              does (tests/listings.cpp); other C++ blocks show lines of the sources
#   names      every word in backticks that has a capital, a _, :: or () is a word of the sources
#              (all-lowercase words are not looked up), and so is each part of one with ::; every
#              file and option in backticks exists, every link leads somewhere, and the line counts
#              in README's table are right
#   references each of these words leads to lines of the sources that contain it
#              (docs/book/references.py, which the book follows as well)
# `tests/check_docs.sh names` looks up names and references alone, in seconds.
set -u
cd "$(dirname "$0")/.."
root=$PWD
pages="README.md docs/*.md"
. tests/lib.sh
work=$dir
# holds SENTENCE COMMAND...: counts in silence; where the command fails, SENTENCE says what is wrong
holds() { if "${@:2}"; then passed=$((passed + 1)); else fail "$1"; fi; }
# has WORD FILE: whether it is one of its lines
has() { grep -qxF -- "$1" "$2"; }
is_a_file() { [ -n "$(find . -path ./build -prune -o -path "*/$1" -print -quit)" ]; }

# ---- names

folders="kernels launch theory report inference checkpoint support cpu tests"
code="$(ls *.cpp *.cu *.h Makefile) \
  $(find $folders -type f -not -path '*/corpus/*' -not -name '*.bin')"
# the words of the sources, for whole-word lookups
cat $code | grep -oE '[A-Za-z_][A-Za-z0-9_]*' | sort -u >"$work/words"
cat $code | grep -oE -- '--[a-z][a-z-]+' | sort -u >"$work/options"
for page in $pages; do
  # outside of code blocks
  awk '/^ *```/ { inside = !inside; next } !inside' "$page" >"$work/text"
  while read -r name; do
    for part in ${name//[:()]/ }; do
      holds "$page names \`$name\`, but no source has $part" has "$part" "$work/words"
    done
  done < <(grep -oE '`[A-Za-z_][A-Za-z0-9_]*(::[A-Za-z0-9_]+)*(\(\))?`' "$work/text" \
    | tr -d '`' | sort -u | grep '[A-Z_:(]')
  while read -r file; do
    holds "$page names the file $file, which is not there" is_a_file "$file"
  done < <(grep -oE '`[A-Za-z0-9_/]+\.(cpp|cu|cuh|h|sh|py|md)`' "$work/text" | tr -d '`' | sort -u)
  while read -r option; do
    holds "$page names the option $option, which no program has" has "$option" "$work/options"
  done < <(grep -oE -- '`[^`]*--[a-z][a-z-]+' "$work/text" | grep -oE -- '--[a-z][a-z-]+' | sort -u)
  while read -r link; do
    holds "$page links to $link, which is not there" [ -e "$(dirname "$page")/${link%%#*}" ]
  done < <(grep -oE '\]\([^)]+\)' "$work/text" | sed 's/^](//; s/)$//' \
    | grep -vE '^(https?:|#)' | sort -u)
done
while IFS='|' read -r _ _ files lines _; do
  file=$(sed -n 's/.*(\([a-z_]*\.cpp\)).*/\1/p' <<<"${files%%,*}")
  [ -n "$file" ] && [ -n "${lines// /}" ] || continue
  holds "README.md says that $file has ${lines// /} lines, it has $(wc -l <"$file")" \
    [ "$(wc -l <"$file")" = "${lines// /}" ]
done < <(grep -E '^\|.*\]\([a-z_]*\.cpp\)' README.md)
echo "names    $passed functions, files, options, links and line counts looked up, $failed wrong"

# ---- references

if command -v ctags >/dev/null && command -v python3 >/dev/null; then
  docs/book/references.py >"$work/references" || fail "docs/book/references.py ended with status $?"
  while IFS=$'\t' read -r page name file first last; do
    word=${name%%[(<]*}
    holds "$page names \`$name\`, which no line of the sources has" [ -n "$file" ]
    [ "${last:-0}" = 0 ] || holds "$page names \`$name\`, not in $file, lines $first to $last" \
      grep -qw -- "${word##*::}" <(sed -n "$first,${last}p" "$file")
  done <"$work/references"
else
  skip references "there is no ctags or no python3 (on Debian: universal-ctags, python3)"
fi
if [ "${1:-}" = names ]; then
  sums_up
  exit
fi

# ---- listings

# lines FILE...: each without its indentation
lines() { sed 's/^ *//' "$@" | sort -u; }
listing='^docs/(fsdp|tensor_parallel|pipeline|context_parallel)\.md$'
awk '/^ *```/ { inside = /```cpp/; next } inside' $(ls $pages | grep -vE "$listing") | lines \
  | comm -23 - <(lines $(ls $code | grep -E '\.(h|cuh?|cpp)$')) >"$work/out"
holds "lines that no source has: $(head -3 "$work/out")" [ ! -s "$work/out" ]

export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
if make -s --no-print-directory BACKEND=cpu build/cpu/tests/listings >"$work/out" 2>&1; then
  for n in 2 3; do
    THREEFOLD_POISON=1 THREEFOLD_REFEREE=1 \
      timeout 120 $MPIEXEC -n $n build/cpu/tests/listings >"$work/out" 2>&1 \
      || fail "the listings on $n ranks: $(grep -m1 ^FAIL "$work/out" || tail -3 "$work/out")"
    passed=$((passed + $(grep -c '^ok' "$work/out")))
    grep '^ok' "$work/out"
  done
else
  fail "a listing does not compile: $(grep -m3 error "$work/out" || tail -3 "$work/out")"
fi

# ---- commands

# Each command, and for the last of a block the output block that follows, if one does:
# "block<TAB>line<TAB>command<TAB>file of the output"
extract() {
  awk -v page="$1" -v work="$work" '
    function is_command(s) {
      return s ~ /^(build\/|mpiexec |make( |$)|tests\/|OMP_[A-Z_]*=)/ ||
        s ~ /\| *(build\/|mpiexec )/
    }
    /^ *```/ {
      if (!inside) {
        inside = 1
        lines = 0
        kind = ""
        blocks++
        if ($0 ~ /```./) waiting = 0
        next
      }
      inside = 0
      if (kind == "commands") waiting = count; else waiting = 0
      next
    }
    inside {
      line = $0; sub(/^ */, "", line)
      if (!lines++) kind = is_command(line) ? "commands" : waiting ? "output" : "other"
      if (kind == "commands" && line !~ /^(#|$)/) {
        count++
        command[count] = is_command(line) ? line : "NO COMMAND " line
        at[count] = NR
        block[count] = blocks
      }
      if (kind == "output") {
        expected[waiting] = work "/expected." waiting
        print $0 > expected[waiting]
      }
      next
    }
    /^#/ { waiting = 0 }
    END {
      for (i = 1; i <= count; i++)
        print block[i] "\t" at[i] "\t" command[i] "\t" (i in expected ? expected[i] : "-")
    }' "$1"
}
# Lines of FILE that TEXT lacks: exactly where the line is a table of bytes or a schedule in units,
# else with any numbers
missing() {
  awk -v expected="$1" '
    function tight(s) {
      gsub(/[ \t]+/, " ", s)
      sub(/ $/, "", s)
      return s
    }
    function shape(s) {
      sub(/\|.*/, "", s)
      gsub(/[0-9][0-9.e+-]*/, "#", s)
      return tight(s)
    }
    {
      exact[tight($0)] = 1
      shapes[shape($0)] = 1
      if (/F = 1, B = 1/) units = 1
    }
    END {
      while ((getline line < expected) > 0) {
        if (line ~ /^ *(\.\.\.)? *$/) continue
        bytes = line ~ /^  (fsdp|replicate|tp|pp|parameters|gradients|optimizer) /
        if (bytes || units ? !(tight(line) in exact) : !(shape(line) in shapes)) print line
      }
    }' "$2"
}
only_looked_up='^make( [A-Z]+=[^ ]+)* '
only_looked_up+='(test|bench|compare|network|parity|mutants|sanitize|check-docs|gpu-check|cuda|'
only_looked_up+='deps)( |$)'
place=$work/place
lines_compared=0
for page in $pages; do
  rm -rf "$work"/expected.* "$place"
  mkdir "$place"
  ln -s "$root"/* "$place"
  rm "$place/build" # what commands write there is not the user's
  mkdir "$place/build"
  (cd build && ls | grep -v '\.') | sed "s#.*#$root/build/&#" | xargs -d '\n' ln -st "$place/build"
  cp build/detected.mk "$place/build"
  cp README.md "$place/my.txt" # a fresh directory for each page
  last=0
  while IFS=$'\t' read -r block at command expected; do
    [ "$block" = $last ] || : >"$work/block"
    last=$block
    [[ $command != "NO COMMAND "* ]] || {
      fail "$page:$at  stands among commands and is none: ${command#NO COMMAND }"
      continue
    }
    bare=$(sed 's/  *#.*//' <<<"$command")
    case $bare in
      "make run"*) actual="$bare ARGS='--steps 3 --sample 20 --eval-every 0'" ;;
      "make generate"*) actual="$bare CHECKPOINT=docs-model TRAIN_ARGS='--steps 3 --sample 20'" ;;
      *) actual=${bare//build\/generate-model/docs-model} ;;
    esac
    [[ $bare =~ $only_looked_up ]] && actual="${bare/make/make -n}"
    (cd "$place" && timeout 600 bash -c "$actual") >"$work/out" 2>&1 </dev/null
    status=$?
    cat "$work/out" >>"$work/block"
    if [[ $command == *refuses* ]]; then a_refusal $status; else [ $status = 0 ]; fi || {
      fail "$page:$at  $bare  ended with status $status: $(tail -1 "$work/out")"
      continue
    }
    if [ "$expected" != - ]; then
      lost=$(missing "$expected" "$work/block")
      lines_compared=$((lines_compared + $(grep -c . "$expected")))
      if [ -n "$lost" ]; then
        fail "$page:$at  $bare  does not print: $(head -3 <<<"$lost")"
        continue
      fi
    fi
    ok "$page:$at" "$bare"
  done < <(extract "$page")
done
check output_is_compared "[ $lines_compared != 0 ]" "$lines_compared lines"
sums_up
