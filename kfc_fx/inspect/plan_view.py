"""The plan as a table: one row a block, then what has none and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kfc_fx.inspect.quantities import bytes_text, count_text
from kfc_fx.inspect.summary_view import NUMERIC, plain_table, side_text

COLUMNS = (
    *("block", "kind", "geometry", "|T|", "Ω", "Γ", "Ω grows with", "form", "method"),
    *("stack", "bytes", "FLOPs", "why"),
)


def plan_view(document: Mapping[str, Any]) -> RenderableType:
    """All blocks, generic parameters and frozen ones, and where the model was not one graph."""
    parts: list[RenderableType] = []
    if document["blocks"]:
        parts.append(_blocks(document))
    if document["generic"]:
        parts += [*_between(parts), _generic(document)]
    if document["frozen"]:
        parts += [*_between(parts), Text("frozen", style="bold")]
        parts += [Text(name) for name in document["frozen"]]
    if document["breaks"]:
        parts += [*_between(parts), _breaks(document)]
    return Group(*parts)


def _between(parts: list[RenderableType]) -> list[RenderableType]:
    return [Text()] if parts else []


def _blocks(document: Mapping[str, Any]) -> Table:
    table = plain_table(*COLUMNS, right=NUMERIC)
    for block in document["blocks"]:
        uses = f" used {block['uses']} times" if block["uses"] > 1 else ""
        table.add_row(
            Text(block["name"] or "(root)"),
            block["kind"] + (" reduce" if block["sharing"] == "reduce" else "") + uses,
            block["geometry"],
            str(block["locations"]),
            side_text(block["columns"], block["groups"]),
            side_text(block["rows"], block["groups"]),
            "|T|" if block["grows_with_locations"] else "",
            block["form"],
            block["method"],
            block["stack"],
            bytes_text(block["bytes"]),
            count_text(block["flops"]),
            Text(block["why"], style="dim"),
        )
    return table


def _breaks(document: Mapping[str, Any]) -> Table:
    table = plain_table("break", "function", "what follows", "layers alone", "reason")
    for entry in document["breaks"]:
        follows = "plain Python" if entry["skipped"] else "another graph"
        alone = ", ".join(entry["alone"])
        place, function = Text(entry["place"]), Text(entry["function"])
        table.add_row(place, function, follows, Text(alone), Text(entry["reason"]))
    return table


def _generic(document: Mapping[str, Any]) -> Table:
    table = plain_table("generic", "shape", "reason")
    for entry in document["generic"]:
        shape = "x".join(map(str, entry["shape"])) or "scalar"
        table.add_row(Text(entry["name"]), shape, Text(entry["reason"]))
    return table
