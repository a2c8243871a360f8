// source.js: a file's page shows the lines that its address names: fsdp.cpp.html#199-212
'use strict';
function show() {
  const [first, last] = location.hash.slice(1).split('-').map(Number);
  document.querySelectorAll('li').forEach(
    (line, i) => line.classList.toggle('shown', first <= i + 1 && i + 1 <= last));
  document.querySelector('.shown')?.scrollIntoView();
}
addEventListener('hashchange', show);
show();
