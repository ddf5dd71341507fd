"""``kfc-fx bench step``: what compiling, statistics and the update cost in a whole training step.

All figures are ratios within one run: the two sides take turns, and the median counts.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.table import Table
from torch import nn
from torch.nn import functional as F

import kfc_fx
from kfc_fx.statistics.request import StatisticsRequest
from kfc_fx.tools.bench.figures import save_figures
from kfc_fx.tools.data.networks import kfc_cifar
from kfc_fx.tools.terminal import show

Step = Callable[[], None]
SGD_MOMENTUM = 0.9


@dataclass(frozen=True)
class Ratio:
    """A measured ratio: ``median`` of own time over the other's, between its quartiles."""

    what: str
    median: float
    low: float
    high: float


def resnet18(classes: int = 10) -> nn.Module:
    """ResNet-18 for images of 32 pixels: a 3x3 stem and no first pooling."""
    from torchvision.models import resnet18 as build

    model = build(num_classes=classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def batch(size: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images and labels."""
    return torch.randn(size, 3, side, side), torch.randint(10, (size,))


def seconds(run: Step) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(what: str, own: Step, other: Step, rounds: int) -> Ratio:
    """Time both in turn after one call of each that does not count."""
    own()
    other()
    ratios = [seconds(own) / seconds(other) for _ in range(rounds)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(what, median, low, high)


def sgd_step(model: nn.Module, size: int) -> Step:
    """Forward, backward and an update by SGD with momentum."""
    x, y = batch(size, 32)
    opt = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=SGD_MOMENTUM)

    def step() -> None:
        F.cross_entropy(model(x), y).backward()
        opt.step()
        opt.zero_grad()

    return step


def statistics_step(compiled: nn.Module, size: int) -> Step:
    """An SGD step that takes every statistic of the whole batch besides: the Fisher pass and all
    factors, unnormalised, as a curvature step of the optimizer does before its update."""
    plain = sgd_step(compiled, size)
    collector = kfc_fx.Compilation.of(compiled).attach(StatisticsRequest())

    def step() -> None:
        collector.arm()
        plain()
        collector.arm(False)
        taken = collector.take()
        assert taken.blocks

    return step


def plain_steps(rounds: int) -> Ratio:
    """Plain step of compiled ResNet-18 over that of the uncompiled one."""
    net = resnet18()
    other = sgd_step(copy.deepcopy(net), 32)
    own = sgd_step(kfc_fx.compile(net), 32)
    return compare("plain step, compiled / not: ResNet-18, batch 32", own, other, 3 * rounds)


def statistics_steps(name: str, build: Callable[[], nn.Module], size: int, rounds: int) -> Ratio:
    """A step with statistics over an SGD step of the uncompiled network."""
    net = build()
    other = sgd_step(copy.deepcopy(net), size)
    own = statistics_step(kfc_fx.compile(net), size)
    return compare(f"step with statistics / SGD: {name}, batch {size}", own, other, rounds)


def mean_steps(scaling: str, rounds: int) -> Ratio:
    """Mean step of KFC at its default intervals over an SGD step, once the early phase is over."""
    size, net = 128, resnet18()
    other = sgd_step(copy.deepcopy(net), size)
    compiled = kfc_fx.compile(net)
    opt = kfc_fx.KFC(compiled, lr=1e-4, scaling=scaling)
    x, y = batch(size, 32)
    interval = opt.options.statistics.refresh_every

    def kfc() -> None:
        for _ in range(interval):
            F.cross_entropy(compiled(x), y).backward()
            opt.step()
            opt.zero_grad()

    def sgd() -> None:
        for _ in range(interval):
            other()

    F.cross_entropy(compiled(x), y).backward()
    opt.step()
    opt.zero_grad()
    opt.diagnostics.steps = opt.schedule.early_phase  # as if it had been through it
    return compare(f"mean step, KFC {scaling} / SGD: ResNet-18, batch {size}", kfc, sgd, rounds)


def first_steps(rounds: int) -> Ratio:
    """First step of KFC on ResNet-18 over SGD's on ``torch.compile``, capture included."""
    x, y = batch(32, 64)

    def first_kfc() -> None:
        torch._dynamo.reset()
        compiled = kfc_fx.compile(resnet18())
        opt = kfc_fx.KFC(compiled, lr=0.01)
        F.cross_entropy(compiled(x), y).backward()
        opt.step()

    def first_sgd() -> None:
        torch._dynamo.reset()
        net = resnet18()
        compiled = torch.compile(net, backend="eager")
        opt = torch.optim.SGD(net.parameters(), lr=0.01, momentum=SGD_MOMENTUM)
        F.cross_entropy(compiled(x), y).backward()
        opt.step()

    return compare(
        "first step, KFC / torch.compile and SGD: ResNet-18", first_kfc, first_sgd, rounds
    )


def measure(rounds: int) -> list[Ratio]:
    """Every figure of the benchmark."""
    return [
        plain_steps(rounds),
        statistics_steps("KFC CIFAR-10", lambda: kfc_cifar((3, 32, 32), 10), 128, 3 * rounds),
        statistics_steps("ResNet-18", resnet18, 32, rounds),
        mean_steps("adam", max(3, rounds // 2)),
        first_steps(rounds),
    ]


def table(ratios: list[Ratio]) -> Table:
    """One line for each ratio."""
    title = f"torch {torch.__version__}, {torch.get_num_threads()} threads, images of 32 pixels"
    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    made.add_column("own time / the other's")
    made.add_column("ratio (quartiles)", justify="right")
    for ratio in ratios:
        made.add_row(ratio.what, f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})")
    return made


def step(
    rounds: Annotated[int, typer.Option(min=2, help="Turns that each pair takes.")] = 7,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write all figures here.")
    ] = None,
) -> None:
    """Whole training steps: compiled against not, with statistics, and KFC against SGD."""
    ratios = measure(rounds)
    show(table(ratios))
    save_figures(json_path, {"ratios": [asdict(ratio) for ratio in ratios]})
