# source.awk: pages of the book for files of code: book.sh gives it the files and `out`, where they
# go. A line of code is a <li>; comments, strings and the language's own words have classes.
BEGIN {
  n = split("auto bool break case catch class const constexpr continue default delete do double " \
    "else enum explicit extern false float for if inline int int64_t namespace new nullptr " \
    "operator private public return static struct switch template this throw true try typename " \
    "uint64_t using void while " \
    "__global__ __device__ __shared__ __host__ __forceinline__ done esac fi function local then", \
    words, " ")
  for (i = 1; i <= n; i++) is_word[words[i]] = 1
}
function escape(s) {
  gsub(/&/, "\\&amp;", s)
  gsub(/</, "\\&lt;", s)
  return s
}
function marked(class, s) { return "<i class=\"" class "\">" escape(s) "</i>" }
FNR == 1 {
  if (page) close_page()
  page = FILENAME
  gsub(/\//, "-", page)
  page = out "/" page ".html"
  is_c = FILENAME ~ /\.(cpp|h|cu|cuh)$/
  while ((getline line < "docs/book/head.html") > 0) {
    gsub(/\$title\$/, FILENAME, line)
    print line > page
  }
  close("docs/book/head.html")
  printf "<ol>" > page
}
{
  rest = $0
  html = ""
  while (match(rest, /\/\/|#|"(\\.|[^"\\])*"|'(\\.|[^'\\])*'|[A-Za-z_][A-Za-z_0-9]*/)) {
    html = html escape(substr(rest, 1, RSTART - 1))
    found = substr(rest, RSTART, RLENGTH)
    comment = found == "//"
    if (!is_c) comment = found == "#" && (RSTART == 1 || substr(rest, RSTART - 1, 1) == " ")
    if (comment) {
      html = html marked("co", substr(rest, RSTART))
      rest = ""
      break
    }
    rest = substr(rest, RSTART + RLENGTH)
    if (found ~ /^["']/) html = html marked("st", found)
    else html = html (found in is_word ? marked("kw", found) : escape(found))
  }
  printf "%s", "<li>" html escape(rest) "\n" > page
}
function close_page() {
  print "</ol>\n<script src=\"source.js\"></script>" > page
  close(page)
}
END { close_page() }
