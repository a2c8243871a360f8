#!/usr/bin/env bash
# references.sh: which code README.md and the pages of docs/ speak of. Prints a line for each page
# and each name in backticks:
#   page <TAB> name <TAB> file <TAB> first line <TAB> last line
# of what the name defines. Of a file, which is meant as a whole, the lines are 1 and 0. What nobody
# here defines (a name of NCCL's, a variable of the environment) has the first line that mentions
# it, and what no line mentions has no file, nor has a `Class::name` that is not there.
#   which     of several definitions: the page's own files first, then others, then tests/; there
#             classes before functions, functions that are declared elsewhere before others,
#             functions before members; declarations last
#   own       the files and folders named in the sentence at the top that says "read beside", and
#             the .cpp or .cu of a header named there
#   words     of small letters alone (`finish`) are names only where an own file has such a function
set -eu
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
find . \( -name build -o -name .git -o -name corpus \) -prune -o -type f \( -name '*.cpp' -o \
  -name '*.cu' -o -name '*.h' -o -name '*.cuh' -o -name '*.mk' -o -name '*.sh' -o -name '*.py' \
  -o -name '*.awk' -o -name '*.sed' -o -name Makefile \) -print \
  | sed 's#^\./##' | sort >"$work/files"
# CUDA is C++ to it
ctags --options=NONE --languages=C++ --langmap=C++:.cpp.h.cu.cuh --kinds-C++=+p --fields=neKs \
  -D 'TEST(name)=void name()' -I '__launch_bounds__+' --excmd=number --sort=no -L "$work/files" \
  -f "$work/tags" 2>/dev/null
awk -v work="$work" '
  function base(path) { sub(/.*\//, "", path); return path }
  function identifier(name) { return name ~ /^[A-Za-z_][A-Za-z0-9_]*(::~?[A-Za-z0-9_]+)*$/ }
  BEGIN {
    FS = "\t"
    while ((getline file < (work "/files")) > 0) {
      files[++file_count] = file
      path_of[file] = file
      if (!(base(file) in path_of) || path_of[base(file)] ~ /^tests\//) path_of[base(file)] = file
    }
    while ((getline < (work "/tags")) > 0) {
      if (/^!/ || $1 ~ /^__anon/) continue
      last = $3 + 0
      scope = ""
      for (i = 5; i <= NF; i++) {
        if ($i ~ /^end:/) last = substr($i, 5) + 0
        if ($i ~ /^(class|struct|enum|union|namespace):/) scope = substr($i, index($i, ":") + 1)
      }
      if (base_name(scope) == $1) continue  # a constructor is its class
      k = ++definitions[$1]
      at[$1, k] = $2 "\t" $3 + 0 "\t" last
      file_of[$1, k] = $2
      scope_of[$1, k] = scope
      kind[$1, k] = $4
      if ($4 == "prototype") declared[$1, scope] = 1
    }
  }
  function base_name(name) { sub(/.*::/, "", name); return name }

  # ---- the pages, outside of code blocks

  FNR == 1 { owned = inside = beside = 0 }
  /^ *```/ { inside = !inside }
  inside { next }
  /^$/ { beside = 0 }
  /[Rr]ead (this )?beside/ { beside = 1 }
  {
    rest = $0
    while (match(rest, /`[^`]+`|\]\([^)]+\)/)) {
      name = substr(rest, RSTART + 1, RLENGTH - 2)
      if (name ~ /^\(/) name = substr(name, 2)
      rest = substr(rest, RSTART + RLENGTH)
      if (beside) own(FILENAME, name)
      if (!((FILENAME, name) in seen)) {
        seen[FILENAME, name] = 1
        page_of[++count] = FILENAME
        name_of[count] = name
      }
    }
    if (beside && /\.$|;/) beside = 0
  }
  function own(page, name,    i, stem) {
    stem = name
    sub(/\.h$/, "", stem)
    for (i = 1; i <= file_count; i++)
      if (files[i] == name || name ~ /\/$/ && index(files[i], name) == 1 || \
          stem != name && (files[i] == stem ".cpp" || files[i] == stem ".cu"))
        if (!((page, files[i]) in owner)) owner[page, files[i]] = ++owned
  }

  # ---- which definition it is: the lowest cost

  function cost(page, file, kind, public,    c) {
    c = (page, file) in owner ? owner[page, file] : file ~ /^tests\// ? 50000 : 10000
    if (kind == "prototype") return c + 100000
    if (kind ~ /^(class|struct|enum|union|macro)$/) return c
    return c + (kind == "function" ? (public ? 200 : 300) : 400)
  }
  function resolve(page, name, last,    parts, word, qualifier, k, c, best, found) {
    parts = split(name, part, "::")
    word = part[parts]
    qualifier = substr(name, 1, length(name) - length(word) - 2)
    best = 1e9
    for (k = 1; k <= definitions[word]; k++) {
      if (qualifier != "" && !index("::" scope_of[word, k] "::", "::" qualifier "::")) continue
      if (optional[page, name] && (kind[word, k] != "function" || \
          !((page, file_of[word, k]) in owner))) continue
      c = cost(page, file_of[word, k], kind[word, k], (word, scope_of[word, k]) in declared)
      if (c < best) {
        best = c
        found = at[word, k]
      }
    }
    return found
  }
  END {
    for (i = 1; i <= count; i++) {
      name = name_of[i]
      page = page_of[i]
      file = name
      sub(/^\.\.\//, "", file)
      if (file ~ /^[a-z]+_[a-z_]+$/ && (file ".cpp") in path_of) file = file ".cpp"  # a program
      if (file in path_of) result[i] = path_of[file] "\t1\t0"
      else {
        sub(/[(<].*/, "", name)
        if (!identifier(name)) continue
        named[i] = name
        optional[page, name] = name_of[i] ~ /^[a-z0-9]+$/
        result[i] = resolve(page, name)
        if (result[i] == "" && !optional[page, name] && name !~ /::/) wanted[name] = 1
      }
    }
    for (f = 1; f <= file_count; f++) {
      line = 0
      while ((getline text < files[f]) > 0) {
        line++
        words = split(text, word, /[^A-Za-z0-9_]+/)
        comment = text ~ /^ *(\/\/|#[^di])/
        for (w = 1; w <= words; w++)
          if (word[w] in wanted && (!((word[w], f, comment) in mentioned)))
            mentioned[word[w], f, comment] = line
      }
      close(files[f])
    }
    for (i = 1; i <= count; i++) {
      if (!(i in result)) continue
      if (result[i] == "" && !optional[page_of[i], named[i]]) {
        best = 1e9
        for (f = 1; f <= file_count; f++)
          for (comment = 0; comment < 2; comment++)
            if ((named[i], f, comment) in mentioned) {
              c = cost(page_of[i], files[f], "") + 300000 * comment
              if (c < best) {
                best = c
                line = mentioned[named[i], f, comment]
                result[i] = files[f] "\t" line "\t" line
              }
            }
      }
      if (result[i] != "" || !optional[page_of[i], named[i]])
        print page_of[i] "\t" name_of[i] "\t" result[i]
    }
  }' README.md docs/*.md
