// The bottom panel: code of the stage, the parts of the update, the run, the ranks; one tab each.

const TAB_TITLES = { stage: "stage code", run: "training run", world: "many processes" };

function drawTabs() {
  const names = [
    "stage",
    ...Object.keys(model.update ?? {}).filter((part) => model.update[part]),
    ...(model.run ? ["run"] : []),
    ...(model.world ? ["world"] : []),
  ];
  const tabs = names.map((name) =>
    html(
      "button",
      {
        type: "button",
        role: "tab",
        id: `tab-${name}`,
        "data-tab": name,
        "aria-controls": "panel",
      },
      tabTitle(name),
    ),
  );
  byId("tabs").replaceChildren(...tabs);
  openTab("stage");
}

function tabTitle(name) {
  return TAB_TITLES[name] ?? `update: ${name}`;
}

function openTab(name) {
  view.tab = name;
  for (const tab of byId("tabs").children) {
    const chosen = tab.dataset.tab === name;
    tab.setAttribute("aria-selected", String(chosen));
    tab.setAttribute("tabindex", chosen ? 0 : -1);
  }
  byId("panel").setAttribute("aria-labelledby", `tab-${name}`);
  byId("panel").replaceChildren(panelContent(name));
  markCode();
}

function panelContent(name) {
  if (name === "run") return runPanel();
  if (name === "world") return worldPanel();
  if (name === "stage")
    return codeList(view.stage.code, `Code of the stage ${view.stage.name}`, chooseStageLine);
  return codeList(model.update[name], `Update: ${name}`, (line) =>
    selectBlocks(updateLinks(name, model.update[name]).blocksAt[line], { line }),
  );
}

function chooseStageLine(line) {
  const name = stageLinks(view.stage).nameAt.get(line);
  if (name) selectNode(name);
}

// Marks the lines of the selected item in whatever source is shown.
function markCode() {
  const list = byId("panel").querySelector(".code");
  if (!list) return;
  const item = view.hierarchy.items.get(view.selected);
  if (view.tab === "stage") markLines(list, item ? linesOfItem(item) : []);
  else markUpdate(list, item);
}

// Lines in which something is computed come first: to the first of all the source is scrolled.
function linesOfItem(item) {
  const { lineOf } = stageLinks(view.stage);
  const linesOf = (nodes) =>
    nodes
      .map((node) => lineOf.get(node.name))
      .filter((line) => line !== undefined)
      .sort((a, b) => a - b);
  const nodes = nodesUnder(item);
  const isComputed = (node) => node.op !== "placeholder";
  return [...new Set([...linesOf(nodes.filter(isComputed)), ...linesOf(nodes)])];
}

function nodesUnder(item) {
  return item.isGroup ? item.children.flatMap(nodesUnder) : [item.node];
}

function markUpdate(list, item) {
  const blocks = item
    ? new Set(
        nodesUnder(item)
          .map((node) => node.block)
          .filter(Boolean),
      )
    : new Set();
  const { named, sections } = updateLinks(view.tab, model.update[view.tab]);
  const collect = (lines) =>
    [...new Set([...blocks].flatMap((name) => lines.get(name) ?? []))].sort((a, b) => a - b);
  markLines(list, collect(named), collect(sections));
}

function connectPanel() {
  const tabs = byId("tabs");
  tabs.addEventListener("click", (event) => {
    const tab = event.target.closest("[role=tab]");
    if (tab) openTab(tab.dataset.tab);
  });
  tabs.addEventListener("keydown", (event) => {
    const all = [...tabs.children];
    const at = all.findIndex((tab) => tab.dataset.tab === view.tab);
    const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    const tab = all[(next + all.length) % all.length];
    openTab(tab.dataset.tab);
    tab.focus();
  });
  connectDivider();
}

function connectDivider() {
  const divider = byId("divider");
  const setHeight = (percent) => {
    const height = Math.min(80, Math.max(10, percent));
    document.body.style.setProperty("--bottom-height", `${height}vh`);
    divider.setAttribute("aria-valuenow", Math.round(height));
  };
  divider.addEventListener("keydown", (event) => {
    const step = { ArrowUp: 4, ArrowDown: -4 }[event.key];
    if (!step) return;
    event.preventDefault();
    setHeight(Number(divider.getAttribute("aria-valuenow")) + step);
  });
  divider.addEventListener("pointerdown", (event) => divider.setPointerCapture(event.pointerId));
  divider.addEventListener("pointermove", (event) => {
    if (divider.hasPointerCapture(event.pointerId))
      setHeight((100 * (innerHeight - event.clientY)) / innerHeight);
  });
}
