// Sorts and filters the tables, opens their rows, draws the charts. Text from results is only
// ever set as textContent, so that nothing in it can become markup.
(() => {
  "use strict";

  const read = (id) => JSON.parse(document.getElementById(id).textContent);

  // Sorting: by the number that a cell's text begins with; a cell without one goes last in either order.
  const key = (row, column, text) => {
    // A reason stands in one cell across all the numbers, so the cells after it have moved to the left.
    const why = [...row.cells].findIndex((cell) => cell.classList.contains("why"));
    const moved = why >= 0 && column > why ? Math.max(why, column - row.cells[why].colSpan + 1) : column;
    const shown = moved === why ? "" : row.cells[moved].textContent;
    return text ? shown : Number.parseFloat(shown);
  };

  const sort = (heading) => {
    const table = heading.closest("table");
    const body = table.tBodies[0];
    const column = heading.cellIndex;
    const text = heading.dataset.kind === "text";
    const now = heading.getAttribute("aria-sort");
    const order = now === "none" ? heading.dataset.first : now === "ascending" ? "descending" : "ascending";
    const sign = order === "ascending" ? 1 : -1;
    const rows = [...body.rows].filter((row) => row.id).map((row) => ({ row, value: key(row, column, text) }));
    rows.sort((one, other) => {
      if (text) return sign * one.value.localeCompare(other.value, undefined, { numeric: true });
      const missing = Number.isNaN(one.value) - Number.isNaN(other.value);
      return missing || (Number.isNaN(one.value) ? 0 : sign * (one.value - other.value));
    });
    for (const { row } of rows) {
      const detail = row.nextElementSibling;
      row.opened = detail?.classList.contains("detail") ? detail : null;
    }
    for (const { row } of rows) body.append(row, ...(row.opened ? [row.opened] : []));
    for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", other === heading ? order : "none");
  };

  // Filtering: a row stays if it has every word that was typed.
  const filter = (input) => {
    const table = document.getElementById(input.getAttribute("aria-controls")).querySelector("table");
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of table.tBodies[0].rows) {
      if (row.id) {
        row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
        shown += row.hidden ? 0 : 1;
      } else {
        row.hidden = row.previousElementSibling.hidden;
      }
    }
    input.closest(".filter").querySelector("output").textContent = words.length ? `${shown} rows` : "";
  };

  // Details of a row, made when it is first opened.
  const details = read("details");
  const whole = (part) => (typeof part === "number" ? details.pool[part] : part);

  const open = (row, button) => {
    const line = document.createElement("tr");
    line.className = "detail";
    const cell = line.insertCell();
    cell.colSpan = row.closest("table").tHead.rows[0].cells.length;
    const list = document.createElement("dl");
    details.fields.forEach(([name, between], index) => {
      const parts = details.cells[row.id.slice(1)][index];
      const text = (Array.isArray(parts) ? parts : [parts]).map(whole).join(between);
      if (!text) return;
      const term = document.createElement("dt");
      const value = document.createElement("dd");
      term.textContent = name;
      value.textContent = text;
      list.append(term, value);
    });
    cell.append(list);
    row.after(line);
    button.setAttribute("aria-expanded", "true");
  };

  const toggle = (row, button) => {
    if (button.getAttribute("aria-expanded") === "false") return open(row, button);
    row.nextElementSibling.remove();
    button.setAttribute("aria-expanded", "false");
  };

  for (const table of document.querySelectorAll("table.cells")) {
    for (const row of table.tBodies[0].rows) {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "more";
      button.setAttribute("aria-expanded", "false");
      button.setAttribute("aria-label", `details of ${row.querySelector(".name").textContent}`);
      row.querySelector("th").prepend(button);
    }
    table.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      if (button.classList.contains("more")) toggle(button.closest("tr"), button);
      else sort(button.closest("th"));
    });
  }
  for (const input of document.querySelectorAll(".filter input")) input.addEventListener("input", () => filter(input));

  // Charts: the specifications leave colours of text and axes to the page.
  const views = [];
  const draw = () => {
    if (!window.vegaEmbed) return;
    for (const view of views.splice(0)) view.finalize();
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const specs = read("charts");
    for (const box of document.querySelectorAll(".chart")) {
      const narrow = box.clientWidth < 520;
      const axis = { labelColor: colour("--quiet"), titleColor: colour("--quiet"), titleFontWeight: "normal" };
      const config = {
        background: "transparent",
        font: getComputedStyle(document.body).fontFamily,
        view: { stroke: null },
        style: { whisker: { color: colour("--ink") }, guide: { color: colour("--quiet") } },
        axis: { ...axis, domainColor: colour("--line"), gridColor: colour("--line"), gridOpacity: 0.6, tickColor: colour("--line") },
        axisY: { labelLimit: Math.max(120, box.clientWidth * (narrow ? 0.38 : 0.48)) },
        legend: { ...axis, orient: "bottom", columns: narrow ? 3 : 6, symbolStrokeWidth: 0 },
      };
      const dark = matchMedia("(prefers-color-scheme: dark)").matches;
      const options = { mode: "vega-lite", actions: false, renderer: "svg", ast: true, config, tooltip: { theme: dark ? "dark" : "light" } };
      window.vegaEmbed(box, specs[box.dataset.chart], options).then(
        (view) => views.push(view),
        (error) => {
          box.textContent = `The chart could not be drawn: ${error.message}`;
        },
      );
    }
  };
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
