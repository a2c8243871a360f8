// replay.js: plays a step of training, all ranks at once, from the trace that --trace writes.
// idea      A trace is a list of events: a part of the model is computed, a collective runs, a unit
//           is unsharded or freed, so many bytes are held. state(trace, t) goes through them and
//           says what each rank holds and does at the moment t. It keeps nothing from one moment to
//           the next, so going back is as easy as going forward.
// sections  the trace, the state, words, the page made once, the page at a moment, controls
// not here  the operations inside of a part: Perfetto shows them, in the same trace
// test      tests/check_pages.py: opens the page in Chromium, and compares it with the trace
'use strict';

// ---- the trace, by rank

// Adds devices: each a rank, its place on the axes of the mesh, and its events in the order of
// time; moments: those events of all ranks that one can step to; and where the trace ends.
function read(json) {
  const trace = {...json.threefold, devices: [], moments: [], end: 0};
  for (const e of json.traceEvents) {
    const device = trace.devices[e.pid] ??= {rank: e.pid, place: {}, events: []};
    if (e.name === 'process_name')
      for (const [, axis, at] of e.args.name.matchAll(/(\w+) (\d+)/g)) device.place[axis] = +at;
    if (e.ts === undefined) continue;
    device.events.push(e);
    if (['part', 'collective', 'unit', 'live'].includes(e.cat)) trace.moments.push(e);
    trace.end = Math.max(trace.end, e.ts + (e.dur ?? 0));
  }
  const by_time = (a, b) => a.ts - b.ts;  // sorting keeps the file's order of equal times
  for (const device of trace.devices) device.events.sort(by_time);
  trace.moments.sort(by_time);
  return trace;
}

// ---- the state

const sum = bytes => Object.values(bytes).reduce((all, one) => all + one, 0);
const kReducing = {reduce: true, reduced: false};

// Of each rank at the moment t: the part that it computes, the collectives that it is in, what it
// has of each unit, its bytes by category, and what it keeps for the backward of each micro-batch.
function state(trace, t) {
  // A whole unit that is not freed is old, but for the rank's own shard, until it is gathered anew.
  const reshard = trace.shards_parameters ? 'shard' : 'old';
  const weights = {unshard: 'gathering', arrived: 'whole', reshard};
  return trace.devices.map(({rank, events}) => {
    const now = {
      part: null, collectives: [], units: {}, memory: trace.held[rank], kept: {}, frees: ''};
    const key = ({microbatch, chunk}) => `${microbatch}.${chunk}`;  // chunk of a stage
    for (const {unit} of trace.units[rank]) now.units[unit] = {weights: reshard, reducing: false};
    for (const e of events) {
      if (e.ts > t) break;
      const a = e.args, runs = t < e.ts + e.dur;
      if (e.ph === 'C') now.memory = a;
      else if (e.cat === 'part') {
        if (runs) now.part = e;
        if (a.pass !== 'forward') now.frees = key(a);
      }
      else if (e.cat === 'collective' && runs) now.collectives.push(e);
      else if (e.cat === 'unit') {
        const unit = now.units[a.unit];
        unit.weights = weights[e.name] ?? unit.weights;
        unit.reducing = kReducing[e.name] ?? unit.reducing;
      } else if (e.cat === 'live') {
        now.kept[key(a)] = (now.kept[key(a)] ?? 0) + (e.name === 'keeps' ? a.bytes : -a.bytes);
      }
    }
    // a backward frees piece by piece what it then says to be free
    const freed = sum(now.kept) - now.memory.activations;
    if (freed > 0 && now.kept[now.frees] > 0) now.kept[now.frees] -= freed;
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

const milliseconds = us => (us / 1000).toPrecision(3) + ' ms';

const kVerbs = {
  all_gather: 'gathers', reduce_scatter: 'sums and scatters', all_reduce: 'sums',
  broadcast: 'broadcasts', unshard: 'unshards', arrived: 'has unsharded',
  reshard: 'reshards', reduce: 'has the gradient of',
  reduced: 'has its shard of the summed gradient of',
  keeps: 'keeps', frees: 'frees',
  begin: 'begins the step', optimizer: 'updates its weights', 'next batch': 'reads the next batch',
};

// What a rank does in a part: "computes the backward of block 2".
const computing = ({name, args: a}) => kVerbs[name] ?? (a.pass === 'sum' ?
  `adds the summed gradient of ${a.part} to its shard` :
  `computes the ${a.part ? `${a.pass} of ${a.part}` : name}`);

const of = ({microbatch: m}) => m >= 0 ? ` of micro-batch ${m}` : '';

// What a rank does in a collective: "gathers block 3 (fsdp, 96 KiB)".
function travel({args: a}) {
  const cost = bytes => ` (${a.axis}, ${size(bytes)})`;
  const parcel = (verb, p, way) =>
    `${verb} the ${p.payload}${of(p)} ${way} rank ${p[way]}` + cost(p.bytes);
  if (a.op !== 'exchange') return `${kVerbs[a.op]} ${a.for}` + cost(a.bytes);
  return [...a.sends.map(p => parcel('sends', p, 'to')),
    ...a.receives.map(p => parcel('receives', p, 'from'))].join(' and ');
}

// What happens at an event, and during what.
function sentence(trace, e) {
  const a = e.args, part = state(trace, e.ts)[e.pid].part;
  const what = {
    part: () => computing(e) + (a.part ? of(a).replace(' of', ',') : ''),
    collective: () => travel(e),
    unit: () => `${kVerbs[e.name]} ${a.name}`,
    live: () => `${kVerbs[e.name]} ${size(a.bytes)}${of(a)}` +
      (e.name === 'keeps' ? ' for the backward' : ''),
  }[e.cat]();
  return `Rank ${e.pid} ${what}` + (part && part !== e ? ` while it ${computing(part)}` : '') +
    (a.waited_us > 0 ? `, after ${milliseconds(a.waited_us)} of waiting for the last rank.` : '.');
}

// ---- the page, made once

const by_id = id => document.getElementById(id);

function make(tag, parent, name = '', text = '') {
  const element = parent.appendChild(document.createElement(tag));
  element.className = name;
  element.textContent = text;
  return element;
}

// who computes a part
const kFunctions = {
  forward: 'Gpt::run', backward: 'Tape::backward', 'weight gradient': 'Tape::backward',
  optimizer: 'Optimizer::step', sum: 'Fsdp::finish_reduce', begin: 'Trainer::gradients',
  'next batch': 'Trainer::read', 'tied gradient': 'Pipeline::sum_tied',
};

const trace = read(JSON.parse(by_id('trace').textContent));
const functions = JSON.parse(by_id('functions').textContent);  // where each stands: "fsdp.cpp:120"

// The axes take turns, the fastest first: its ranks stand side by side, the next one's below each
// other, the next one's side by side. Returns the number of columns.
function arrange() {
  const counts = [1, 1];
  const axes = Object.keys(trace.devices[0].place).filter(axis => trace.layout[axis] > 1);
  for (const device of trace.devices) device.at = [1, 1];
  axes.reverse().forEach((axis, i) => {
    for (const device of trace.devices) device.at[i % 2] += counts[i % 2] * device.place[axis];
    counts[i % 2] *= trace.layout[axis];
  });
  return counts[0];
}

// The most that a rank ever has of each category of memory; of parameters, in one unit.
function most_bytes() {
  const most = {...trace.held[0]};
  for (const {rank, events} of trace.devices)
    for (const held of [trace.held[rank], ...events.filter(e => e.ph === 'C').map(e => e.args)])
      for (const name in held) most[name] = Math.max(most[name], held[name]);
  most.parameters = Math.max(...Object.values(trace.units).flat().map(unit => unit.bytes));
  return most;
}

// One scale for all bars of all ranks: the bytes that fill the width. What needs more than that, as
// activations may, is drawn at a half, a quarter, ... of the scale. What is thinner than a fiftieth
// has no row. Parameters are drawn as units.
const most = most_bytes(), scale = Math.max(most.parameters, most.gradients, most.optimizer);
const width = bytes => 100 * bytes / scale + '%';
const categories = Object.keys(most).filter(
  name => name !== 'parameters' && most[name] > scale / 50);
const parts = name => 2 ** Math.max(0, Math.ceil(Math.log2(most[name] / scale)));

const kKey = ['weights', 'gradients', 'optimizer', 'activations', 'forward', 'backward',
  'weight gradient', 'other', 'communication'];
const kind = e => e.cat === 'collective' ? 'communication' :
  kKey.includes(e.args.pass) ? e.args.pass.replace(' ', '-') : 'other';

function make_device(device) {
  const card = make('section', by_id('devices'), 'device');
  card.style.gridArea = `${device.at[1]} / ${device.at[0]}`;
  const row = (name, kind) => {
    const line = make('div', card, 'row');
    make('span', line, '', name).title = name;
    return make('div', make('div', line, 'room'), kind);
  };
  const place = Object.keys(device.place).filter(axis => trace.layout[axis] > 1);
  make('h2', card, '', `rank ${device.rank}`);
  make('small', card, '', place.map(axis => `${axis} ${device.place[axis]}`).join(', '));
  device.computes = make('p', card, 'computes');
  device.lane = make('p', card, 'lane');
  device.port = make('i', card, 'port');
  device.units = trace.units[device.rank].map(unit => {
    const bar = row(unit.name, 'unit');
    bar.style.width = width(unit.bytes);
    bar.dataset.unit = unit.unit;
    make('i', bar, 'part').style.width = '100%';
    make('i', bar, 'shard').style.width = 100 * unit.shard_bytes / unit.bytes + '%';
    return bar;
  });
  device.rows = categories.map(name => {
    const bar = row(parts(name) > 1 ? `${name} / ${parts(name)}` : name, 'bytes ' + name);
    bar.dataset.category = name;
    return bar;
  });
  device.total = make('p', card, 'total');
}

// Two rows a rank: what it computes, and under it what travels. A bar says of what: in a pipeline,
// the micro-batch.
function make_timeline(device) {
  const line = make('div', by_id('timeline'), 'rank');
  make('b', line, '', device.rank);
  const room = line.clientWidth / 6;  // letters
  const rows = {part: make('div', line, 'track'), collective: make('div', line, 'track')};
  for (const e of device.events.filter(e => rows[e.cat])) {
    const a = e.args, share = e.dur / trace.end;
    const of = trace.layout.pp > 1 ? a.microbatch ?? '' : a.part || a.for || e.name;
    const bar = make('i', rows[e.cat], kind(e), `${of}`.length < room * share ? of : '');
    bar.title = `${e.name}, ${milliseconds(e.dur)}`;
    bar.style.left = 100 * e.ts / trace.end + '%';
    bar.style.width = 100 * share + '%';
    bar.style.setProperty('--waits', 100 * (a.waited_us ?? 0) / e.dur + '%');
  }
}

// ---- the page at a moment

let t = 0, moments = trace.moments, index = 0, playing = false;

// index: of the event to speak of, where several happen at the same time.
function show(time, which = moments.findLastIndex(e => e.ts <= time)) {
  t = Math.min(Math.max(time, 0), trace.end);
  index = Math.max(which, 0);
  const now = state(trace, t), e = moments[index];
  trace.devices.forEach((device, rank) => show_device(device, now[rank]));
  show_travel(now);
  say(e);
  by_id('clock').textContent = `${milliseconds(t)} of ${milliseconds(trace.end)}`;
  const timeline = by_id('timeline');
  timeline.style.setProperty('--at', t / trace.end);
  timeline.setAttribute('aria-valuenow', Math.round(100 * t / trace.end));
  timeline.setAttribute('aria-valuetext', by_id('clock').textContent);
}

function say(e) {
  const text = sentence(trace, e), name = e.args.function ?? kFunctions[e.args.pass];
  const place = functions[name];
  if (by_id('sentence').textContent !== text) by_id('sentence').textContent = text;
  const link = by_id('function');
  link.textContent = place ? `${name}, ${place}` : '';
  // the browser scrolls to the text, and marks it, if it can
  if (place) link.href = document.body.dataset.sources + place.split(':')[0] +
    '#:~:text=' + encodeURIComponent(name);
}

function show_device(device, now) {
  device.computes.textContent = now.part ? now.part.name : 'waits';
  device.computes.className = `computes ${now.part ? kind(now.part) : 'waits'}`;
  device.lane.textContent = now.collectives.map(
    e => travel(e) + (t < e.ts + e.args.waited_us ? ', waits' : '')).join('; ');
  for (const bar of device.units) {
    const unit = now.units[bar.dataset.unit];
    bar.dataset.weights = unit.weights;
    bar.dataset.reducing = unit.reducing;
  }
  for (const bar of device.rows) {
    const name = bar.dataset.category, kept = name === 'activations' ? now.kept : {};
    bar.style.width = width(now.memory[name] / parts(name));
    bar.dataset.bytes = now.memory[name];
    bar.replaceChildren();
    for (const key in kept) {
      if (kept[key] <= 0) continue;
      const piece = make('i', bar, '', key.split('.')[0]);
      piece.style.width = 100 * kept[key] / now.memory[name] + '%';
      piece.dataset.kept = key;
    }
  }
  device.total.textContent = size(sum(now.memory)) + ' in all' +
    (trace.memory_limit ? ` of ${size(trace.memory_limit)}` : '');
}

// Between two ranks, a line; on it, what travels: it waits at its end until every rank is there.
function show_travel(now) {
  const base = by_id('devices').getBoundingClientRect(), paths = [];
  const port = rank => {
    const {x, y, width, height} = trace.devices[rank].port.getBoundingClientRect();
    return [x - base.x + width / 2, y - base.y + height / 2];
  };
  now.forEach(({collectives}, rank) => collectives.forEach(({ts, dur, args: a}) => {
    const at = a.ranks.indexOf(rank), waited = a.waited_us ?? 0;
    const others = a.op === 'exchange' ? a.sends.map(p => p.to) :
      [a.ranks[at - 1], a.ranks[at + 1]].filter(other => other !== undefined);
    const way = still ? 0.5 : Math.max(0, (t - ts - waited) / (dur - waited));
    const carries = a.purpose !== 'training' ? 'communication' :
      !a.function.startsWith('Fsdp') ? 'activations' :
      a.op === 'all_gather' ? 'weights' : 'gradients';
    for (const other of others) {
      const [x, y] = port(rank), [to_x, to_y] = port(other), d = `M${x} ${y}H${to_x}V${to_y}`;
      paths.push(`<path d="${d}"/><path d="${d}" class="parcel" pathLength="100"
        style="stroke: var(--${carries})" stroke-dashoffset="${-96 * way}"/>`);
    }
  }));
  by_id('travel').innerHTML = paths.join('');
}

// ---- controls

// Steps go through the events of the chosen rank, or of all.
function follow() {
  const rank = by_id('watch').selectedIndex - 1;
  moments = trace.moments.filter(e => rank < 0 || e.pid === rank);
  show(t);
}

const motion = matchMedia('(prefers-reduced-motion: reduce)');
let still = motion.matches;  // from event to event, nothing glides

function step(by) {
  const next = Math.min(Math.max(index + by, 0), moments.length - 1);
  show(moments[next].ts, next);
}

function jump(pass) {
  const is = e => e.args.pass === pass;
  const next = moments.findIndex((e, i) => i > index && is(e));
  const found = next < 0 ? moments.findIndex(is) : next;
  if (found >= 0) show(moments[found].ts, found);
}

// At speed 1, a trace takes half a minute. Pausing can go one event on.
function play(on = !playing, by = 0) {
  playing = on;
  if (by) step(by);
  by_id('play').textContent = on ? 'pause' : 'play';
  if (on && t >= trace.end) show(0);
  let last = performance.now();
  const tick = time => {
    if (!playing) return;
    const speed = by_id('speed').value, passed = (time - last) / 1000 * speed;
    if (!still || passed > 1) {
      last = time;
      if (still) step(1);
      else show(t + passed / 30 * trace.end);
    }
    if (t >= trace.end || (still && index === moments.length - 1)) return play(false);
    requestAnimationFrame(tick);
  };
  if (on) requestAnimationFrame(tick);
}

// id, what it says, what it does in words, its key, what it does
const kControls = [
  ['first', '|‹', 'to the start', 'Home', () => show(0)],
  ['back', '‹ event', 'one event back', 'ArrowLeft', () => play(false, -1)],
  ['play', 'play', 'play or pause', ' ', () => play()],
  ['next', 'event ›', 'one event forward', 'ArrowRight', () => play(false, 1)],
  ['last', '›|', 'to the end', 'End', () => show(trace.end)],
  ['forward', 'next forward', 'to the next forward', 'f', () => jump('forward')],
  ['backward', 'next backward', 'to the next backward', 'b', () => jump('backward')],
  ['optimizer', 'next optimizer', 'to the next optimizer', 'o', () => jump('optimizer')],
];

function begin() {
  const devices = by_id('devices'), timeline = by_id('timeline'), columns = arrange();
  const fit = () => {  // fewer columns where boxes would be too narrow
    let fitting = columns;
    while (fitting > 1 && devices.clientWidth / fitting < 220) fitting = Math.ceil(fitting / 2);
    devices.classList.toggle('narrow', fitting < columns);
    devices.style.setProperty('--columns', fitting);
    timeline.replaceChildren();
    trace.devices.forEach(make_timeline);
    show(t, index);
  };
  const {zero} = trace.units[0][0], details = [trace.title];
  if (zero) details.push(`ZeRO-${zero}`);
  if (trace.layout.pp > 1) details.push(trace.schedule);
  by_id('title').textContent = document.title = `Replay: ${details.join(', ')}`;
  by_id('rebuilt').hidden = trace.clock !== 'rebuilt';
  by_id('scale').textContent = size(scale);
  trace.devices.forEach(make_device);
  trace.devices.forEach(({rank}) => make('option', by_id('watch'), '', `rank ${rank}`));
  for (const [id, says, does, key, act] of kControls) {
    const button = make('button', by_id('buttons'), '', says);
    Object.assign(button, {id, onclick: act, title: key, ariaLabel: does});
  }
  for (const name of kKey) make('i', make('span', by_id('key'), '', name), name.replace(' ', '-'));
  by_id('watch').selectedIndex = trace.layout.pp > 1 ? 0 : 1;  // else all ranks do the same
  by_id('watch').onchange = follow;
  addEventListener('keydown', e => {
    const control = kControls.find(([, , , key]) => key === e.key), at = e.target.tagName;
    if (!control || e.ctrlKey || e.metaKey || e.altKey || at === 'SELECT') return;
    if (e.key === ' ' && at === 'BUTTON') return;  // which it presses
    e.preventDefault();
    control[4]();
  });
  timeline.onpointerdown = timeline.onpointermove = e => {
    if (!e.buttons) return;
    const {x, width} = timeline.querySelector('.track').getBoundingClientRect();
    show((e.clientX - x) / width * trace.end);
  };
  motion.onchange = () => still = motion.matches;
  addEventListener('resize', fit);
  fit();
  follow();
}

begin();
