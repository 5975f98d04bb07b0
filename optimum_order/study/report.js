"use strict";
// A click on the head of a column sorts its table, a second click the other way around.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const value = (row, column) => {
    const cell = row.cells[column];
    const text = cell.dataset.value ?? cell.textContent;
    return text === "" || isNaN(text) ? text : Number(text);
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const rising = head.getAttribute("aria-sort") !== "ascending";
      const rows = [...body.rows].sort((a, b) => {
        const [left, right] = [value(a, column), value(b, column)];
        const numbers = typeof left === "number" && typeof right === "number";
        const order = numbers ? left - right : String(left).localeCompare(String(right));
        return rising ? order : -order;
      });
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      body.append(...rows);
    });
  });
}
