#!/usr/bin/env bash
# replay.sh: a trace as a page that plays it: one file that needs no network.
#   report/replay.sh TRACE.json PAGE.html [METRICS.jsonl]
# With metrics, what --metrics wrote of the same run stands above it (run.js): `make run`.
set -euC
export LC_ALL=C # where [A-Z] are these letters
refuse() {
  echo "report/replay.sh: $*" >&2
  exit 1
}
[ $# = 2 ] || [ $# = 3 ] || refuse "expected TRACE.json PAGE.html [METRICS.jsonl]"
trace=$(realpath -- "$1") page=$(realpath -ms -- "$2") metrics=${3:+$(realpath -- "$3")}
cd "$(dirname "$0")/.."
# one line: two runs that name one file add one each
[[ $(head -c 15 "$trace")$(tail -c 3 "$trace") = '{"traceEvents":}}' && $(wc -l <"$trace") = 1 ]] \
  || refuse "$1 is no trace, or not one alone: --trace writes it"
[ -z "$metrics" ] || {
  [[ $(tail -n 1 -- "$metrics") = '{"summary":'*'}' ]] && grep -q -e '^{"step":' -- "$metrics"
} || refuse "$3 is no metrics of a run that has ended: --metrics writes them"
[ ! -d "$page" ] || refuse "$2 is a directory"
[ ! -e "$page" ] || grep -q '<title>Replay' "$page" \
  || refuse "$2 is there already, and is no replay that a new one may replace"

# where each function that the trace or the script names is defined, and a link to its lines in the
# book, if there is one: "Fsdp::reshard":["fsdp.cpp:200","book/source/fsdp.cpp.html#200-210"]
functions() {
  local name file line sources address comma=""
  sources=$(realpath -ms --relative-to="$(dirname "$page")" . \
    | sed 's/%/%25/g; s/"/%22/g; s/#/%23/g; s/?/%3f/g; s/</%3c/g; s/\\/%5c/g')
  grep -ohE '"function": ?"[^"]+"|[A-Z][a-z]+::[a-z_]+' "$trace" report/replay.js \
    | sed 's/.*"\(.*\)"/\1/' | grep -x '[A-Za-z0-9_:]*' | sort -u | while read -r name; do
    IFS=: read -r file line _ < <(grep -nE -e "^[^ /].*\b$name\(.*[^;]$" -- *.cpp) || continue
    address=$sources/$file
    [ ! -e "build/book/source/$file.html" ] \
      || address=$sources/build/book/source/$file.html#$line-$(
        awk -v line="$line" 'NR >= line && /^}/ { print NR; exit }' "$file"
      )
    printf '%s"%s":["%s","%s"]' "$comma" "$name" "$file:$line" "$address"
    comma=,
  done
}
data() { printf '<script type="application/json" id="%s">%s</script>\n' "$1" "$2"; }

{
  trap 'rm -f "$page.$$"' EXIT # not before: it may have been there
  echo '<!doctype html><html lang="en"><meta charset="utf-8">'
  echo '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Replay</title>'
  echo '<style>'
  cat report/page.css
  echo '</style><body><noscript><p>This page is drawn by a script: allow JavaScript.</noscript>'
  data functions "{$(functions)}"
  echo '<script type="application/json" id="trace">'
  sed 's/</\\u003c/g' "$trace" # nor ends the script
  echo '</script><script>'
  cat report/replay.js
  if [ -n "$metrics" ]; then
    echo '</script>'
    data metrics "[$(paste -sd, "$metrics" | sed 's/</\\u003c/g')]"
    echo '<script>'
    cat report/run.js
  fi
  echo '</script></html>'
} >"$page.$$"
mv -f "$page.$$" "$page"
