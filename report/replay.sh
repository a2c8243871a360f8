#!/usr/bin/env bash
# replay.sh: a trace as a page that plays it: one file that needs no network.
#   report/replay.sh TRACE.json PAGE.html [METRICS.jsonl]
# With metrics, what --metrics wrote of the same run stands above it (run.js): `make run`.
set -eu
trace=$(realpath "$1") page=$(realpath -m "$2") metrics=${3:+$(realpath "$3")}
cd "$(dirname "$0")/.."

# where each function that the trace or the script names is defined: "Fsdp::reshard":"fsdp.cpp:200"
functions() {
  local name place comma=""
  grep -ohE '"function": ?"[^"]+"|[A-Z][a-z]+::[a-z_]+' "$trace" report/replay.js \
    | sed 's/.*"\(.*\)"/\1/' | sort -u | while read -r name; do
    place=$(grep -nE "^[^ /].*\b$name\(" ./*.cpp | head -1 | cut -d: -f1,2)
    [ -n "$place" ] || continue
    printf '%s"%s":"%s"' "$comma" "$name" "${place#./}"
    comma=,
  done
}
data() { printf '<script type="application/json" id="%s">%s</script>\n' "$1" "$2"; }

{
  echo '<!doctype html><html lang="en"><meta charset="utf-8">'
  echo '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Replay</title>'
  echo '<style>'
  cat report/page.css
  printf '</style><body data-sources="%s/">\n' "$(realpath --relative-to="$(dirname "$page")" .)"
  data functions "{$(functions)}"
  echo '<script type="application/json" id="trace">'
  sed 's/</\\u003c/g' "$trace" # no name can end the script
  echo '</script><script>'
  cat report/replay.js
  if [ -n "$metrics" ]; then
    echo '</script>'
    data metrics "[$(paste -sd, "$metrics" | sed 's/</\\u003c/g')]"
    echo '<script>'
    cat report/run.js
  fi
  echo '</script></html>'
} >"$page"
