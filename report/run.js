// run.js: what `make run` shows above the replay of its last step: the loss, step by step, and what
// a rank held and sent beside the formulas, from the file that --metrics writes.
// test      tests/check_pages.py
'use strict';

// The loss of every step, and the held-out loss where it was measured, as lines over the steps.
function draw_loss(steps) {
  const first = steps[0].step, last = steps.at(-1).step, losses = steps.map(s => s.loss);
  const low = Math.min(...losses), high = Math.max(...losses);
  const x = s => 44 + 590 * (s.step - first) / Math.max(last - first, 1);
  const y = loss => 10 + 180 * (high - loss) / Math.max(high - low, 1e-9);
  const line = (name, of) => `<polyline class="${name}" points="${
    steps.filter(s => s[of] !== undefined).map(s => `${x(s)},${y(s[of])}`).join(' ')}"/>`;
  const label = (at_x, at_y, text, anchor) =>
    `<text x="${at_x}" y="${at_y}" text-anchor="${anchor}">${text}</text>`;
  by_id('loss').innerHTML = line('loss', 'loss') + line('held-out', 'held_out_loss') +
    label(40, y(high) + 4, high.toFixed(2), 'end') + label(40, y(low) + 4, low.toFixed(2), 'end') +
    label(44, 212, `step ${first}`, 'start') + label(634, 212, `step ${last}`, 'end');
}

// heads: names of the columns, and what each shows of a row
function make_table(caption, rows, heads) {
  const table = make('table', by_id('tables'));
  make('caption', table, '', caption);
  const line = make('tr', table);
  for (const [head] of heads) make('th', line, '', head);
  for (const row of rows) {
    const line = make('tr', table);
    for (const [, of] of heads) make('td', line, '', of(row));
  }
}

function show_run(lines) {
  const steps = lines.filter(l => l.step), {memory, traffic} = lines.find(l => l.summary);
  const held = steps.filter(s => s.held_out_loss !== undefined).at(-1);
  const bytes = n => n === undefined ? '' : n.toLocaleString('en');
  draw_loss(steps);
  by_id('losses').textContent = `Loss ${steps.at(-1).loss.toFixed(2)} after ${steps.length} steps` +
    (held ? `, ${held.held_out_loss.toFixed(2)} on text that it has not read` : '') +
    ' (nats a token). Below, the last step, played.';
  const held_by_0 = memory.find(m => m.rank === 0), {kept_activations: kept} = held_by_0;
  const categories = Object.entries(held_by_0).filter(([, m]) => m.now !== undefined);
  make_table('What rank 0 holds between steps, in bytes', [
    ...categories.filter(([, m]) => m.predicted !== undefined),
    ['activations kept for backwards', {now: kept.bytes, predicted: kept.predicted_bytes}],
  ], [['', ([name]) => name], ['measured', ([, m]) => bytes(m.now)],
    ['by the formula', ([, m]) => bytes(m.predicted)]]);
  const sent = traffic.filter(t => t.rank === 0 && t.predicted_bytes !== undefined);
  if (sent.length === 0) return;
  make_table(`What rank 0 sent in ${steps.length} steps, in bytes`, sent, [
    ['', t => `${t.axis} ${t.collective}, ${t.purpose}`], ['measured', t => bytes(t.bytes)],
    ['by the formula', t => bytes(t.predicted_bytes)]]);
}

show_run(JSON.parse(by_id('metrics').textContent));
