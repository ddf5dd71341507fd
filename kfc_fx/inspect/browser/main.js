// Reads the document, shows the last stage of the first graph, connects everything.

const model = readDocument();
const view = {
  graph: null,
  stage: null,
  hierarchy: null,
  expanded: new Set(),
  selected: null,
  related: new Set(),
  found: [],
  results: [],
  result: -1,
  colouring: "kind",
  parameters: false,
  tab: "stage",
  places: new Map(),
  drawn: new Map(),
};

// Shows a stage; what is open and selected stays so where the stage has it.
function showStage(graph, stage) {
  view.graph = graph;
  view.stage = stage;
  rebuild();
  markStages();
  if (view.tab === "stage") openTab("stage");
  else markCode();
}

function rebuild() {
  view.hierarchy = buildHierarchy(view.graph, view.stage, view.parameters);
  if (!view.hierarchy.items.has(view.selected)) view.selected = null;
  view.related = new Set();
  byId("scene").replaceChildren();
  openSingles();
  redraw();
  fitScene(view.hierarchy.root.layout, 0.75);
  drawDetails();
}

// Opens a module as long as it is all there is: a wrapper's only child.
function openSingles() {
  let group = view.hierarchy.root;
  while (group) {
    const inner = group.children.filter((child) => child.isGroup);
    const nodes = group.children.filter(
      (child) => !child.isGroup && !["input", "output"].includes(child.node.role),
    );
    group = inner.length === 1 && nodes.length === 0 ? inner[0] : null;
    if (group) view.expanded.add(group.id);
  }
}

function showParameters(shown) {
  view.parameters = shown;
  rebuild();
  markCode();
}

function showColouring(colouring) {
  view.colouring = colouring;
  drawLegend(view);
  for (const item of view.hierarchy.items.values()) if (item.isGroup) item.layout = null;
  view.hierarchy.root.layout = null;
  redraw(view.hierarchy.root.children[0]);
}

function drawHeading() {
  document.title = `${model.target} · kfc_fx inspector`;
  byId("title").textContent = model.target;
  byId("subtitle").textContent =
    `kfc_fx ${model.kfc_fx} · torch ${model.torch} · captured by ${model.capture}`;
}

function connectControls() {
  byId("show-parameters").addEventListener("change", (event) =>
    showParameters(event.target.checked),
  );
  byId("colouring").addEventListener("change", (event) => showColouring(event.target.value));
  byId("expand-all").addEventListener("click", () => setAllExpanded(true));
  byId("collapse-all").addEventListener("click", () => setAllExpanded(false));
}

function start() {
  drawHeading();
  drawStages();
  drawLegend(view);
  const graph = model.graphs.find(({ stages }) => stages.length > 0);
  if (!graph) {
    byId("details").replaceChildren(...overview().filter(Boolean));
    announce("The document has no graph.");
    return;
  }
  view.graph = graph;
  view.stage = graph.stages.at(-1);
  rebuild();
  markStages();
  drawTabs();
  [
    connectGraph,
    connectViewport,
    connectModules,
    connectPanel,
    connectSearch,
    connectKeyboard,
    connectControls,
  ].forEach((connect) => connect());
}

start();
document.documentElement.dataset.ready = "true";
