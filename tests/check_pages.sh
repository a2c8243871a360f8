#!/usr/bin/env bash
# check_pages.sh: `make check-pages`: makes a replay of each strategy, and drives it in Chromium
# (tests/check_pages.py); and the pages of `make run`, `make compare` and `make book`, where they
# are there. What was seen is in build/pages/.
#   STRATEGIES="fsdp pp"   only these
set -u
cd "$(dirname "$0")/.."
. tests/lib.sh
out=build/pages pages=()
command -v chromium >/dev/null || command -v google-chrome >/dev/null || {
  echo "SKIP check-pages: there is no chromium (apt-get install chromium)"
  exit 0
}
mkdir -p $out
# many: a pipeline in which 64 micro-batches live at once
for strategy in ${STRATEGIES:-serial replicate zero1 fsdp cp tp tp-sequence pp 3d many}; do
  ranks='' options=''
  [ "$strategy" != many ] || ranks=4 options="--schedule gpipe --batch 64 --microbatch 1"
  NP=$ranks STRATEGY=${strategy/many/pp} PAGE=$out/$strategy.html ARGS=$options \
    launch/run.sh replay >"$out/$strategy.txt" 2>&1 || {
    tail -3 "$out/$strategy.txt"
    echo "check-pages: no replay of $strategy"
    exit 1
  }
  pages+=("$out/$strategy.html")
done
# a name in a trace is no markup, however it is written
name='\\u003cimg src=\\"x\\"\\u003e'
sed "s#\"title\":\"#&$name<b>\&amp;#" "${pages[0]%.html}.json" >$out/markup.json
rm -f $out/markup.html
# and a run may be long
awk 'BEGIN {
  for (i = 1; i <= 100000; i++) printf "{\"step\":%d,\"loss\":2,\"held_out_loss\":3}\n", i
  print "{\"summary\":true,\"text\":\"\"}" }' >$out/markup.jsonl
report/replay.sh $out/markup.json $out/markup.html $out/markup.jsonl || exit
pages+=($out/markup.html)
for page in build/run.html build/report.html build/book/*.html; do
  [ ! -e "$page" ] || pages+=("$page")
done
timeout 1800 python3 tests/check_pages.py $out "${pages[@]}"
