"""What ``kfc-fx train`` leaves behind: a table, a plot and a JSON file."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from kfc_fx.tools.failures import import_extra
from kfc_fx.tools.train.comparison import Comparison, Row, smoothed
from kfc_fx.tools.train.training_run import RunRecord

NOT_REACHED = "–"
NOTABLE = 0.05
TO_TARGET = ("iterations", "seconds")


def table(comparison: Comparison, title: str) -> Table:
    """The comparison as a table; its caption says what the loss to reach is and how it is
    smoothed. Fits a line of 80 characters."""
    made = Table(title=title, caption=_caption(comparison), box=box.SIMPLE_HEAD, padding=0)
    made.title_justify = made.caption_justify = "left"
    made.add_column("optimizer", no_wrap=True)
    tested = f"test {comparison.rows[0].record.test}" if comparison.rows else "test"
    for heading in ("lr", "final loss", tested, *TO_TARGET, "capture", "in all"):
        made.add_column(heading, justify="right")
    for row in comparison.rows:
        made.add_row(*_cells(row))
    return made


def speed_ups(comparison: Comparison) -> list[str]:
    """One sentence for each optimizer that reached the end of the reference before it."""
    if comparison.reference is None:
        return []
    by_name = {row.record.optimizer.name: row for row in comparison.rows}
    reference = by_name.pop(comparison.reference.optimizer.name)
    return [_speed_up(row, reference) for row in by_name.values() if row.iterations is not None]


def plot(comparison: Comparison, title: str, path: Path) -> None:
    """Write training loss against iterations and against seconds as a PNG.

    Raises:
        CommandError: matplotlib is not installed.
    """
    figure = import_extra("matplotlib.figure", "the plot").Figure((10, 4), layout="constrained")
    by_iteration, by_second = figure.subplots(1, 2, sharey=True)
    for number, row in enumerate(comparison.rows):
        record, color = row.record, f"C{number}"
        curve = smoothed(record.losses, comparison.half_window)
        iterations = range(1, record.steps + 1)
        for axes, places in ((by_iteration, iterations), (by_second, record.seconds)):
            axes.plot(places, record.losses, color=color, alpha=0.2, linewidth=0.8)
            axes.plot(places, curve, color=color, label=record.optimizer.title)
    for axes, label in ((by_iteration, "iterations"), (by_second, "seconds of training")):
        _finish_axes(axes, label, comparison)
    window = 2 * comparison.half_window + 1
    by_iteration.set_ylabel(f"training loss (mean of {window} steps)")
    figure.suptitle(title)
    figure.savefig(path, dpi=150, format="png")


def save(
    comparison: Comparison, settings: Mapping[str, object], *, interrupted: bool, path: Path
) -> None:
    """Write settings, machine, every run's curves and the table's figures as JSON.

    Numbers that are not finite are written as null.
    """
    reference = comparison.reference
    content = {
        "settings": settings,
        "machine": _machine(),
        "interrupted": interrupted,
        "target": {
            "loss": _finite(comparison.target),
            "reference": None if reference is None else reference.optimizer.name,
            "smoothing_half_window": comparison.half_window,
        },
        "runs": [_run(row) for row in comparison.rows],
    }
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _cells(row: Row) -> list[str]:
    record = row.record
    final = "diverged" if record.diverged else _number(row.final_loss, "#.3g")
    return [
        record.optimizer.title,
        f"{record.optimizer.lr:g}",
        final,
        _tested(record),
        _number(row.iterations, "d"),
        _number(row.seconds, ".2f"),
        f"{record.capture_seconds:.2f}",
        f"{record.seconds[-1]:.2f}",
    ]


def _tested(record: RunRecord) -> str:
    if not record.tested:
        return NOT_REACHED
    return f"{record.tested[-1]:.1%}" if record.test == "accuracy" else f"{record.tested[-1]:#.4g}"


def _number(value: float | None, form: str) -> str:
    return NOT_REACHED if value is None else format(value, form)


def _caption(comparison: Comparison) -> str:
    half = comparison.half_window
    lines = [f"Losses: of training, the mean of {2 * half + 1} mini-batches, {half} either side."]
    if comparison.reference is not None:
        lines.append(
            f"Iterations, seconds: to a loss of {comparison.target:#.3g}, "
            f"{comparison.reference.optimizer.title}'s at its end."
        )
    lines.append("Seconds: capture (of the graph, once) and steps; evaluation is not counted.")
    lines += [
        f"{record.optimizer.title} stopped after {record.steps} of {record.planned_steps} steps."
        for record in (row.record for row in comparison.rows)
        if record.steps < record.planned_steps
    ]
    return "\n".join(lines)


def _speed_up(row: Row, reference: Row) -> str:
    iterations = (reference.iterations or 0) / (row.iterations or 1)
    seconds = (reference.seconds or 0) / (row.seconds or 1)
    return (
        f"{row.record.optimizer.title} takes {_ratio(iterations, 'fewer', 'as many')} iterations "
        f"and {_ratio(seconds, 'less', 'as much')} time to the loss that "
        f"{reference.record.optimizer.title} ends with."
    )


def _ratio(ratio: float, less: str, equal: str) -> str:
    if ratio > 1 + NOTABLE:
        return f"{ratio:.1f} times {less}"
    if ratio < 1 / (1 + NOTABLE):
        return f"{1 / ratio:.1f} times more"
    return f"about {equal}"


def _finish_axes(axes: Any, label: str, comparison: Comparison) -> None:
    axes.set_xlabel(label)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    if comparison.target is not None:
        axes.axhline(comparison.target, color="grey", linestyle=":", label="loss to reach")
    axes.legend()


def _machine() -> dict[str, object]:
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _run(row: Row) -> dict[str, object]:
    record = row.record
    return {
        "optimizer": record.optimizer.name,
        "title": record.optimizer.title,
        "scaling": record.optimizer.scaling,
        "learning_rate": record.optimizer.lr,
        "planned_steps": record.planned_steps,
        "steps": record.steps,
        "diverged": record.diverged,
        "final_loss": _finite(row.final_loss),
        f"test_{record.test}": record.tested[-1] if record.tested else None,
        "iterations_to_target": row.iterations,
        "seconds_to_target": row.seconds,
        "capture_seconds": record.capture_seconds,
        "losses": _finite_all(record.losses),
        "seconds": list(record.seconds),
        "tested": list(record.tested),
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _finite_all(values: Sequence[float]) -> list[float | None]:
    return [_finite(value) for value in values]
