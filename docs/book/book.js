// book.js: keeps the code on the right in step with the paragraph that is read on the left.
// idea      One reads at two fifths of the window's height; at the page's beginning above, at its
//           end below. The last block with a name of code that begins above this line, or the next
//           one where that has left the window, is the one that is read. Its first name is shown; a
//           click shows another.
'use strict';
const pane = document.querySelector('#pane');
const blocks = new Map();  // from a block to its names, those of lines before those of whole files
for (const name of document.querySelectorAll('main a.code')) {
  const block = name.closest('li, p, tr, h1, h2, h3');
  blocks.set(block, [...(blocks.get(block) ?? []), name]);
}
let reading, shown;

function show(name) {
  shown?.classList.remove('shown');
  shown = name;
  shown.classList.add('shown');
  pane.firstElementChild.textContent = `Code: ${name.title}`;
  frames.code.location.replace(name.href);
}
function follow() {
  const page = document.documentElement, below = page.scrollHeight - innerHeight - scrollY;
  const line = Math.max(Math.min(innerHeight * .4, 60 + scrollY), innerHeight - 60 - below);
  const boxes = [...blocks.keys()].map(block => block.getBoundingClientRect());
  let i = Math.max(0, boxes.findLastIndex(box => box.top < line));
  if (boxes[i]?.bottom < 60 && boxes[i + 1]?.top < innerHeight) i++;
  const now = [...blocks.keys()][i];
  if (!now || now === reading) return;
  reading?.classList.remove('reading');
  reading = now;
  reading.classList.add('reading');
  const names = blocks.get(now);
  show(names.find(name => name.hash) ?? names[0]);
}
document.querySelector('main').addEventListener('click', event => {
  const name = event.target.closest('a.code');
  if (!name || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  pane.open = true;
  show(name);
});
document.querySelector('header').addEventListener('click', event => {
  if (event.target.closest('nav a')) event.target.closest('details').open = false;
});
addEventListener('keydown', event => {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const turn = {ArrowLeft: 'prev', ArrowRight: 'next'}[event.key];
  if (turn) document.querySelector(`[rel=${turn}]`).click();
});
if (matchMedia('(max-width: 60rem)').matches) pane.open = false;
addEventListener('scroll', () => requestAnimationFrame(follow), {passive: true});
addEventListener('resize', follow);
follow();
