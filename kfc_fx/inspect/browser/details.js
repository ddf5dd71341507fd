// The right panel: what is known of the selected item.

function drawDetails() {
  const item = view.hierarchy.items.get(view.selected);
  let content = overview();
  if (item)
    content = [closeButton(), ...(item.isGroup ? groupDetails(item) : nodeDetails(item.node))];
  byId("details").replaceChildren(...content.filter(Boolean));
  byId("details").scrollTop = 0;
}

function closeButton() {
  const button = html(
    "button",
    { type: "button", class: "close", title: "Back to the overview ( Esc )" },
    "Overview",
  );
  button.addEventListener("click", clearSelection);
  return button;
}

function groupDetails(group) {
  const facts = [
    ["module", group.path],
    ["type", group.type],
    ["call", group.occurrence ? group.occurrence + 1 : ""],
    ["nodes", group.size],
    ["blocks", group.blocks.size],
    ["emissions", group.emissions],
    ["statistics", costText(group.flops)],
  ];
  const single = group.blocks.size === 1 ? [...group.blocks][0] : null;
  return [
    html("h2", {}, group.label),
    factList(facts),
    ...(single
      ? blockSections(single)
      : linkSection("Blocks", [...group.blocks], (name) => selectBlocks([name]))),
  ];
}

function costText(flops) {
  return flops ? `${shortNumber(flops)}FLOPs, ${percentText(flops / model.totalFlops)} of all` : "";
}

function nodeDetails(node) {
  const users = view.stage.nodes
    .filter((other) => other.args.includes(node.name))
    .map((other) => other.name);
  const facts = [
    ["role", node.role],
    ["op", node.op],
    ["target", node.target],
    ["shape", shapeText(node.shape)],
    ["dtype", node.dtype],
    ["module", node.module],
    ["type", node.module_type],
    ["source", node.source],
    ["made by", madeBy(node)],
  ];
  return [
    html("h2", {}, node.name),
    factList(facts),
    ...linkSection("Arguments", [...new Set(node.args)], selectNode),
    ...linkSection("Used by", users, selectNode),
    ...(node.block ? blockSections(node.block) : []),
  ];
}

function madeBy(node) {
  return view.graph.stages.findLast(
    (stage) =>
      stage.position > 0 &&
      stage.position <= view.stage.position &&
      stage.created.includes(node.name),
  )?.name;
}

function linkSection(title, names, choose) {
  if (names.length === 0) return [];
  const links = names.map((name) => {
    const button = html("button", { type: "button", class: "link" }, name);
    button.addEventListener("click", () => choose(name));
    return html("li", {}, button);
  });
  return [html("h3", {}, `${title} (${names.length})`), html("ul", { class: "links" }, ...links)];
}

function blockSections(name) {
  const block = model.blockByName.get(name);
  if (!block) return [];
  return [html("h3", {}, `Block ${name}`), factList(blockFacts(block)), ...factorSection(name)];
}

function blockFacts(block) {
  const stack = html("button", { type: "button", class: "link" }, String(block.stack ?? ""));
  stack.addEventListener("click", () =>
    selectBlocks(
      model.blocks.filter((other) => other.stack === block.stack).map((other) => other.name),
    ),
  );
  return [
    ["kind", block.kind],
    ["weight", block.weight],
    ["bias", block.bias],
    ["[W b]", `${block.rows} × ${block.columns}`],
    ["groups", block.groups > 1 ? block.groups : ""],
    ["locations", block.locations],
    ["geometry", block.geometry],
    ["form", block.form],
    ["method", block.method],
    ["why", block.why],
    ["stack", block.stack ? stack : ""],
    ["memory", bytesText(block.bytes)],
    ["statistics", costText(block.flops)],
    ["uses", block.uses],
  ];
}
