# table.awk: of build/network/cells.tsv: how many times slower a step is than over the fast link,
# and how far the predictions are off. experiment.sh prints it, make compare's report shows it.
#   fields   1 ranks a node, 2 link (again: 1gbit once more), 3 layout, 4 ms, 5 predicted ms,
#            6 bytes by the ledger of rank 0, 7 by its node's interface, 8 options, 9 how many times
#            slower the machine was
BEGIN { FS = "\t" }
$2 == "again" && ($1, $2, $3) in ms && ms[$1, $2, $3] < $4 { next }
{
  ms[$1, $2, $3] = $4
  predicted[$1, $2, $3] = $5
  ledger[$1, $3] = $6
  wire[$1, $3] = $7
}
!(($1, $3) in seen) {
  seen[$1, $3] = 1
  ranks[++n] = $1
  layout[n] = $3
}
function abs(x) { return x < 0 ? -x : x }
# over 1 Gbit/s, in one repetition or more
function took(i,   once, again) {
  once = ms[ranks[i], "1gbit", layout[i]]
  again = ms[ranks[i], "again", layout[i]]
  return again == "" || once < again ? once : again
}
END {
  print "A step, how many times slower than over the fast link: measured (predicted)"
  printf "%-6s %-15s %17s", "a node", "layout", "fast, ms"
  links = split("1gbit 300mbit 100mbit 1ms", link, " ")
  for (j = 1; j <= links; j++) printf " %13s", link[j]
  print "   MB a step: ledger of rank 0, its node's interface"
  for (i = 1; i <= n; i++) {
    fast = ms[ranks[i], "fast", layout[i]]
    fast_predicted = predicted[ranks[i], "fast", layout[i]]
    printf "%-6s %-15s %17s", ranks[i], layout[i],
      fast == "" ? "-" : sprintf("%.0f (%.0f)", fast, fast_predicted)
    for (j = 1; j <= links; j++) {
      x = ms[ranks[i], link[j], layout[i]]
      if (x == "" || fast == "") {
        printf " %13s", "-"
        continue
      }
      measured = x / fast
      expected = predicted[ranks[i], link[j], layout[i]] / fast_predicted
      error[++errors] = abs(expected / measured - 1)
      where[errors] = ranks[i] " a node, " layout[i] ", " link[j]
      printf " %13s", sprintf("%.2f (%.2f)", measured, expected)
    }
    printf "   %.2f %.2f\n", ledger[ranks[i], layout[i]] / 1e6, wire[ranks[i], layout[i]] / 1e6
  }
  for (i = 1; i <= errors; i++)
    for (j = i; j > 1 && error[j] < error[j - 1]; j--) {
      x = error[j]; error[j] = error[j - 1]; error[j - 1] = x
      x = where[j]; where[j] = where[j - 1]; where[j - 1] = x
    }
  if (errors)
    printf "slowdowns are predicted within %.1f %% (median) and %.1f %% (at most: %s)\n", \
      50 * (error[int((errors + 1) / 2)] + error[int(errors / 2) + 1]), 100 * error[errors], \
      where[errors]
  links = split("fast 1gbit 300mbit 100mbit 1ms", link, " ")
  for (i = 1; i <= n; i++)
    for (k = 1; k < i; k++)
      for (j = 1; j <= links; j++) {
        a = ms[ranks[i], link[j], layout[i]]
        b = ms[ranks[k], link[j], layout[k]]
        if (ranks[i] != ranks[k] || a == "" || b == "" || (a < 1.1 * b && b < 1.1 * a)) continue
        pairs++
        right += (a < b) == (predicted[ranks[i], link[j], layout[i]] < \
                             predicted[ranks[k], link[j], layout[k]])
      }
  if (pairs)
    printf "the faster of two layouts is named rightly in %d of %d pairs that differ by over " \
      "10 %%\n", right, pairs
  for (i = 1; i <= n; i++) {
    if (layout[i] != "first-choice" || took(i) == "") continue
    best = i
    for (k = 1; k <= n; k++)
      if (ranks[k] == ranks[i] && took(k) != "" && took(k) < took(best)) best = k
    printf "%s a node, 1gbit: the planner's first choice takes %.2f times as long as the fastest " \
      "(%s)\n", ranks[i], took(i) / took(best), layout[best]
  }
}
