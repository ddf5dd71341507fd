// Keys of the graph and of the page.

function connectKeyboard() {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.matches("input[type=text]")) return;
    if (event.key === "/") (byId("search-input").select(), byId("search-input").focus());
    else if (event.key === "Escape") leaveSelection();
    else return;
    event.preventDefault();
  });
  byId("graph").addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const item = view.hierarchy.items.get(event.target.closest(".item")?.dataset.id);
    if (item && graphKey(event.key, item)) event.preventDefault();
  });
}

function leaveSelection() {
  if (byId("search-input").value !== "") clearSearch();
  else clearSelection();
}

function graphKey(key, item) {
  if (key === "Enter" || key === " ") {
    if (item.isGroup) toggleGroup(item);
    selectItem(item, { focus: true });
  } else if (key === "+" || key === "=") zoomBy(SCALE.step);
  else if (key === "-") zoomBy(1 / SCALE.step);
  else if (key === "0") fitScene(view.hierarchy.root.layout);
  else {
    const target = ARROWS[key]?.(item);
    if (target === undefined) return key in ARROWS;
    selectItem(target, { focus: true });
  }
  return true;
}

const ARROWS = {
  ArrowDown: itemBelow,
  ArrowUp: itemAbove,
  ArrowRight: (item) => itemBeside(item, 1),
  ArrowLeft: (item) => itemBeside(item, -1),
  Home: () => topmost(view.hierarchy.root.children),
};

function topmost(items) {
  const y = (item) => view.places.get(item.id).y;
  return [...items].sort((a, b) => y(a) - y(b))[0];
}

function closest(item, candidates) {
  const middle = ({ x, width }) => x + width / 2;
  const here = view.places.get(item.id);
  const distance = (other) =>
    Math.abs(middle(view.places.get(other.id)) - middle(here)) +
    Math.abs(view.places.get(other.id).y - here.y);
  return [...candidates].sort((a, b) => distance(a) - distance(b))[0];
}

// Into an open group; else along an edge; else along an edge of the group around.
function itemBelow(item) {
  if (item.isGroup && view.expanded.has(item.id)) return topmost(item.children);
  for (let from = item; from.parent; from = from.parent) {
    const next = neighboursOf(from, "to").map((id) => view.hierarchy.items.get(id));
    if (next.length) return closest(from, next);
  }
  return undefined;
}

function itemAbove(item) {
  const before = neighboursOf(item, "from").map((id) => view.hierarchy.items.get(id));
  if (before.length) return closest(item, before);
  return item.parent === view.hierarchy.root ? undefined : item.parent;
}

function itemBeside(item, direction) {
  const here = view.places.get(item.id);
  const overlaps = (place) => place.y < here.y + here.height && here.y < place.y + place.height;
  const beside = item.parent.children.filter((other) => {
    const place = view.places.get(other.id);
    return other !== item && overlaps(place) && Math.sign(place.x - here.x) === direction;
  });
  return closest(item, beside);
}
