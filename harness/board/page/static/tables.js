// Tables that sort by their header buttons and hide the rows that a filter does not match.
"use strict";
(() => {
  // A cell without data-key has nothing to compare and stays last, whichever way the others go.
  const keyOf = (row, column) => row.cells[column].dataset.key;

  const compare = (number, sign) => (a, b) => {
    if (a.key === undefined || b.key === undefined) return (a.key === undefined) - (b.key === undefined);
    const [x, y] = [Number(a.key), Number(b.key)];
    if (number && !Number.isNaN(x) && !Number.isNaN(y)) return sign * (x - y);
    return sign * a.key.localeCompare(b.key, undefined, { numeric: true, sensitivity: "base" });
  };

  for (const table of document.querySelectorAll("table.sortable")) {
    const headers = [...table.tHead.rows[0].cells];
    headers.forEach((header, column) => {
      header.querySelector("button").addEventListener("click", () => {
        const before = header.getAttribute("aria-sort");
        const opposite = { ascending: "descending", descending: "ascending" };
        const direction = opposite[before] ?? header.dataset.first;
        for (const other of headers) other.setAttribute("aria-sort", "none");
        header.setAttribute("aria-sort", direction);
        const rows = [...table.tBodies[0].rows].map((row) => ({ row, key: keyOf(row, column) }));
        rows.sort(compare(header.dataset.type === "number", direction === "ascending" ? 1 : -1));
        table.tBodies[0].append(...rows.map(({ row }) => row));
      });
    });
  }

  for (const input of document.querySelectorAll("input[data-filter]")) {
    const table = document.getElementById(input.dataset.filter);
    const count = document.querySelector(`[data-count="${input.dataset.filter}"]`);
    const none = document.querySelector(`[data-none="${input.dataset.filter}"]`);
    const rows = [...table.tBodies[0].rows];
    const texts = new Map(rows.map((row) => [row, `${row.textContent} ${row.dataset.search ?? ""}`.toLowerCase()]));
    const all = count.textContent;
    const filter = () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        row.hidden = !words.every((word) => texts.get(row).includes(word));
        shown += !row.hidden;
      }
      count.textContent = shown === rows.length ? all : `${shown} of ${all}`;
      none.hidden = shown > 0;
    };
    input.addEventListener("input", filter);
    filter(); // a browser that comes back to the page keeps what was typed
  }
})();
