"""What ``kfc-fx bench train`` measures, and the one file that it is kept in."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kfc_fx.tools.failures import CommandError
from kfc_fx.tools.train.comparison import smoothed, smoothing_half_window

DIGITS = 5
"""Significant digits of what a file keeps of curves and clocks: seeds differ in the second."""


@dataclass(frozen=True)
class RunSpec:
    """One training run. Two of one specification differ in their seconds only.

    ``cell_steps`` are those of the cell that it belongs to, where it is shorter itself.
    """

    task: str
    batch_size: int
    steps: int
    optimizer: str
    lr: float
    seed: int
    cell_steps: int | None = None

    @property
    def cell(self) -> tuple[str, int, int]:
        """Task, batch size and steps of its cell."""
        return self.task, self.batch_size, self.cell_steps or self.steps


@dataclass(frozen=True)
class RunResult:
    """What a run did, up to its end or to where it diverged.

    ``losses`` has one mini-batch loss per step, from before its update; one that is not finite
    is ``None``. ``seconds`` are those of all steps by the run's own clock, the capture apart.
    ``end_loss`` is the training loss of the parameters after the last update, over a set of
    training examples that is the same for all runs of a task; ``None`` where the run diverged, or
    was made before it was measured. ``test_loss`` and ``test_accuracy`` are of the end too.
    ``peak_memory`` is in bytes beyond what the process (on a GPU, its allocator) and the data took
    before the network was made, ``None`` where the system does not tell.
    """

    spec: RunSpec
    diverged: bool
    losses: tuple[float | None, ...]
    seconds: float
    capture_seconds: float
    test_loss: float | None
    test_accuracy: float | None
    peak_memory: int | None
    train_size: int
    threads: int
    workers: int
    versions: dict[str, str]
    device: str = "cpu"
    end_loss: float | None = None

    @property
    def curve(self) -> list[float]:
        """Smoothed mini-batch loss of each step, from before its update; infinite from where it
        diverged.

        A shortened run is smoothed over an eighth of it at most: more would be its beginning.
        """
        half_window = smoothing_half_window(self.spec.steps)
        if self.spec.cell_steps is not None:
            half_window = min(half_window, self.spec.steps // 8)
        known = [loss for loss in self.losses if loss is not None]
        return smoothed(known, half_window) + [float("inf")] * (self.spec.steps - len(known))

    def clock_seconds(self, steps: int) -> float:
        """Of the capture and so many mean steps, by the run's own clock."""
        return self.capture_seconds + steps * self.seconds / max(1, len(self.losses))

    @property
    def final_loss(self) -> float:
        """Training loss at the end; infinite for a run that diverged. Where ``end_loss`` was not
        measured, the end of the curve, which lags a step or two behind."""
        if self.diverged:
            return float("inf")
        return self.curve[-1] if self.end_loss is None else self.end_loss


@dataclass(frozen=True)
class CostResult:
    """Seconds of one optimizer's steps over SGD's, both measured in turns in one block.

    ``mean`` is the median over the rounds of the mean step of a whole refresh interval, between
    its quartiles; ``early`` the mean of the first ``early_steps``, where KFC's statistics and
    refreshes are denser: it has them at the steps ``early_due``, the others cost ``plain``. Where
    all stacks are due a step costs ``due``, else the share ``early_shares`` of what that costs
    more. ``sgd_seconds`` is SGD's median step.
    """

    task: str
    batch_size: int
    optimizer: str
    mean: float
    low: float
    high: float
    early: float
    early_steps: int
    interval: int
    rounds: int
    sgd_seconds: float
    threads: int
    versions: dict[str, str]
    device: str = "cpu"
    due: float | None = None
    plain: float | None = None
    early_due: tuple[int, ...] = ()
    early_shares: tuple[float, ...] = ()

    def relative_seconds(self, steps: int) -> float:
        """Time of the first ``steps`` steps, in mean SGD steps."""
        early = min(steps, self.early_steps)
        if self.due is not None and self.plain is not None:
            shares = self.early_shares or (1.0,) * len(self.early_due)
            pairs = zip(self.early_due, shares, strict=True)
            due = sum(share for step, share in pairs if step < early)
            in_early = due * self.due + (early - due) * self.plain
            return in_early + (steps - early) * self.mean
        return early * self.early + (steps - early) * self.mean


class ResultsFile:
    """Runs and costs, written through to ``path`` after each; a file there is gone on with.

    Raises:
        CommandError: the file is there and is not such a file, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[RunSpec, RunResult] = {}
        self._costs: dict[tuple[str, int, str], CostResult] = {}
        if path.exists():
            self._read()

    @property
    def costs(self) -> Sequence[CostResult]:
        """The newest cost of every optimizer in every cell."""
        return list(self._costs.values())

    def add_run(self, run: RunResult) -> None:
        """Keep a finished run, in the digits that the file has."""
        self.runs[run.spec] = rounded(run)
        self._write()

    def add_costs(self, costs: Sequence[CostResult]) -> None:
        """Keep the costs of one block; they replace all older ones of its task and batch size,
        because only costs of one block compare."""
        measured = {(cost.task, cost.batch_size) for cost in costs}
        self._costs = {key: cost for key, cost in self._costs.items() if key[:2] not in measured}
        self._costs |= {(cost.task, cost.batch_size, cost.optimizer): cost for cost in costs}
        self._write()

    def _write(self) -> None:
        content = {
            "runs": [asdict(run) for run in self.runs.values()],
            "costs": [asdict(cost) for cost in self._costs.values()],
        }
        part = self.path.with_name(f"{self.path.name}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(_one_entry_a_line(content), encoding="utf-8")
            os.replace(part, self.path)
        except OSError as error:
            raise CommandError(f"--results {self.path}: {error.strerror or error}") from error

    def _read(self) -> None:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            runs = [_run(entry) for entry in content["runs"]]
            costs = [_cost(entry) for entry in content["costs"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CommandError(
                f"--results {self.path} is not a file of this version of the race: {error}"
            ) from error
        self.runs = {run.spec: run for run in runs}
        self._costs = {(cost.task, cost.batch_size, cost.optimizer): cost for cost in costs}


def rounded(run: RunResult) -> RunResult:
    """A run whose curve and clock have :data:`DIGITS` significant digits, so that a search which
    goes on with a file sees what it saw before. What the best rate is chosen by stays whole."""
    return replace(
        run,
        losses=tuple(None if loss is None else _rounded(loss) for loss in run.losses),
        seconds=_rounded(run.seconds),
        capture_seconds=_rounded(run.capture_seconds),
    )


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _run(entry: dict[str, Any]) -> RunResult:
    own = {
        **entry,
        "spec": RunSpec(**entry["spec"]),
        "losses": tuple(entry["losses"]),
    }
    return RunResult(**own)


def _cost(entry: dict[str, Any]) -> CostResult:
    lists = {name: tuple(entry.get(name, ())) for name in ("early_due", "early_shares")}
    return CostResult(**{**entry, **lists})


def _one_entry_a_line(content: dict[str, list[Any]]) -> str:
    parts = []
    for name, entries in content.items():
        lines = ",\n".join(
            json.dumps(entry, allow_nan=False, separators=(",", ":")) for entry in entries
        )
        parts.append(f'"{name}": [\n{lines}\n]')
    return "{\n" + ",\n".join(parts) + "\n}\n"
