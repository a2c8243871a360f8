# sentences.awk: prints a Markdown page with one sentence a line. Headings, tables, code blocks and
# lines of HTML stay as they are; a list's item keeps its indentation on its further lines.
# A sentence ends with . ! or ? (perhaps closed by quotes, brackets or stars) before a space and a
# capital, a digit or an opening sign; not inside `code`, after "..." nor after an abbreviation.
function is_end(before, after) {
  if (before !~ /[.!?]["')*_\]]*$/ || before ~ /\.\.\.$/) return 0
  if (before ~ /(^|[ (])(et al|e\.g|i\.e|cf|vs|No|[A-Z])\.$/) return 0
  if (gsub(/`/, "`", before) % 2) return 0
  return after ~ /^["'(*_`\[]*[A-Z0-9]/ || after ~ /^[*_]*[`\["(]/
}
function flush(    rest, line, lead, space, at) {
  if (!open) return
  open = 0
  rest = text
  line = ""
  lead = first
  while ((space = index(rest, " ")) > 0) {
    line = line substr(rest, 1, space - 1)
    rest = substr(rest, space + 1)
    if (is_end(line, rest)) {
      print lead line
      lead = further
      line = ""
    } else line = line " "
  }
  print lead line rest
}
/^ *```/ { flush(); inside = !inside; print; next }
inside { print; next }
/^ *(\||#|<)/ || /^ *$/ { flush(); print; next }
/^ *([-*+]|[0-9]+\.) / {
  flush()
  match($0, /^ *([-*+]|[0-9]+\.) +/)
  first = substr($0, 1, RLENGTH)
  further = sprintf("%" RLENGTH "s", "")
  text = substr($0, RLENGTH + 1)
  open = 1
  next
}
{
  match($0, /^ */)
  if (!open) {
    first = further = substr($0, 1, RLENGTH)
    text = substr($0, RLENGTH + 1)
    open = 1
  } else text = text " " substr($0, RLENGTH + 1)
}
END { flush() }
