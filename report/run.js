// run.js: what `make run` shows above the replay of what was traced: the loss, step by step, and
// what a rank held and sent beside the formulas, from the file that --metrics writes.
// test      tests/check_pages.py
'use strict';

const metrics = read('metrics');
const steps = metrics.filter(line => line.step), first = steps[0], last = steps.at(-1);
const losses = steps.flatMap(s => [s.loss, s.held_out_loss ?? s.loss]);
// Math.min(...losses) would fail: of a long run they are too many arguments
const low = losses.reduce((a, b) => Math.min(a, b));
const high = losses.reduce((a, b) => Math.max(a, b));
const held_out = steps.findLast(s => s.held_out_loss)?.held_out_loss.toFixed(2);

// A point alone is a line to itself.
function draw_loss(name, member) {
  const points = steps.filter(s => s[member]).map(s => [s.step, -s[member]]);
  return tag(`polyline class="${name}" points="${[...points, points.at(-1)].join(' ')}"`);
}

document.title = document.title.replace('Replay', 'A run');
document.body.insertAdjacentHTML('afterbegin', [
  tag('h1', 'A run'),
  tag('p', 'Loss ', last.loss.toFixed(2), ' at step ', last.step,
    held_out ? `, then ${held_out} on text that it has not read` : '',
    ' (nats a token). Below, what was traced of the run, played.'),
  tag(`svg id="loss" role="img" aria-label="loss by step" preserveAspectRatio="none"
    viewBox="${first.step} ${-high} ${Math.max(1, last.step - first.step)} ${
      Math.max(1e-6, high - low)}"`,
    draw_loss('weights', 'loss'), draw_loss('gradients', 'held_out_loss')),
  tag('p', 'Step ', first.step, ' to ', last.step, ', from ', low.toFixed(2), ' (bottom) to ',
    high.toFixed(2), ' (top): ', draw_key('weights', 'loss of a step'),
    held_out ? draw_key('gradients', 'held-out') : ''),
  tag('pre', metrics.at(-1).text),  // memory and traffic beside their formulas
].join(''));
