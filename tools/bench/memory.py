"""``kfc-fx bench memory``: what training a large model takes in memory, with KFC and with AdamW.

Every measurement is a process of its own, which trains on random data with the optimizer's
default options but for the intervals: statistics and a refresh at every step, the dearest case.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich import box
from rich.table import Table
from torch import Tensor, nn

import kfc_fx
from kfc_fx.tools.bench.figures import save_figures
from kfc_fx.tools.bench.trainings import Training, gpt2, images, torchvision
from kfc_fx.tools.data.networks import digits_net
from kfc_fx.tools.failures import CommandError, one_line_failures, unknown_name
from kfc_fx.tools.terminal import show

GB = 10**9
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024
RATE = 1e-4


@dataclass(frozen=True)
class Run:
    """What one process saw: peak resident memory, and bytes of the optimizer's state."""

    peak_bytes: int
    state_bytes: int
    first_loss: float
    last_loss: float


@dataclass(frozen=True)
class MemoryRow:
    """One model trained with both optimizers; sizes in bytes."""

    model: str
    input: tuple[int, ...]
    parameters: int
    parameter_bytes: int
    kfc: Run
    adamw: Run

    @property
    def state_ratio(self) -> float:
        """Bytes of KFC's state over those of the parameters."""
        return self.kfc.state_bytes / self.parameter_bytes


WORKLOADS: dict[str, Callable[[], Training]] = {
    "digits-net": lambda: images(digits_net((1, 8, 8), 10), 64, 1, 8, 10),
    "resnet50": lambda: torchvision("resnet50"),
    "vgg16": lambda: torchvision("vgg16"),
    "gpt2, 2 layers, tied": lambda: gpt2(2, tied=True),
    "gpt2, 2 layers, untied": lambda: gpt2(2, tied=False),
    "gpt2": lambda: gpt2(12, tied=True),
}
"""Images of 224² by eights (digits: 8² by 64), 4 texts of 128 words."""


def measure(name: str, steps: int, state_dtype: str = "float32") -> MemoryRow:
    """Train the workload ``name`` once with each optimizer, each in a fresh process.

    Args:
        state_dtype: what KFC keeps moments in.

    Raises:
        CommandError: a process ended without a result.
    """
    shape, count, size, kfc = _in_fresh_process(name, "kfc", steps, state_dtype)
    *_, adamw = _in_fresh_process(name, "adamw", steps, state_dtype)
    return MemoryRow(name, shape, count, size, kfc, adamw)


def _in_fresh_process(name: str, optimizer: str, steps: int, state_dtype: str) -> tuple[Any, ...]:
    # Spawned, not forked: what this process has in memory must not count.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    threads = torch.get_num_threads()
    process = context.Process(
        target=_child, args=(name, optimizer, steps, state_dtype, threads, theirs)
    )
    process.start()
    theirs.close()
    try:
        result: tuple[Any, ...] = ours.recv()
    except EOFError:
        process.join()
        raise CommandError(
            f"{name} with {optimizer}: the process died, exit code {process.exitcode}"
            " (-9: the machine has too little memory)"
        ) from None
    finally:
        process.kill()  # also when the user interrupts the run
        process.join()
    return result


def _child(
    name: str,
    optimizer: str,
    steps: int,
    state_dtype: str,
    threads: int,
    connection: Connection,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    training = WORKLOADS[name]()
    if optimizer == "kfc":
        run = _train_kfc(training, steps, getattr(torch, state_dtype))
    else:
        run = _train_adamw(training, steps)
    parameters = list(training.model.parameters())
    count = sum(p.numel() for p in parameters)
    connection.send((tuple(training.x.shape), count, tensor_bytes(parameters), run))


def _train_kfc(training: Training, steps: int, state_dtype: torch.dtype) -> Run:
    compiled = kfc_fx.compile(training.model)
    statistics = kfc_fx.Statistics(every=1, refresh_every=1)
    opt = kfc_fx.KFC(compiled, lr=RATE, statistics=statistics, state_dtype=state_dtype)
    losses = _train(training, compiled, opt, steps)
    peak = peak_bytes()
    done = (opt.diagnostics.statistics_steps, opt.diagnostics.refreshes)
    if done != (steps, steps):
        raise RuntimeError(f"{done} statistics and refreshes in {steps} steps")
    return Run(peak, tensor_bytes(opt.state_dict()["state"]), losses[0], losses[-1])


def _train_adamw(training: Training, steps: int) -> Run:
    opt = torch.optim.AdamW(training.model.parameters(), lr=RATE)
    losses = _train(training, training.model, opt, steps)
    return Run(peak_bytes(), tensor_bytes(opt.state_dict()["state"]), losses[0], losses[-1])


def _train(
    training: Training, model: nn.Module, opt: torch.optim.Optimizer, steps: int
) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = training.loss(model(training.x))
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses


def peak_bytes() -> int:
    """Most resident memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(tensor_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(tensor_bytes, value))
    return 0


def table(rows: list[MemoryRow], steps: int) -> Table:
    """One line for each model."""
    title = f"torch {torch.__version__}, {steps} steps, statistics and a refresh at each"
    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    made.add_column("model")
    made.add_column("input")
    for heading in ("parameters", "GB", "state / parameters", "peak GB", "with AdamW", "loss"):
        made.add_column(heading, justify="right")
    for row in rows:
        made.add_row(
            row.model,
            "x".join(map(str, row.input)),
            f"{row.parameters:,}",
            f"{row.parameter_bytes / GB:.2f}",
            f"{row.state_ratio:.2f}",
            f"{row.kfc.peak_bytes / GB:.2f}",
            f"{row.adamw.peak_bytes / GB:.2f}",
            f"{row.kfc.first_loss:.2f} → {row.kfc.last_loss:.2f}",
        )
    return made


def memory(
    model: Annotated[
        list[str] | None, typer.Option(help=f"Any of: {'; '.join(WORKLOADS)}. Repeatable.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 3,
    state_dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="What KFC keeps moments in.")
    ] = "float32",
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write all figures here, model by model.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Tracebacks in full.")] = False,
) -> None:
    """Peak memory and optimizer state of large models, beside AdamW's."""
    rows = []
    with one_line_failures(debug=debug):
        for name in model or WORKLOADS:
            if name not in WORKLOADS:
                raise unknown_name("model", name, WORKLOADS)
            rows.append(measure(name, steps, state_dtype))
            models = [asdict(row) | {"state_ratio": row.state_ratio} for row in rows]
            found = {"steps": steps, "state_dtype": state_dtype, "models": models}
            save_figures(json_path, found)
    show(table(rows, steps))
