// Elements are made here and nowhere else; what a model names is only ever set as text.

const SVG_NAMESPACE = "http://www.w3.org/2000/svg";

function fillElement(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    made.setAttribute(name, value === true ? "" : String(value));
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

// An HTML element; children are elements or texts.
function html(tag, attributes = {}, ...children) {
  return fillElement(document.createElement(tag), attributes, children);
}

// An SVG element; children are elements or texts.
function svg(tag, attributes = {}, ...children) {
  return fillElement(document.createElementNS(SVG_NAMESPACE, tag), attributes, children);
}

function byId(id) {
  return document.getElementById(id);
}

// Says something to screen readers.
function announce(text) {
  byId("status").textContent = text;
}

// Scrolls the box only, never the page around it.
function scrollInto(box, child, block = "nearest") {
  const outer = box.getBoundingClientRect();
  const inner = child.getBoundingClientRect();
  const inside = inner.top >= outer.top && inner.bottom <= outer.bottom;
  if (inside && block === "nearest") return;
  box.scrollTop += inner.top - outer.top - (outer.height - inner.height) / 2;
}
