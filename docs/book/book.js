// book.js: keeps the code on the right in step with the paragraph that is read on the left.
// idea      One reads at a line that goes from the window's top, at the page's beginning, to its
//           bottom, at the page's end. The last block with a name of code that begins above this
//           line is the one that is read. Its first name is shown; a click shows another.
// menus     The open one closes when the page is scrolled, when the focus leaves it, at Escape.
'use strict';
const pane = document.querySelector('#pane');
const names = [...document.querySelectorAll('main a.code')];
const block_of = name => name?.closest('li, p, tr, h1, h2, h3');
const menu = () => document.querySelector('header [open]');
let reading, shown;

function show(name) {
  shown?.classList.remove('shown');
  shown = name;
  shown.classList.add('shown');
  pane.firstElementChild.textContent = `Code: ${name.title}`;
  frames.code.location.replace(name.href);
}
function follow() {
  menu()?.removeAttribute('open');
  const below = document.documentElement.scrollHeight - innerHeight;
  const line = 60 + (innerHeight - 120) * scrollY / Math.max(below, 1);
  const begun = names.filter(name => block_of(name).getBoundingClientRect().top <= line);
  const now = block_of(begun.at(-1) ?? names[0]);
  if (now === reading) return;
  reading?.classList.remove('reading');
  reading = now;
  reading.classList.add('reading');
  const its = names.filter(name => block_of(name) === now);
  show(its.find(name => name.hash) ?? its[0]);  // lines rather than a whole file
}
addEventListener('click', event => {
  const name = event.target.closest('main a.code');
  if (!name || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  pane.open = true;
  show(name);
});
addEventListener('focusin', event => {
  if (!menu()?.contains(event.target)) menu()?.removeAttribute('open');
});
addEventListener('keydown', event => {
  if (event.key !== 'Escape') return;
  menu()?.firstElementChild.focus();
  menu()?.removeAttribute('open');
});
pane.open = matchMedia('(min-width: 60rem)').matches;
addEventListener('scroll', follow, {passive: true});
addEventListener('resize', follow);
addEventListener('hashchange', follow);
follow();
