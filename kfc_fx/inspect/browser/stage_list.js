// The stages of every captured graph: what each pass left, made and took away.

function drawStages() {
  const parts = model.graphs.flatMap((graph) => {
    const buttons = graph.stages.map((stage) => stageButton(graph, stage));
    return model.graphs.length > 1 ? [html("h3", {}, `Graph ${graph.index}`), ...buttons] : buttons;
  });
  byId("stages").replaceChildren(...parts);
  markStages();
}

function stageButton(graph, stage) {
  const changes = stage.position === 0 ? "" : ` +${stage.created.length} −${stage.erased.length}`;
  const seconds = stage.seconds ? ` · ${secondsText(stage.seconds)}` : "";
  const skipped = stage.skipped ? " · skipped" : "";
  const count = `${stage.size.toLocaleString("en")}${changes}${seconds}${skipped}`;
  const title = [
    plural(stage.size, "node"),
    `${stage.created.length} created`,
    `${stage.erased.length} erased`,
  ].join(", ");
  const button = html(
    "button",
    { type: "button", class: "stage", "data-stage": stage.name, title },
    html("span", { class: "name" }, stage.name),
    html("span", { class: "what" }, count),
  );
  button.addEventListener("click", () => showStage(graph, stage));
  return button;
}

function markStages() {
  const stages = model.graphs.flatMap((graph) => graph.stages);
  [...byId("stages").querySelectorAll(".stage")].forEach((button, position) => {
    button.setAttribute("aria-pressed", String(stages[position] === view.stage));
    if (stages[position] === view.stage) scrollInto(byId("stages"), button);
  });
}
