"""One training run of ``kfc-fx bench train``."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor, nn

from kfc_fx.tools.race.optimizers import Entered, enter
from kfc_fx.tools.race.results import RunResult, RunSpec
from kfc_fx.tools.race.tasks import Examples, RaceData, TaskSpec, find_task
from kfc_fx.tools.train.training_run import learning_rate_scale, warm_up_steps

DIVERGED_FACTOR = 3.0
EVALUATION_BATCH = 500
END_EXAMPLES = 2_000  # of the training set, evenly spaced
PROCESS_STATUS = Path("/proc/self/status")
CLEAR_PEAK = Path("/proc/self/clear_refs")
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # torch's CPU allocator looks for it at its first large tensor


def train(spec: RunSpec, data: RaceData, *, workers: int = 1) -> RunResult:
    """Train on the device of ``data``, from the parameters and in the order that ``spec.seed``
    gives.

    It is stopped, and counted as diverged, where the loss is not finite, or more than three
    times that of the first step once the warm-up is over.

    Args:
        workers: runs that share the machine at the time, for the record.
    """
    task = find_task(spec.task)
    device = data.train.inputs.device
    memory_before = _reset_peak_memory(device)
    entered = make(task, spec.optimizer, spec.lr, spec.seed, data, spec.batch_size)
    losses, seconds, diverged = _loop(spec, task, data, entered)
    peak = _peak_memory(device)  # before the test set is looked at
    tested = (None, None) if diverged else test(entered.network, task, data.test)
    # After the test: this changes the running statistics of BatchNorm.
    end_loss = None if diverged else training_loss(entered.network, task, data.train)
    return RunResult(
        spec=spec,
        diverged=diverged,
        losses=tuple(losses),
        seconds=sum(seconds),
        capture_seconds=entered.capture_seconds,
        test_loss=tested[0],
        test_accuracy=tested[1],
        peak_memory=None if peak is None or memory_before is None else peak - memory_before,
        train_size=len(data.train),
        threads=torch.get_num_threads(),
        workers=workers,
        versions=versions(),
        device=device_name(device),
        end_loss=end_loss,
    )


def device_name(device: torch.device) -> str:
    """The device as results name it: the GPU's own name, "cpu" for the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def use_tensor_cores(device: torch.device) -> None:
    """Let float32 products on a GPU be TF32, for everyone: what people train with there."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True


def use_huge_pages() -> None:
    """Let torch ask Linux for huge pages for its large tensors, here and in processes started
    from here, for everyone, unless the user has decided: with pages of 4 KiB, a step of SGD at a
    batch of 4096 spends a third of its time on having them mapped."""
    os.environ.setdefault(HUGE_PAGES, "1")


def make(
    task: TaskSpec, optimizer: str, lr: float, seed: int, data: RaceData, batch_size: int
) -> Entered:
    """The task's network, freshly initialized, and the optimizer for it."""
    torch.manual_seed(seed)
    example, _ = data.train.batch(slice(batch_size))
    network = task.build().to(example.device)
    entered = enter(optimizer, network, task, lr, example)
    # What sampling comes from after this must not depend on how many numbers were drawn so far.
    torch.manual_seed(seed)
    return entered


def take_step(entered: Entered, task: TaskSpec, inputs: Tensor, targets: Tensor) -> float:
    """Forward, backward and update; the loss from before the update."""
    loss = task.loss(entered.network(inputs), targets)
    loss.backward()
    for optimizer in entered.optimizers:
        optimizer.step()
    for optimizer in entered.optimizers:
        optimizer.zero_grad()
    return loss.item()


def batches(examples: Examples, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end, in an order that is drawn anew every epoch; the last batch of an
    epoch that is not full is left out.

    Raises:
        ValueError: there are fewer examples than one batch takes.
    """
    if len(examples) < batch_size:
        raise ValueError(f"{len(examples)} examples are fewer than a batch of {batch_size}")
    order = torch.Generator().manual_seed(seed)
    whole = len(examples) // batch_size * batch_size
    while True:
        epoch = torch.randperm(len(examples), generator=order)[:whole]
        for rows in epoch.to(examples.inputs.device).split(batch_size):
            yield examples.batch(rows)


@torch.no_grad()
def training_loss(network: nn.Module, task: TaskSpec, examples: Examples) -> float:
    """Mean loss over a part of the training set, evenly spaced, the network in training mode.

    The losses of a run's last mini-batches would be from before its last updates, and by the luck
    of which examples those were: in a run of six steps the former, in a task of small batches the
    latter is more than what optimizers differ by.
    """
    count = min(END_EXAMPLES, len(examples))
    rows = torch.arange(count, device=examples.inputs.device) * (len(examples) // count)
    network.train()
    total = 0.0
    for part in rows.split(EVALUATION_BATCH):
        inputs, targets = examples.batch(part)
        total += task.loss(network(inputs), targets).item() * len(part)
    return total / count


@torch.no_grad()
def test(network: nn.Module, task: TaskSpec, examples: Examples) -> tuple[float, float | None]:
    """Mean loss over ``examples`` and, where that is the task's metric, the accuracy."""
    network.eval()
    loss = correct = 0.0
    for start in range(0, len(examples), EVALUATION_BATCH):
        inputs, targets = examples.batch(slice(start, start + EVALUATION_BATCH))
        outputs = network(inputs)
        loss += task.loss(outputs, targets).item() * len(targets)
        if task.metric == "accuracy":
            correct += int((outputs.argmax(-1) == targets).sum())
    network.train()
    accuracy = correct / len(examples) if task.metric == "accuracy" else None
    return loss / len(examples), accuracy


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("kfc_fx", "heavyball"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def _loop(
    spec: RunSpec, task: TaskSpec, data: RaceData, entered: Entered
) -> tuple[list[float | None], list[float], bool]:
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_scale(step, spec.steps)
        )
        for optimizer in entered.optimizers
    ]
    losses: list[float | None] = []
    seconds: list[float] = []
    source = batches(data.train, spec.batch_size, spec.seed)
    for _ in range(spec.steps):
        inputs, targets = next(source)
        started = time.perf_counter()
        try:
            loss = take_step(entered, task, inputs, targets)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            loss = math.nan  # a factor of a rival has overflowed
        seconds.append(time.perf_counter() - started)
        losses.append(loss if math.isfinite(loss) else None)
        if _has_diverged(losses, warm_up_steps(spec.steps)):
            return losses, seconds, True
        for schedule in schedules:
            schedule.step()
    return losses, seconds, False


def _has_diverged(losses: list[float | None], warm_up: int) -> bool:
    first, last = losses[0], losses[-1]
    if first is None or last is None:
        return True
    return len(losses) > warm_up and last > DIVERGED_FACTOR * first


def _reset_peak_memory(device: torch.device) -> int | None:
    """Forget the peak so far, of the GPU's allocator or of the process; what is held now,
    ``None`` where it cannot be had."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        CLEAR_PEAK.write_text("5", encoding="ascii")
    except OSError:
        return None
    return _memory("VmRSS")


def _peak_memory(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _memory("VmHWM")


def _memory(field: str) -> int | None:
    """A field of Linux's process status, in bytes."""
    try:
        lines = PROCESS_STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(found[0]) * 1024 if found else None
