#!/usr/bin/env bash
# check_style.sh: `make check-style`: what can be said of the sources without reading them.
#   width      no line of code, of a script or of a makefile is longer than 100 columns
#   format     C++ and CUDA are what clang-format makes of them, in the version that .clang-format
#              names; with another version, or none, this is skipped
#   sentences  Markdown has one sentence a line, as tests/sentences.awk prints it (that is the mend:
#              awk -f tests/sentences.awk docs/fsdp.md >new && mv new docs/fsdp.md)
#   places     the top level holds the book's main line, and nothing else
#   circles    no header includes itself, over others; no folder another that includes it
set -u
cd "$(dirname "$0")/.."
. tests/lib.sh
git rev-parse --is-inside-work-tree >"$dir/out" 2>"$dir/err" || {
  fail check-style "git says which files are the project's: $(cat "$dir/err")"
  sums_up
  exit
}
code=$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
scripts=$(git ls-files '*.sh' '*.awk' '*.py' '*.mk' '*.js' '*.css' '*.html' Makefile .ci/run)
folders="checkpoint cpu docs inference kernels launch network report support tests theory"
main_line="autograd comm context_parallel fsdp gpt optimizer pipeline schedule tensor"
main_line="$main_line tensor_parallel"

# found NAME FILE: passes when FILE, a list of what is wrong, is empty
found() { check "$1" "[ ! -s '$2' ]" "$3" "$(wc -l <"$2") of them: $(head -40 "$2")"; }

# Columns are characters: bytes that continue a character do not count.
for file in $code $scripts; do
  awk -v file="$file" '
    { line = $0; gsub(/[\200-\277]/, "", line) }
    length(line) > 100 { print file ":" FNR ": " length(line) " columns" }' "$file"
done >"$dir/wide"
found no_line_is_longer_than_100_columns "$dir/wide" "$(echo $code $scripts | wc -w) files"

wanted=$(sed -n 's/^#.*clang-format \([0-9]*\).*/\1/p' .clang-format)
formatter=$(command -v "clang-format-$wanted" || echo clang-format)
version=$("$formatter" --version 2>/dev/null | sed 's/.*version \([0-9]*\).*/\1/')
if [ "$version" = "$wanted" ]; then
  for file in $code; do
    "$formatter" "$file" | cmp -s "$file" - || echo "$file"
  done >"$dir/unformatted"
  found sources_are_what_clang_format_makes_of_them "$dir/unformatted" "version $version"
else
  skip sources_are_what_clang_format_makes_of_them \
    "clang-format is version ${version:-unknown (or not there)}, .clang-format is for $wanted"
fi

for page in $(git ls-files '*.md'); do
  awk -f tests/sentences.awk "$page" | diff "$page" - \
    | sed -n "s/^\([0-9]*\)[,0-9]*[acd].*/\1/p" | sed "s#^#$page:#"
done >"$dir/sentences"
found markdown_has_one_sentence_a_line "$dir/sentences" "$(git ls-files '*.md' | wc -l) pages"

{
  git ls-files | grep -v / \
    | grep -vE '^(\..*|Makefile|README\.md|train_gpt\.cpp|trainer\.(h|cpp))$' \
    | grep -vE "^(${main_line// /|})\.(h|cpp|cu)$"
  git ls-files | sed -n 's#^\([^./][^/]*\)/.*#\1#p' | sort -u | grep -vxE "${folders// /|}"
} >"$dir/strangers"
found the_top_level_holds_the_main_line_alone "$dir/strangers" "and ${folders// /, }"

# includes: a line for each #include "..." outside tests/: the file, and the file that it includes
includes() {
  local file name place
  grep -oE '^#include "[^"]+"' $(grep -v '^tests/' <<<"$code") | tr -d '"' | tr ':' ' ' \
    | while read -r file _ name; do
      for place in "$name" "$(dirname "$file")/$name" "kernels/$name" cpu/{cuda,nccl}/"$name"; do
        [ -f "$place" ] && echo "$file $(realpath --relative-to=. "$place")" && break
      done
    done
}
includes >"$dir/includes"
grep -E '\.(h|cuh) ' "$dir/includes" | tsort 2>&1 >/dev/null | sed 's/^tsort: //' >"$dir/circles"
# A part is a folder, or a file of the main line with its header; kernels/ are tensor's. Programs
# stand above all of them.
programs=$(grep -lE '^int main\(' $code | paste -sd'|')
grep -vE "^($programs) " "$dir/includes" \
  | sed -E 's#\b([a-z_]+)/[^ ]*#\1/#g; s#\.(cpp|cuh?|h)\b##g; s#\bkernels/#tensor#g' \
  | awk '$1 != $2' | sort -u | tsort 2>&1 >/dev/null | sed 's/^tsort: //' >>"$dir/circles"
found there_is_no_circle_of_includes "$dir/circles" "$(wc -l <"$dir/includes") includes"
sums_up
