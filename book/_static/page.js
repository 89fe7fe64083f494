// What the theme leaves undone on every page.

// A first visit has no stored mode; the theme falls back on "auto" too, but reports an error.
document.documentElement.dataset.mode ||= "auto";

// Formulas and tables that scroll within their own box can be reached, and scrolled, by keyboard.
// The theme does so for code. A box changes its height when MathJax sets its formula.
window.addEventListener("DOMContentLoaded", () => {
  openFigures();
  const observer = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      if (target.scrollWidth > target.clientWidth) target.tabIndex = 0;
      else target.removeAttribute("tabindex");
    }
  });
  const boxes = "div.math, .cell_output .text_html, .pst-scrollable-table-container, .indextable";
  for (const box of document.querySelectorAll(boxes)) observer.observe(box);
});

// A figure is drawn for a wide page. On a phone it leads to itself at full size, to zoom into.
function openFigures() {
  for (const image of document.querySelectorAll(".bd-content figure img")) {
    if (image.closest("a")) continue;
    const link = document.createElement("a");
    link.href = image.src;
    link.className = "full-size";
    link.title = "At full size";
    image.replaceWith(link);
    link.append(image);
  }
}
