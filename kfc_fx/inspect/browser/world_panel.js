// What many processes would hold, send and compute: by number of ranks, and by rank.

const WAYS = {
  none: "distribute=\"none\": every rank computes everything",
  refresh: "distribute=\"refresh\": blocks are refreshed by their owners",
  update: "distribute=\"update\": blocks are held and stepped by their owners",
  shard: "fully_shard: shards go to the owners of their blocks and come back",
};
const WORLD_COLUMNS = [
  ["ranks", (own) => String(own.ranks)],
  ["state a rank", (own) => bytesText(own.state_bytes)],
  ["of one process's", (own) => own.state_share.toFixed(3)],
  ["gradients send", (own) => bytesText(own.gradient_sent)],
  ["KFC sends", (own) => bytesText(own.step_sent)],
  ["a due step adds", (own) => bytesText(own.due_sent)],
  ["traffic", (own) => `${own.traffic.toFixed(3)}x`],
  ["busiest / mean", (own) => own.imbalance.toFixed(2)],
  ["mean step", (own) => `${own.mean_step.toFixed(3)}x`],
];

function worldPanel() {
  const { world } = model;
  const { tflops, memory, network } = world.machine;
  const stated = `${tflops} TFLOP/s, ${memory} GB/s of memory and ${network} GB/s of network a rank`;
  return html(
    "div",
    { class: "world" },
    html("h3", {}, WAYS[world.way]),
    html(
      "p",
      { class: "what" },
      `Bytes that a rank sends, and a mean step in steps of SGD on as many ranks. Stated: ${stated}; nothing overlaps.`,
    ),
    worldTable(world),
    html("div", { class: "plots" }, worldPlot(world)),
    html("h3", {}, `Owners of ${plural(world.ranks, "rank")}`),
    ownersTable(world),
  );
}

function worldTable({ worlds, ranks }) {
  const rows = worlds.map((own) =>
    html(
      "tr",
      { "aria-current": own.ranks === ranks },
      ...WORLD_COLUMNS.map(([, text]) => html("td", { class: "figure" }, text(own))),
    ),
  );
  return plainTable(
    WORLD_COLUMNS.map(([title]) => title),
    rows,
  );
}

function worldPlot({ worlds }) {
  const series = [
    ["mean step", "mean_step"],
    ["traffic", "traffic"],
    ["state share", "state_share"],
  ].map(([name, field]) => ({ name, values: worlds.map((own) => own[field]) }));
  return linePlot("As the world grows", series, {
    x: worlds.map(({ ranks }) => Math.log2(ranks)),
    xName: "log2 of ranks",
  });
}

function ownersTable({ owners }) {
  const most = Math.max(...owners.map((own) => own.refresh_share), Number.MIN_VALUE);
  const rows = owners.map((own) => {
    const bar = html("span", { class: "bar", "aria-hidden": "true" });
    bar.style.setProperty("--share", `${(100 * own.refresh_share) / most}%`);
    return html(
      "tr",
      {},
      html("td", {}, String(own.rank)),
      html("td", { class: "number" }, percentText(own.refresh_share), bar),
      html("td", { class: "figure" }, bytesText(own.state_bytes)),
      html("td", {}, ownedBlocks(own.blocks)),
    );
  });
  return plainTable(["rank", "refresh work", "state of blocks", "blocks"], rows);
}

// A rank of a large world has few blocks, one of a small world many: all at once by one button.
function ownedBlocks(names) {
  if (names.length === 0) return "none";
  const few = names.slice(0, 3).map((name) => name || "the model itself");
  const more = names.length > few.length ? `, ... (${names.length})` : "";
  const button = html("button", { type: "button", class: "link" }, few.join(", ") + more);
  button.addEventListener("click", () => selectBlocks(names));
  return button;
}

function plainTable(titles, rows) {
  const head = titles.map((text) => html("th", { scope: "col" }, text));
  return html(
    "table",
    { class: "facts" },
    html("thead", {}, html("tr", {}, ...head)),
    html("tbody", {}, ...rows),
  );
}
