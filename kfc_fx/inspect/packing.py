"""The inspector's document in a compact form: names once, nodes that stages share once."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

NODE_FIELDS = (
    "name",
    "op",
    "target",
    "args",
    "shape",
    "dtype",
    "module",
    "module_type",
    "source",
    "block",
    "role",
)
"""Columns of a packed node; what else a node has follows as a mapping."""

_TEXT_FIELDS = frozenset(NODE_FIELDS) - {"args", "shape"}


class _Strings:
    """Texts in the order of their first use, each with its index."""

    def __init__(self) -> None:
        self.indices: dict[str, int] = {}

    def index(self, text: str | None) -> int | None:
        return None if text is None else self.indices.setdefault(text, len(self.indices))


def pack_document(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with every stage's nodes as rows over one table of strings.

    Of a graph with S stages the nodes that no pass touched are stored once instead of S times.
    ``browser/document.js`` reads this form.

    Returns:
        The document's keys, with ``strings``, ``fields`` and packed ``graphs``.
    """
    strings = _Strings()
    graphs = [_pack_graph(graph, strings) for graph in document["graphs"]]
    packed = {**document, "fields": NODE_FIELDS, "graphs": graphs}
    packed["strings"] = list(strings.indices)
    return packed


def _pack_graph(graph: Mapping[str, Any], strings: _Strings) -> dict[str, Any]:
    rows: dict[str, int] = {}
    stages = []
    for stage in graph["stages"]:
        nodes = [json.dumps(_pack_node(node, strings)) for node in stage["nodes"]]
        stages.append(
            {
                **stage,
                "nodes": [rows.setdefault(node, len(rows)) for node in nodes],
                "created": [strings.index(name) for name in stage["created"]],
                "erased": [strings.index(name) for name in stage["erased"]],
            }
        )
    return {**graph, "rows": [json.loads(row) for row in rows], "stages": stages}


def _pack_node(node: Mapping[str, Any], strings: _Strings) -> list[Any]:
    row: list[Any] = []
    for field in NODE_FIELDS:
        value = node[field]
        if field in _TEXT_FIELDS:
            value = strings.index(value)
        elif field == "args":
            value = [strings.index(name) for name in value]
        row.append(value)
    extra = {key: value for key, value in node.items() if key not in NODE_FIELDS}
    return [*row, extra] if extra else row


def embedded_json(value: object) -> str:
    """JSON that may stand inside a ``<script>`` element: no text of it can end the element.

    Numbers that are not finite, which JSON lacks, become null.
    """
    text = json.dumps(_finite(value), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
