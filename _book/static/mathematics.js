// Typesets what Sphinx marks as mathematics. The copy of KaTeX beside this file needs no network.
const equations = [...document.querySelectorAll(".math")];
for (const element of equations) {
  renderMathInElement(element, { throwOnError: false });
}
// What is wider than the page scrolls, and then the keyboard has to reach it.
const widths = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    target.tabIndex = target.scrollWidth > target.clientWidth ? 0 : -1;
  }
});
document.fonts.ready.then(() => {
  for (const element of equations.filter((element) => element.matches("div"))) {
    widths.observe(element);
  }
});
