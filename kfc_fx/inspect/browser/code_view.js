// Source, line by line: a list in which a line can be chosen, and lines can be marked.

const LONGEST_LINE = 600; // characters of a line that are shown; a captured signature has 100,000
const KEYWORDS = "def|return|import|from|if|else|elif|for|in|with|as|not|None|True|False|raise";
const TOKENS = new RegExp(
  [
    String.raw`(#.*$)`,
    String.raw`("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')`,
    String.raw`\b(${KEYWORDS})\b`,
    String.raw`\b(\d+(?:\.\d+)?(?:e-?\d+)?)\b`,
  ].join("|"),
  "g",
);
const TOKEN_CLASSES = ["comment", "string", "keyword", "number"];

// `choose(line)` is called with the index of a line that is clicked or entered.
function codeList(code, label, choose) {
  const lines = code.split("\n");
  const list = html("div", { class: "code", role: "listbox", "aria-label": label, tabindex: 0 });
  const colourer = new IntersectionObserver(
    (entries) => {
      for (const { isIntersecting, target } of entries) {
        if (!isIntersecting) continue;
        colourer.unobserve(target);
        target.replaceChildren(...colouredTokens(target.textContent));
      }
    },
    { root: list, rootMargin: "200px" },
  );
  list.append(
    ...lines.map((line, index) => {
      const text =
        line.length > LONGEST_LINE
          ? `${line.slice(0, LONGEST_LINE)} … (${line.length.toLocaleString("en")} characters)`
          : line;
      const row = html(
        "div",
        { class: "line", role: "option", id: `line-${index}`, "aria-selected": "false" },
        text,
      );
      colourer.observe(row);
      return row;
    }),
  );
  connectCode(list, choose);
  return list;
}

function colouredTokens(text) {
  const parts = [];
  let end = 0;
  for (const match of text.matchAll(TOKENS)) {
    const kind = match.slice(1).findIndex((group) => group !== undefined);
    parts.push(
      text.slice(end, match.index),
      html("span", { class: TOKEN_CLASSES[kind] }, match[0]),
    );
    end = match.index + match[0].length;
  }
  parts.push(text.slice(end));
  return parts;
}

function connectCode(list, choose) {
  list.addEventListener("click", (event) => {
    const row = event.target.closest(".line");
    if (!row || String(getSelection()) !== "") return;
    moveCursor(list, row);
    choose(lineIndex(row));
  });
  list.addEventListener("keydown", (event) => {
    const row =
      list.querySelector(".cursor") ?? list.querySelector(".marked") ?? list.firstElementChild;
    const next = {
      ArrowDown: row.nextElementSibling,
      ArrowUp: row.previousElementSibling,
      Home: list.firstElementChild,
      End: list.lastElementChild,
    }[event.key];
    if (next) moveCursor(list, next);
    else if (event.key === "Enter") choose(lineIndex(row));
    else return;
    event.preventDefault();
  });
}

function lineIndex(row) {
  return Number(row.id.slice("line-".length));
}

function moveCursor(list, row) {
  list.querySelector(".cursor")?.classList.remove("cursor");
  row.classList.add("cursor");
  list.setAttribute("aria-activedescendant", row.id);
  scrollInto(list, row);
}

// Marks the lines of what is selected; `nearby` lines belong to it less closely.
function markLines(list, lines, nearby = []) {
  list.querySelectorAll(".marked, .nearby").forEach((row) => {
    row.classList.remove("marked", "nearby");
    row.setAttribute("aria-selected", "false");
  });
  nearby.forEach((index) => list.children[index].classList.add("nearby"));
  for (const index of lines) {
    list.children[index].classList.add("marked");
    list.children[index].setAttribute("aria-selected", "true");
  }
  const first = lines[0] ?? nearby[0];
  if (first !== undefined)
    scrollInto(list, list.children[first], lines.length > 1 ? "center" : "nearest");
}
