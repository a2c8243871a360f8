#!/usr/bin/env bash
# check_book.sh: `make check-book`: makes the book, and reads it (check_book.py): every page is
# there, every link leads somewhere, every file of code is the source, and the lines that a name
# leads to are what the name defines, found here in another way than by docs/book/references.py.
set -u
cd "$(dirname "$0")/.."
for tool in pandoc ctags highlight python3; do
  command -v $tool >/dev/null || {
    echo "SKIP check-book: there is no $tool"
    exit 0
  }
done
SECONDS=0
docs/book/book.sh || exit
[ $SECONDS -le 60 ] || echo "make book took $SECONDS s; a minute is what a reader waits"
python3 tests/check_book.py
