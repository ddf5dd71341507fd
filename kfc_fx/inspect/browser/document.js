// Reads the packed document; the nodes of a stage become objects when it is first shown.

function readDocument() {
  const packed = JSON.parse(byId("document").textContent);
  const blocks = new Map(packed.blocks.map((block) => [block.name, block]));
  const flops = packed.blocks.reduce((sum, block) => sum + (block.flops || 0), 0);
  const graphs = packed.graphs.map((graph) => ({
    ...graph,
    stages: graph.stages.map((stage, position) => readStage(packed, graph, stage, position)),
  }));
  return { ...packed, graphs, blockByName: blocks, totalFlops: flops };
}

function readStage(packed, graph, stage, position) {
  const text = (index) => packed.strings[index];
  let nodes = null;
  return {
    ...stage,
    position,
    graph: graph.index,
    size: stage.nodes.length,
    created: stage.created.map(text),
    erased: stage.erased.map(text),
    get nodes() {
      nodes ??= stage.nodes.map((row) => readNode(packed, graph.rows[row]));
      return nodes;
    },
  };
}

function readNode(packed, row) {
  const node = {};
  packed.fields.forEach((field, column) => {
    const value = row[column];
    if (field === "args") node.args = value.map((index) => packed.strings[index]);
    else if (field === "shape" || value === null) node[field] = value;
    else node[field] = packed.strings[value];
  });
  return Object.assign(node, row[packed.fields.length]);
}

// Parameters and buffers: what the model holds, however the capture spells it.
function isStored(node) {
  return (
    node.role === "parameter" ||
    node.op === "get_attr" ||
    (node.role === "input" && /(^|_)buffers_/.test(node.target))
  );
}

// Names of the nodes that the passes made, which the model's own code has not.
function namesMadeByPasses(graph, stage) {
  const original = new Set(graph.stages[0].nodes.map((node) => node.name));
  return new Set(stage.nodes.map((node) => node.name).filter((name) => !original.has(name)));
}
