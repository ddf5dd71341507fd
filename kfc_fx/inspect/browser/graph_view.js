// The graph as SVG: one element per item, nested as the modules are, each a tree item.

function drawGraph() {
  const { root } = view.hierarchy;
  const layout = layoutGroup(root, view);
  view.places = new Map();
  view.drawn = new Map();
  byId("scene").replaceChildren(...drawInside(root, layout, 0, 0, 1));
  markItems();
}

// Edges and items of an open group whose content begins at (left, top) of the scene.
function drawInside(group, layout, left, top, level) {
  const lines = svg("g", { class: "edges", "aria-hidden": "true" });
  for (const edge of layout.lines) {
    const classes = `edge ${edge.flow}`;
    lines.append(svg("path", { d: pathThrough(edge.points), class: classes, "marker-end": edge.to === OUT_PORT ? null : `url(#arrow-${edge.flow})` }));
  }
  for (const port of [layout.inPort, layout.outPort]) {
    if (port) lines.append(svg("circle", { cx: port.x, cy: port.y, r: 3, class: "port" }));
  }
  const items = group.children.map((child) => drawItem(child, layout.boxes.get(child.id), left, top, level));
  return level === 1 ? [arrowHeads(), lines, ...items] : [lines, ...items];
}

function arrowHeads() {
  const heads = ["data", "parameter", "statistic"].map((flow) => svg("marker", {
    id: `arrow-${flow}`, viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7,
    orient: "auto-start-reverse", class: `head ${flow}`,
  }, svg("path", { d: "M0,0L8,4L0,8z" })));
  return svg("defs", {}, ...heads);
}

function drawItem(item, box, left, top, level) {
  const place = { x: left + box.x, y: top + box.y, width: box.width, height: box.height };
  view.places.set(item.id, place);
  const open = item.isGroup && view.expanded.has(item.id);
  const drawn = svg("g", {
    class: `item ${item.isGroup ? "group" : item.node.role}${open ? " open" : ""}`,
    "data-id": item.id, transform: `translate(${box.x},${box.y})`, tabindex: -1, role: "treeitem",
    "aria-level": level, "aria-label": spokenName(item), "aria-expanded": item.isGroup ? String(open) : null,
  });
  setTint(drawn, item, view);
  view.drawn.set(item.id, drawn);
  if (open) drawOpen(drawn, item, box, place, level);
  else drawClosed(drawn, item, box);
  return drawn;
}

function drawClosed(drawn, item, box) {
  const [first, second] = captionOf(item, view);
  const rounding = isRounded(item) ? box.height / 2 : 5;
  if (item.isGroup) {
    drawn.append(svg("rect", { class: "behind", x: 4, y: 4, width: box.width, height: box.height, rx: 5 }));
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

function drawOpen(drawn, group, box, place, level) {
  const layout = layoutGroup(group, view);
  drawn.append(svg("rect", { class: "box", width: box.width, height: box.height, rx: 7 }));
  drawn.append(svg("rect", { class: "title", width: box.width, height: HEADER - 6, rx: 7 }));
  drawn.append(svg("text", { class: "name", x: 10, y: 17 }, fitText(group.label), svg("tspan", { class: "what", dx: 8 }, group.type)));
  drawn.append(drawToggle(box.width - 15, 12, true));
  const inside = svg("g", { role: "group", transform: `translate(0,${HEADER})` });
  inside.append(...drawInside(group, layout, place.x, place.y + HEADER, level + 1));
  drawn.append(inside);
}

function drawToggle(x, y, open) {
  const sign = open ? `M${x - 4},${y}H${x + 4}` : `M${x - 4},${y}H${x + 4}M${x},${y - 4}V${y + 4}`;
  return svg("g", { class: "toggle" },
    svg("title", {}, open ? "Collapse (Enter)" : "Expand (Enter)"),
    svg("rect", { x: x - 11, y: y - 11, width: 22, height: 22, rx: 4 }), svg("path", { d: sign }));
}

// A strip with the kinds of the blocks inside, as wide as they are many.
function drawKinds(drawn, group, box) {
  if (group.kinds.size < 2 || view.colouring === "cost") return;
  const total = [...group.kinds.values()].reduce((sum, count) => sum + count, 0);
  let x = 5;
  for (const [kind, count] of group.kinds) {
    const width = (box.width - 10) * count / total;
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
  return [item.label, node.role, node.target, shapeText(node.shape), node.block && `block ${node.block}`].filter(Boolean).join(", ");
}

// Selection, matches and the one item that Tab reaches, on what is drawn already.
function markItems() {
  const tabStop = view.drawn.has(view.selected) ? view.selected : view.hierarchy.root.children[0]?.id;
  for (const [id, drawn] of view.drawn) {
    drawn.setAttribute("tabindex", id === tabStop ? 0 : -1);
    drawn.setAttribute("aria-selected", String(id === view.selected));
    drawn.classList.toggle("selected", id === view.selected);
    drawn.classList.toggle("related", view.related.has(id));
    drawn.classList.toggle("match", view.matches.has(id));
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
