// The graph as SVG: one element per item, nested as the modules are, each a tree item.

// Draws what is not drawn yet and moves the rest: elements are kept from one drawing to the next.
function drawGraph() {
  const { root } = view.hierarchy;
  layoutGroup(root, view);
  view.places = new Map();
  view.drawn = new Map();
  drawInside(root, byId("scene"), 1);
  register(root, 0, 0);
  markItems();
}

// Edges and items of an open group, in its container.
function drawInside(group, container, level) {
  const edges = drawEdges(group.layout);
  if (container.firstChild) container.firstChild.replaceWith(edges);
  else container.append(edges);
  for (const child of group.children) {
    const before = child.element?.parentNode === container ? child.element : null;
    const drawn = drawItem(child, group.layout.boxes.get(child.id), level);
    if (!before) container.append(drawn);
    else if (before !== drawn) before.replaceWith(drawn);
  }
}

function drawEdges(layout) {
  const lines = svg("g", { class: "edges", "aria-hidden": "true" });
  for (const { points, flow, to } of layout.lines) {
    const head = to === OUT_PORT ? null : `url(#arrow-${flow})`;
    lines.append(
      svg("path", { d: pathThrough(points), class: `edge ${flow}`, "marker-end": head }),
    );
  }
  for (const port of [layout.inPort, layout.outPort]) {
    if (port) lines.append(svg("circle", { cx: port.x, cy: port.y, r: 3, class: "port" }));
  }
  return lines;
}

// Absolute places and elements of everything that is drawn.
function register(group, left, top) {
  for (const child of group.children) {
    const box = group.layout.boxes.get(child.id);
    const place = { ...box, x: left + box.x, y: top + box.y };
    view.places.set(child.id, place);
    view.drawn.set(child.id, child.element);
    if (child.isGroup && view.expanded.has(child.id)) register(child, place.x, place.y + HEADER);
  }
}

function drawItem(item, box, level) {
  const open = item.isGroup && view.expanded.has(item.id);
  const look = [open, view.colouring, open || box.width].join();
  if (item.look !== look) {
    item.look = look;
    item.element = newElement(item, open, level);
    item.shownLayout = null;
    if (open) drawOpen(item);
    else drawClosed(item.element, item, box);
  }
  item.element.setAttribute("transform", `translate(${box.x},${box.y})`);
  if (open && item.shownLayout !== item.layout) {
    item.shownLayout = item.layout;
    fitOpen(item, box);
    drawInside(item, item.inside, level + 1);
  }
  return item.element;
}

function newElement(item, open, level) {
  const drawn = svg("g", {
    class: `item ${item.isGroup ? "group" : item.node.role}${open ? " open" : ""}`,
    "data-id": item.id,
    tabindex: -1,
    role: "treeitem",
    "aria-level": level,
    "aria-label": spokenName(item),
    "aria-expanded": item.isGroup ? String(open) : null,
  });
  setTint(drawn, item, view);
  return drawn;
}

function drawClosed(drawn, item, box) {
  const [first, second] = captionOf(item, view);
  const rounding = isRounded(item) ? box.height / 2 : 5;
  if (item.isGroup) {
    drawn.append(
      svg("rect", { class: "behind", x: 4, y: 4, width: box.width, height: box.height, rx: 5 }),
    );
  }
  drawn.append(svg("rect", { class: "box", width: box.width, height: box.height, rx: rounding }));
  const indent = isRounded(item) ? 20 : 12;
  drawn.append(svg("text", { class: "name", x: indent, y: second ? 19 : 27 }, first));
  if (second) drawn.append(svg("text", { class: "what", x: indent, y: 34 }, second));
  if (item.isGroup) {
    drawn.append(drawToggle(box.width - 15, 14, false));
    drawKinds(drawn, item, box);
  }
}

function drawOpen(group) {
  group.inside = svg("g", { role: "group", transform: `translate(0,${HEADER})` });
  group.element.append(
    svg("rect", { class: "box", rx: 7 }),
    svg("rect", { class: "title", height: HEADER - 6, rx: 7 }),
    svg(
      "text",
      { class: "name", x: 10, y: 17 },
      fitText(group.label),
      svg("tspan", { class: "what", dx: 8 }, group.type),
    ),
    drawToggle(0, 12, true),
    group.inside,
  );
}

// An open group's frame, as large as what it holds.
function fitOpen(group, box) {
  const [frame, title, , toggle] = group.element.children;
  frame.setAttribute("width", box.width);
  frame.setAttribute("height", box.height);
  title.setAttribute("width", box.width);
  toggle.setAttribute("transform", `translate(${box.width - 15},0)`);
}

function drawToggle(x, y, open) {
  const sign = open ? `M${x - 4},${y}H${x + 4}` : `M${x - 4},${y}H${x + 4}M${x},${y - 4}V${y + 4}`;
  return svg(
    "g",
    { class: "toggle" },
    svg("title", {}, open ? "Collapse (Enter)" : "Expand (Enter)"),
    svg("rect", { x: x - 11, y: y - 11, width: 22, height: 22, rx: 4 }),
    svg("path", { d: sign }),
  );
}

// A strip with the kinds of the blocks inside, as wide as they are many.
function drawKinds(drawn, group, box) {
  if (group.kinds.size < 2 || view.colouring === "cost") return;
  const total = [...group.kinds.values()].reduce((sum, count) => sum + count, 0);
  let x = 5;
  for (const [kind, count] of group.kinds) {
    const width = ((box.width - 10) * count) / total;
    const strip = svg("rect", { class: "kind", x, y: box.height - 5, width, height: 4 });
    strip.style.setProperty("--tint", kindColour(kind));
    drawn.append(strip);
    x += width;
  }
}

function spokenName(item) {
  if (item.isGroup) {
    const statistics = item.emissions ? `, ${plural(item.emissions, "emission")}` : "";
    return `${item.label} ${item.type}, ${plural(item.size, "node")}${statistics}`;
  }
  const { node } = item;
  return [
    item.label,
    node.role,
    node.target,
    shapeText(node.shape),
    node.block && `block ${node.block}`,
  ]
    .filter(Boolean)
    .join(", ");
}

// Selection, matches and the one item that Tab reaches, on what is drawn already.
function markItems() {
  const matches = drawnMatches();
  const tabStop = view.drawn.has(view.selected)
    ? view.selected
    : view.hierarchy.root.children[0]?.id;
  for (const [id, drawn] of view.drawn) {
    drawn.setAttribute("tabindex", id === tabStop ? 0 : -1);
    drawn.setAttribute("aria-selected", String(id === view.selected));
    drawn.classList.toggle("selected", id === view.selected);
    drawn.classList.toggle("related", view.related.has(id));
    drawn.classList.toggle("match", matches.has(id));
  }
}

function connectGraph() {
  const area = byId("graph");
  const itemAt = (event) => view.hierarchy.items.get(event.target.closest(".item")?.dataset.id);
  area.addEventListener("click", (event) => {
    const item = itemAt(event);
    if (item && event.target.closest(".toggle")) toggleGroup(item);
    if (item) selectItem(item, { focus: true });
    else clearSelection();
  });
  area.addEventListener("dblclick", (event) => {
    const item = itemAt(event);
    if (item?.isGroup && !event.target.closest(".toggle")) toggleGroup(item);
  });
}
