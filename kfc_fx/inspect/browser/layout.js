// Positions, group by group: a group that opens or closes moves only what is around it.

const LINE = { height: 44, character: 6.9, padding: 26, minimum: 84, maximum: 300 };
const HEADER = 30;
const MARGIN = 14;
const BARE = { nodesep: 22, ranksep: 30, edgesep: 12, marginx: MARGIN, marginy: MARGIN };

// Size of an item; an open group is laid out for it.
function sizeOf(item, view) {
  if (item.isGroup && view.expanded.has(item.id)) {
    const layout = layoutGroup(item, view);
    return { width: layout.width, height: layout.height + HEADER };
  }
  const captions = captionOf(item);
  const room = item.isGroup ? 22 : isRounded(item) ? 16 : 0; // for the toggle, for the round ends
  return { width: textWidth(...captions) + room, height: LINE.height };
}

function textWidth(...texts) {
  const longest = Math.max(...texts.map((text) => text.length));
  return Math.min(LINE.maximum, Math.max(LINE.minimum, longest * LINE.character + LINE.padding));
}

// Texts cut to the width that an item may have at most.
function fitText(text) {
  const longest = Math.floor((LINE.maximum - LINE.padding) / LINE.character);
  return text.length <= longest ? text : `${text.slice(0, longest - 1)}…`;
}

function isRounded(item) {
  return !item.isGroup && ["probe", "emission", "input", "output"].includes(item.node.role);
}

// Two lines: the name, and what it is.
function captionOf(item) {
  if (item.isGroup) {
    const blocks = item.blocks.size > 1 ? plural(item.blocks.size, "block") : "";
    const what = [item.type, blocks || plural(item.size, "node")].filter(Boolean).join(" · ");
    return [fitText(item.label), fitText(what)];
  }
  const { node } = item;
  const operation = node.role === "probe" ? "" : shortTarget(node);
  return [fitText(item.label), fitText([operation, shapeText(node.shape)].filter(Boolean).join(" "))];
}

function shortTarget(node) {
  if (node.role === "input" || node.role === "output" || node.role === "parameter") return node.role;
  return node.target.split(/[.:]/).at(-1);
}

// Positions of a group's children and the lines of its edges, kept until `forgetLayout`.
function layoutGroup(group, view) {
  group.layout ??= computeLayout(group, view);
  return group.layout;
}

function forgetLayout(item) {
  for (let group = item; group; group = group.parent) group.layout = null;
}

function computeLayout(group, view) {
  const graph = new dagre.graphlib.Graph();
  graph.setGraph({ ...BARE, rankdir: "TB", ranker: group.children.length > 80 ? "longest-path" : "network-simplex" });
  graph.setDefaultEdgeLabel(() => ({}));
  for (const child of group.children) graph.setNode(child.id, sizeOf(child, view));
  for (const edge of group.edges.values()) {
    for (const end of [edge.from, edge.to]) {
      if (end.startsWith("port:")) graph.setNode(end, { width: 8, height: 4 });
    }
    graph.setEdge(edge.from, edge.to, { weight: edge.flow === "data" ? 3 : 1 });
  }
  dagre.layout(graph);
  return readLayout(group, graph, view);
}

function readLayout(group, graph, view) {
  const inner = graph.graph();
  const height = Number.isFinite(inner.height) ? inner.height : 0;
  const width = Math.max(Number.isFinite(inner.width) ? inner.width : 0, textWidth(group.label, group.type) + 60);
  const shift = (width - (inner.width || 0)) / 2; // a title wider than what is under it
  const boxes = new Map();
  for (const { id } of group.children) {
    const node = graph.node(id);
    const corner = { x: node.x - node.width / 2 + shift, y: node.y - node.height / 2 };
    boxes.set(id, { ...corner, width: node.width, height: node.height });
  }
  const port = (name, y) => (graph.hasNode(name) ? { x: graph.node(name).x + shift, y } : null);
  const layout = { width, height, boxes, inPort: port(IN_PORT, 0), outPort: port(OUT_PORT, height) };
  const open = new Map(group.children.filter((c) => c.isGroup && view.expanded.has(c.id)).map((c) => [c.id, c]));
  layout.lines = [...group.edges.values()].map((edge) => {
    const bends = graph.edge(edge.from, edge.to).points.map(({ x, y }) => ({ x: x + shift, y }));
    return { ...edge, points: linePoints(edge, bends, layout, open) };
  });
  return layout;
}

// A line ends at the port of an open group, else at the border of the box.
function linePoints(edge, points, layout, open) {
  const source = open.get(edge.from)?.layout.outPort;
  const target = open.get(edge.to)?.layout.inPort;
  if (edge.from === IN_PORT) points[0] = layout.inPort;
  if (edge.to === OUT_PORT) points[points.length - 1] = layout.outPort;
  if (source) points[0] = portAt(layout.boxes.get(edge.from), source, true);
  if (target) points[points.length - 1] = portAt(layout.boxes.get(edge.to), target, false);
  return points;
}

function portAt(box, port, atBottom) {
  return { x: box.x + port.x, y: atBottom ? box.y + box.height : box.y };
}

// A smooth path through the points.
function pathThrough(points) {
  const [first, ...rest] = points;
  const last = rest.at(-1);
  let path = `M${round(first.x)},${round(first.y)}`;
  for (let index = 0; index < rest.length - 1; index += 1) {
    const middle = { x: (rest[index].x + rest[index + 1].x) / 2, y: (rest[index].y + rest[index + 1].y) / 2 };
    const end = index === rest.length - 2 ? last : middle;
    path += `Q${round(rest[index].x)},${round(rest[index].y)} ${round(end.x)},${round(end.y)}`;
  }
  return rest.length === 1 ? `${path}L${round(last.x)},${round(last.y)}` : path;
}

function round(value) {
  return Math.round(value * 10) / 10;
}
