// source.js: a file's page shows the lines that its address names: fsdp.cpp.html#199-212
'use strict';
function show() {
  const [first, last] = location.hash.slice(1).split('-').map(Number);
  const lines = [...document.querySelectorAll('pre > span')];
  lines.forEach((line, i) => line.classList.toggle('shown', i + 1 >= first && i + 1 <= last));
  const room = innerHeight / 5;  // above the first line
  const top = first ? lines[first - 1].getBoundingClientRect().top + scrollY - room : 0;
  const calm = matchMedia('(prefers-reduced-motion: reduce)').matches;
  scrollTo({top, behavior: calm ? 'auto' : 'smooth'});
}
addEventListener('hashchange', show);
show();
