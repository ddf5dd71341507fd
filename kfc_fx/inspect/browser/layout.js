// Positions, group by group: a group that opens or closes moves only what is around it.

const LINE = { height: 44, character: 6.9, padding: 26, minimum: 84, maximum: 308, step: 14 };
const HEADER = 30;
const MARGIN = 14;
const BARE = { nodesep: 22, ranksep: 30, edgesep: 12, marginx: MARGIN, marginy: MARGIN };

// Size of an item; an open group is laid out for it.
function sizeOf(item, view) {
  if (item.isGroup && view.expanded.has(item.id)) {
    const layout = layoutGroup(item, view);
    return { width: layout.width, height: layout.height + HEADER };
  }
  const captions = captionOf(item, view);
  const room = item.isGroup ? 22 : isRounded(item) ? 16 : 0; // for the toggle, for the round ends
  return { width: textWidth(...captions) + room, height: LINE.height };
}

// Widths go in steps, so that groups whose names differ in a digit have one shape.
function textWidth(...texts) {
  const longest = Math.max(...texts.map((text) => text.length));
  const width = Math.ceil((longest * LINE.character + LINE.padding) / LINE.step) * LINE.step;
  return Math.min(LINE.maximum, Math.max(LINE.minimum, width));
}

// Texts cut to the width that an item may have at most.
function fitText(text) {
  const longest = Math.floor((LINE.maximum - LINE.padding) / LINE.character);
  return text.length <= longest ? text : `${text.slice(0, longest - 1)}…`;
}

function isRounded(item) {
  return !item.isGroup && ["probe", "emission", "input", "output"].includes(item.node.role);
}

// Two lines: the name, and what it is or costs.
function captionOf(item, view) {
  if (view.colouring === "cost" && flopsOf(item) > 0) {
    const share = percentText(flopsOf(item) / model.totalFlops);
    return [fitText(item.label), `${shortNumber(flopsOf(item))}FLOPs · ${share}`];
  }
  if (item.isGroup) {
    const blocks = item.blocks.size > 1 ? plural(item.blocks.size, "block") : "";
    const what = [item.type, blocks || plural(item.size, "node")].filter(Boolean).join(" · ");
    return [fitText(item.label), fitText(what)];
  }
  const { node } = item;
  const operation = node.role === "probe" ? "" : shortTarget(node);
  return [
    fitText(item.label),
    fitText([operation, shapeText(node.shape)].filter(Boolean).join(" ")),
  ];
}

function shortTarget(node) {
  if (isStored(node)) return node.role === "parameter" ? "parameter" : "buffer";
  if (node.role === "input" || node.role === "output") return node.role;
  const parts = node.target.split(/[.:]+/);
  const isOverload = parts.length === 2 && !["torch", "operator", "_operator"].includes(parts[0]);
  return node.op === "call_function" && isOverload ? parts[0] : parts.at(-1); // unflatten.int
}

// Positions of a group's children and the lines of its edges, kept until `forgetLayout`.
function layoutGroup(group, view) {
  group.layout ??= computeLayout(group, view);
  return group.layout;
}

function forgetLayout(item) {
  for (let group = item; group; group = group.parent) group.layout = null;
}

// Groups of one shape, as repeated blocks are, are laid out once.
const layoutsByShape = new Map();

function computeLayout(group, view) {
  const sizes = group.children.map((child) => sizeOf(child, view));
  const order = new Map(group.children.map((child, position) => [child.id, String(position)]));
  const edges = [...group.edges.values()];
  const ends = edges.map(({ from, to, flow }) => [
    order.get(from) ?? from,
    order.get(to) ?? to,
    flow === "data" ? 3 : 1,
  ]);
  const shape = JSON.stringify([sizes, ends]);
  if (!layoutsByShape.has(shape)) layoutsByShape.set(shape, positionsOf(sizes, ends));
  return readLayout(group, edges, sizes, layoutsByShape.get(shape), view);
}

// Middles of the boxes and bends of the edges; boxes go by their positions in the group.
function positionsOf(sizes, ends) {
  const graph = new dagre.graphlib.Graph();
  graph.setGraph({
    ...BARE,
    rankdir: "TB",
    ranker: sizes.length > 80 ? "longest-path" : "network-simplex",
  });
  sizes.forEach((size, position) => graph.setNode(String(position), { ...size }));
  for (const [from, to, weight] of ends) {
    for (const end of [from, to])
      if (end.startsWith("port:")) graph.setNode(end, { width: 8, height: 4 });
    graph.setEdge(from, to, { weight });
  }
  dagre.layout(graph);
  const { width, height } = graph.graph();
  const middle = (name) =>
    graph.hasNode(name) ? { x: graph.node(name).x, y: graph.node(name).y } : null;
  return {
    width: Number.isFinite(width) ? width : 0,
    height: Number.isFinite(height) ? height : 0,
    middles: sizes.map((_, position) => middle(String(position))),
    bends: ends.map(([from, to]) => graph.edge(from, to).points),
    inPort: middle(IN_PORT),
    outPort: middle(OUT_PORT),
  };
}

function readLayout(group, edges, sizes, positions, view) {
  const { height } = positions;
  const width = Math.max(positions.width, textWidth(group.label, group.type) + 60);
  const shift = (width - positions.width) / 2; // a title wider than what is under it
  const boxes = new Map(
    group.children.map((child, position) => {
      const { x, y } = positions.middles[position];
      const size = sizes[position];
      return [child.id, { x: x - size.width / 2 + shift, y: y - size.height / 2, ...size }];
    }),
  );
  const port = (middle, y) => middle && { x: middle.x + shift, y };
  const layout = {
    width,
    height,
    boxes,
    inPort: port(positions.inPort, 0),
    outPort: port(positions.outPort, height),
  };
  const open = new Map(
    group.children.filter((c) => c.isGroup && view.expanded.has(c.id)).map((c) => [c.id, c]),
  );
  layout.lines = edges.map((edge, index) => {
    const bends = positions.bends[index].map(({ x, y }) => ({ x: x + shift, y }));
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
  if (points.length === 3) points[1].x = (points[0].x + points[2].x) / 2; // no hook at a moved end
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
    const middle = {
      x: (rest[index].x + rest[index + 1].x) / 2,
      y: (rest[index].y + rest[index + 1].y) / 2,
    };
    const end = index === rest.length - 2 ? last : middle;
    path += `Q${round(rest[index].x)},${round(rest[index].y)} ${round(end.x)},${round(end.y)}`;
  }
  return rest.length === 1 ? `${path}L${round(last.x)},${round(last.y)}` : path;
}

function round(value) {
  return Math.round(value * 10) / 10;
}
