// How a training run went, step by step.

const RUN_PLOTS = [
  ["loss", "Loss"],
  ["lr", "Learning rate"],
  ["damping", "Damping"],
  ["nu", "ν"],
  ["clip_scale", "Clip scale"],
];

function runPanel() {
  const { steps = [] } = model.run;
  if (steps.length === 0) return html("p", {}, "The run has no steps.");
  const x = steps.map(({ step }) => step);
  const plots = RUN_PLOTS.map(([field, title]) => [title, steps.map((step) => step[field] ?? null)])
    .filter(([, values]) => values.some((value) => value !== null))
    .map(([title, values]) => linePlot(title, [{ name: title, values }], { x }));
  return html("div", { class: "plots" }, ...plots, secondsPlot(steps, x), conditionPlot());
}

function secondsPlot(steps, x) {
  const parts = [...new Set(steps.flatMap((step) => Object.keys(step.seconds ?? {})))];
  if (parts.length === 0) return null;
  const series = parts.map((name) => ({
    name,
    values: steps.map((step) => step.seconds?.[name] ?? null),
  }));
  return linePlot("Seconds", series, { x });
}

// Condition of both factors over the blocks, in the order of the model.
function conditionPlot() {
  const known = model.blocks.map((block) => model.run.factors?.[block.name]).filter(Boolean);
  if (known.length < 2) return null;
  const series = [
    ["Ω", "omega_condition"],
    ["Γ", "gamma_condition"],
  ].map(([name, field]) => ({ name, values: known.map((factors) => factors[field] ?? null) }));
  return linePlot("Condition of the factors", series, { logarithmic: true, xName: "block" });
}
