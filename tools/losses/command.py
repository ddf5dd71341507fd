"""``kfc-fx bench losses``: which likelihood is found for a loss, and whether factors fit it."""

from __future__ import annotations

import importlib.util
import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.table import Table

from kfc_fx.tools.losses.check import LossResult, check_loss
from kfc_fx.tools.losses.models import found_likelihood, model_losses
from kfc_fx.tools.losses.table import loss_cases
from kfc_fx.tools.terminal import output_console, write

LIBRARIES = ("torchvision", "transformers", "diffusers")


@dataclass(frozen=True)
class LossRow:
    """One loss: what was to be found and what was."""

    name: str
    expected: str
    result: LossResult

    @property
    def is_right(self) -> bool:
        """Whether the likelihood is the one that was to be found."""
        return self.result.decision == self.expected


def losses(
    json_path: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Write all rows here.")
    ] = None,
    models: Annotated[
        bool,
        typer.Option(help="Also the losses of models of torchvision, transformers and diffusers."),
    ] = True,
) -> None:
    """Find the likelihood of many losses, and compare Γ with that of the log-likelihood.

    A small network takes one step of "eigen" with fisher="empirical", in double precision. "scale"
    is the trace of Γ relative to that of the gradients of each example's log-likelihood, written
    out. The exit code is 1 if a likelihood is another one than was to be found.
    """
    rows = [LossRow(case.name, case.decision, check_loss(case)) for case in loss_cases()]
    of_models = _of_models() if models else {}
    console = output_console()
    console.print(_table(rows))
    if of_models:
        console.print(_model_table(of_models))
    right = all(row.is_right for row in rows)
    right &= all(found == expected for expected, found in of_models.values())
    if json_path is not None:
        document = {
            "torch": torch.__version__,
            "losses": [asdict(row) for row in rows],
            "models": {
                name: {"expected": expected, "found": found}
                for name, (expected, found) in of_models.items()
            },
        }
        write(json_path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    raise typer.Exit(0 if right else 1)


def _of_models() -> dict[str, tuple[str, str]]:
    """Expected and found likelihood of each model of a library that is installed."""
    found = {}
    for library in LIBRARIES:
        if importlib.util.find_spec(library) is None:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries themselves
            for case in model_losses(library):
                found[f"{library}: {case.name}"] = (case.decision, found_likelihood(case))
    return found


def _table(rows: list[LossRow]) -> Table:
    table = Table("loss", "likelihood", "found from", "scale", "warned", box=box.SIMPLE)
    for row in rows:
        result = row.result
        decision = result.decision if row.is_right else f"{result.decision}, not {row.expected}"
        scale = "" if result.scale is None else f"{result.scale:.3f}"
        table.add_row(row.name, decision, result.reason, scale, "yes" if result.doubt else "")
    return table


def _model_table(rows: dict[str, tuple[str, str]]) -> Table:
    table = Table("model and loss", "likelihood", box=box.SIMPLE)
    for name, (expected, found) in rows.items():
        table.add_row(name, found if found == expected else f"{found}, not {expected}")
    return table
