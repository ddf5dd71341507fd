"""The view of memory: a row for each optimizer and its options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from kfc_fx.inspect.quantities import bytes_text, ratio_text
from kfc_fx.inspect.summary_view import plain_table


def memory_view(document: Mapping[str, Any]) -> RenderableType:
    """What is held whatever the optimizer is, then one row for each."""
    memory = document["memory"]
    right = ("state", "of parameters", "statistics", "refresh adds", "in all")
    table = plain_table("optimizer", *right, "options", right=right)
    for row in memory["rows"]:
        whole = memory["parameters"] + memory["gradients"] + row["state"]
        table.add_row(
            row["optimizer"],
            bytes_text(row["state"]),
            ratio_text(row["state"], memory["parameters"]),
            bytes_text(row["statistics"]),
            bytes_text(row["refresh"]),
            bytes_text(whole + row["statistics"] + row["refresh"]),
            row["options"],
        )
    head = (
        f"parameters {bytes_text(memory['parameters'])}, "
        f"gradients {bytes_text(memory['gradients'])}"
    )
    notes = ["In all: parameters, gradients, state, statistics, refresh. Activations come beside."]
    notes.append(f"average= adds {bytes_text(memory['average'])}")
    if memory["master_weights"]:
        notes[-1] += f", master_weights=True {bytes_text(memory['master_weights'])}"
    notes += [f"{name!r} fits no layer of this model" for name in memory["left_out"]]
    texts = [Text(note, style="dim") for note in notes]
    return Group(Text(document["target"], style="bold"), Text(head), Text(), table, Text(), *texts)
