"""Tables, JSON and plots of ``kfc-fx bench train``, from its results file alone."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from kfc_fx.tools.failures import CommandError, import_extra
from kfc_fx.tools.race.optimizers import KFC_PREFIX, SHORTENED, title
from kfc_fx.tools.race.results import ResultsFile
from kfc_fx.tools.race.standings import Cell, Spread, Standing, ToTarget, cells
from kfc_fx.tools.race.tasks import TASKS

NOTHING = "–"
TARGETS = "Steps (time in SGD steps) to the final training loss of:"
MEBIBYTE = 2**20


def write_report(file: ResultsFile, console: Console) -> None:
    """Print the tables; write the figures beside the file as ``…-report.json``, the plots as
    ``…-TASK-BATCH-STEPS.png``. Without a run it says that there is none.

    Raises:
        CommandError: the report cannot be written.
    """
    stem = file.path.with_suffix("")
    found = cells(file)
    if not found:
        console.print(f"no runs in {file.path}: nothing to report")
        return
    for cell in found:
        for shown in (
            heading(cell),
            ends_table(cell),
            TARGETS,
            targets_table(cell),
            *shortened(cell),
            *verdicts(cell),
        ):
            console.print(shown)
    try:
        path = stem.with_name(f"{stem.name}-report.json")
        content = {"machine": platform.platform(), "cells": [_plain(asdict(c)) for c in found]}
        path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        console.print(f"figures: {path}")
        for cell in found:
            name = f"{stem.name}-{cell.task}-{cell.batch_size}-{cell.steps}.png"
            plot(cell, stem.with_name(name))
            console.print(f"plot: {stem.with_name(name)}")
    except OSError as error:
        raise CommandError(f"cannot write the report: {error}") from error


def heading(cell: Cell) -> str:
    """The cell in words."""
    task = TASKS.get(cell.task)
    return (
        f"{cell.task}{f' ({task.title})' if task else ''}, batch {cell.batch_size}, "
        f"{cell.steps} steps, {cell.train_size:,} training examples"
    )


def ends_table(cell: Cell) -> Table:
    """Where each optimizer ends at its best rate, what a step costs, how much memory it takes."""
    made = Table(box=box.SIMPLE_HEAD)
    made.caption = (
        "Final loss: of training, after the last update (of runs from before that was measured, "
        "where the smoothed curve ends). Mean (lowest to highest) of the seeds. "
        "Step: mean step in SGD steps (quartiles); early: the same for KFC's first ones. "
        "Memory: peak over the process with its data."
    )
    made.caption_justify = "left"
    made.add_column("optimizer", no_wrap=True)
    columns = ("rate", "rates tried", "diverged", "final loss", "test", "seeds", "step", "early")
    for column in (*columns, "memory MiB"):
        made.add_column(column, justify="right")
    for standing in cell.standings:
        made.add_row(*_ends(standing))
    return made


def targets_table(cell: Cell) -> Table:
    """Steps, and in brackets time in mean SGD steps, to the loss that each rival ends with."""
    made = Table(box=box.SIMPLE_HEAD)
    made.add_column("optimizer", no_wrap=True)
    targets = cell.standings[0].targets if cell.standings else ()
    for target in targets:
        made.add_column(f"{title(target.rival)}: {target.loss:.4g}", justify="right")
    for standing in cell.standings:
        made.add_row(title(standing.optimizer), *(_to_target(t) for t in standing.targets))
    return made


def shortened(cell: Cell) -> list[str]:
    """For each optimizer whose runs were shortened, the shortest that ends as low as each rival;
    that of its whole length counts too."""
    lines = []
    for standing in cell.standings:
        if standing.optimizer not in SHORTENED:
            continue
        parts = [_shortened(cell, target) for target in standing.targets if target.shortened]
        if parts:
            lines.append(f"{title(standing.optimizer)} ends as low as {'; '.join(parts)}.")
    return lines


def verdicts(cell: Cell) -> list[str]:
    """Who is first, by final loss and test, and by steps and time to each rival's end."""
    lines = []
    ended = [s for s in cell.standings if s.final and math.isfinite(s.final.mean)]
    if ended:
        first = min(ended, key=lambda s: s.final.mean if s.final else math.inf)
        lines.append(f"Lowest final loss: {_named(first)}.")
        lines.append(f"Best test {_best_test(ended)}.")
    for number, target in enumerate(cell.standings[0].targets if cell.standings else ()):
        parts = [
            _first(cell, number, lambda t: t.steps, "fewest steps", "d"),
            _first(cell, number, lambda t: t.relative_seconds, "least time", ".1f"),
        ]
        known = [part for part in parts if part]
        lines.append(f"To {title(target.rival)}'s final loss: {'; '.join(known)}.")
    return lines


def plot(cell: Cell, path: Path) -> None:
    """Smoothed training loss against steps and against time in SGD steps, as a PNG."""
    figure = import_extra("matplotlib.figure", "the plot").Figure((11, 4.5), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    for number, standing in enumerate(cell.standings):
        curve = [loss if math.isfinite(loss) else math.nan for loss in standing.curve]
        steps = range(1, len(curve) + 1)
        style = {
            "color": f"C{number}",
            "linestyle": "-" if standing.optimizer.startswith(KFC_PREFIX) else "--",
            "label": title(standing.optimizer),
        }
        by_step.plot(steps, curve, **style)
        if standing.cost is not None:
            by_time.plot([standing.cost.relative_seconds(step) for step in steps], curve, **style)
    for axes, label in ((by_step, "steps"), (by_time, "time in SGD steps")):
        axes.set_xlabel(label)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    by_step.set_ylabel("training loss, smoothed, mean of seeds")
    by_step.legend(fontsize="small")
    figure.suptitle(heading(cell))
    figure.savefig(path, dpi=110, format="png")


def _ends(standing: Standing) -> list[str]:
    cost, tested = standing.cost, standing.test_accuracy or standing.test_loss
    as_percent = standing.test_accuracy is not None
    return [
        title(standing.optimizer),
        NOTHING if standing.lr is None else f"{standing.lr:g}",
        str(len(standing.rates)),
        str(len(standing.diverged)),
        _spread(standing.final, ".4g"),
        _spread(tested, ".1%" if as_percent else ".4g"),
        NOTHING if standing.final is None else str(standing.final.seeds),
        NOTHING if cost is None else f"{cost.mean:.2f} ({cost.low:.2f}–{cost.high:.2f})",
        NOTHING if cost is None else f"{cost.early:.2f}",
        NOTHING if standing.peak_memory is None else f"{standing.peak_memory / MEBIBYTE:.0f}",
    ]


def _spread(spread: Spread | None, form: str) -> str:
    if spread is None:
        return NOTHING
    if spread.seeds == 1:
        return format(spread.mean, form)
    return f"{spread.mean:{form}} ({spread.low:{form}}–{spread.high:{form}})"


def _to_target(target: ToTarget) -> str:
    if target.steps is None:
        return NOTHING
    if target.relative_seconds is None:
        return str(target.steps)
    return f"{target.steps} ({target.relative_seconds:.1f})"


def _shortened(cell: Cell, target: ToTarget) -> str:
    """As "Muon in 40 steps (1.5 times fewer; in 0.70 of its time)"."""
    assert target.shortened is not None
    fewer = cell.steps / target.shortened
    times = f"{fewer:.3g} times fewer" if fewer > 1 else "as many"
    (rival,) = (s for s in cell.standings if s.optimizer == target.rival)
    if target.shortened_seconds is not None and rival.cost is not None:
        share = target.shortened_seconds / rival.cost.relative_seconds(cell.steps)
        times += f", in {share:.2f} of its time"
    return f"{title(target.rival)} in {target.shortened} steps ({times})"


def _best_test(standings: list[Standing]) -> str:
    if any(s.test_accuracy for s in standings):
        first = max(standings, key=lambda s: s.test_accuracy.mean if s.test_accuracy else -math.inf)
        return f"accuracy: {_named(first)}"
    first = min(standings, key=lambda s: s.test_loss.mean if s.test_loss else math.inf)
    return f"loss: {_named(first)}"


def _first(
    cell: Cell, number: int, figure: Callable[[ToTarget], float | None], what: str, form: str
) -> str | None:
    """``what``: the optimizer with the lowest figure for the target, and what the rival itself
    needed."""
    found = {
        s.optimizer: value
        for s in cell.standings
        if (value := figure(s.targets[number])) is not None
    }
    if not found:
        return None
    first = min(found, key=lambda name: found[name])
    rival = cell.standings[0].targets[number].rival
    own = f", {title(rival)} {found[rival]:{form}}" if rival in found and rival != first else ""
    mark = "" if first.startswith(KFC_PREFIX) else " (not KFC)"
    return f"{what} {title(first)}{mark} {found[first]:{form}}{own}"


def _named(standing: Standing) -> str:
    mark = "" if standing.optimizer.startswith(KFC_PREFIX) else " (not KFC)"
    return f"{title(standing.optimizer)}{mark}"


def _plain(value: Any) -> Any:
    """Numbers that are not finite as null."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
