// What a run says of a block's factors: spectra, conditions and a picture of Ω.

function factorSection(name) {
  const factors = model.run?.factors?.[name];
  if (!factors) return [];
  const spectra = [
    ["Ω", factors.omega_spectrum],
    ["Γ", factors.gamma_spectrum],
  ]
    .filter(([, values]) => values?.length)
    .map(([symbol, values]) => ({ name: symbol, values }));
  return [
    html("h3", {}, "Factors"),
    factorTable(factors),
    spectra.length ? linePlot("Eigenvalues", spectra, { logarithmic: true, xName: "rank" }) : null,
    factors.omega_image?.length ? heatMap("Ω", factors.omega_image) : null,
  ];
}

function factorTable(factors) {
  const row = (symbol, side) =>
    html(
      "tr",
      {},
      html("th", { scope: "row" }, symbol),
      html("td", {}, shortNumber(factors[`${side}_condition`])),
      html("td", {}, shortNumber(factors[`${side}_effective_rank`])),
    );
  const head = ["factor", "condition", "effective rank"].map((text) =>
    html("th", { scope: "col" }, text),
  );
  return html(
    "table",
    { class: "facts" },
    html("thead", {}, html("tr", {}, ...head)),
    html("tbody", {}, row("Ω", "omega"), row("Γ", "gamma")),
  );
}

// One pixel per entry; blue below zero, red above, by the root of the size so that small ones show.
function heatMap(symbol, image) {
  const rows = image.length;
  const columns = image[0].length;
  const largest =
    image.flat().reduce((most, value) => Math.max(most, Math.abs(value) || 0), 0) || 1;
  const canvas = html("canvas", {
    class: "heat",
    width: columns,
    height: rows,
    role: "img",
    "aria-label": `${symbol} as a heat map, ${rows} by ${columns}, to ${significant(largest)}`,
  });
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(columns, rows);
  image
    .flat()
    .forEach((value, index) => pixels.data.set(heatColour((value || 0) / largest), 4 * index));
  context.putImageData(pixels, 0, 0);
  const caption = html(
    "figcaption",
    {},
    `${symbol}, ${rows} × ${columns}; white 0, red to ${significant(largest)}, blue below 0`,
  );
  return html("figure", { class: "plot" }, canvas, caption);
}

function heatColour(value) {
  const strength = Math.sqrt(Math.min(1, Math.abs(value)));
  const [red, green, blue] = value < 0 ? [20, 80, 180] : [178, 24, 43];
  const mix = (end) => Math.round(255 + (end - 255) * strength);
  return [mix(red), mix(green), mix(blue), 255];
}
