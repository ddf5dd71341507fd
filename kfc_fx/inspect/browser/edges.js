// Edges between nodes become edges between the children of the group that holds both, and
// between a child and its group's ports, through which they enter and leave.

const IN_PORT = "port:in";
const OUT_PORT = "port:out";

function projectEdges(hierarchy, nodes) {
  for (const node of nodes) {
    const user = hierarchy.byNode.get(node.name);
    for (const name of node.args) {
      const source = hierarchy.byNode.get(name);
      if (!source) continue;
      // A statistic leaves through its probe's gradient, against the direction of the argument.
      if (source.node.role === "probe") addEdge(user, source, "statistic");
      else addEdge(source, user, isBookkeeping(source.node, hierarchy.made) ? "parameter" : "data");
    }
  }
}

function addEdge(source, target, flow) {
  const sourceLine = [source, ...ancestors(source)];
  const targetLine = [target, ...ancestors(target)];
  while (
    sourceLine.length > 1 &&
    targetLine.length > 1 &&
    sourceLine.at(-2) === targetLine.at(-2)
  ) {
    sourceLine.pop();
    targetLine.pop();
  }
  const common = sourceLine.at(-1);
  record(common, sourceLine.at(-2).id, targetLine.at(-2).id, flow);
  for (let depth = 0; depth < sourceLine.length - 2; depth += 1) {
    record(sourceLine[depth + 1], sourceLine[depth].id, OUT_PORT, flow);
  }
  for (let depth = 0; depth < targetLine.length - 2; depth += 1) {
    record(targetLine[depth + 1], IN_PORT, targetLine[depth].id, flow);
  }
}

function record(group, from, to, flow) {
  const key = `${from}\n${to}`;
  const edge = group.edges.get(key);
  if (edge) edge.count += 1;
  else group.edges.set(key, { from, to, flow, count: 1 });
}

// Children of the item's own group that it feeds (`"to"`) or is fed by (`"from"`).
function neighboursOf(item, side) {
  const other = side === "to" ? "from" : "to";
  const found = [];
  for (const edge of item.parent.edges.values()) {
    if (edge[other] === item.id && !edge[side].startsWith("port:")) found.push(edge[side]);
  }
  return found;
}
