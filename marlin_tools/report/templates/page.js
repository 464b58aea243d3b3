// Tables of class `sortable`: a click on a column's name sorts by it, a field above the table filters by words. No server.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], rows = [...body.rows];
  const value = (row, column) => row.cells[column].textContent.trim().replace("\u2212", "-");
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const before = head.getAttribute("aria-sort"); // the largest numbers first, and names from A
      const down = before ? (before === "descending" ? 1 : -1) : isNaN(parseFloat(value(rows[0], column))) ? 1 : -1;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down < 0 ? "descending" : "ascending");
      rows.sort((a, b) => {
        const [x, y] = [value(a, column), value(b, column)], [p, q] = [parseFloat(x), parseFloat(y)];
        if (!x || !y) return !x - !y;
        return down * (isNaN(p) || isNaN(q) ? x.localeCompare(y, "en", { numeric: true }) : p - q);
      });
      body.append(...rows);
    });
  });
  const field = document.createElement("input");
  field.type = "search";
  field.placeholder = `Search ${rows.length} rows`;
  field.setAttribute("aria-label", field.placeholder);
  field.addEventListener("input", () => {
    const asked = field.value.toLowerCase().split(/\s+/);
    for (const row of rows) row.hidden = !asked.every((word) => row.textContent.toLowerCase().includes(word));
  });
  table.before(field);
}
