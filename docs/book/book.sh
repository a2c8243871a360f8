#!/usr/bin/env bash
# book.sh: `make book`: README.md and the pages of docs/ as a book in build/book/, each page beside
# the code that it speaks of.
#   references.py   which name is which lines     head.html    how a page and a file of code begin
#   page.lua        a page's links                book.js      the code follows what is read
#   page.html       a page around its text        source.js    a file shows some of its lines
set -eu
cd "$(dirname "$0")/../.."
for tool in pandoc ctags highlight python3; do
  command -v $tool >/dev/null || {
    echo "make book: there is no $tool (on Debian and Ubuntu:" \
      "apt-get install pandoc universal-ctags highlight python3)"
    exit 1
  }
done
# whose lists of words a filter can walk
pandoc --version | awk -F'[ .]' 'NR == 1 { exit !($2 > 2 || ($2 == 2 && $3 >= 17)) }' \
  || {
    echo "make book: $(pandoc --version | head -1) is too old: pandoc 2.17 or newer is needed"
    exit 1
  }
out=build/book
mkdir -p $out && [ -w build ] && [ -w $out ] || {
  echo "make book: build/ or $out cannot be written to"
  exit 1
}
rm -rf $out
mkdir -p $out/source
cp report/page.css docs/book/book.js docs/*.svg $out
cp report/page.css docs/book/source.js $out/source
export REFERENCES=$out/references.tsv
docs/book/references.py >$REFERENCES

# README's reading order, then the others
ordered=$(sed -n '/^## Reading order/,/^## /p' README.md | grep -oE 'docs/[a-z_]+\.md')
pages=(README.md $(printf '%s\n' $ordered docs/*.md | awk '!seen[$0]++'))
address() { [ "$1" = README.md ] && echo index.html || echo "$(basename "$1" .md).html"; }
title() { sed -n 's/^# //p' "$1" | head -1; }

# seen PAGE: links to what `make compare` and `make replay` have drawn of the page's subject here
seen() {
  local files file
  case $1 in
    *fsdp.md) files="compare/replicate compare/fsdp-*" ;;
    *tensor_parallel.md) files="compare/tp*" ;;
    *pipeline.md) files="report compare/pp-*" ;;
    *context_parallel.md) files=compare/cp ;;
    *choosing.md) files="report compare/3d" ;;
    *replay.md) files=replay ;;
    *) return ;;
  esac
  for file in $(cd build && ls ${files// /.html }.html 2>/dev/null); do
    echo "<a href='../$file'>$(basename "$file" .html)</a>"
  done
}

contents=$(for page in "${pages[@]}"; do
  echo "<a href='$(address "$page")'>$(title "$page")</a>"
done)
previous=
for i in "${!pages[@]}"; do
  page=${pages[$i]} next=${pages[$((i + 1))]:-}
  here=$(address "$page")
  pandoc "$page" -f gfm --wrap=none --toc \
    --template docs/book/page.html --lua-filter docs/book/page.lua \
    -M title="$(title "$page")" -V pages="${contents/"'$here'"/"'$here' aria-current='page'"}" \
    -V previous="$previous" -V next="${next:+$(address "$next")}" \
    -V after="${next:+$(title "$next")}" -V seen="$(seen "$page")" -o "$out/$here"
  previous=$here
done

mapfile -t files < <(cut -f3 $REFERENCES | grep . | sort -u)
for file in "${files[@]}"; do
  language=${file##*.}
  code=$(highlight --fragment --out-format=html --force --syntax="${language/cuh/cu}" <"$file")
  {
    sed "s#[$]title[$]#$file#" docs/book/head.html
    printf "<ol>"
    sed 's/^/<li>/' <<<"$code"
    echo "</ol><script src='source.js'></script>"
  } >"$out/source/${file//\//-}.html"
done
echo "book: $out/index.html (${#pages[@]} pages beside ${#files[@]} files of code)"
