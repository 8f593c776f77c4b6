// Typesets what Sphinx marks as mathematics. The copy of KaTeX beside this file needs no network.
for (const element of document.querySelectorAll(".math")) {
  renderMathInElement(element, { throwOnError: false });
}
