#!/usr/bin/env python3
"""references.py: which code README.md and the pages of docs/ speak of. Prints a line for each page
and each name in backticks:
  page <TAB> name <TAB> file <TAB> first line <TAB> last line
of what the name defines. Of a file, which is meant as a whole, the lines are 1 and 0. What nobody
here defines (a name of NCCL's, a variable of the environment) has the first line that mentions it,
and what no line mentions has no file, nor has a `Class::name` that is not there.
  which     of several definitions: the page's own files first, then others, then tests/; there
            classes before functions, functions that are declared elsewhere before others,
            functions before members; declarations last
  own       the files and folders named in the sentence at the top that says "read beside", and
            the .cpp or .cu of a header named there
  words     of small letters alone (`finish`) are names only where an own file has such a function
"""
import collections
import glob
import json
import os
import re
import subprocess

os.chdir(os.path.dirname(os.path.abspath(__file__)) + '/../..')
files = sorted(
    file for file in glob.glob('**', recursive=True)
    if re.search(r'^(?!build/|.*corpus/).*(\.(cpp|cuh?|h|js|mk|sh|py|awk|sed)|Makefile)$', file)
    and os.path.isfile(file))
lines = {}
for file in files:
    with open(file) as text:
        lines[file] = text.read().split('\n')
# by address and by name; of several with one name the first, those of tests/ last
path_of = {os.path.basename(file): file
           for file in sorted(files, key=lambda f: f.startswith('tests/'))[::-1]}
path_of.update(zip(files, files))

# ---- definitions, by their words

tags = subprocess.run(  # CUDA is C++ to it
    ['ctags', '--quiet', '--options=NONE', '--languages=C++', '--langmap=C++:.cpp.h.cu.cuh',
     '--kinds-C++=+p', '--fields=NFneKs', '-D', 'TEST(name)=void name()',
     '-I', '__launch_bounds__+', '--sort=no', '--output-format=json', '-f-', *files],
    stdout=subprocess.PIPE, check=True).stdout
definitions = collections.defaultdict(list)
declared = set()
for tag in map(json.loads, tags.splitlines()):
    word, scope = tag['name'], tag.get('scope', '')
    if word.startswith('__anon') or scope.split('::')[-1] == word:
        continue  # a constructor is its class
    definitions[word].append(tag)
    if tag['kind'] == 'prototype':
        declared.add((word, scope))

# ---- the pages

for page in ['README.md', *sorted(glob.glob('docs/*.md'))]:
    with open(page) as text:
        prose = re.sub(r'(?ms)^ *```.*?^ *```', '', text.read())

    beside = re.search(r'[Rr]ead (this )?beside(.*?)(;|\.\n|\n\n)', prose, re.S)
    own = []
    for name in re.findall('`(.+?)`', beside[2]) if beside else []:
        stem = name.removesuffix('.h')
        own += [file for file in files if file == name or name[-1] == '/' and file.startswith(name)
                or stem != name and file in (stem + '.cpp', stem + '.cu')]

    def rank(file):
        return own.index(file) if file in own else 1000 + file.startswith('tests/')

    def cost(tag):
        kind = tag['kind']
        is_declared = (tag['name'], tag.get('scope', '')) in declared
        return (kind == 'prototype', max(rank(tag['path']), 999),  # 999: any own file
                kind not in ('class', 'struct', 'enum', 'union', 'macro'),
                kind != 'function', not is_declared, rank(tag['path']))

    def find(name):
        """The file, the first and the last line; empty where code is named that is not there, and
        nothing where no code is named."""
        file = name.removeprefix('../')
        if re.fullmatch('[a-z]+_[a-z_]+', file) and file + '.cpp' in path_of:
            file += '.cpp'  # a program
        if file in path_of:
            return path_of[file], 1, 0
        is_word = re.fullmatch('[a-z0-9]+', name)
        name = re.split('[(<]', name)[0]
        if not re.fullmatch(r'[A-Za-z_]\w*(::~?\w+)*', name):
            return None
        *scope, word = name.split('::')
        scope = '::'.join(scope)
        found = [tag for tag in definitions[word]
                 if not scope or f'::{scope}::' in f"::{tag.get('scope', '')}::"]
        if is_word:
            found = [t for t in found if t['kind'] == 'function' and t['path'] in own]
        if found:
            tag = min(found, key=cost)
            return tag['path'], tag['line'], tag.get('end', tag['line'])
        if is_word:
            return None
        mentions = [] if scope else [
            (bool(re.match(r' *(//|#[^di])', line)), rank(file), file, number)
            for file in files for number, line in enumerate(lines[file], 1)
            if word in line and re.search(rf'\b{word}\b', line)]
        if not mentions:
            return '', '', ''
        _, _, file, number = min(mentions)
        return file, number, number

    names = re.findall(r'`([^`\n]+)`|\]\(([^)\n]+)\)', prose)
    for name in dict.fromkeys(code or link for code, link in names):
        place = find(name)
        if place:
            print(page, name, *place, sep='\t')
