"""Train one network by several optimizers, one after the other, and report on them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from torch import nn

from kfc_fx.tools.data import networks
from kfc_fx.tools.data import sets as data_sets
from kfc_fx.tools.data.sets import DataSet
from kfc_fx.tools.train import report
from kfc_fx.tools.train.comparison import compare
from kfc_fx.tools.train.optimizers import OptimizerSpec
from kfc_fx.tools.train.training_run import RunSpec, TrainingRun


@dataclass(frozen=True)
class TrainSettings:
    """The checked choices of one ``kfc-fx train``; ``plot`` and ``save`` are files to write."""

    data: str
    data_dir: Path | None
    train_size: int | None
    model: str | None
    optimizers: tuple[OptimizerSpec, ...]
    run: RunSpec
    plot: Path | None
    save: Path | None


def train_side_by_side(settings: TrainSettings, console: Console) -> bool:
    """Train by each optimizer in turn, then print the table and write the files.

    All of them start from the same parameters and see the same batches.

    Returns:
        False where Ctrl-C ended it early.

    Raises:
        CommandError: the data or the network cannot be had.
    """
    data = data_sets.load(settings.data, settings.data_dir)
    model = settings.model or networks.DEFAULT_NETWORKS[data.name]
    torch.manual_seed(settings.run.seed)
    network = networks.build(model, data.image_shape, data.classes)
    data = data_sets.shuffled(data, settings.run.seed, settings.train_size)
    title = f"{model} on {data.title}"
    console.print(_introduction(title, network, data, settings.run), highlight=False)
    runs = [
        TrainingRun(
            optimizer,
            copy.deepcopy(network),
            data,
            settings.run,
            reconstructs=model in networks.AUTOENCODERS,
        )
        for optimizer in settings.optimizers
    ]
    completed = _train_all(runs, console)
    _report(settings, title, runs, completed, console)
    return completed


def _introduction(title: str, network: nn.Module, data: DataSet, run: RunSpec) -> str:
    parameters = sum(parameter.numel() for parameter in network.parameters())
    size = "x".join(map(str, data.image_shape))
    return (
        f"{title}: {parameters:,} parameters, {len(data.train):,} training and "
        f"{len(data.test):,} test images of {size}, {run.epochs} epochs of batches of "
        f"{run.batch_size}, on {run.device}"
    )


def _train_all(runs: Sequence[TrainingRun], console: Console) -> bool:
    try:
        with _progress(console) as progress:
            tasks = [
                progress.add_task(
                    run.optimizer.title, start=False, total=run.planned_steps, loss=""
                )
                for run in runs
            ]
            for run, task in zip(runs, tasks, strict=True):
                _follow(run, progress, task)
    except KeyboardInterrupt:
        return False
    return True


def _follow(run: TrainingRun, progress: Progress, task: TaskID) -> None:
    progress.start_task(task)
    for loss in run.steps():
        progress.update(task, advance=1, loss=f"loss {loss:.3f}")
    progress.stop_task(task)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        console=console,
    )


def _report(
    settings: TrainSettings,
    title: str,
    runs: Sequence[TrainingRun],
    completed: bool,
    console: Console,
) -> None:
    if not completed:
        console.print("Interrupted; the table so far:", style="yellow")
    comparison = compare([record for run in runs if (record := run.record()).steps])
    console.print(report.table(comparison, title))
    for sentence in report.speed_ups(comparison):
        console.print(sentence, highlight=False)
    if settings.save:
        report.save(comparison, _plain(settings), interrupted=not completed, path=settings.save)
        console.print(f"runs: {settings.save}", highlight=False, soft_wrap=True)
    if settings.plot and comparison.rows:
        report.plot(comparison, title, settings.plot)
        console.print(f"plot: {settings.plot}", highlight=False, soft_wrap=True)


def _plain(settings: TrainSettings) -> dict[str, object]:
    """The settings as JSON has them: the optimizers are told by their runs."""
    values = asdict(settings)
    del values["optimizers"]
    return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
