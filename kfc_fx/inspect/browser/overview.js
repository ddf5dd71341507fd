// The right panel while nothing is selected: the whole model in numbers.

const DEAREST = 20;
const KEYS = [
  ["/", "search"],
  ["arrows", "along the edges, into and out of open modules"],
  ["Enter", "open or close a module"],
  ["Esc", "clear the search, then the selection"],
  ["+ − 0", "zoom in, out, to fit"],
  ["Home", "first node"],
  ["wheel, drag", "move the graph"],
  ["Ctrl + wheel", "zoom"],
  ["double click", "open or close a module"],
];

function overview() {
  const inputs = model.inputs.map(({ shape, dtype }) => `${dtype} ${shapeText(shape)}`).join(", ");
  return [
    html("h2", {}, "Overview"),
    factList([
      ["target", model.target],
      ["capture", model.capture],
      ["inputs", inputs],
      ["torch", model.torch],
    ]),
    ...summarySection(),
    ...listSection("Warnings", model.warnings, (text) => [text]),
    ...dearestSection(),
    ...listSection("Generic parameters", model.generic, ({ name, shape, reason }) => [
      html("b", {}, name),
      ` ${shapeText(shape)}: ${reason}`,
    ]),
    ...listSection("Frozen parameters", model.frozen, (name) => [name]),
    html("h3", {}, "Keys and pointer"),
    factList(KEYS),
  ];
}

function factList(facts) {
  const known = facts.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return html(
    "dl",
    {},
    ...known.flatMap(([name, value]) => [
      html("dt", {}, name),
      html("dd", {}, value instanceof Node ? value : String(value)),
    ]),
  );
}

function summarySection() {
  const facts = Object.entries(model.summary || {}).filter(
    ([, value]) => typeof value !== "object",
  );
  if (facts.length === 0) return [];
  return [
    html("h3", {}, "Summary"),
    factList(facts.map(([name, value]) => [name.replaceAll("_", " "), numberNamed(name, value)])),
  ];
}

function numberNamed(name, value) {
  return name.includes("bytes") ? bytesText(value) : shortNumber(value);
}

function listSection(title, entries, content) {
  if (!entries?.length) return [];
  return [
    html("h3", {}, `${title} (${entries.length})`),
    html("ul", {}, ...entries.map((entry) => html("li", {}, ...content(entry)))),
  ];
}

function dearestSection() {
  const blocks = [...model.blocks]
    .sort((a, b) => (b.flops || 0) - (a.flops || 0))
    .slice(0, DEAREST);
  if (blocks.length === 0) return [];
  const most = blocks[0].flops || 1;
  const rows = blocks.map((block) => {
    const bar = html("span", { class: "bar", "aria-hidden": "true" });
    bar.style.setProperty("--share", `${(100 * (block.flops || 0)) / most}%`);
    const button = html("button", { type: "button", class: "link" }, block.name);
    button.addEventListener("click", () => selectBlocks([block.name]));
    return html(
      "tr",
      {},
      html("td", {}, button),
      html("td", {}, block.kind),
      html("td", { class: "number" }, shortNumber(block.flops), bar),
    );
  });
  const head = ["block", "kind", "FLOPs"].map((text) => html("th", { scope: "col" }, text));
  return [
    html("h3", {}, `Blocks by cost of statistics (${blocks.length} of ${model.blocks.length})`),
    html(
      "table",
      { class: "facts" },
      html("thead", {}, html("tr", {}, ...head)),
      html("tbody", {}, ...rows),
    ),
  ];
}
