// Pan and zoom: one transform of the scene.

const SCALE = { smallest: 0.04, largest: 3, step: 1.25 };
const LEGEND = 44; // pixels at the bottom that the legend covers
const DRAG_THRESHOLD = 4; // pixels, under which a press is a click

const viewport = { x: 0, y: 0, scale: 1 };

function applyViewport() {
  const { x, y, scale } = viewport;
  byId("scene").setAttribute("transform", `translate(${x},${y}) scale(${scale})`);
}

function panBy(x, y) {
  viewport.x += x;
  viewport.y += y;
  applyViewport();
}

// Zooms about a point of the graph area, by default its middle.
function zoomBy(factor, point = null) {
  const box = byId("graph").getBoundingClientRect();
  const { x, y } = point ?? { x: box.width / 2, y: box.height / 2 };
  const scale = Math.min(SCALE.largest, Math.max(SCALE.smallest, viewport.scale * factor));
  const ratio = scale / viewport.scale;
  viewport.x = x - (x - viewport.x) * ratio;
  viewport.y = y - (y - viewport.y) * ratio;
  viewport.scale = scale;
  applyViewport();
}

// Shows all of the scene, or its beginning where all of it would be too small to read.
function fitScene(size, readable = 0) {
  const box = byId("graph").getBoundingClientRect();
  const whole = Math.min(
    box.width / (size.width + 40),
    (box.height - LEGEND) / (size.height + 20),
    1,
  );
  const scale = Math.max(whole, readable, SCALE.smallest);
  viewport.scale = scale;
  viewport.x = (box.width - size.width * scale) / 2;
  viewport.y = Math.max(4, (box.height - LEGEND - size.height * scale) / 2);
  applyViewport();
}

// Brings a place of the scene into sight, and moves nothing if it is there.
function showPlace(place) {
  const box = byId("graph").getBoundingClientRect();
  const { x, y, scale } = viewport;
  const left = place.x * scale + x;
  const top = place.y * scale + y;
  const width = Math.min(place.width * scale, box.width - 40);
  const height = Math.min(place.height * scale, box.height - 60);
  const outside =
    left < 10 || top < 10 || left + width > box.width - 10 || top + height > box.height - 50;
  if (outside) panBy((box.width - width) / 2 - left, (box.height - height) / 2 - top);
}

function connectViewport() {
  const area = byId("graph");
  area.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      const box = area.getBoundingClientRect();
      const point = { x: event.clientX - box.left, y: event.clientY - box.top };
      if (event.ctrlKey || event.metaKey) zoomBy(Math.exp(-event.deltaY / 200), point);
      else panBy(-event.deltaX, -event.deltaY);
    },
    { passive: false },
  );
  connectDragging(area);
  byId("zoom-in").addEventListener("click", () => zoomBy(SCALE.step));
  byId("zoom-out").addEventListener("click", () => zoomBy(1 / SCALE.step));
  byId("zoom-fit").addEventListener("click", () => fitScene(view.hierarchy.root.layout));
}

function connectDragging(area) {
  let last = null;
  let dragged = false;
  area.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    last = { x: event.clientX, y: event.clientY };
    dragged = false;
  });
  area.addEventListener("pointermove", (event) => {
    if (!last) return;
    const moved = { x: event.clientX - last.x, y: event.clientY - last.y };
    if (!dragged && Math.hypot(moved.x, moved.y) < DRAG_THRESHOLD) return;
    if (!dragged) area.setPointerCapture(event.pointerId);
    dragged = true;
    last = { x: event.clientX, y: event.clientY };
    panBy(moved.x, moved.y);
  });
  const stop = () => {
    last = null;
  };
  area.addEventListener("pointerup", stop);
  area.addEventListener("pointercancel", stop);
  // The click that ends a drag selects nothing.
  area.addEventListener(
    "click",
    (event) => {
      if (dragged) event.stopImmediatePropagation();
      dragged = false;
    },
    { capture: true },
  );
}
