"""A stage of the captured graphs as Graphviz text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kfc_fx.inspect.graph_view import find_stage

COLOURS = {
    "input": "#dbeafe",
    "parameter": "#e5e7eb",
    "probe": "#fde68a",
    "site": "#bbf7d0",
    "emission": "#fdba74",
    "output": "#dbeafe",
    "op": "#ffffff",
}
"""Fill by role."""


def dot_text(document: Mapping[str, Any], stage: str) -> str:
    """``digraph`` of one stage, a cluster for each captured graph.

    Raises:
        TargetError: there is no such stage.
    """
    lines = [
        f"digraph {_quoted(document['target'])} {{",
        "  rankdir=TB;",
        '  node [shape=box, style="filled,rounded", fontname="Helvetica", fontsize=10];',
    ]
    for graph in document["graphs"]:
        lines += _cluster(graph["index"], find_stage(graph, stage))
    return "\n".join([*lines, "}"]) + "\n"


def _cluster(index: int, stage: Mapping[str, Any]) -> list[str]:
    lines = [f"  subgraph cluster_{index} {{", f"    label={_quoted(f'graph {index}')};"]
    for node in stage["nodes"]:
        name = _quoted(f"{index}.{node['name']}")
        label, colour = _quoted(_label(node)), COLOURS[node["role"]]
        lines.append(f'    {name} [label={label}, fillcolor="{colour}"];')
    for node in stage["nodes"]:
        for used in node["args"]:
            edge = f"{_quoted(f'{index}.{used}')} -> {_quoted(f'{index}.' + node['name'])}"
            lines.append(f"    {edge};")
    return [*lines, "  }"]


def _label(node: Mapping[str, Any]) -> str:
    shape = "" if node["shape"] is None else "x".join(map(str, node["shape"])) or "scalar"
    title = node["target"] if node["op"].startswith("call") else node["name"]
    return "\n".join(part for part in (title, node["module"], shape) if part)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
