/* Filters of the gallery and of the claims, and the claims in the order of a column. Without it all is shown. */
"use strict";

const words = (text) => text.toLowerCase().split(/\s+/).filter(Boolean);

function matches(item, form) {
  for (const { name, value } of form.querySelectorAll("select")) {
    if (value && !item.dataset[name].split(" ").includes(value)) return false;
  }
  const field = form.querySelector("input");
  const text = field && field.value ? item.textContent.toLowerCase() : "";
  return !field || words(field.value).every((word) => text.includes(word));
}

function filter(form, items) {
  const told = form.querySelector("output");
  const all = told.textContent;
  const kind = all.replace(/^\d+ /, "");
  const update = () => {
    let shown = 0;
    for (const item of items) {
      item.hidden = !matches(item, form);
      shown += item.hidden ? 0 : 1;
    }
    told.textContent = shown === items.length ? all : `${shown} of ${items.length} ${kind}`;
  };
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  update(); // a browser keeps what was chosen when a page is read again
}

function compare(first, second) {
  if (first === "" || second === "") return (first === "") - (second === ""); // what has no value comes last
  const difference = Number(first) - Number(second);
  return Number.isNaN(difference) ? first.localeCompare(second) : difference;
}

function sortable(table) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const value = (row, column) => row.cells[column].dataset.sort || row.cells[column].textContent;
  const missing = (row, column) => row.cells[column].textContent.trim() === "";
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
      const rows = [...body.rows].sort((first, second) => {
        const lacking = missing(first, column) - missing(second, column);
        return lacking || direction * compare(value(first, column), value(second, column));
      });
      body.append(...rows);
    });
  });
}

for (const form of document.querySelectorAll("form.filters")) {
  filter(form, [...document.querySelectorAll(".gallery > .card, .sortable tbody tr")]);
}
document.querySelectorAll("table.sortable").forEach(sortable);
