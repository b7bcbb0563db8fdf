"use strict";
// Texts out of records only ever become textContent.
const $ = (query, root = document) => root.querySelector(query);
const $$ = (query, root = document) => [...root.querySelectorAll(query)];
const state = { recipe: "", data: "", sorts: {}, ...history.state };
const keep = () => history.replaceState(state, "");

async function unpacked(id) {
  const bytes = Uint8Array.from(atob($(id).textContent), (c) => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

function element(name, text, properties = {}) {
  const made = Object.assign(document.createElement(name), properties);
  if (text !== undefined) made.textContent = text;
  return made;
}

// Theme

const THEMES = ["system", "light", "dark"];
function stored(value) {
  try {
    if (value) localStorage.setItem("theme", value);
    return localStorage.getItem("theme");
  } catch {
    return value;
  }
}
function setTheme(name) {
  document.documentElement.dataset.theme = name;
  $("#theme").textContent = `Theme: ${name}`;
  const { color, faint } = colours();
  const changes = { "font.color": color };
  for (const axis of ["xaxis", "yaxis"])
    for (const part of ["gridcolor", "zerolinecolor"]) changes[`${axis}.${part}`] = faint;
  for (const chart of $$(".chart.drawn")) Plotly.relayout(chart, changes);
}
let theme = THEMES.includes(stored()) ? stored() : "system";
$("#theme").addEventListener("click", () => {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  stored(theme);
  setTheme(theme);
});

// Filters

const selects = $$(".filters select");
function filter() {
  for (const select of selects) state[select.name] = select.value;
  for (const part of $$("[data-recipe]"))
    part.hidden = selects.some((s) => s.value && part.dataset[s.name] !== s.value);
  $(".none").hidden = $$(".block").some((block) => !block.hidden);
  keep();
}
for (const select of selects) {
  select.value = state[select.name];
  if (select.selectedIndex < 0) select.value = "";
  select.addEventListener("change", filter);
}
filter();

// Sorting: numbers before texts, what is missing last, whichever the direction.

function sort(table, column, direction) {
  const value = (row) => {
    const cell = row.cells[column];
    const number = cell.dataset.order;
    return number !== undefined ? Number(number) : cell.textContent.trim();
  };
  const rank = (v) => (typeof v === "number" ? 0 : v === "-" || v === "" ? 2 : 1);
  const compare = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
  const rows = [...table.tBodies[0].rows].map((row) => [value(row), row]);
  rows.sort(([a], [b]) => rank(a) - rank(b) || direction * compare(a, b));
  table.tBodies[0].append(...rows.map(([, row]) => row));
  $$("thead th", table).forEach((th, i) => {
    th.setAttribute("aria-sort", i !== column ? "none" : direction > 0 ? "ascending" : "descending");
  });
}
$$(".sortable").forEach((table) => {
  const key = table.closest(".scroll").getAttribute("aria-label");
  $$(".sort", table).forEach((button, column) =>
    button.addEventListener("click", () => {
      const [was, direction] = state.sorts[key] ?? [];
      const first = button.closest("th").classList.contains("n") ? -1 : 1;
      state.sorts[key] = [column, was === column ? -direction : first];
      sort(table, ...state.sorts[key]);
      keep();
    }),
  );
  if (state.sorts[key]) sort(table, ...state.sorts[key]);
});

// The story of a number

const data = unpacked("#data").then(JSON.parse);
const link = (path) => "./" + path.split("/").map(encodeURIComponent).join("/");

function lines(rows) {
  const table = element("table");
  for (const [what, ...values] of rows) {
    const row = table.insertRow();
    row.append(element("th", what, { scope: "row" }));
    for (const value of values) row.append(value instanceof Node ? value : element("td", value));
  }
  return table;
}

// A line for what all runs share, one for each of the others.
function merged(runs, title) {
  const groups = runs.map((run) => new Map(run.groups).get(title) ?? []);
  if (groups.every((group) => JSON.stringify(group) === JSON.stringify(groups[0]))) return groups[0];
  const found = [];
  const names = [...new Set(groups.flat().map(([what]) => what))];
  for (const what of names) {
    const mine = groups.map((group) => group.filter(([other]) => other === what));
    if (mine.every((entries) => JSON.stringify(entries) === JSON.stringify(mine[0]))) found.push(...mine[0]);
    else mine.forEach((entries, i) => entries.forEach(([, ...v]) => found.push([`${what}, seed ${runs[i].seed}`, ...v])));
  }
  return found;
}

async function tell(number) {
  const { stories, records } = await data;
  const story = stories[number];
  const runs = story.records.map((index) => records[index]);
  const body = $("#story-body");
  $("#story-title").textContent = story.title;
  body.replaceChildren(element("p", story.text, { className: "big" }));
  body.append(lines(story.lines));
  if (runs.length) {
    const rows = runs.map((run) => {
      const cell = element("td");
      cell.append(element("a", run.path, { href: link(run.path) }));
      return [`seed ${run.seed}`, run.values[story.metric] ?? run.status, cell];
    });
    const table = lines(rows);
    table.className = "runs";
    body.append(table);
  }
  for (const title of new Set(runs.flatMap((run) => run.groups.map(([name]) => name)))) {
    const rows = merged(runs, title);
    if (!title.startsWith("Table: ")) body.append(element("h3", title), lines(rows));
    else {
      const folded = element("details");
      folded.append(element("summary", title.replaceAll("_", " ")), lines(rows));
      body.append(folded);
    }
  }
  $("#story").showModal();
  body.scrollTop = 0;
}
document.addEventListener("click", ({ target }) => {
  const button = target.closest("[data-story]");
  if (button) tell(Number(button.dataset.story));
  if (target.id === "story" || target.id === "close") $("#story").close();
});

// Plots are drawn once they come near.

function colours() {
  const { color } = getComputedStyle(document.body);
  const faint = getComputedStyle($(".counts")).color.replace("rgb(", "rgba(").replace(")", ", 0.25)");
  return { color, faint };
}

const library = async () => {
  if (!window.Plotly) document.head.append(element("script", await unpacked("#library")));
};
let loading;

async function draw(chart) {
  await (loading ??= library());
  const { plots } = await data;
  const { traces, layout } = plots[chart.dataset.plot][chart.dataset.panel];
  const small = !chart.closest(".single");
  const named = !small && traces.length <= 8;
  if (named) chart.style.height = `${Math.max(300, chart.clientHeight) + 14 * traces.length}px`;
  const { color, faint } = colours();
  const axis = { automargin: true, gridcolor: faint, zerolinecolor: faint };
  const full = {
    margin: { l: 10, r: 8, t: 6, b: 10 },
    paper_bgcolor: "transparent",
    plot_bgcolor: "transparent",
    font: { size: small ? 10 : 12, family: "system-ui, sans-serif", color },
    showlegend: named,
    legend: { orientation: "h", yref: "container", yanchor: "bottom", y: 0, font: { size: 11 } },
    dragmode: false,
    hovermode: "closest",
    barmode: "group",
    ...layout,
  };
  for (const name of ["xaxis", "yaxis"]) {
    const own = layout[name] ?? {};
    full[name] = { ...axis, ...own, title: small ? undefined : { standoff: 6, ...own.title } };
    if (small) Object.assign(full[name], { nticks: 5, tickangle: 0 });
  }
  await Plotly.newPlot(chart, traces, full, { displayModeBar: false, responsive: true });
  chart.classList.add("drawn");
}

const near = new IntersectionObserver(
  (entries) => {
    for (const { isIntersecting, target } of entries)
      if (isIntersecting) {
        near.unobserve(target);
        draw(target);
      }
  },
  { rootMargin: "300px" },
);
$$(".chart").forEach((chart) => near.observe(chart));
setTheme(theme);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setTheme(theme));

// While jobs are at work the file is written anew now and then.

const seconds = Number(document.body.dataset.reload);
if (seconds) {
  const pause = $("#pause");
  pause.addEventListener("click", () => {
    const paused = pause.getAttribute("aria-pressed") !== "true";
    pause.setAttribute("aria-pressed", paused);
  });
  setInterval(() => {
    const busy = document.hidden || $("#story").open || pause.getAttribute("aria-pressed") === "true";
    if (!busy) location.reload();
  }, 1000 * seconds);
}
