// Which line of generated source belongs to which node or block.

// A name that a line assigns, with an annotation or without, or a parameter on a line of its own.
const NAMED_FIRST = /^\s*([A-Za-z_]\w*)\s*(?:(?::[^=]+)?=(?!=)|,\s*(?:#|$))/;

// Line of every node of a stage's code, and node of every line.
function stageLinks(stage) {
  stage.links ??= readStageLinks(stage);
  return stage.links;
}

function readStageLinks(stage) {
  const names = new Set(stage.nodes.map((node) => node.name));
  const lineOf = new Map();
  const nameAt = new Map();
  const mentions = new Map();
  stage.code.split("\n").forEach((line, index) => {
    const name = /^\s*return\b/.test(line) ? "output" : NAMED_FIRST.exec(line)?.[1];
    if (names.has(name) && !lineOf.has(name)) {
      lineOf.set(name, index);
      nameAt.set(index, name);
    }
    if (/^\s*def\b/.test(line)) return;
    for (const [word] of line.matchAll(/[A-Za-z_]\w*/g))
      if (!mentions.has(word)) mentions.set(word, index);
  });
  // A placeholder that no line assigns is shown where it is first used.
  for (const name of names)
    if (!lineOf.has(name) && mentions.has(name)) lineOf.set(name, mentions.get(name));
  return { lineOf, nameAt };
}

// Lines of a part of the update: those that name a block, and the section of its stack.
function updateLinks(part, code) {
  model.updateLinks ??= new Map();
  if (!model.updateLinks.has(part)) model.updateLinks.set(part, readUpdateLinks(code));
  return model.updateLinks.get(part);
}

function readUpdateLinks(code) {
  const stacks = new Map();
  for (const block of model.blocks)
    stacks.set(block.stack, [...(stacks.get(block.stack) ?? []), block.name]);
  const blocksAt = [];
  const named = new Map();
  const sections = new Map();
  let section = [];
  code.split("\n").forEach((line, index) => {
    if (line.trim() === "") section = [];
    section = stackNamedIn(line, stacks) ?? section;
    const called = stackCalledIn(line, stacks);
    const found = blocksNamedIn(line);
    found.forEach((name) => named.set(name, [...(named.get(name) ?? []), index]));
    (called ?? section).forEach((name) =>
      sections.set(name, [...(sections.get(name) ?? []), index]),
    );
    blocksAt.push(found.length ? found : (called ?? section));
  });
  return { blocksAt, named, sections };
}

// Blocks of the stack that a section is of: its comment, or the head of a function of the stack.
function stackNamedIn(line, stacks) {
  const tag = /^\s*#\s*(\S+): /.exec(line)?.[1] ?? /^\s*def [a-z]+_(\w+)\(/.exec(line)?.[1];
  return stacks.get(tag);
}

// Blocks of the stack whose state, "64x576", or whose function a line takes.
function stackCalledIn(line, stacks) {
  const found = [...line.matchAll(/"([^"]+)"|\b[a-z]+_(\w+)\(/g)];
  return stacks.get(found.map((match) => match[1] ?? match[2]).find((key) => stacks.has(key)));
}

// A comment lists blocks after its last colon, on as many lines as it takes; code names them in
// strings, as "block.factor".
function blocksNamedIn(line) {
  const comment = /^\s*#(?:.*:)? (.*)$/.exec(line);
  const known = (name) => model.blockByName.has(name);
  if (comment) return comment[1].split(/,\s*/).filter(known);
  const found = [...line.matchAll(/"([^"]+)"/g)].flatMap(([, text]) => [
    text,
    text.replace(/\.\w+$/, ""),
  ]);
  return [...new Set(found.filter(known))];
}
