// What is selected, open and shown; every view is told from here.

function selectItem(item, { focus = false, related = [] } = {}) {
  reveal(item);
  view.selected = item.id;
  view.related = new Set(related.map((other) => other.id));
  markItems();
  markModules();
  drawDetails();
  markCode();
  showPlace(view.places.get(item.id));
  if (focus) view.drawn.get(item.id).focus({ preventScroll: true });
  announce(`${item.label} selected`);
}

function clearSelection() {
  const hadFocus = byId("graph").contains(document.activeElement);
  view.selected = null;
  view.related = new Set();
  markItems();
  markModules();
  drawDetails();
  markCode();
  if (hadFocus) focusGraph();
}

function focusGraph() {
  byId("graph").querySelector(".item[tabindex='0']")?.focus({ preventScroll: true });
}

// A node by name; parameters are brought into the graph if it is one of them.
function selectNode(name, options = {}) {
  if (!view.hierarchy.byNode.has(name) && !view.parameters) {
    byId("show-parameters").checked = true;
    showParameters(true);
  }
  const item = view.hierarchy.byNode.get(name);
  if (item) selectItem(item, options);
}

// The sites of some blocks: the first is selected, the others are marked.
function selectBlocks(names, options = {}) {
  showHomeOf(names);
  const items = names.map(siteOf).filter(Boolean);
  if (items.length === 0) return;
  selectItem(items[0], { ...options, related: items.slice(1).map(shownFor) });
}

// Shows the graph that has one of the blocks, if the shown one has none.
function showHomeOf(names) {
  const has = (stage) => stage.nodes.some((node) => names.includes(node.block));
  if (names.length === 0 || has(view.stage)) return;
  const home = model.graphs.find((graph) => graph.stages.length > 0 && has(graph.stages.at(-1)));
  if (home) showStage(home, home.stages.at(-1));
}

function siteOf(block) {
  const nodes = view.stage.nodes.filter((node) => node.block === block);
  const site = nodes.find((node) => node.role === "site") ?? nodes[0];
  return site && view.hierarchy.byNode.get(site.name);
}

// The item itself where it is drawn, else the closed group that holds it.
function shownFor(item) {
  return [item, ...ancestors(item)].find((candidate) => view.drawn.has(candidate.id)) ?? item;
}

function reveal(item) {
  const closed = ancestors(item).filter((group) => group.parent && !view.expanded.has(group.id));
  if (closed.length === 0) return;
  for (const group of closed) view.expanded.add(group.id);
  forgetLayout(item.parent);
  redraw(closed.at(-1));
}

function toggleGroup(group) {
  if (view.expanded.has(group.id)) view.expanded.delete(group.id);
  else view.expanded.add(group.id);
  const inside = view.selected && ancestorIds(view.selected).includes(group.id);
  if (inside && !view.expanded.has(group.id)) view.selected = group.id;
  forgetLayout(group);
  redraw(group);
  announce(`${group.label} ${view.expanded.has(group.id) ? "expanded" : "collapsed"}`);
}

function ancestorIds(id) {
  const item = view.hierarchy.items.get(id);
  return item ? ancestors(item).map((group) => group.id) : [];
}

function setAllExpanded(open) {
  for (const item of view.hierarchy.items.values()) {
    if (item.isGroup) item.layout = null;
    if (item.isGroup && open) view.expanded.add(item.id);
  }
  if (!open) view.expanded.clear();
  view.hierarchy.root.layout = null;
  if (!view.hierarchy.items.has(view.selected)) view.selected = null;
  redraw();
  fitScene(view.hierarchy.root.layout, open ? 0.4 : 0.75);
}

// Draws graph and modules anew; `anchor` stays where it is on the screen.
function redraw(anchor = null) {
  const before = anchor && view.places.get(anchor.id);
  drawGraph();
  drawModules();
  const after = anchor && view.places.get(anchor.id);
  if (before && after) {
    panBy(
      (before.x + before.width / 2 - after.x - after.width / 2) * viewport.scale,
      (before.y - after.y) * viewport.scale,
    );
  }
}
