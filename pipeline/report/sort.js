// Tables of class "sortable": a click on a heading sorts by its column, another one the other way round. Cells may carry
// the value they stand for in data-v; what is no number is sorted as text, and cells without a value come last.
const parts = (text) => text.split(/(\d+(?:\.\d+)?(?:e[+-]?\d+)?)/);  // every second one is a number
const natural = (a, b) => {
  const x = parts(a), y = parts(b);
  for (let i = 0; i < Math.min(x.length, y.length); i++) {
    const order = i % 2 ? x[i] - y[i] : x[i].localeCompare(y[i], "en");
    if (order) return order;
  }
  return x.length - y.length;
};
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  const value = (row, i) => { const cell = row.cells[i]; return cell.dataset.v ?? cell.textContent; };
  const empty = (text) => text === "" || text === "–";
  headings.forEach((heading, i) => heading.querySelector("button").addEventListener("click", () => {
    const up = heading.getAttribute("aria-sort") !== "ascending";
    headings.forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => {
      const x = value(a, i), y = value(b, i);
      if (empty(x) || empty(y)) return empty(x) - empty(y);
      const numbers = !isNaN(x) && !isNaN(y);
      const order = numbers ? x - y : natural(x, y);
      return up ? order : -order;
    });
    table.tBodies[0].append(...rows);
  }));
}
