"""The view that one opens first: what is preconditioned, what it holds, what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kfc_fx.inspect.quantities import bytes_text, count_text, ratio_text, share_text

LARGEST = 5
STEPS = (
    ("gradient", "gradient step"),
    ("statistics", "statistics step adds"),
    ("refresh", "refresh adds"),
    ("update", "update"),
)


def plain_table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """A table without lines, the named columns to the right; the same in a file as on screen."""
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for column in columns:
        table.add_column(
            Text(column),
            justify="right" if column in right else "left",
            overflow="fold",
            no_wrap=column not in FLEXIBLE,
            min_width=FLEXIBLE_WIDTH if column in FLEXIBLE else None,
        )
    return table


def summary_view(document: Mapping[str, Any]) -> RenderableType:
    """Title, account of the parameters, costs, the largest blocks, warnings."""
    parts: list[RenderableType] = [_title(document), Text(), _parameters(document)]
    parts += [Text(), *_memory(document), Text(), _costs(document), Text(BATCH, style="dim")]
    if document["blocks"]:
        parts += [Text(), Text("largest blocks", style="bold"), _largest(document)]
    return Group(*parts, *_warnings(document))


def _title(document: Mapping[str, Any]) -> Text:
    inputs = " ".join(
        "x".join(map(str, i["shape"])) + ("" if i["dtype"] == "float32" else f":{i['dtype']}")
        for i in document["inputs"]
    )
    graphs = document["summary"]["graphs"]
    return Text.assemble(
        (document["target"], "bold"),
        f"  input {inputs}  captured by {document['capture']} in {graphs} "
        f"{'graph' if graphs == 1 else 'graphs'}",
    )


def _parameters(document: Mapping[str, Any]) -> Table:
    summary = document["summary"]
    table = plain_table("parameters", "tensors", "numbers", "share", right=NUMERIC)
    blocks = f"in {summary['blocks']} blocks, {summary['stacks']} stacks"
    in_blocks = sum(1 + (block["bias"] is not None) for block in document["blocks"])
    tensors = in_blocks, len(document["generic"]), len(document["frozen"])
    for label, key, count in zip(
        (blocks, "generic", "frozen"), ("block", "generic", "frozen"), tensors, strict=True
    ):
        numbers = summary[f"{key}_parameters"]
        share = share_text(numbers, summary["parameters"])
        table.add_row(label, str(count), count_text(numbers), share)
    return table


BATCH = "for this input; a gradient and a statistics step grow with the batch, the others do not"
FLEXIBLE = ("why", "reason", "break", "function", "layers alone")
"""Columns that give way on a narrow terminal."""
FLEXIBLE_WIDTH = 32
NUMERIC = ("tensors", "numbers", "share", "FLOPs", "bytes", "against gradient", "Ω", "Γ", "|T|")


def _memory(document: Mapping[str, Any]) -> list[Text]:
    summary = document["summary"]
    factors, ranks = summary["factor_bytes"], summary["factor_bytes_per_rank"]
    return [
        Text.assemble(
            ("factors ", "bold"),
            f"{bytes_text(factors)} with their bases or inverses, {bytes_text(ranks)} on every "
            f"rank, {ratio_text(factors, summary['parameter_bytes'])} the parameters",
        ),
        Text.assemble(
            ("state ", "bold"), f"{bytes_text(summary['block_state_bytes'])} of blocks in all"
        ),
    ]


def _costs(document: Mapping[str, Any]) -> Table:
    summary = document["summary"]
    table = plain_table("step", "FLOPs", "bytes", "against gradient", right=NUMERIC)
    for key, label in STEPS:
        if f"{key}_flops" in summary:
            flops = summary[f"{key}_flops"]
            ratio = ratio_text(flops, summary.get("gradient_flops", 0))
            moved = bytes_text(summary[f"{key}_bytes"])
            table.add_row(label, count_text(flops), moved, ratio)
    return table


def _largest(document: Mapping[str, Any]) -> Table:
    table = plain_table("block", "kind", "Ω", "Γ", "form", "bytes", "share", right=NUMERIC)
    total = document["summary"]["factor_bytes"]
    blocks = sorted(document["blocks"], key=lambda block: -block["bytes"])
    for block in blocks[:LARGEST]:
        table.add_row(
            Text(block["name"] or "(root)"),
            block["kind"],
            side_text(block["columns"], block["groups"]),
            side_text(block["rows"], block["groups"]),
            block["form"],
            bytes_text(block["bytes"]),
            share_text(block["bytes"], total),
        )
    return table


def side_text(side: int, groups: int) -> str:
    """``64x9`` for 64 factors of side 9."""
    return f"{groups}x{side}" if groups > 1 else str(side)


def _warnings(document: Mapping[str, Any]) -> list[RenderableType]:
    if not document["warnings"]:
        return []
    lines = [Text.assemble(("warning: ", "yellow"), warning) for warning in document["warnings"]]
    return [Text(), *lines]
