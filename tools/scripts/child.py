"""The process that runs one script: ``python -m kfc_fx.tools.scripts.child REQUEST RESULT``."""

from __future__ import annotations

import json
import os
import random
import runpy
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

import kfc_fx
from kfc_fx.errors import KfcError, KfcWarning, first_line
from kfc_fx.tools.scripts.data import STAND_INS
from kfc_fx.tools.scripts.watch import StepsDone, Watch


@dataclass(frozen=True)
class Request:
    """What to run."""

    script: str
    arguments: list[str]
    imports: list[str]
    data: list[str]
    data_dir: str | None
    steps: int
    optimizers: int
    largest_batch: int | None


@dataclass(frozen=True)
class ModelAccount:
    """What kfc_fx made of a model."""

    likelihood: str
    found_from: list[str]
    blocks: int
    generic: dict[str, str]
    """Name of a parameter to the reason why it has no block."""
    graphs: int


@dataclass(frozen=True)
class Run:
    """A run of a script, to its error where it has one."""

    data: list[str]
    losses: list[list[float]]
    """For each optimizer, one for each step."""
    first: float | None
    median: float | None
    models: list[ModelAccount]
    warnings: list[str]
    error: str


def run(request: Request) -> Run:
    """Run a script in this process, which is then of no other use."""
    script = Path(request.script)
    os.chdir(script.parent)
    sys.argv = [script.name, *request.arguments]
    sys.path[:0] = [str(script.parent), *request.imports]
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    data_dir = None if request.data_dir is None else Path(request.data_dir)
    titles = [STAND_INS[name](script.parent, data_dir) for name in request.data]
    if request.largest_batch is not None:
        _cut_batches(request.largest_batch)
    models, given = _noted_models(), _noted_warnings()
    watch = Watch(request.steps, request.optimizers)
    watch.install()
    error = _error_of(script)
    first, median = watch.seconds()
    accounts = [_account(model) for model in models]
    return Run(titles, watch.losses, first, median, accounts, given, error)


def _error_of(script: Path) -> str:
    """Run it to its last step; returns its error, or an empty text."""
    try:
        runpy.run_path(str(script), run_name="__main__")
    except StepsDone:
        return ""
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        own = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(script)]
        place = f"line {own[-1].lineno}: " if own else ""
        return f"{place}{type(error).__name__}: {first_line(error)}"
    return "it ended before its last step"


def _cut_batches(largest: int) -> None:
    """Loaders that are made from here on have batches of at most that size."""
    made: Callable[..., None] = DataLoader.__init__

    def init(self: Any, dataset: Any, batch_size: int = 1, *args: Any, **kwargs: Any) -> None:
        made(self, dataset, min(batch_size, largest), *args, **kwargs)

    DataLoader.__init__ = init  # type: ignore[method-assign, assignment]


def _noted_models() -> list[nn.Module]:
    """The models that are compiled from here on."""
    found: list[nn.Module] = []
    compiled: Callable[..., nn.Module] = kfc_fx.compile

    def noted(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        found.append(model)
        return compiled(model, *args, **kwargs)

    kfc_fx.compile = noted  # type: ignore[assignment]
    return found


def _noted_warnings() -> list[str]:
    """The warnings of kfc_fx from here on; those of others are shown as ever."""
    found: list[str] = []
    shown = warnings.showwarning
    warnings.simplefilter("always", KfcWarning)

    def note(message: Any, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        if issubclass(category, KfcWarning):
            found.append(str(message))
        else:
            shown(message, category, *args, **kwargs)

    warnings.showwarning = note
    return found


def _account(model: nn.Module) -> ModelAccount:
    """What is known of a model at the end."""
    compilation = kfc_fx.Compilation.of(model)
    try:
        plan = compilation.plan
    except KfcError as error:
        return ModelAccount("none", [first_line(error)], 0, {}, 0)
    generic = {entry.name: entry.reason for entry in plan.generic}
    found = str(compilation.likelihood)
    return ModelAccount(found, list(plan.likelihood), len(plan.blocks), generic, len(plan.graphs))


if __name__ == "__main__":
    asked, answer = map(Path, sys.argv[1:])  # the script gets arguments of its own
    done = run(Request(**json.loads(asked.read_text())))
    answer.write_text(json.dumps(asdict(done)))
