// run.js: what `make run` shows above the replay of its last step: the loss, step by step, and what
// a rank held and sent beside the formulas, from the file that --metrics writes.
// test      tests/check_pages.py
'use strict';

const metrics = read('metrics');
const steps = metrics.filter(line => line.step), first = steps[0], last = steps.at(-1);
const losses = steps.flatMap(s => [s.loss, s.held_out_loss ?? s.loss]);
const low = Math.min(...losses), high = Math.max(...losses);
const held_out = steps.findLast(s => s.held_out_loss)?.held_out_loss.toFixed(2);

const draw_loss = (name, member) => tag(`polyline class="${name}" points="${
  steps.filter(s => s[member]).map(s => [s.step, -s[member]]).join(' ')}"`);

document.body.insertAdjacentHTML('afterbegin', [
  tag('h1', 'A run'),
  tag('p', 'Loss ', last.loss.toFixed(2), ' at step ', last.step,
    held_out ? `, then ${held_out} on text that it has not read` : '',
    ' (nats a token). Below, the last step, played.'),
  tag(`svg id="loss" preserveAspectRatio="none"
    viewBox="${first.step} ${-high} ${steps.length} ${high - low}"`,
    draw_loss('weights', 'loss'), draw_loss('gradients', 'held_out_loss')),
  tag('p', 'Step ', first.step, ' to ', last.step, ', from ', low.toFixed(2), ' (bottom) to ',
    high.toFixed(2), ' (top): ', draw_key('weights', 'loss of a step'),
    draw_key('gradients', 'held-out')),
  tag('pre', metrics.at(-1).text),  // memory and traffic beside their formulas
].join(''));
