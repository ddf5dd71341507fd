"""Models whose modules are called from outside, and how the tests of that train them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx
from tests.models import parameters

SCALINGS = ["adam", "spectral", "eigen", "inverse"]
FISHERS = ["empirical", "sampled"]


class Coder(nn.Module):
    """Methods beside ``forward``, as people write them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.body(x).mean((2, 3)))

    def forward_head(self, features: torch.Tensor) -> torch.Tensor:
        return self.head(features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


class Trained(nn.Module):
    """As a LightningModule: its loss is computed by a method, and nobody calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Coder()

    def training_step(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.net(x), labels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def batch(step: int, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 1, 6, 6, generator=generator)
    return x, torch.randint(3, (size,), generator=generator)


def trained(model, loss_of, steps=6, **options):
    options.setdefault("statistics", kfc_fx.Statistics(every=2, refresh_every=2))
    net = kfc_fx.compile(model)
    opt = kfc_fx.KFC(net, seed=1, **options)
    for step in range(steps):
        opt.zero_grad()
        loss_of(net, *batch(step)).backward()
        opt.step()
    return net, opt


def whole(net, x, labels):
    return F.cross_entropy(net(x), labels)


def in_parts(net, x, labels):
    return F.cross_entropy(net.forward_head(net.forward_features(x)), labels)


def assert_same_run(found, expected, *, prefix=""):
    (net, opt), (plain, its) = found, expected
    torch.testing.assert_close(parameters(net), parameters(plain), rtol=0, atol=0)
    for name, factors in its.factors.items():
        own = opt.factors[prefix + name]
        torch.testing.assert_close(own.omega, factors.omega, rtol=0, atol=0)
        if factors.output is not None:
            torch.testing.assert_close(own.gamma, factors.gamma, rtol=0, atol=0)
    assert opt.diagnostics.missed_statistics == 0


class Agent(nn.Module):
    """Actor and critic on one body; all at once by ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh())
        self.critic = nn.Linear(8, 1)
        self.actor = nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.body(x)
        value = self.critic(hidden)
        return self.actor(hidden), value


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Tanh())
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.body(x) - self.body(x.flip(0)))
