// book.js: keeps the code on the right in step with the paragraph that is read on the left.
// idea      A line wanders from the top of the window, at the page's beginning, to its bottom, at
//           the page's end. The last block with a name of code above this line is the one that is
//           read, and its first name is shown; a click shows another.
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
  const page = document.documentElement;
  const way = Math.max(1, page.scrollHeight - innerHeight);
  const line = 60 + (innerHeight - 120) * Math.min(1, scrollY / way);
  let now = blocks.keys().next().value;
  for (const block of blocks.keys()) if (block.getBoundingClientRect().top < line) now = block;
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
addEventListener('keydown', event => {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const turn = {ArrowLeft: 'prev', ArrowRight: 'next'}[event.key];
  if (turn) document.querySelector(`[rel=${turn}]`).click();
});
if (matchMedia('(max-width: 60rem)').matches) pane.open = false;
addEventListener('scroll', () => requestAnimationFrame(follow), {passive: true});
addEventListener('resize', follow);
follow();
