"""What compiling costs: plain steps, and the time to the end of the first training step.

Both as ratios within one run, the two sides in turn, median of several.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import kfc_fx

ROUNDS = 5


def batch(size: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images and labels."""
    return torch.randn(size, 3, side, side), torch.randint(10, (size,))


def train_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """Forward and backward pass."""
    F.cross_entropy(model(x), y).backward()
    model.zero_grad()


def seconds(run: Callable[[], None]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def plain_step_ratio() -> float:
    """Plain step of compiled ResNet-18 (32², batch 32) over that of the uncompiled one."""
    net = torchvision.models.resnet18(num_classes=10)
    x, y = batch(32, 32)
    compiled = kfc_fx.compile(net)
    train_step(compiled, x, y)
    pairs = [
        seconds(lambda: train_step(compiled, x, y)) / seconds(lambda: train_step(net, x, y))
        for _ in range(3 * ROUNDS)
    ]
    return statistics.median(pairs)


def first_step_ratio() -> float:
    """First step of KFC on ResNet-18 (64², batch 32) over SGD on ``torch.compile``."""
    x, y = batch(32, 64)

    def first_kfc() -> None:
        compiled = kfc_fx.compile(torchvision.models.resnet18(num_classes=10))
        opt = kfc_fx.KFC(compiled, lr=0.01)
        F.cross_entropy(compiled(x), y).backward()
        opt.step()

    def first_sgd() -> None:
        net = torchvision.models.resnet18(num_classes=10)
        compiled = torch.compile(net, backend="eager")
        opt = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        F.cross_entropy(compiled(x), y).backward()
        opt.step()

    def fresh(run: Callable[[], None]) -> float:
        torch._dynamo.reset()
        return seconds(run)

    fresh(first_sgd)  # imports of dynamo itself
    return statistics.median(fresh(first_kfc) / fresh(first_sgd) for _ in range(ROUNDS))


def main() -> None:
    """Print both ratios."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"plain step, compiled / uncompiled: {plain_step_ratio():.2f}")
    print(f"first training step, KFC / torch.compile and SGD: {first_step_ratio():.2f}")


if __name__ == "__main__":
    main()
