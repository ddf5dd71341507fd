"""How many iterations and seconds each run needed for the same training loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kfc_fx.tools.train.training_run import RunRecord

REFERENCE = "sgd"


@dataclass(frozen=True)
class Row:
    """One run measured against the target; ``None`` where it did not get there."""

    record: RunRecord
    final_loss: float | None
    iterations: int | None
    seconds: float | None


@dataclass(frozen=True)
class Comparison:
    """Runs against one target loss, the smoothed training loss at the end of ``reference``.

    The reference is the run of SGD or, without one, the run that ends with the highest loss;
    ``None``, and so is ``target``, where no run has a finite loss. ``half_window`` is what the
    losses were smoothed with.
    """

    rows: tuple[Row, ...]
    half_window: int
    target: float | None
    reference: RunRecord | None


def compare(records: Sequence[RunRecord]) -> Comparison:
    """Measure runs of one length against their common target, interrupted ones as they are."""
    half_window = smoothing_half_window(max((run.steps for run in records), default=0))
    curves = [smoothed(record.losses, half_window) for record in records]
    ends = {
        record.optimizer.name: (curve[-1], record)
        for record, curve in zip(records, curves, strict=True)
        if curve and math.isfinite(curve[-1])
    }
    slowest = max(ends.values(), key=lambda end: end[0], default=(None, None))
    target, reference = ends.get(REFERENCE, slowest)
    rows = [_row(record, curve, target) for record, curve in zip(records, curves, strict=True)]
    return Comparison(tuple(rows), half_window, target, reference)


def smoothing_half_window(steps: int) -> int:
    """Steps before and after to smooth a run of ``steps`` with: a fortieth of it, 2 to 100."""
    return min(max(2, steps // 40), 100)


def smoothed(losses: Sequence[float], half_window: int) -> list[float]:
    """Mean of the mini-batch losses from ``half_window`` steps before to as many after each step.

    A window that only looks back would add its lag to the iterations of every run, which
    matters most to the fastest. At the start, where there are fewer steps before, as few are
    taken after, so that no step is given a loss from ahead of it; at the end the window is cut.
    """
    curve = []
    for step in range(len(losses)):
        half = min(half_window, step)
        window = losses[step - half : step + half + 1]
        curve.append(sum(window) / len(window))
    return curve


def _row(record: RunRecord, curve: list[float], target: float | None) -> Row:
    final = curve[-1] if curve else None
    if target is None:
        return Row(record, final, None, None)
    step = next((step for step, loss in enumerate(curve) if loss <= target), None)
    if step is None:
        return Row(record, final, None, None)
    return Row(record, final, step + 1, record.seconds[step])
