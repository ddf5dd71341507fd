// What colours say: a block's kind, or its share of the statistics' floating point operations.

const KIND_COLOURS = 6; // --kind-0 ... in the style sheet
const KIND_TINT = 26;
const COST_TINT = 60; // of the dearest; more would drown the text

function kindColour(kind) {
  const kinds = [...new Set(model.blocks.map((block) => block.kind))];
  const position = kinds.indexOf(kind);
  return position < 0 ? null : `var(--kind-${position % KIND_COLOURS})`;
}

function flopsOf(item) {
  if (item.isGroup) return item.flops;
  const block = item.node.role === "site" ? model.blockByName.get(item.node.block) : null;
  return block?.flops || 0;
}

// Colour and strength of an item's fill, or null for none.
function tintOf(item, view) {
  if (view.colouring === "cost") {
    const share = model.totalFlops ? flopsOf(item) / model.totalFlops : 0;
    return share > 0 ? { colour: "var(--cost)", amount: COST_TINT * Math.sqrt(share) } : null;
  }
  if (item.isGroup) {
    return item.kinds.size === 1
      ? { colour: kindColour([...item.kinds.keys()][0]), amount: KIND_TINT }
      : null;
  }
  if (["probe", "emission"].includes(item.node.role))
    return { colour: "var(--statistic)", amount: KIND_TINT };
  const block = model.blockByName.get(item.node.block);
  const colour = block && kindColour(block.kind);
  return colour ? { colour, amount: KIND_TINT } : null;
}

function setTint(drawn, item, view) {
  const tint = tintOf(item, view);
  drawn.style.setProperty("--tint", tint ? tint.colour : "var(--surface)");
  drawn.style.setProperty("--strength", tint ? `${tint.amount.toFixed(1)}%` : "0%");
}

function drawLegend(view) {
  const entries = view.colouring === "cost" ? costEntries() : kindEntries();
  byId("legend").replaceChildren(...entries);
}

function kindEntries() {
  const kinds = [...new Set(model.blocks.map((block) => block.kind))];
  const entries = kinds.map((kind) => legendEntry(kindColour(kind), 100, kind));
  return [...entries, legendEntry("var(--statistic)", 100, "statistic")];
}

function costEntries() {
  const shares = [0.01, 0.1, 0.5, 1];
  const entries = shares.map((share) =>
    legendEntry("var(--cost)", COST_TINT * Math.sqrt(share), percentText(share)),
  );
  return [html("span", {}, "share of the statistics' FLOPs"), ...entries];
}

function legendEntry(colour, amount, text) {
  const swatch = html("span", { class: "swatch", "aria-hidden": "true" });
  swatch.style.setProperty("--tint", colour);
  swatch.style.setProperty("--strength", `${amount}%`);
  return html("span", { class: "entry" }, swatch, text);
}
