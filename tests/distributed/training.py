"""What the programs of several processes train, and how they compare ranks."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import kfc_fx
import kfc_fx.distributed.statistics

DDP = DistributedDataParallel


SCALINGS = ("adam", "spectral", "eigen", "inverse")


WHOLE = kfc_fx.Statistics(samples=None, fisher="empirical", every=3, refresh_every=3)


class Net(nn.Module):
    """Convolutions, a norm and linear layers, none of which mixes examples."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.GroupNorm(2, 6)
        self.down = nn.Conv2d(6, 4, 3, stride=2)
        self.head = nn.Linear(4 * 2 * 2, 3)
        self.shift = nn.Parameter(torch.ones(3))
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(torch.relu(self.down(x)).flatten(1)) * self.gain + torch.tanh(self.shift)


def net(kind: type[nn.Module] = Net, *, double: bool = False) -> nn.Module:
    torch.manual_seed(3)
    made = kind()
    return made.double() if double else made


def batch(step: int, rank: int, size: int = 8, *, double: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(size, 2, 6, 6, generator=generator)
    return x.double() if double else x, torch.randint(3, (size,), generator=generator)


def own_batch(step: int, **options: Any) -> tuple[Tensor, Tensor]:
    return batch(step, dist.get_rank(), **options)


def joined_batch(step: int, **options: Any) -> tuple[Tensor, Tensor]:
    parts = [batch(step, rank, **options) for rank in range(dist.get_world_size())]
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def step_of(model: nn.Module, opt: kfc_fx.KFC, x: Tensor, y: Tensor) -> None:
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    opt.step()


def assert_replicas_equal(model: nn.Module, what: str = "") -> None:
    # in double precision, which holds what any other does
    own = torch.cat([p.detach().double().flatten() for p in model.parameters()])
    assert own.isfinite().all(), what
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    for rank, other in enumerate(found):
        assert torch.equal(own, other), f"rank {rank} has other parameters {what}"


def made(scaling: Any = "adam", kind: type[nn.Module] = Net, **options: Any):
    options.setdefault("statistics", WHOLE)
    ddp_options = options.pop("ddp", {})
    inner = kfc_fx.compile(net(kind))
    opt = kfc_fx.KFC(inner, scaling=scaling, seed=1, **options)
    return DDP(inner, **ddp_options), opt


@contextlib.contextmanager
def told() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def everywhere(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def averaged_by_hand(model: nn.Module, opt: kfc_fx.KFC, x: Tensor, y: Tensor) -> None:
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
    opt.step()


def expect(action: Any, message: str) -> None:
    found = ""
    try:
        action()
    except kfc_fx.KfcError as error:
        found = str(error)
    assert message in found, f"{found!r} has not {message!r}"
