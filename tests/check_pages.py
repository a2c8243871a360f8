#!/usr/bin/env python3
"""check_pages.py: `make check-pages`, with tests/check_pages.sh: opens pages in headless Chromium,
and drives them as a person would.

   tests/check_pages.py SCREENSHOTS PAGE.html...

A page that holds a trace is a replay: it is played, stepped, moved by keys, and at 20 random
moments what it says and draws is compared with the trace, which is read and added up here, in
Python. Of any page: no error of a script, no overflow at 320, 768 and 1440 pixels, light and dark,
and it prints.
Chromium is spoken to over a pair of pipes, in its DevTools protocol."""
import base64
import fcntl
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time

passed = failed = 0


def check(name, wrong, about=''):
    """Passes when nothing is wrong: wrong is a list of what is."""
    global passed, failed
    if wrong:
        failed += 1
        print('FAIL', name, *wrong[:5], sep='\n     ')
    else:
        passed += 1
        print('ok  ', name, f'({about})' if about else '')


class Browser:
    def __init__(self, program):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in os.pipe() + os.pipe()]
        reads, self.out, self.into, writes = ends
        self.process = subprocess.Popen(
            ['bash', '-c', f'exec "$@" 3<&{reads} 4>&{writes}', '-', program, '--headless=new',
             '--remote-debugging-pipe', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage',
             '--no-first-run', '--hide-scrollbars', f'--user-data-dir={self.profile.name}'],
            pass_fds=(reads, writes), stderr=subprocess.DEVNULL)
        os.close(reads), os.close(writes)
        self.number, self.rest, self.errors, self.session = 0, b'', [], None
        target = self.call('Target.createTarget', url='about:blank')['targetId']
        self.session = self.call('Target.attachToTarget', targetId=target,
                                 flatten=True)['sessionId']
        for domain in 'Page', 'Runtime', 'Log':
            self.call(domain + '.enable')

    def message(self):
        while b'\0' not in self.rest:
            piece = os.read(self.into, 1 << 20)
            if not piece:
                raise SystemExit('check_pages: Chromium ended')
            self.rest += piece
        one, self.rest = self.rest.split(b'\0', 1)
        one = json.loads(one)
        if one.get('method') == 'Runtime.exceptionThrown':
            details = one['params']['exceptionDetails']
            self.errors.append(details.get('exception', {}).get('description', details['text']))
        if one.get('method') == 'Log.entryAdded' and one['params']['entry']['level'] == 'error':
            self.errors.append(one['params']['entry']['text'])
        return one

    def call(self, method, **params):
        self.number += 1
        message = {'id': self.number, 'method': method, 'params': params}
        if self.session:
            message['sessionId'] = self.session
        data = json.dumps(message).encode() + b'\0'
        while data:
            data = data[os.write(self.out, data):]
        while True:
            answer = self.message()
            if answer.get('id') == self.number:
                if 'error' in answer:
                    raise SystemExit(f'check_pages: {method}: {answer["error"]}')
                return answer['result']

    def open(self, path):
        self.call('Page.navigate', url='file://' + os.path.abspath(path))
        while self.message().get('method') != 'Page.loadEventFired':
            pass

    def evaluate(self, script):
        answer = self.call('Runtime.evaluate', expression=script, returnByValue=True,
                           awaitPromise=True)
        if 'exceptionDetails' in answer:
            self.errors.append(str(answer['exceptionDetails']))
        return answer['result'].get('value')

    def press(self, key, text=''):
        for kind in 'keyDown', 'keyUp':
            self.call('Input.dispatchKeyEvent', type=kind, key=key,
                      **({'text': text} if text and kind == 'keyDown' else {}))

    def click(self, selector):
        x, y = self.evaluate(
            f'(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView();'
            ' const r = e.getBoundingClientRect();'
            ' return [r.x + r.width / 2, r.y + r.height / 2]; })()')
        for kind in 'mousePressed', 'mouseReleased':
            self.call('Input.dispatchMouseEvent', type=kind, x=x, y=y, button='left', buttons=1,
                      clickCount=1)

    def size(self, width, height=900):
        self.call('Emulation.setDeviceMetricsOverride', width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 500)

    def media(self, media='', **features):
        self.call('Emulation.setEmulatedMedia', media=media, features=[
            {'name': name.replace('_', '-'), 'value': value} for name, value in features.items()])

    def picture(self, box):
        return self.call('Page.captureScreenshot', captureBeyondViewport=True,
                         clip={**box, 'height': min(box['height'], 4000), 'scale': 1})['data']

    def screenshot(self, path):
        data = self.picture(self.call('Page.getLayoutMetrics')['cssContentSize'])
        with open(path, 'wb') as file:
            file.write(base64.b64decode(data))


# ---- what the trace says, added up without the page


class Trace:
    def __init__(self, page):
        text = re.search(r'id="trace">(.*?)</script>', page, re.S)[1]
        trace = json.loads(text)
        self.about, self.events = trace['threefold'], trace['traceEvents']
        self.ranks = range(len(self.about['units']))
        self.end = max(e['ts'] + e.get('dur', 0) for e in self.events if 'ts' in e)
        self.told = sorted((e for e in self.events
                            if e.get('cat') in ('part', 'collective', 'unit')),
                           key=lambda e: e['ts'])

    def until(self, rank, t, **fields):
        """A rank's events that began, in the order of time."""
        return sorted((e for e in self.events if e['pid'] == rank and e.get('ts', 1e99) <= t
                       and all(e.get(k) == v for k, v in fields.items())), key=lambda e: e['ts'])

    def running(self, rank, t, cat):
        return [e for e in self.until(rank, t, ph='X', cat=cat) if e['ts'] + e['dur'] > t]

    def memory(self, rank, t):
        return self.counter(rank, t, 'memory')

    def units(self, rank, t):
        def begins(unit):
            return ('reshard' if self.about['shards_parameters'] else
                    'old' if unit['shard_bytes'] < unit['bytes'] else 'here')
        states = {unit['name']: [begins(unit), 'here'] for unit in self.about['units'][rank]}
        for e in sorted(self.until(rank, t, cat='unit') + self.until(rank, t, cat='collective'),
                        key=lambda e: e['ts']):
            a = e['args']
            if e['cat'] == 'unit':
                states[a['unit']][0] = 'reshard'
            elif a['for'] in states and a['function'] in (
                    'start_unshard', 'start_reduce', 'sum_over_copies', 'sum_partial_gradients'):
                states[a['for']][a['op'] != 'all_gather'] = \
                    'moves' if e['ts'] + e['dur'] > t else 'here'
        return states

    def kept(self, rank, t):
        return {m: n for m, n in self.counter(rank, t, 'activations').items() if n > 0}

    def counter(self, rank, t, name):
        held = {}
        for e in self.until(rank, t, ph='C', name=name):  # each says what changes
            held |= e['args']
        return held


def bytes_in(words):
    """The bytes that "(fsdp, 96 KiB)" speaks of, and by how much they may be rounded."""
    number, unit = re.search(r'([\d.]+(?:e\+\d+)?) (bytes|KiB|MiB|GiB)', words).groups()
    factor = {'bytes': 1, 'KiB': 1 << 10, 'MiB': 1 << 20, 'GiB': 1 << 30}[unit]
    return float(number) * factor


def about(words, value):
    return abs(bytes_in(words) - value) <= 0.006 * value


def computing(part):
    a = part['args']
    verb = {'sum': 'adds to its shard the summed gradient',
            'complete': 'completes the gradient'}.get(a['pass'])
    if verb:
        return f"{verb} of {a['part']}"
    if a['part']:
        return f"computes the {a['pass']} of {a['part']}"
    return {'begin': 'begins the step', 'next batch': 'reads the next batch',
            'optimizer': 'runs the optimizer (norm, clipping, AdamW)',
            'results': 'hands over the loss and the norm'}.get(
                part['name'], 'computes the ' + part['name'])


def wrong_sentence(trace, said, t):
    e = [e for e in trace.told if e['ts'] <= t][-1]
    a, wrong = e['args'], []
    wanted = [f"Rank {e['pid']} "]
    if e['cat'] == 'collective':
        begin, end = e['ts'], e['ts'] + e['dur']
        beside = [(min(end, p['ts'] + p['dur']) - max(begin, p['ts']), -p['ts'], -i, p)
                  for i, p in enumerate(trace.events) if p['pid'] == e['pid']
                  and p.get('cat') == 'part']
        longest = max(beside)
        if longest[0] > 0.0005:  # us, with the noise of doubles
            wanted.append('while it ' + computing(longest[3]))
        elif 'while' in said:
            wrong.append(f'"{said}": nothing is computed meanwhile')
    if e['cat'] == 'part':
        wanted.append(computing(e))
        if a['part'] and a['microbatch'] >= 0:
            wanted.append(f"micro-batch {a['microbatch']}")
    if e['cat'] == 'unit':
        wanted.append(a['unit'])
    if e['cat'] == 'collective':
        wanted.append(f"({a['axis']}, ")
        parcels = [*a['sends'], *a['receives']]
        for parcel in parcels:
            of = f" of micro-batch {parcel['microbatch']}" if parcel['microbatch'] >= 0 else ''
            way = 'to' if 'to' in parcel else 'from'
            wanted.append(f"the {parcel['payload']}{of} {way} rank {parcel[way]} (")
            if said.count(wanted[-1]) > 1:
                wrong.append(f'"{said}" says twice "{wanted[-1]}"')
        if a['op'] != 'exchange':
            wanted.append(f" of {a['for']} (" if a['purpose'] not in ('loss', 'norm') else a['for'])
        elif sum(p['bytes'] for p in a['sends']) != a['bytes']:
            wrong.append(f'{a}: the bytes sent do not add up')
        alike = [p for p in parcels if {**p, 'bytes': 0} == {**parcels[0], 'bytes': 0}]
        sizes = [parcel['bytes'] for parcel in alike]
        if not about(said, sum(sizes) if parcels else a['bytes']):
            wrong.append(f'"{said}": {a["bytes"]} bytes')
    return wrong + [f'"{said}" lacks "{words}"' for words in wanted if words not in said]


READ = '''[...document.querySelectorAll('.device')].map(card => {
  const wide = e => e.getBoundingClientRect().width;
  const label = bar => bar.closest('.row').firstChild.textContent;
  return {
    computes: card.querySelector('.computes').textContent,
    lane: card.querySelector('.lane').textContent,
    units: [...card.querySelectorAll('.unit')].map(bar => ({
      unit: label(bar), weights: bar.dataset.weights, gradient: bar.dataset.gradients,
      says: bar.title, outline: wide(bar), part: wide(bar.querySelector('.part')),
      shard: wide(bar.querySelector('.shard'))})),
    rows: [...card.querySelectorAll('.bytes')].map(bar => ({
      name: label(bar).split(' / ')[0], wide: wide(bar), label: label(bar),
      kept: [...bar.children].map(piece => [piece.textContent, wide(piece)])})),
  };
})'''


def wrong_drawing(trace, cards, t):
    wrong = []
    scale = None  # pixels a byte: the same for every bar of the page

    def to_scale(what, pixels, value):
        nonlocal scale
        if value > 0 and scale is None and pixels > 20:
            scale = pixels / value
        if scale and abs(pixels - value * scale) > 1.5:
            wrong.append(f't {t}: {what} is {pixels} px, not {value * scale}')

    for rank in trace.ranks:
        card, units = cards[rank], trace.units(rank, t)
        part = trace.running(rank, t, 'part')
        if card['computes'] != (part[-1]['name'] if part else 'waits'):
            wrong.append(f"t {t}: rank {rank} draws '{card['computes']}', not {part}")
        moving = trace.running(rank, t, 'collective')
        for e in moving:
            if not (e['args']['op'] == 'exchange' or e['args']['for'] in card['lane']):
                wrong.append(f"t {t}: rank {rank} '{card['lane']}' lacks {e['args']['for']}")
        if bool(moving) != bool(card['lane']):
            wrong.append(f"t {t}: rank {rank} '{card['lane']}' beside {moving}")
        for unit in trace.about['units'][rank]:
            bar = next(bar for bar in card['units'] if bar['unit'] == unit['name'])
            state, gradient = units[unit['name']]
            if (bar['weights'], bar['gradient']) != (state, gradient):
                wrong.append(f't {t}: rank {rank} {unit["name"]}: {bar}, not {state} {gradient}')
            words = {'reshard': ': its shard', 'here': ': whole', 'moves': ': on its way',
                     'old': ': whole, out of date'}[state]
            if words not in bar['says'] or ('out of' in bar['says']) != (state == 'old'):
                wrong.append(f't {t}: rank {rank} {unit["name"]} is {state}: "{bar["says"]}"')
            if ('summed' in bar['says']) != (gradient == 'moves'):
                wrong.append(f't {t}: rank {rank} {unit["name"]}: "{bar["says"]}", {gradient}')
            to_scale(f'rank {rank} {unit["name"]}', bar['outline'], unit['bytes'])
            to_scale(f'the shard of {unit["name"]}', bar['shard'], unit['shard_bytes'])
            to_scale(f'what is here of {unit["name"]}', max(bar['part'], bar['shard']),
                     unit['shard_bytes'] if state == 'reshard' else unit['bytes'])
        memory, kept = trace.memory(rank, t), trace.kept(rank, t)
        for row in card['rows']:
            parts = int((re.search(r' / (\d+)$', row['label']) or [0, 1])[1])
            to_scale(f'rank {rank} {row["label"]}', row['wide'], memory[row['name']] / parts)
            if row['name'] == 'activations':
                if {key for key, _ in row['kept']} != set(kept):
                    wrong.append(f't {t}: rank {rank} keeps {row["kept"]}, not {kept}')
                for key, pixels in row['kept']:
                    to_scale(f'micro-batch {key}', pixels, kept.get(key, 0) / parts)
    return wrong


# At any moment: numbers are seen whole or not at all, and lines between boxes lie on no words, and
# on each other only where they have an end in common.
MESS = '''(() => {
  const wrong = [], box = e => e.getBoundingClientRect(), words = document.createRange();
  const all = selector => [...document.querySelectorAll(selector)];
  for (const piece of all('.bytes i')) {
    words.selectNodeContents(piece);
    if (box(words).right > box(piece).right + 1 && box(words).top < box(piece).bottom - 1)
      wrong.push(`micro-batch ${piece.textContent} is cut off`);
  }
  const lines = all('#travel path:not(.parcel)').map(box).filter(line => line.height < 4);
  const meet = (one, other) => one.left < other.right - 1 && other.left < one.right - 1 &&
    one.top < other.bottom + 1 && other.top < one.bottom + 1;
  for (const line of lines) {
    for (const e of all('.lane, .computes, .row'))
      if (meet(line, box(e))) wrong.push(`a line crosses '${e.className} ${e.textContent}'`);
    if (lines.some(other => meet(line, other) &&
        Math.abs(line.left - other.left) > 1 && Math.abs(line.right - other.right) > 1))
      wrong.push('a line lies on another one');
  }
  return wrong;
})()'''

# In a picture of the timeline, the bars of 0.3 to 1 pixels, and those that are not seen: that
# have the page's colour, or that of a track without a bar.
UNSEEN = '''(async data => {
  const image = new Image(), page = document.getElementById('timeline').getBoundingClientRect();
  image.src = 'data:image/png;base64,' + data;
  await image.decode();
  const canvas = new OffscreenCanvas(image.width, image.height).getContext('2d');
  const empty = ['body', '.track'].map(selector => {
    canvas.fillStyle = getComputedStyle(document.querySelector(selector)).backgroundColor;
    canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data;
  });
  canvas.drawImage(image, 0, 0);
  const is_empty = pixel =>
    empty.some(colour => colour.every((value, i) => Math.abs(value - pixel[i]) < 8));
  let thin = 0, unseen = 0;
  for (const bar of document.querySelectorAll('.track i')) {
    const {left, width, bottom} = bar.getBoundingClientRect();
    if (width < 0.3 || width > 1) continue;
    const x = Math.floor(left - page.left), y = Math.round(bottom - page.top) - 2;
    thin++;
    unseen += [x, x + 1].every(x => is_empty(canvas.getImageData(x, y, 1, 1).data));
  }
  return [thin, unseen];
})'''

PLAY = '[data-key=" "]'


def check_replay(browser, page, name, path):
    trace = Trace(page)
    now = 'document.getElementById("clock").textContent'
    follows = browser.evaluate('document.getElementById("watch").value')
    wanted = 'every rank' if trace.about['stages'] > 1 else next(
        e['args']['name'] for e in trace.events if e['name'] == 'process_name')
    check(f'{name}: follows {wanted}', [] if follows == wanted else [follows])
    said = trace.about['title'] in browser.evaluate(
        '[...document.querySelectorAll("h1")].at(-1).textContent')
    marked = browser.evaluate('document.images.length')
    check(f'{name}: no name is markup', [] if said and not marked else [f'{said}, {marked}'])
    browser.evaluate('document.getElementById("watch").selectedIndex = 0; follow()')

    browser.click(PLAY)
    began = browser.evaluate('performance.now()')
    time.sleep(1)
    live = [browser.evaluate('document.getElementById("sentence").ariaLive')]
    took = browser.evaluate('performance.now()') - began
    browser.click(PLAY)
    live.append(browser.evaluate('document.getElementById("sentence").ariaLive'))
    played = browser.evaluate('t')
    time.sleep(0.3)
    check(f'{name}: plays and pauses',
          [] if 0 < played == browser.evaluate('t') else [f'{played}, {browser.evaluate(now)}'])
    seconds = 30 * played / trace.end
    check(f'{name}: plays a trace in half a minute',
          [] if 0.6 * took < 1000 * seconds < 1.5 * took + 500
          else [f'of {took / 1000} s it played {seconds}'])
    told = browser.evaluate(f'document.getElementById("time").ariaValueText === {now}')
    check(f'{name}: read out is the moment, and sentences only while it does not play',
          [] if live == ['off', 'polite'] and told else [f'{live}, {told}'])
    browser.evaluate('document.getElementById("link").focus(); step(1); step(1)')
    focus = browser.evaluate('document.activeElement.id')
    check(f'{name}: the link keeps the focus', [] if focus == 'link' else [focus])

    wrong = []
    browser.evaluate('document.activeElement.blur()')
    browser.evaluate('show(Infinity)')
    for key, script, value in (
            ('ArrowLeft', 'index', len(trace.told) - 2),
            ('ArrowRight', 'index', len(trace.told) - 1),
            ('ArrowRight', 't', trace.end)):
        browser.press(key)
        if browser.evaluate(script) != value:
            wrong.append(f'{key}: {script} is {browser.evaluate(script)}, not {value}')
    browser.evaluate('show(0, 0)')
    browser.press('ArrowLeft')
    if browser.evaluate('index || t'):
        wrong.append('ArrowLeft leads away from the beginning')
    for key in 'f', 'b', 'o':
        browser.press(key, key)
        wanted = {'f': 'forward', 'b': 'backward', 'o': 'optimizer'}[key]
        is_pass = browser.evaluate('moments[index].args.pass')
        if is_pass != wanted:
            wrong.append(f'{key}: jumps to {is_pass}')
    browser.evaluate('show(0)')
    browser.press(' ', ' ')
    time.sleep(0.3)
    browser.press(' ', ' ')
    if not browser.evaluate('t > 0 && !playing'):
        wrong.append('space does not play')
    check(f'{name}: keys', wrong)

    moments = random.Random(name)
    times = [moments.uniform(0, trace.end) for _ in range(10)]
    times += [e['ts'] for e in moments.sample(trace.told, 10)]
    said, drawn, mess = [], [], []
    for t in times:
        browser.evaluate(f'show({t!r})')
        said += wrong_sentence(
            trace, browser.evaluate('document.getElementById("sentence").textContent'), t)
        drawn += wrong_drawing(trace, browser.evaluate(READ), t)
        mess += [f't {t}: {what}' for what in browser.evaluate(MESS)]
    check(f'{name}: the sentence is what the trace says', said, f'{len(times)} moments')
    check(f'{name}: the drawing is what the trace says, to scale', drawn, f'{len(times)} moments')
    check(f'{name}: nothing lies on words, and no number is cut off', mess)

    browser.evaluate('show(0)')
    box = browser.evaluate('(({x, y, width, height}) => ({x, y: y + scrollY, width, height}))'
                           '(document.getElementById("timeline").getBoundingClientRect())')
    thin, unseen = browser.evaluate(f'{UNSEEN}({browser.picture(box)!r})')
    check(f'{name}: thin bars are seen', [f'{unseen} of {thin} are not'] if unseen else [], thin)

    grey = browser.evaluate('document.querySelectorAll(".track .communication").length')
    numbers = sum(e.get('cat') == 'collective' and e['args']['purpose'] in ('loss', 'norm')
                  for e in trace.events)
    check(f'{name}: only sums of loss or norm are grey',
          [] if grey == numbers else [f'{grey} grey bars, {numbers} sums of loss or norm'])

    wrong = []
    names = {e['args']['function'] for e in trace.events
             if e.get('cat') in ('part', 'collective', 'unit') and 'function' in e['args']}
    places = browser.evaluate('functions')
    for function in names:
        place, address = places.get(function, (':1', ''))
        file, _, line = place.partition(':')
        if not file or function + '(' not in open(file).read().splitlines()[int(line) - 1] or (
                not os.path.exists(os.path.join(os.path.dirname(path), address.split('#')[0]))):
            wrong.append(f'{function} is not at {places.get(function)}')
    check(f'{name}: functions are where their links lead', wrong, ', '.join(sorted(names)))

    browser.media(prefers_reduced_motion='reduce')
    browser.evaluate('show(0)')
    before = browser.evaluate('index')
    browser.click(PLAY)
    time.sleep(1.5)
    browser.click(PLAY)
    check(f'{name}: with reduced motion it goes from event to event',
          [] if browser.evaluate(f'index > {before} && t === moments[index].ts')
          else [browser.evaluate(now)])
    colours = '''[...document.querySelectorAll('.shard, .key, .track i')].map(e =>
        getComputedStyle(e).color + getComputedStyle(e).backgroundColor).join()'''
    browser.media()
    wanted = browser.evaluate(colours)
    browser.media(forced_colors='active')
    check(f'{name}: forced colours leave what stands for something',
          [] if browser.evaluate(colours) == wanted else ['they change it'])
    browser.media()


def check_run(browser, name):
    wrong = browser.evaluate('''(() => {
      const [curve] = document.querySelectorAll('#loss polyline');
      const points = curve.getAttribute('points').split(' '), box = e => e.getBoundingClientRect();
      const short = box(curve.parentElement).right - box(curve).right;
      return [points.length < 2 && 'the curve is a point, which is not drawn',
        new Set(points).size > 1 && short > 9 && `the curve ends ${short} px before the edge`,
        !document.title.startsWith('A run') && document.title].filter(x => x);
    })()''')
    check(f'{name}: the loss is drawn from edge to edge, the title says that it is a run', wrong)


def check_menu(browser, name):
    wrong = []
    for leave, what in (lambda: browser.press('Escape'), 'Escape'), (
            lambda: browser.evaluate('document.querySelector("#pane summary").focus()'),
            'the focus elsewhere'):
        browser.evaluate('document.querySelector("header details").open = true;'
                         'document.querySelector("header nav a").focus({preventScroll: true})')
        leave()
        if browser.evaluate('document.querySelector("header [open]")?.tagName'):
            wrong.append(f'{what} leaves it open')
        if what == 'Escape' and browser.evaluate('document.activeElement.tagName') != 'SUMMARY':
            wrong.append('Escape loses the focus')
    check(f'{name}: a menu closes', wrong)


OVERFLOW = '''[...document.querySelectorAll('body *')].filter(e => {
  const box = e.getBoundingClientRect();
  let inside = e.parentElement;
  while (inside && getComputedStyle(inside).overflowX === 'visible') inside = inside.parentElement;
  return (!inside || inside === document.documentElement) && box.right > innerWidth + 1;
}).slice(0, 3).map(e => e.tagName + ' ' + e.className + ' ' + e.textContent.slice(0, 30))'''


def check_page(browser, path, screenshots):
    name = os.path.basename(path).removesuffix('.html')
    with open(path) as file:
        page = file.read()
    browser.errors.clear()
    browser.size(1440)
    browser.open(path)
    is_replay = 'id="trace"' in page
    if is_replay:
        check_replay(browser, page, name, path)
        browser.evaluate('show(trace.end * 0.6)')
    if 'id="metrics"' in page:
        check_run(browser, name)
    if 'class="book"' in page:
        check_menu(browser, name)
    wrong, papers = [], set()
    for width in 320, 768, 1440:
        browser.size(width)
        for scheme in 'light', 'dark':
            browser.media(prefers_color_scheme=scheme)
            papers.add(browser.evaluate('getComputedStyle(document.body).backgroundColor'))
            if browser.evaluate('document.documentElement.scrollWidth') > width:
                wrong += [f'at {width}: {e}' for e in browser.evaluate(OVERFLOW)] or [f'at {width}']
            browser.screenshot(f'{screenshots}/{name}-{width}-{scheme}.png')
    if len(papers) != 2:
        wrong.append(f'light and dark have the same paper: {papers}')
    check(f'{name}: no overflow at 320, 768, 1440, light and dark', wrong)
    browser.media('print')
    wrong = browser.evaluate("""[...document.querySelectorAll('.book > header, #pane, button')]
        .filter(e => e.getClientRects().length).map(e => `${e.tagName} is on paper`)""")
    if is_replay and not browser.evaluate('document.getElementById("clock").offsetHeight'):
        wrong.append('the moment is not on paper')
    data = base64.b64decode(browser.call('Page.printToPDF', printBackground=True)['data'])
    browser.media()
    with open(f'{screenshots}/{name}.pdf', 'wb') as file:
        file.write(data)
    if not data.startswith(b'%PDF') or len(data) <= 5000:
        wrong.append('no PDF')
    check(f'{name}: prints, without what is to be clicked', wrong, f'{len(data)} bytes')
    check(f'{name}: no error of a script', browser.errors[:])


def main():
    screenshots, *pages = sys.argv[1:]
    program = shutil.which('chromium') or shutil.which('google-chrome')
    if not program:
        print('SKIP check-pages: there is no chromium (apt-get install chromium)')
        return 0
    os.makedirs(screenshots, exist_ok=True)
    browser = Browser(program)
    try:
        for page in pages:
            check_page(browser, page, screenshots)
    finally:
        browser.process.terminate()
        browser.process.wait()
    print(f'{passed} passed, {failed} failed')
    return failed > 0


sys.exit(main())
