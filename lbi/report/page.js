// Sorts, filters and groups the tables, opens their rows, sets rows side by side, draws the charts. Text from results is only
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
    const column = heading.cellIndex;
    const text = heading.dataset.kind === "text";
    const now = heading.getAttribute("aria-sort");
    const order = now === "none" ? heading.dataset.first : now === "ascending" ? "descending" : "ascending";
    const sign = order === "ascending" ? 1 : -1;
    const rows = cellRows(table).map((row) => ({ row, value: key(row, column, text) }));
    rows.sort((one, other) => {
      if (text) return sign * one.value.localeCompare(other.value, undefined, { numeric: true });
      const missing = Number.isNaN(one.value) - Number.isNaN(other.value);
      return missing || (Number.isNaN(one.value) ? 0 : sign * (one.value - other.value));
    });
    arrange(table, rows.map(({ row }) => row));
    for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", other === heading ? order : "none");
  };

  // Grouping: a heading before the rows of each option, the option of the first row first.
  const cellRows = (table) => [...table.tBodies[0].rows].filter((row) => row.id);
  const indexOf = (table) => table.closest("[id^=cells-]").id.slice(6);
  const controlsOf = (table) => document.querySelector(`.filter[data-table="${indexOf(table)}"]`);

  const arrange = (table, rows) => {
    const body = table.tBodies[0];
    const by = controlsOf(table).querySelector("select.by")?.value;
    const groups = new Map();
    for (const row of rows) {
      const next = row.nextElementSibling;
      row.opened = next?.classList.contains("detail") ? next : null;
      const option = by ? row.dataset[by] : "";
      if (!groups.has(option)) groups.set(option, []);
      groups.get(option).push(row);
    }
    for (const heading of body.querySelectorAll("tr.group")) heading.remove();
    for (const [option, members] of groups) {
      if (by) body.append(groupHeading(table, `${by} ${option || "-"}`, members));
      for (const row of members) body.append(row, ...(row.opened ? [row.opened] : []));
    }
  };

  const groupHeading = (table, name, members) => {
    const line = document.createElement("tr");
    line.className = "group";
    const cell = document.createElement("th");
    cell.scope = "rowgroup";
    cell.colSpan = table.tHead.rows[0].cells.length;
    const shown = members.filter((row) => !row.hidden);
    const best = Math.max(...shown.map((row) => key(row, 2, false)).filter(Number.isFinite));
    cell.textContent = `${name}: ${shown.length} ${shown.length === 1 ? "cell" : "cells"}`;
    if (Number.isFinite(best)) cell.textContent += `, the fastest ${best} tok/s`;
    line.append(cell);
    line.hidden = !shown.length;
    return line;
  };

  // Filtering: a row stays if it has every word that was typed and every option that was chosen.
  const filter = (controls) => {
    const table = document.getElementById(`cells-${controls.dataset.table}`).querySelector("table");
    const words = controls.querySelector("input").value.toLowerCase().split(/\s+/).filter(Boolean);
    const chosen = [...controls.querySelectorAll("select[data-group]")].filter((list) => list.value);
    const rows = cellRows(table);
    for (const row of rows) {
      const text = words.length ? row.textContent.toLowerCase() : "";
      const fits = chosen.every((list) => row.dataset[list.dataset.group] === list.value);
      row.hidden = !fits || !words.every((word) => text.includes(word));
      const next = row.nextElementSibling;
      if (next?.classList.contains("detail")) next.hidden = row.hidden;
    }
    arrange(table, rows);
    const shown = rows.filter((row) => !row.hidden);
    controls.querySelector("output").textContent = shown.length < rows.length ? `${shown.length} of ${rows.length} rows` : "";
    narrow(controls.dataset.table, new Set(shown.map((row) => Number(row.id.slice(1)))));
  };

  // Details of a row, made when it is first opened.
  const details = read("details");
  const whole = (part) => (typeof part === "number" ? details.pool[part] : part);

  const detailsOf = (row) =>
    details.fields.map(([name, between], index) => {
      const parts = details.cells[row.id.slice(1)][index];
      return [name, (Array.isArray(parts) ? parts : [parts]).map(whole).join(between)];
    });

  const open = (row, button) => {
    const line = document.createElement("tr");
    line.className = "detail";
    const cell = line.insertCell();
    cell.colSpan = row.closest("table").tHead.rows[0].cells.length;
    const list = document.createElement("dl");
    for (const [name, text] of detailsOf(row)) {
      if (!text) continue;
      const term = document.createElement("dt");
      const value = document.createElement("dd");
      term.textContent = name;
      value.textContent = text;
      list.append(term, value);
    }
    cell.append(list);
    row.after(line);
    button.setAttribute("aria-expanded", "true");
  };

  const toggle = (row, button) => {
    if (button.getAttribute("aria-expanded") === "false") return open(row, button);
    row.nextElementSibling.remove();
    button.setAttribute("aria-expanded", "false");
  };

  // Side by side: the ticked rows, a column each; what is the same in all of them is only named.
  const MOST_BESIDE = 4;

  const nameOf = (row) => row.querySelector(".name").textContent;

  const shownOf = (row) => {
    const heads = [...row.closest("table").tHead.rows[0].cells].slice(2, -1).map((cell) => cell.textContent);
    const why = row.querySelector(".why");
    const numbers = heads.map((head, index) => [head, row.cells[index + 2].textContent]);
    return new Map([...(why ? [["status", why.textContent]] : numbers), ...detailsOf(row)]);
  };

  const beside = (table) => {
    const box = document.getElementById(`beside-${indexOf(table)}`);
    const ticked = cellRows(table).filter((row) => row.querySelector(".pick").checked);
    box.replaceChildren();
    if (ticked.length < 2) return;
    const rows = ticked.slice(0, MOST_BESIDE);
    const known = rows.map(shownOf);
    const fields = [...new Set(known.flatMap((one) => [...one.keys()]))];
    const same = (field) => known.every((one) => (one.get(field) ?? "") === (known[0].get(field) ?? ""));
    const heading = document.createElement("h3");
    const rest = ticked.length > rows.length ? `, the first of ${ticked.length} ticked` : "";
    heading.textContent = `Side by side: ${rows.length} cells${rest}`;
    const grid = document.createElement("table");
    const head = grid.createTHead().insertRow();
    for (const text of ["", ...rows.map(nameOf)]) {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.textContent = text;
      head.append(cell);
    }
    const body = grid.createTBody();
    for (const field of fields.filter((name) => !same(name))) {
      const line = body.insertRow();
      const name = document.createElement("th");
      name.scope = "row";
      name.textContent = field;
      line.append(name);
      for (const one of known) line.insertCell().textContent = one.get(field) || "-";
    }
    const scroll = document.createElement("div");
    scroll.className = "scroll";
    scroll.tabIndex = 0;
    scroll.append(grid);
    const alike = document.createElement("p");
    alike.className = "quiet";
    const names = fields.filter((name) => same(name) && known[0].get(name));
    alike.textContent = `The same in all: ${names.join(", ") || "nothing"}.`;
    box.append(heading, scroll, alike);
  };

  for (const table of document.querySelectorAll("table.cells")) {
    for (const row of table.tBodies[0].rows) {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "more";
      button.setAttribute("aria-expanded", "false");
      button.setAttribute("aria-label", `details of ${nameOf(row)}`);
      const pick = document.createElement("input");
      pick.type = "checkbox";
      pick.className = "pick";
      pick.setAttribute("aria-label", `${nameOf(row)} side by side`);
      row.querySelector("th").prepend(button, pick);
    }
    table.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      if (button.classList.contains("more")) toggle(button.closest("tr"), button);
      else sort(button.closest("th"));
    });
    table.addEventListener("change", () => beside(table));
  }
  for (const controls of document.querySelectorAll(".filter")) controls.addEventListener("input", () => filter(controls));

  // Charts: the specifications leave colours of text and axes to the page.
  const charts = read("charts");
  const views = [];
  const kept = {};
  const recordsOf = (index) => charts.cells[index].filter((record) => !kept[index] || kept[index].has(record.cell));

  // The charts follow the filter of their table.
  const narrow = (index, cells) => {
    kept[index] = cells;
    const shown = recordsOf(index);
    for (const { view, table, spec } of views) {
      if (table !== index) continue;
      // Errors alone: a filter may leave a chart without a mark, which is no fault of the chart.
      view.view.logLevel(1);
      const { bar, most } = spec.usermeta ?? {};
      if (bar) view.view.height(bar * Math.max(1, Math.min(shown.length, most)));
      view.view.data("cells", shown).runAsync();
    }
  };

  const look = (box) => {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const narrow = box.clientWidth < 520;
    const axis = { labelColor: colour("--quiet"), titleColor: colour("--quiet"), titleFontWeight: "normal" };
    return {
      background: "transparent",
      font: getComputedStyle(document.body).fontFamily,
      view: { stroke: null },
      style: { whisker: { color: colour("--ink") }, guide: { color: colour("--quiet") } },
      axis: { ...axis, domainColor: colour("--line"), gridColor: colour("--line"), gridOpacity: 0.6, tickColor: colour("--line") },
      axisY: { labelLimit: Math.max(120, box.clientWidth * (narrow ? 0.38 : 0.48)) },
      legend: { ...axis, orient: "bottom", columns: Math.max(2, Math.floor(box.clientWidth / 200)), symbolStrokeWidth: 0 },
    };
  };

  // A table without a layout is not in the browser's accessibility tree, so it gets one once the page stands.
  const lay = () => {
    for (const box of document.querySelectorAll(".tall")) box.style.contentVisibility = "visible";
  };
  const whenIdle = window.requestIdleCallback ?? ((work) => work());
  addEventListener("load", () => setTimeout(() => whenIdle(lay, { timeout: 1000 }), 500));

  // A chart costs a quarter of a second where there are a thousand cells, so it is drawn when it is about to be seen,
  // one after the other, and the page can be read and used meanwhile. What is printed is seen.
  const boxes = [...document.querySelectorAll(".chart")];
  const drawn = new Set();
  const waiting = [];
  let drawing = 0;

  const drawOne = async (box) => {
    const table = box.dataset.table;
    const before = kept[table];
    const theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
    const spec = { ...charts.specs[box.dataset.chart], datasets: { cells: recordsOf(table) } };
    const options = { mode: "vega-lite", actions: false, renderer: "svg", ast: true, config: look(box), tooltip: { theme } };
    try {
      views.push({ view: await window.vegaEmbed(box, spec, options), spec, table });
      // A filter may make the chart lower.
      box.style.minHeight = "";
      if (kept[table] !== before) narrow(table, kept[table]);
    } catch (error) {
      box.textContent = `The chart could not be drawn: ${error.message}`;
    }
  };

  const drawWaiting = async () => {
    const mine = ++drawing;
    while (waiting.length) {
      await new Promise((done) => setTimeout(done));
      if (mine !== drawing) return;
      await drawOne(waiting.shift());
    }
  };

  const want = (wanted) => {
    if (!window.vegaEmbed) return;
    const fresh = wanted.filter((box) => !drawn.has(box));
    for (const box of fresh) drawn.add(box);
    waiting.push(...fresh);
    if (fresh.length) drawWaiting();
  };

  const near = new IntersectionObserver(
    (seen) => want(seen.filter((entry) => entry.isIntersecting).map((entry) => entry.target)),
    { rootMargin: "200px" },
  );
  for (const box of boxes) near.observe(box);
  // Printing waits for no timer.
  addEventListener("beforeprint", () => {
    if (!window.vegaEmbed) return;
    const missing = [...waiting.splice(0), ...boxes.filter((box) => !drawn.has(box))];
    for (const box of missing) {
      drawn.add(box);
      drawOne(box);
    }
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const { view } of views.splice(0)) view.finalize();
    waiting.splice(0, waiting.length, ...drawn);
    drawWaiting();
  });
})();
