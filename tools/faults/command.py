"""``kfc-fx bench faults``: faults in the middle of training, and what each leaves behind."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.table import Table

from kfc_fx.tools.faults.battery import battery, kills
from kfc_fx.tools.faults.outcome import Outcome
from kfc_fx.tools.terminal import output_console, write

SCALINGS = ("adam", "spectral", "eigen", "inverse")


def faults(
    points: Annotated[
        int, typer.Option(min=1, help="Places of a fault that may be anywhere.")
    ] = 25,
    interrupts: Annotated[
        int, typer.Option(min=1, help="Moments of Ctrl-C for each scaling.")
    ] = 250,
    kill: Annotated[int, typer.Option(min=0, help="Times that a saving process is killed.")] = 10,
    json_path: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Write all rows here.")
    ] = None,
) -> None:
    """Put faults into training, and compare the state after each with that of before and after.

    Parameters, buffers, the optimizer's state and its counters must be those of before the step or
    those of after it, bit for bit, and the steps that follow those of a run without the fault.
    The exit code is 1 if they are not.
    """
    outcomes: list[Outcome] = []
    console = output_console()
    for scaling in SCALINGS:
        with console.status(scaling):
            outcomes += battery(scaling, points, interrupts)
    outcomes += kills(kill) if kill else []
    console.print(_table(outcomes))
    if json_path is not None:
        rows = [_plain(outcome) for outcome in outcomes]
        write(json_path, json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    if not all(outcome.is_right for outcome in outcomes):
        raise typer.Exit(1)


def _plain(outcome: Outcome) -> dict[str, object]:
    counters = {"left": dict(outcome.left), "raised": dict(outcome.raised)}
    return {**vars(outcome), **counters, "is_right": outcome.is_right}


def _table(outcomes: Sequence[Outcome]) -> Table:
    """One row for each fault, over all scalings."""
    table = Table(box=box.SIMPLE_HEAD)
    for header in ("fault", "tried", "before", "after", "neither", "goes on", "raised"):
        table.add_column(header, justify="left" if header in ("fault", "raised") else "right")
    for fault in dict.fromkeys(outcome.fault for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.fault == fault]
        left, raised = _sum(o.left for o in own), _sum(o.raised for o in own)
        table.add_row(
            fault,
            str(sum(outcome.tried for outcome in own)),
            *(str(left[name]) for name in ("before", "after", "neither")),
            str(sum(outcome.goes_on for outcome in own)),
            ", ".join(f"{name or 'nothing'} {count}" for name, count in raised.most_common()),
        )
    return table


def _sum(counters: object) -> Counter[str]:
    total: Counter[str] = Counter()
    for counter in counters:  # type: ignore[attr-defined]
        total.update(counter)
    return total
