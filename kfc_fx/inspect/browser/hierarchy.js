// Nodes of a stage, nested as the modules that ran them.
//
// An item is a node or a group. A group is one run of a module: a module that is called
// again later is a second group, so that the nested graph has no cycles.

const LONGEST_GROUP = 160; // children, before they are folded: layout time grows faster than they
const FOLD = 40;

// Items of a stage; with `parameters`, also parameters, buffers and row counts.
function buildHierarchy(graph, stage, parameters) {
  const made = namesMadeByPasses(graph, stage);
  const used = new Set(stage.nodes.flatMap((node) => node.args));
  // A size that no node reads.
  const isIdle = (node) => node.role === "input" && !node.shape && !used.has(node.name);
  const shown = stage.nodes.filter(
    (node) => parameters || !(isBookkeeping(node, made) || isIdle(node)),
  );
  const root = newGroup("", null, 0);
  const hierarchy = {
    root,
    made,
    items: new Map(),
    byNode: new Map(),
  };
  const deferred = placeByModule(hierarchy, shown, made);
  placeDeferred(hierarchy, deferred, shown);
  promoteSingles(root);
  foldLongGroups(root);
  summarise(hierarchy, root);
  projectEdges(hierarchy, shown);
  return hierarchy;
}

// What the model holds, and the numbers of rows that the passes count: no tensor flows there.
function isBookkeeping(node, made) {
  return (
    isStored(node) || (node.role === "op" && made.has(node.name) && !node.shape && !node.module)
  );
}

function newGroup(path, parent, occurrence) {
  return {
    id: `module:${path}#${occurrence}`,
    path,
    parent,
    occurrence,
    isGroup: true,
    label: path.split(".").at(-1),
    type: "",
    children: [],
    layout: null,
    edges: new Map(),
  };
}

function addNode(hierarchy, node, group) {
  const item = {
    id: `node:${node.name}`,
    node,
    parent: group,
    isGroup: false,
    label: nodeLabel(node),
  };
  group.children.push(item);
  hierarchy.byNode.set(node.name, item);
  if (node.module && node.module === group.path) group.type ||= node.module_type;
}

function nodeLabel(node) {
  if (isStored(node)) return storedName(node.target);
  if (node.role !== "probe") return node.name;
  const symbol = { omega: "Ω", gamma: "Γ" };
  const factor = node.name.split("_").at(-1);
  return symbol[factor] ?? factor;
}

// Last part of a parameter's path, which dynamo spells L_model_modules_fc_parameters_weight_.
function storedName(target) {
  return /(?:parameters|buffers)_(.+?)_?$/.exec(target)?.[1] ?? target.split(".").at(-1);
}

// Nodes with a module of their own; the rest is returned, to be placed beside a neighbour.
function placeByModule(hierarchy, nodes, made) {
  const occurrences = new Map();
  const deferred = [];
  let open = hierarchy.root;
  for (const node of nodes) {
    const follows =
      isStored(node) || node.role === "probe" || (made.has(node.name) && !node.module);
    if (follows && node.role !== "output") {
      deferred.push(node);
      continue;
    }
    const path = node.role === "input" || node.role === "output" ? "" : node.module || "";
    while (!isInside(path, open.path)) open = open.parent;
    while (open.path !== path) open = openGroup(open, path, occurrences);
    addNode(hierarchy, node, open);
  }
  return deferred;
}

function isInside(path, outer) {
  return outer === "" || path === outer || path.startsWith(`${outer}.`);
}

function openGroup(parent, target, occurrences) {
  const rest = parent.path === "" ? target : target.slice(parent.path.length + 1);
  const path =
    parent.path === "" ? rest.split(".", 1)[0] : `${parent.path}.${rest.split(".", 1)[0]}`;
  const occurrence = occurrences.get(path) ?? 0;
  occurrences.set(path, occurrence + 1);
  const group = newGroup(path, parent, occurrence);
  if (occurrence > 0) group.label += ` ·${occurrence + 1}`;
  parent.children.push(group);
  return group;
}

// A parameter or probe stands beside its first user, another node beside its first argument.
function placeDeferred(hierarchy, deferred, nodes) {
  const firstUser = new Map();
  for (const node of nodes) {
    for (const name of node.args) if (!firstUser.has(name)) firstUser.set(name, node.name);
  }
  const place = (node) => {
    const placed = hierarchy.byNode;
    const neighbours = [firstUser.get(node.name), ...node.args].filter((name) => placed.has(name));
    const fromArguments = node.args.find(
      (name) => placed.has(name) && placed.get(name).parent !== hierarchy.root,
    );
    const source = node.args.length === 0 ? neighbours[0] : (fromArguments ?? neighbours[0]);
    addNode(hierarchy, node, source === undefined ? hierarchy.root : placed.get(source).parent);
  };
  deferred.filter((node) => node.args.length > 0).forEach(place);
  deferred.filter((node) => node.args.length === 0).forEach(place);
}

// A group of one node is drawn as that node, under the module's name.
function promoteSingles(group) {
  group.children = group.children.map((child) => {
    if (!child.isGroup) return child;
    promoteSingles(child);
    const only = child.children[0];
    if (child.children.length !== 1 || only.isGroup) return child;
    return Object.assign(only, { label: child.label, parent: group, isModule: true });
  });
}

// Long runs of plain nodes, as a model without modules has, are folded piece by piece.
function foldLongGroups(group) {
  group.children.filter((child) => child.isGroup).forEach(foldLongGroups);
  if (group.children.length <= LONGEST_GROUP) return;
  const isFoldable = (child) => child.isGroup || !["input", "output"].includes(child.node.role);
  const folded = group.children.filter(isFoldable);
  const kept = group.children.filter((child) => !isFoldable(child));
  const folds = [];
  for (let start = 0; start < folded.length; start += FOLD) {
    const piece = folded.slice(start, start + FOLD);
    const fold = {
      ...newGroup(group.path, group, 0),
      id: `${group.id}/${start}`,
      children: piece,
      edges: new Map(),
    };
    fold.label = `${start + 1} to ${start + piece.length}`;
    piece.forEach((child) => {
      child.parent = fold;
    });
    folds.push(fold);
  }
  group.children = [...kept, ...folds];
}

// Counts and costs of every group, from the inside outwards; registers the items that are left.
function summarise(hierarchy, group) {
  Object.assign(group, { size: 0, emissions: 0, flops: 0, kinds: new Map(), blocks: new Set() });
  for (const child of group.children) {
    hierarchy.items.set(child.id, child);
    if (child.isGroup) summarise(hierarchy, child);
    const inner = child.isGroup ? child : summaryOfNode(child.node);
    group.size += inner.size;
    group.emissions += inner.emissions;
    inner.blocks.forEach((name) => group.blocks.add(name));
  }
  for (const name of group.blocks) {
    const block = model.blockByName.get(name);
    if (!block) continue;
    group.flops += block.flops || 0;
    group.kinds.set(block.kind, (group.kinds.get(block.kind) || 0) + 1);
  }
}

function summaryOfNode(node) {
  return {
    size: 1,
    emissions: node.role === "emission" ? 1 : 0,
    blocks: node.block ? [node.block] : [],
  };
}

function ancestors(item) {
  const found = [];
  for (let group = item.parent; group; group = group.parent) found.push(group);
  return found;
}
