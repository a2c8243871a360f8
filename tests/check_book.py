"""check_book.py: reads build/book/, for check_book.sh."""
import glob
import html.parser
import os
import re
import sys
import urllib.parse

BOOK = 'build/book'
passed, failed = 0, 0


def check(holds, what):
    global passed, failed
    holds = bool(holds)
    passed += holds
    failed += not holds
    if not holds:
        print('FAIL', what)


class Page(html.parser.HTMLParser):
    """ids, links (target, classes, text), and the text of what is in <ol>."""

    def __init__(self, path):
        super().__init__()
        self.path, self.ids, self.links, self.text, self.code = path, set(), [], '', ''
        self.inside = []
        with open(path) as f:
            self.feed(f.read())

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        self.ids.add(a.get('id'))
        for target in [a.get('href'), a.get('src')]:
            if target is not None and 'aria-hidden' not in a:
                self.links.append([target, a.get('class') or '', ''])
        if tag in ('a', 'ol'):
            self.inside.append(tag)

    def handle_endtag(self, tag):
        if tag in ('a', 'ol'):
            self.inside.pop()

    def handle_data(self, data):
        self.text += data
        if 'a' in self.inside and self.links:
            self.links[-1][2] += data
        if 'ol' in self.inside:
            self.code += data


def bare(line):
    """without strings, characters and comments"""
    return re.sub(r'"(\\.|[^"\\])*"|\'(\\.|[^\'\\])*\'|//.*', '', line)


def indentation(line):
    return len(line) - len(line.lstrip())


def end_of(lines, first):
    """The last line (from 1) of what begins at `first`: where its braces or its statement end."""
    if lines[first - 1].startswith('#define'):
        return next(i + 1 for i in range(first - 1, len(lines)) if not lines[i].endswith('\\'))
    depth = 0
    for i in range(first - 1, len(lines)):
        for sign in bare(lines[i]):
            depth += (sign in '([{') - (sign in ')]}')
            if not depth and sign in '};':
                return i + 1
    return len(lines)


def definitions(lines, word):
    """Lines at which a function of this name begins that has a body."""
    for i, line in enumerate(lines):
        if not re.match(r'\s*[A-Za-z_~:<>*&, ]*\b(TEST\()?%s[(<)]' % re.escape(word), bare(line)):
            continue
        if re.match(r'\s*(return|throw|else|if|for|while|case|delete)\b', line) or '=' in \
                bare(line).split(word)[0] or lines[i - 1].endswith(','):  # it initialises a member
            continue
        head = ''
        for following in lines[i:i + 12]:
            head += bare(following)
            if re.search(r'[{;]', head):
                break
        before_body = re.split(r'[{;]', head)[0]
        if '{' in head and (';' not in head or head.index('{') < head.index(';')) and \
                before_body.count('(') == before_body.count(')'):
            yield i + 1


def own_files(page):
    """What a page is read beside, with what implements its headers."""
    with open(page) as f:
        sentence = re.search(r'[Rr]ead (this )?beside ([^\n;]*)', f.read())
    own = []
    for name in re.findall(r'`([^`]+)`', sentence[2]) if sentence else []:
        if name.endswith('/'):
            own += glob.glob(name + '**/*.*', recursive=True)
        own += [name] + [name[:-2] + end for end in ('.cpp', '.cu') if name.endswith('.h')]
    return [f for f in own if os.path.isfile(f)]


sources = {}


def lines_of(file):
    if file not in sources:
        with open(file) as f:
            sources[file] = f.read().split('\n')
    return sources[file]


def check_reference(page, own, name, file, first, last):
    where = f'{page}: {name} leads to {file}:{first}-{last}'
    lines = lines_of(file)
    *qualifiers, word = re.sub(r'[(<].*', '', name).split('::')
    check(re.search(r'\b%s\b' % re.escape(word), lines[first - 1]), f'{where}, which lacks it')
    if qualifiers:
        kept, inside = indentation(lines[first - 1]), f'{qualifiers[0]}::{word}' in lines[first - 1]
        for line in reversed(lines[:first - 1]):  # the lines that enclose it
            if line.strip() and indentation(line) < kept and not line.strip().startswith('//'):
                kept = indentation(line)
                inside |= bool(re.search(r'(class|struct|enum|union) %s\b' % qualifiers[-1], line))
        inside |= bool(re.search(r'(class|struct|enum) %s\b' % qualifiers[-1], lines[first - 1]))
        check(inside, f'{where}, which is not of {qualifiers[0]}')
    if last > first:
        check(end_of(lines, first) == last, f'{where}, but it ends at {end_of(lines, first)}')
    # where an own file defines a function of this name, it is one of these
    known = {(f, i) for f in own if f.endswith(('.cpp', '.cu', '.h', '.cuh'))
             for i in definitions(lines_of(f), word) if not word.endswith('_')}
    if qualifiers:
        known = {(f, i) for f, i in known if f'{qualifiers[-1]}::{word}' in lines_of(f)[i - 1]}
    if known and not re.search(r'(class|struct|enum)\b.*\b%s\b' % word, lines[first - 1]):
        check((file, first) in known, f'{where}, but own definitions are {sorted(known)}')
    elif last == first:  # else nothing here, nor there, has a body
        check(not list(definitions(lines, word)) or first in definitions(lines, word),
              f'{where}, which is no definition, though there is one')


pages = {p: Page(p) for p in glob.glob(f'{BOOK}/**/*.html', recursive=True)}
markdown = {'README.md': f'{BOOK}/index.html'}
for source in glob.glob('docs/*.md'):
    markdown[source] = f'{BOOK}/{os.path.basename(source)[:-3]}.html'
for source, built in markdown.items():
    check(built in pages, f'{source} has no page {built}')
    with open(source) as f:
        prose = re.sub(r'(?ms)^```.*?^```', '', f.read())
        for heading in re.findall(r'^#+ ([^`*\n]+)$', prose, re.M):
            check(heading in pages[built].text, f'{built} lacks the heading "{heading}"')

files = {}  # of code, by their pages
for path, page in pages.items():
    if '/source/' in path:
        with open(path) as f:
            file = re.search('<title>(.*)</title>', f.read())[1]
        files[path] = file
        check(page.code.rstrip('\n') == '\n'.join(lines_of(file)).rstrip('\n'),
              f'{path} is not the text of {file}')

references = 0
for source, built in markdown.items():
    own = own_files(source)
    for target, classes, text in pages[built].links:
        if re.match(r'https?:', target) or target == '':
            continue
        path, _, place = target.partition('#')
        path = os.path.normpath(os.path.join(BOOK, urllib.parse.unquote(path))) if path else built
        check(os.path.exists(path), f'{built} links to {target}, which is not there')
        if 'code' in classes.split() and place:
            references += 1
            first, last = map(int, place.split('-'))
            check_reference(source, own, text, files[path], first, last)
        elif place and path in pages:
            check(urllib.parse.unquote(place) in pages[path].ids,
                  f'{built} links to {target}, where nothing has this name')
check(references, 'no page names code')
print(f'{len(markdown)} pages, {len(files)} files of code, {references} names of code')
print(f'{passed} passed, {failed} failed')
sys.exit(failed > 0)
