// The modules as a list that opens: the same items, open or closed, as in the graph.

function drawModules() {
  const rows = [];
  const visit = (group, level) => {
    for (const child of group.children.filter((child) => child.isGroup || child.isModule)) {
      rows.push(moduleRow(child, level));
      if (child.isGroup && view.expanded.has(child.id)) visit(child, level + 1);
    }
  };
  visit(view.hierarchy.root, 1);
  byId("modules").replaceChildren(...rows);
  markModules();
}

function moduleRow(item, level) {
  const open = item.isGroup && view.expanded.has(item.id);
  const sign = item.isGroup ? (open ? "▾" : "▸") : "";
  const type = item.isGroup ? item.type : item.node.module_type;
  const row = html(
    "div",
    {
      role: "treeitem",
      class: "module",
      tabindex: -1,
      "data-id": item.id,
      "aria-level": level,
      "aria-expanded": item.isGroup ? String(open) : null,
    },
    html("span", { class: "twisty", "aria-hidden": "true" }, sign),
    html("span", { class: "name" }, item.label),
    html("span", { class: "what" }, type || ""),
  );
  row.style.setProperty("--level", level);
  setTint(row, item, view);
  return row;
}

function markModules() {
  const rows = [...byId("modules").children];
  const chosen = rows.find((row) => row.dataset.id === view.selected);
  for (const row of rows) {
    row.setAttribute("aria-selected", String(row === chosen));
    row.setAttribute("tabindex", row === (chosen ?? rows[0]) ? 0 : -1);
  }
  if (chosen) scrollInto(byId("modules"), chosen);
}

function focusModule(id) {
  [...byId("modules").children].find((row) => row.dataset.id === id)?.focus();
}

function connectModules() {
  const tree = byId("modules");
  const itemAt = (event) => view.hierarchy.items.get(event.target.closest(".module")?.dataset.id);
  tree.addEventListener("click", (event) => {
    const item = itemAt(event);
    if (!item) return;
    if (item.isGroup && event.target.closest(".twisty")) toggleGroup(item);
    selectItem(item);
    focusModule(item.id);
  });
  tree.addEventListener("dblclick", (event) => {
    const item = itemAt(event);
    if (item?.isGroup && !event.target.closest(".twisty")) toggleGroup(item);
  });
  tree.addEventListener("keydown", (event) => {
    const item = itemAt(event);
    if (item && moveInModules(event.key, item, event.target)) event.preventDefault();
  });
}

function moveInModules(key, item, row) {
  const open = item.isGroup && view.expanded.has(item.id);
  let target = null;
  if (key === "ArrowDown") target = row.nextElementSibling?.dataset.id;
  else if (key === "ArrowUp") target = row.previousElementSibling?.dataset.id;
  else if (key === "ArrowLeft" && !open) target = item.parent.id;
  else if (key === "ArrowRight" && open) target = row.nextElementSibling?.dataset.id;
  else if (item.isGroup && ["ArrowLeft", "ArrowRight", "Enter"].includes(key)) {
    toggleGroup(item);
    target = item.id;
  } else return false;
  const moved = view.hierarchy.items.get(target);
  if (moved) selectItem(moved);
  if (moved) focusModule(moved.id);
  return true;
}
