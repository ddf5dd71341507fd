// Search over every node and module of the stage, shown or not.

const MOST_RESULTS = 60;

function findMatches(query) {
  const text = query.trim().toLowerCase();
  if (text === "") return [];
  const groups = [...view.hierarchy.items.values()]
    .filter((item) => item.isGroup)
    .map((item) => ({
      id: item.id,
      title: item.path,
      what: item.type,
      text: `${item.path} ${item.type}`,
    }));
  const nodes = view.stage.nodes.map((node) => ({
    id: `node:${node.name}`,
    name: node.name,
    title: node.name,
    what: [node.module, node.target].filter(Boolean).join(" · "),
    text: [node.name, node.module, node.target, node.block, node.module_type].join(" "),
  }));
  const found = [...groups, ...nodes].filter((entry) => entry.text.toLowerCase().includes(text));
  const rank = ({ title }) =>
    title.toLowerCase() === text ? 0 : title.toLowerCase().includes(text) ? 1 : 2;
  return found.sort((a, b) => rank(a) - rank(b));
}

function runSearch() {
  const input = byId("search-input");
  const found = findMatches(input.value);
  view.found = found;
  view.results = found.slice(0, MOST_RESULTS);
  markItems();
  const rows = view.results.map((entry, index) =>
    html(
      "li",
      { role: "option", id: `result-${index}`, "aria-selected": "false" },
      html("span", { class: "name" }, entry.title),
      html("span", { class: "what" }, entry.what),
    ),
  );
  if (found.length > rows.length)
    rows.push(
      html(
        "li",
        { role: "presentation", class: "what" },
        `and ${plural(found.length - rows.length, "other")}`,
      ),
    );
  if (input.value.trim() && found.length === 0)
    rows.push(html("li", { role: "presentation", class: "what" }, "nothing found"));
  showResults(rows);
  if (input.value.trim()) announce(`${plural(found.length, "result")}`);
}

function showResults(rows) {
  const list = byId("search-results");
  list.replaceChildren(...rows);
  list.hidden = rows.length === 0;
  byId("search-input").setAttribute("aria-expanded", String(rows.length > 0));
  pointAt(rows.length > 0 ? 0 : -1);
}

// What stands for each match in the graph as it is drawn: itself, or the closed group around it.
function drawnMatches() {
  const ids = new Set();
  for (const { id } of view.found) {
    const item = view.hierarchy.items.get(id);
    const standIn =
      item && [item, ...ancestors(item)].find((candidate) => view.drawn.has(candidate.id));
    if (standIn) ids.add(standIn.id);
  }
  return ids;
}

function pointAt(index) {
  view.result = index;
  const input = byId("search-input");
  byId("search-results")
    .querySelectorAll("[role=option]")
    .forEach((row, position) => {
      row.setAttribute("aria-selected", String(position === index));
      if (position === index) scrollInto(byId("search-results"), row);
    });
  if (index >= 0 && view.results.length)
    input.setAttribute("aria-activedescendant", `result-${index}`);
  else input.removeAttribute("aria-activedescendant");
}

function chooseResult(index) {
  const entry = view.results[index];
  if (!entry) return;
  showResults([]);
  if (entry.name !== undefined) selectNode(entry.name, { focus: true });
  else selectItem(view.hierarchy.items.get(entry.id), { focus: true });
}

function clearSearch() {
  byId("search-input").value = "";
  runSearch();
}

function connectSearch() {
  const input = byId("search-input");
  input.addEventListener("input", runSearch);
  input.addEventListener("blur", () => showResults([]));
  input.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const count = view.results.length;
    if (step && count) pointAt((view.result + step + count) % count);
    else if (event.key === "Enter") chooseResult(Math.max(0, view.result));
    else if (event.key === "Escape") leaveSearch();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  const results = byId("search-results");
  results.addEventListener("pointerdown", (event) => event.preventDefault()); // keeps the focus
  results.addEventListener("click", (event) => {
    const row = event.target.closest("[role=option]");
    if (row) chooseResult(Number(row.id.slice("result-".length)));
  });
}

// The first Escape empties the field, the second goes back to the graph.
function leaveSearch() {
  if (byId("search-input").value !== "") clearSearch();
  else focusGraph();
}
