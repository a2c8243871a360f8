#!/usr/bin/env bash
# size.sh: how much there is to read, in tokens. An identifier, a number, a string or an operator is
# one and a comment is none (one that has an end, as in CSS and HTML, ends in its line), so that
# neither long names nor wrapped lines count. What a script made (inference/unicode_table.h) is left
# out.
set -u
export LC_ALL=C
cd "$(dirname "$0")/.."
tokens() {
  local string='"(\\.|[^"\\])*"' character="'(\\\\.|[^'\\\\])*'" word='[A-Za-z_][A-Za-z_0-9]*'
  local number="\.?[0-9]([A-Za-z_0-9.]|'[0-9])*"
  local three='<<=|>>=|<=>|\.\.\.|->\*' two='::|->|\+\+|--|<<|>>|[-+*/%&|^<>=!]=|&&|\|\||##'
  local comment='//.*|/\*([^*]|\*[^/])*\*/|<!--.*-->'
  local raw='/R"\(/,/\)"/{ /R"\(/{ s/R"\(.*/""/; b }; /\)"/!d; s/.*\)"// }' # is one string
  sed -E "$raw" "$@" \
    | grep -oE "$string|$character|$comment|$number|$word|$three|$two|[^[:space:]]" \
    | grep -vcE '^(//|/\*|<!--)'
}
path=$(ls {tensor,autograd,gpt,optimizer,comm}.{h,cpp,cu} \
  {fsdp,tensor_parallel,pipeline,context_parallel}.{h,cpp,cu} \
  {schedule,trainer,train_gpt}.{h,cpp} theory/simulate.{h,cpp} 2>/dev/null)
folders="kernels launch theory report inference checkpoint support network"
whole=$(
  ls *.h *.cpp *.cu
  find $folders -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu' \
    | grep -v '^inference/unicode_table.h$'
  find report docs -name '*.js' -o -name '*.css' -o -name '*.html'
)
stand_in=$(find cpu -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.sed')
echo "size in tokens: $(tokens $path) the reading path, $(tokens $whole) the whole outside" \
  "tests/ and cpu/, $(tokens $stand_in) cpu/"
