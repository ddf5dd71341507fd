"""The stages of the captured graphs as coloured Python, and what differs between two."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.syntax import Syntax
from rich.text import Text

from kfc_fx.errors import TargetError, did_you_mean
from kfc_fx.inspect.graph_text import CREATED
from kfc_fx.inspect.summary_view import plain_table

HIGHLIGHT = Syntax("", "python", theme="ansi_dark", background_color="default")
STYLES = {"+": "green", "-": "red", "@": "cyan"}


def highlighted(code: str) -> Text:
    """Python source in the colours of the terminal."""
    text = HIGHLIGHT.highlight(code)
    text.rstrip()
    return text


def find_stage(graph: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The stage of one graph by name.

    Raises:
        TargetError: there is none; the message has the nearest name.
    """
    names = [stage["name"] for stage in graph["stages"]]
    if name not in names:
        raise TargetError(
            f"unknown stage {name!r}{did_you_mean(name, names)}; there are: {', '.join(names)}"
        )
    return graph["stages"][names.index(name)]


def graph_view(document: Mapping[str, Any], stage: str) -> Text:
    """One stage of every graph; lines of nodes that its pass created are green."""
    several = len(document["graphs"]) > 1
    parts: list[Text] = []
    for graph in document["graphs"]:
        found = find_stage(graph, stage)
        parts += [Text(f"# {_title(graph, stage)}", style="bold")] if several else []
        parts.append(_coloured(found["code"], f"{CREATED}{stage}"))
    return Text("\n").join(parts)


MOST_NAMES = 4
"""Blocks that the title of a graph names."""


def _title(graph: Mapping[str, Any], stage: str) -> str:
    """The number of a graph, the layer that it is of, and the blocks in it: modules of one class
    have one graph, which is shown once for each."""
    nodes = find_stage(graph, stage)["nodes"]
    blocks = list(dict.fromkeys(node["block"] for node in nodes if node["role"] == "site"))
    names = ", ".join(blocks[:MOST_NAMES]) + ", ..." * (len(blocks) > MOST_NAMES)
    kind = "layer by itself" if graph["layer"] else "blocks"
    return f"graph {graph['index']}" + (f", {kind}: {names}" if names else "")


def _coloured(code: str, mark: str) -> Text:
    text = highlighted(code)
    start = 0
    for line in code.splitlines(keepends=True):
        if line.rstrip().endswith(mark):
            text.stylize("green", start, start + len(line.rstrip()))
        if line.startswith("# erased by"):
            text.stylize("red", start, start + len(line.rstrip()))
        start += len(line)
    return text


def diff_view(document: Mapping[str, Any], first: str, second: str) -> Text:
    """Unified diff from one stage to another, of every graph."""
    parts: list[Text] = []
    for graph in document["graphs"]:
        before, after = find_stage(graph, first)["code"], find_stage(graph, second)["code"]
        lines = difflib.unified_diff(
            _without_marks(before), _without_marks(after), first, second, lineterm=""
        )
        coloured = [Text(line, style=STYLES.get(line[:1], "")) for line in lines]
        parts += coloured or [Text(f"graph {graph['index']}: {first} and {second} are the same")]
    return Text("\n").join(parts)


def _without_marks(code: str) -> Sequence[str]:
    """Lines without what the passes say about them, which would differ everywhere."""
    lines = [line.partition(f"  {CREATED}")[0] for line in code.splitlines()]
    bare = [line.partition(f"  # {CREATED}")[0] for line in lines]
    return [line for line in bare if not line.startswith("# erased by")]


def passes_view(document: Mapping[str, Any]) -> RenderableType:
    """What ran, in order: time, and nodes created and erased."""
    numeric = ("nodes", "created", "erased", "ms")
    table = plain_table("graph", "pass", "nodes", "created", "erased", "ms", right=numeric)
    for graph in document["graphs"]:
        for stage in graph["stages"]:
            milliseconds = f"{1000 * stage['seconds']:.2f}" if stage["seconds"] else ""
            table.add_row(
                str(graph["index"]),
                stage["name"] + (" (left out)" if stage["skipped"] else ""),
                str(len(stage["nodes"])),
                str(len(stage["created"])),
                str(len(stage["erased"])),
                "" if stage["skipped"] else milliseconds,
            )
    return table
