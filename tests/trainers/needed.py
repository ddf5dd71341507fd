"""Packages of the extra ``trainers``, without which tests are skipped, and what they train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import kfc_fx


def needed(package: str) -> Any:
    """A package, or a reason to skip."""
    reason = f"{package} is not installed: make test EXTRAS=trainers has it"
    return pytest.importorskip(package, reason=reason)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)
    )  # fmt: skip


def examples(count: int = 64) -> TensorDataset:
    """Images whose label is the brightest of their first ten pixels."""
    images = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(images, images.flatten(1)[:, :10].argmax(1))


def loader(batch: int = 16) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(examples(), batch_size=batch)


def by_hand(
    epochs: int = 2, *, accumulate: int = 1, clip: float | None = None, **options: Any
) -> list[Tensor]:
    """Parameters after training by a loop of one's own, which a trainer has to end with too."""
    net = kfc_fx.compile(network())
    opt = kfc_fx.KFC(net, **options)
    for _ in range(epochs):
        for number, (x, y) in enumerate(loader(), 1):
            (nn.functional.cross_entropy(net(x), y) / accumulate).backward()
            if number % accumulate == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(net.parameters(), clip)
                opt.step()
                opt.zero_grad()
    return [p.detach().clone() for p in net.parameters()]


def assert_same(parameters: Any, others: Any) -> None:
    pairs = list(zip(parameters, others, strict=True))
    assert pairs
    for own, other in pairs:
        assert torch.equal(own, other)
