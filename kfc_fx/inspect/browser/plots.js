// Line plots as SVG, drawn to the size of a card.

const PLOT = { width: 320, height: 170, left: 52, right: 12, top: 12, bottom: 26 };

// `series` is [{name, values}]; a null value is a gap.
// `x` holds the positions; without it they are 1, 2, ...
function linePlot(title, series, { x = null, logarithmic = false, xName = "step" } = {}) {
  const drawn = series.filter(({ values }) =>
    values.some((value) => isDrawable(value, logarithmic)),
  );
  const heading = html("figcaption", {}, title);
  if (drawn.length === 0)
    return html(
      "figure",
      { class: "plot" },
      heading,
      html("p", { class: "what" }, "no finite values"),
    );
  const positions = x ?? drawn[0].values.map((_, index) => index + 1);
  const scales = plotScales(drawn, positions, logarithmic);
  const picture = svg("svg", {
    viewBox: `0 0 ${PLOT.width} ${PLOT.height}`,
    role: "img",
    "aria-label": plotSummary(title, drawn),
  });
  picture.append(...axes(scales, logarithmic, xName));
  drawn.forEach((line, index) => {
    picture.append(
      svg("path", {
        class: "line",
        d: linePath(line.values, positions, scales, logarithmic),
        "data-series": index,
      }),
    );
  });
  if (drawn.length > 1)
    heading.append(
      ...drawn.map(({ name }, index) => html("span", { class: "key", "data-series": index }, name)),
    );
  const readout = html("output", { class: "what", "aria-hidden": "true" });
  connectReadout(picture, readout, drawn, positions, scales);
  return html("figure", { class: "plot" }, heading, picture, readout);
}

function isDrawable(value, logarithmic) {
  return typeof value === "number" && Number.isFinite(value) && (!logarithmic || value > 0);
}

function plotScales(series, positions, logarithmic) {
  const values = series
    .flatMap((line) => line.values)
    .filter((value) => isDrawable(value, logarithmic));
  const transform = logarithmic ? Math.log10 : (value) => value;
  let low = values.reduce((least, value) => Math.min(least, transform(value)), Infinity);
  let high = values.reduce((most, value) => Math.max(most, transform(value)), -Infinity);
  if (high - low <= 1e-9 * Math.abs(high)) {
    // a constant lies in the middle
    const room = Math.abs(high) / 2 || 0.5;
    [low, high] = [low - room, high + room];
  }
  const first = positions[0];
  const span = positions.at(-1) - first || 1;
  const width = PLOT.width - PLOT.left - PLOT.right;
  const height = PLOT.height - PLOT.top - PLOT.bottom;
  return {
    low,
    high,
    first,
    span,
    across: (position) => PLOT.left + (width * (position - first)) / span,
    up: (value) => PLOT.top + (height * (high - transform(value))) / (high - low),
    level: (fraction) =>
      logarithmic ? 10 ** (low + fraction * (high - low)) : low + fraction * (high - low),
  };
}

function linePath(values, positions, scales, logarithmic) {
  let path = "";
  let pen = "M";
  values.forEach((value, index) => {
    if (!isDrawable(value, logarithmic)) {
      pen = "M";
      return;
    }
    path += `${pen}${round(scales.across(positions[index]))},${round(scales.up(value))}`;
    pen = "L";
  });
  return path;
}

function axes(scales, logarithmic, xName) {
  const right = PLOT.width - PLOT.right;
  const bottom = PLOT.height - PLOT.bottom;
  const marks = [0, 0.5, 1].flatMap((fraction) => {
    const value = scales.level(fraction);
    const y = scales.up(value);
    return [
      svg("line", { class: "grid", x1: PLOT.left, x2: right, y1: y, y2: y }),
      svg("text", { x: PLOT.left - 6, y: y + 4, "text-anchor": "end" }, shortNumber(value)),
    ];
  });
  const ends = [
    [scales.first, "start", PLOT.left],
    [scales.first + scales.span, "end", right],
  ];
  const numbers = ends.map(([value, anchor, x]) =>
    svg("text", { x, y: bottom + 16, "text-anchor": anchor }, significant(value)),
  );
  const name = svg(
    "text",
    { x: (PLOT.left + right) / 2, y: bottom + 16, "text-anchor": "middle" },
    xName,
  );
  return [...marks, ...numbers, name];
}

function plotSummary(title, series) {
  const lines = series.map(({ name, values }) => {
    const known = values.filter((value) => typeof value === "number");
    return `${name} from ${significant(known[0])} to ${significant(known.at(-1))}`;
  });
  return `${title}: ${lines.join("; ")}`;
}

// Values at the step under the pointer.
function connectReadout(picture, readout, series, positions, scales) {
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const across = ((event.clientX - box.left) / box.width) * PLOT.width;
    const distance = (index) => Math.abs(scales.across(positions[index]) - across);
    const nearest = positions.reduce(
      (best, _, index) => (distance(index) < distance(best) ? index : best),
      0,
    );
    const values = series.map((line) => `${line.name} ${shortNumber(line.values[nearest])}`);
    readout.textContent = `${positions[nearest]}: ${values.join(", ")}`;
  });
  picture.addEventListener("pointerleave", () => {
    readout.textContent = "";
  });
}
