// Numbers and shapes as a person reads them.

const PREFIXES = [
  [1e12, "T"],
  [1e9, "G"],
  [1e6, "M"],
  [1e3, "k"],
];

function shortNumber(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  for (const [unit, prefix] of PREFIXES) {
    if (size >= unit) return `${significant(value / unit)} ${prefix}`;
  }
  return significant(value);
}

function significant(value) {
  if (Number.isInteger(value)) return String(value);
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6)
    ? value.toExponential(2)
    : String(Number(value.toPrecision(3)));
}

function bytesText(bytes) {
  if (typeof bytes !== "number") return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let power = 0;
  while (bytes >= 1024 && power < units.length - 1) {
    bytes /= 1024;
    power += 1;
  }
  return `${significant(bytes)} ${units[power]}`;
}

function secondsText(seconds) {
  return seconds >= 0.1 ? `${significant(seconds)} s` : `${significant(1e3 * seconds)} ms`;
}

function shapeText(shape) {
  return shape ? `[${shape.join(", ")}]` : "";
}

function percentText(fraction) {
  const percent = 100 * fraction;
  if (percent > 0 && percent < 0.01) return "< 0.01 %";
  return `${percent >= 10 ? percent.toFixed(0) : percent.toPrecision(2)} %`;
}

function plural(count, noun) {
  return `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
}
