// replay.js: plays a step of training, all ranks at once, from the trace that --trace writes.
// idea      A trace is a list of events: a part of the model is computed, a collective runs, a unit
//           is resharded, so many bytes are held. state(t) goes through them and says what
//           each rank holds and does at the moment t, and show(t) draws that. Nothing is kept from
//           one moment to the next, so going back is as easy as going forward.
// sections  the trace, the state, words, the drawing, controls
// not here  the operations inside of a part: Perfetto shows them, in the same trace
// test      tests/check_pages.py: opens the page in Chromium, and compares it with the trace
'use strict';

// ---- the trace: by rank, its events in the order of time; of all ranks, the moments that one can
// step to, and the end

const by_id = id => document.getElementById(id);
// No name of a trace is markup.
const read = id => JSON.parse(by_id(id).textContent, (name, x) =>
  /[<"&]/.test(name) ? undefined :
  typeof x === 'string' ? x.replace(/[<"&]/g, sign => `&#${sign.charCodeAt()};`) : x);
const {threefold, traceEvents} = read('trace');
// each one's place and a link to it: they never become markup
const functions = JSON.parse(by_id('functions').textContent);
const trace = {...threefold, ranks: threefold.units.map(() => []), end: 0};
const names = [];  // of the ranks: "rank 3, pp 1, tp 1"
const most = {};  // that a rank ever has of each category of memory
for (const e of traceEvents.sort((a, b) => a.ts - b.ts)) {
  trace.ranks[e.pid].push(e);
  trace.end = Math.max(trace.end, e.ts + e.dur);
  if (e.name === 'process_name') names[e.pid] = e.args.name;
  if (e.name === 'memory')
    for (const name in e.args) most[name] = Math.max(most[name] ?? 0, e.args[name]);
}

// ---- the state

// What a collective carries: parts of units, unless it is tp's or between neighbours.
const carries = a => /loss|norm/.test(a.purpose) ? 'communication' :
  a.purpose === 'partial gradients' ? 'gradients' :
  a.axis === 'tp' || a.op === 'exchange' ? 'activations' :
  a.op === 'all_gather' ? 'weights' : 'gradients';

// Of each rank at the moment t: the events that last, the latest first, which are the part that it
// computes and the collectives that it is in; where each unit's weights and gradients are; its
// bytes by category, and of activations by micro-batch.
function state(t) {
  return trace.ranks.map((events, rank) => {
    const now = {part: [], collective: [], units: {}, memory: {}, activations: {}};
    // A whole unit that is not freed is old, but for the rank's own shard, until it is gathered.
    for (const {name, bytes, shard_bytes} of trace.units[rank]) {
      const begins = trace.shards_parameters ? 'reshard' : shard_bytes < bytes ? 'old' : 'here';
      now.units[name] = {weights: begins, gradients: 'here'};
    }
    for (const e of events) {
      if (e.ts > t) break;
      const a = e.args, lasts = t < e.ts + e.dur;
      if (lasts) now[e.cat]?.unshift(e);
      if (e.ph === 'C') Object.assign(now[e.name], a);
      if (e.cat === 'unit') now.units[a.unit].weights = 'reshard';
      if (e.cat === 'collective' && now.units[a.for])
        now.units[a.for][carries(a)] = lasts ? 'moves' : 'here';
    }
    return now;
  });
}

// ---- words

// 98304 is "96 KiB".
function size(bytes) {
  let k = 0;
  for (; bytes >= 1024 && k < 3; k++) bytes /= 1024;
  return +bytes.toPrecision(3) + [' bytes', ' KiB', ' MiB', ' GiB'][k];
}

const duration = us =>
  us >= 1e6 ? +(us / 1e6).toPrecision(3) + ' s' : +(us / 1e3).toPrecision(3) + ' ms';

const kVerbs = {
  all_gather: 'gathers', reduce_scatter: 'sums and scatters', all_reduce: 'sums',
  begin: 'begins the step',
  optimizer: 'runs the optimizer (norm, clipping, AdamW)', 'next batch': 'reads the next batch',
  sum: 'adds to its shard the summed gradient', complete: 'completes the gradient',
  results: 'hands over the loss and the norm',
};

const of = ({microbatch: m}) => m >= 0 ? ` of micro-batch ${m}` : '';

// What a rank does in a part: "computes the backward of block 2".
const computing = ({args: a}) =>
  (kVerbs[a.pass] ?? `computes the ${a.pass}`) + (a.part && ` of ${a.part}`);

// What a rank does in a collective: "gathers weights of block 3 (fsdp, 96 KiB)". Parcels that have
// the same words are said together.
function travelling({args: a}) {
  const bytes = {};  // by what is said of them
  const add = (words, more) => bytes[words] = (bytes[words] ?? 0) + more;
  const move = (verb, way) => parcel =>
    add(`${verb} the ${parcel.payload}${of(parcel)} ${way} rank ${parcel[way]}`, parcel.bytes);
  if (a.op !== 'exchange')
    add(`${kVerbs[a.op]} ${carries(a)} of ${a.for}`.replace('communication of ', ''), a.bytes);
  a.sends.forEach(move('sends', 'to'));
  a.receives.forEach(move('receives', 'from'));
  return Object.keys(bytes).map(words => `${words} (${a.axis}, ${size(bytes[words])})`)
    .join(' and ');
}

// What happens at an event, and while what is computed: the part that it has most time in common
// with, above the noise of doubles (half a nanosecond).
function sentence(e) {
  const a = e.args;
  const common = other => Math.min(other.ts + other.dur, e.ts + e.dur) - Math.max(other.ts, e.ts);
  const [part] = trace.ranks[e.pid].filter(other => other.cat === 'part' && common(other) > .0005)
    .sort((one, other) => common(other) - common(one));
  const what = e.cat === 'part' ? computing(e) + of(a) :
    e.cat === 'unit' ? `reshards ${a.unit}` :
    travelling(e) + (part ? ` while it ${computing(part)}` : '');
  return `Rank ${e.pid} ${what}` +
    (a.waited_us > 0 ? `, ${duration(a.waited_us)} of it waiting for others.` : '.');
}

// who computes a part, or reshards
const kFunctions = {
  forward: 'Gpt::run', backward: 'Tape::backward', 'weight gradient': 'Tape::backward',
  optimizer: 'Optimizer::step', reshard: 'Fsdp::reshard', sum: 'Fsdp::finish_reduce',
  complete: 'Fsdp::start_reduce', begin: 'Trainer::gradients',
  results: 'Trainer::results', 'next batch': 'Trainer::read',
  'tied gradient': 'Pipeline::sum_tied',
};

// ---- the drawing

// One scale for all bars of all ranks: the bytes that fill the width. What needs more than that, as
// activations may, is drawn at a half, a quarter, ... of the scale. What is thinner than a fiftieth
// has no row. Parameters are drawn as units.
const scale = Math.max(
  most.gradients, most.optimizer, ...trace.units.flat().map(unit => unit.bytes));
const width = bytes => `width: ${100 * bytes / scale}%`;
const categories = Object.keys(most).filter(
  name => name !== 'parameters' && most[name] > scale / 50);
const parts = name => 2 ** Math.max(0, Math.ceil(Math.log2(most[name] / scale)));

// An element of HTML: tag('b class="key"', 'words'). What is in it may be lists of elements.
const tag = (opening, ...inside) =>
  `<${opening}>${inside.flat().join('')}</${opening.split(' ')[0]}>`;

const kStates = {reshard: 'its shard', here: 'whole', old: 'whole, out of date but for the shard',
  moves: 'on its way'};

// A rank: what it computes, which collectives it is in, and its bars of memory.
function draw_rank({part: [part], collective, units, memory, activations}, rank) {
  const row = (name, bar) => tag('div class="row"', tag(`span title="${name}"`, name), bar);
  const lane = collective.map(
    e => travelling(e) + (t < e.ts + e.args.waited_us ? ', waits' : ''));
  const weights = trace.units[rank].map(({name, bytes, shard_bytes}) => row(name, tag(
    `div class="unit weights" style="${width(bytes)}" role="img"
      title="${size(bytes)}: ${kStates[units[name].weights]}${
        units[name].gradients === 'moves' ? ', its gradient is being summed' : ''}"
      data-weights="${units[name].weights}" data-gradients="${units[name].gradients}"`,
    tag('i class="part"'), tag(`i class="shard" style="width: ${100 * shard_bytes / bytes}%"`))));
  const pieces = Object.entries(activations).filter(([, bytes]) => bytes > 0).map(
    ([microbatch, bytes]) =>
      tag(`i style="width: ${100 * bytes / memory.activations}%"`, microbatch));
  const others = categories.map(name => row(
    parts(name) > 1 ? `${name} / ${parts(name)}` : name,
    tag(`div class="bytes ${name}" style="${width(memory[name] / parts(name))}" role="img"
      title="${size(memory[name])}"`,
      name === 'activations' ? pieces : '')));
  return tag('section class="device"', tag('h2', names[rank]),
    tag(`div class="computes ${part?.args.pass ?? 'waits'}"`, part?.name ?? 'waits'),
    tag('div class="lane"', lane.join('; ')), weights, others,
    tag('small', size(Object.values(memory).reduce((all, one) => all + one)), ' in all'));
}

// Between two ranks, a line; on it, what travels: it waits at its end until every rank is there.
// Lines that pass other ranks are shifted, those of a group like each other and unlike the next's.
function draw_travel({collective}, rank) {
  const boxes = by_id('ranks').children;
  return collective.flatMap(({ts, dur, args: a}) => {
    const at = a.ranks.indexOf(rank), {offsetLeft: x, offsetTop: y} = boxes[rank];
    const others = a.op === 'exchange' ? a.sends.map(parcel => parcel.to) :
      a.ranks.filter((other, i) => Math.abs(i - at) === 1);
    const way = Math.max(0, (t - ts - a.waited_us) / (dur - a.waited_us));
    return others.map(other => {
      const shift = Math.abs(other - rank) > 1 ? 3 + 3 * (Math.min(...a.ranks) % 8) : 0;
      const end = boxes[other];
      const path = `path transform="translate(${shift} ${shift})"
        d="M${x} ${y}H${end.offsetLeft}V${end.offsetTop}"`;
      return tag(path) +
        tag(`${path} class="parcel ${carries(a)}" pathLength="100"
          stroke-dashoffset="${-96 * way}"`);
    });
  });
}

// Two rows a rank: what it computes, and under it what travels. A bar says of what: in a pipeline,
// the micro-batch.
function draw_timeline(events, rank) {
  const bar = ({name, ts, dur, args: a}) => tag(
    `i class="${a.pass ?? 'moves ' + carries(a)}" title="${name}, ${duration(dur)}"
      style="left: ${100 * ts / trace.end}%; width: ${100 * dur / trace.end}%;
      --waits: ${100 * a.waited_us / dur}%"`,
    '<wbr>', trace.stages > 1 ? a.microbatch < 0 ? '' : a.microbatch : a.part || a.for || name);
  const row = category =>
    tag('div class="track"', events.filter(e => e.cat === category).map(bar));
  return tag('div class="rank" aria-hidden="true"', tag('b', rank), row('part'), row('collective'));
}

// ---- controls

let t = 0, moments, index, playing = false, timer, said;
const still = matchMedia('(prefers-reduced-motion: reduce)');  // then nothing glides

// which: the event to speak of, where several happen at the same time.
function show(time, which) {
  t = Math.min(Math.max(time, 0), trace.end);
  index = which ?? Math.max(0, moments.findLastIndex(e => e.ts <= t));
  const now = state(t), e = moments[index];
  const name = e.args.function ?? kFunctions[e.args.pass ?? e.name];
  const [place, address] = functions[name] ?? [];
  by_id('ranks').innerHTML =
    now.map(draw_rank).join('') + tag('svg id="travel" aria-hidden="true"');
  by_id('travel').innerHTML = now.flatMap(draw_travel).join('');
  by_id('clock').textContent = `${duration(t)} of ${duration(trace.end)}`;
  by_id('timeline').style.setProperty('--at', t / trace.end);
  by_id('time').value = t;
  by_id('time').ariaValueText = by_id('clock').textContent;
  // the same sentence is not read out again, and the link stays, as it may have the focus
  const words = sentence(e);
  if (words !== said) by_id('sentence').innerHTML = said = words;
  by_id('link').hidden = !place;
  by_id('link').href = address;
  by_id('link').textContent = `${name}, ${place}`;
}

// Steps go through the events of the chosen rank, or of all.
function follow() {
  const rank = by_id('watch').selectedIndex - 1;
  moments = traceEvents.filter(e =>
    ['part', 'collective', 'unit'].includes(e.cat) && (rank < 0 || e.pid === rank));
  show(t);
}

function step(by) {
  play(false);
  const next = moments[index + by];
  if (next) show(next.ts, index + by);
  else if (by > 0) show(trace.end);
  else show(0, 0);
}

function jump(pass) {
  const found = [...moments.slice(index + 1), ...moments].find(e => e.args.pass === pass);
  if (found) show(found.ts, moments.indexOf(found));
}

function play(on = !playing) {
  playing = on;
  document.querySelector('[data-key=" "]').textContent = on ? 'pause' : 'play';
  by_id('sentence').ariaLive = on ? 'off' : 'polite';  // whether a change is read out
  clearTimeout(timer);
  if (on && t >= trace.end) show(0);
  if (on) tick(performance.now());
}

// At speed 1, a trace takes half a minute, however long a picture takes.
function tick(before) {
  const speed = by_id('speed').value, now = performance.now();
  show(still.matches ? moments[index + 1]?.ts ?? trace.end :
    t + speed * trace.end * (now - before) / 30e3);
  if (t >= trace.end) play(false);
  else timer = setTimeout(tick, still.matches ? 1000 / speed : 20, now);
}

// by key: the button's words, and what it does
const kControls = {
  ArrowLeft: ['‹ event', () => step(-1)],
  ' ': ['play', () => play()],
  ArrowRight: ['event ›', () => step(1)],
  f: ['next forward', () => jump('forward')],
  b: ['next backward', () => jump('backward')],
  o: ['next optimizer', () => jump('optimizer')],
};

addEventListener('keydown', e => {
  const control = kControls[e.key], at = e.target.tagName;
  if (!control || e.ctrlKey || e.metaKey || e.altKey || e.shiftKey ||
      at === 'SELECT' || at === 'PRE') return;
  if (e.key === ' ' && at === 'BUTTON') return;  // which it presses
  e.preventDefault();
  control[1]();
});
addEventListener('resize', () => show(t, index));

// ---- the page

const kRebuilt = 'The clock is rebuilt: ranks may share processors and take turns. The times ' +
  'were put together from the processor time of each computation and from what waits for what.';
const kLegend = 'A box is a rank. Its bars are bytes, all on one scale; "/ 4" is drawn at a ' +
  'quarter. An outline is a whole unit, what is filled is here: dark the shard of the rank, ' +
  'light what it gathered (with ZeRO-3 into a buffer that has the shard once more), striped what ' +
  'is on its way, pale what is out of date; an orange line: its gradient is being summed. ' +
  'Numbers in activations, and those of a pipeline in the timeline, are micro-batches. A line ' +
  'between boxes is a whole collective, whatever its algorithm. In the timeline, what travels is ' +
  'pale while it waits for the last rank. The full width of a bar is ';
document.title = `Replay: ${trace.title}`;
const kKeys = ['weights', 'gradients', 'optimizer', 'activations', 'forward', 'backward',
  'weight gradient', 'other', 'communication'];
const draw_key = (colour, words) => tag(`b class="key ${colour}"`, '■') + ` ${words} `;
document.body.insertAdjacentHTML('beforeend', [
  tag('h1', document.title),
  tag('footer', trace.clock === 'rebuilt' ? kRebuilt : ''),
  tag('nav aria-label="replay"',
    Object.entries(kControls).map(([key, [says]]) =>
      tag(`button data-key="${key}" onclick="kControls[dataset.key][1]()"
        title="${key.replace(' ', 'space')}"`, says)),
    tag('label', 'speed ',
      tag('select id="speed"', '<option>0.25<option selected>1<option>4')),
    tag('label', 'follow ', tag('select id="watch" onchange="follow()"',
      ['every rank', ...names].map(name => tag('option', name))))),
  tag('p id="says"', tag('small id="clock"'), ' ', tag('span id="sentence" aria-live="polite"'),
    ' ', tag('a id="link"')),
  tag('div id="ranks"'),
  tag('p', kKeys.map(name => draw_key(name, name))),
  `<input id="time" type="range" max="${trace.end}" step="any" aria-label="time"
    oninput="show(value)">`,
  tag('div id="timeline"', trace.ranks.map(draw_timeline)),
  tag('footer', kLegend, size(scale), '.'),
].join(''));
by_id('watch').selectedIndex = trace.stages > 1 ? 0 : 1;  // else all ranks do the same
follow();
