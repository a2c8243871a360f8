#!/usr/bin/env python3
"""Writes inference/unicode_table.h: which code points are white space, letters and numbers.
Run it in the project's root with the version of Unicode that is wanted:

    pip install unicodedata2==16.0.0 && python3 inference/unicode_table.py

16.0 is what the `tokenizers` library has (0.23). Letters and numbers are the categories L and N;
white space is the property White_Space: the category Z, U+0009 to U+000D and U+0085.
"""
import unicodedata2 as unicode


def kind(code):
    category = unicode.category(chr(code))[0]
    if category == "Z" or 0x9 <= code <= 0xD or code == 0x85:
        return "space"
    return {"L": "letter", "N": "number"}.get(category)


runs = []  # [first, last, kind]
for code in range(0x110000):
    k = kind(code)
    if runs and runs[-1][1] == code - 1 and runs[-1][2] == k:
        runs[-1][1] = code
    elif k:
        runs.append([code, code, k])

with open("inference/unicode_table.h", "w") as out:
    out.write(
        f"""// unicode_table.h: made by inference/unicode_table.py; not to be edited.
// source    the Unicode Character Database, version {unicode.unidata_version}: the categories
//           L (letters) and N (numbers), the property White_Space; {len(runs)} runs of code
//           points, in order
#pragma once
enum class Sign {{ space, letter, number, other }};
struct SignRun {{
  char32_t first, last;
  Sign sign;
}};
// clang-format off
constexpr SignRun kSigns[] = {{
"""
    )
    line = ""
    for first, last, k in runs:
        entry = f" {{{first:#x},{last:#x},Sign::{k}}},"
        if len(line + entry) > 100:
            out.write(line + "\n")
            line = ""
        line += entry
    out.write(line + "\n};\n// clang-format on\n")
