"""The algorithms written out per layer: what the tests of the optimizer's steps share."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx
from tests.options import kfc
from tests.oracle import categorical_cotangent, exact_factors, matrix_of, parameters_of

LAYERS = ("0", "2", "4", "7")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, stride=2, bias=False),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4 * 3 * 3, 5),
    ).double()


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            # Enough examples that no factor has a null space of two dimensions, in which the
            # eigenvectors would be arbitrary.
            torch.randn(64, 2, 7, 7, generator=generator, dtype=torch.float64),
            torch.randint(5, (64,), generator=generator),
        )
        for _ in range(count)
    ]


def gradients(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    named = dict(net.named_parameters())
    grads = torch.autograd.grad(F.cross_entropy(net(x), y), list(named.values()))
    return dict(zip(named, grads, strict=True))


class WrittenOut:
    """The algorithms as published, one layer after the other, nothing shared."""

    def __init__(self, net: nn.Sequential, separable: bool, decay: float = 0.95) -> None:
        self.net, self.separable, self.decay = net, separable, decay
        self.ema: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.count = 0

    def accumulate(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """As long as they are few the n-th statistic weighs n times the first."""
        rate = max(1 - self.decay, 2 / (self.count + 2))
        self.count += 1
        for name in LAYERS:
            layer = self.net[int(name)]
            omega, gamma = exact_factors(self.net, layer, x, categorical_cotangent(y))
            old = self.ema.get(name, (torch.zeros_like(omega), torch.zeros_like(gamma)))
            self.ema[name] = tuple(  # type: ignore[assignment]
                (1 - rate) * o + rate * n for o, n in zip(old, (omega, gamma), strict=True)
            )

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        omega, gamma = self.ema[name]
        layer = self.net[int(name)]
        if self.separable and isinstance(layer, nn.Conv2d):
            omega = torch.stack([self._separable(layer, o) for o in omega])
        return omega, gamma

    def _separable(self, layer: nn.Conv2d, omega: torch.Tensor) -> torch.Tensor:
        channels, offsets = layer.weight.shape[1], layer.weight[0, 0].numel()
        main = omega[: channels * offsets, : channels * offsets]
        split = main.reshape(channels, offsets, channels, offsets)
        channel = torch.einsum("akbk->ab", split)
        offset = torch.einsum("akal->kl", split)
        product = torch.kron(channel, offset) / channel.trace()
        return torch.block_diag(product, omega[-1:, -1:]) if layer.bias is not None else product

    def add(self, name: str, step: torch.Tensor) -> None:
        layer = self.net[int(name)]
        weight, bias = parameters_of(layer, step)
        with torch.no_grad():
            layer.weight += weight
            if bias is not None:
                layer.bias += bias

    def gradient(self, grads: dict[str, torch.Tensor], name: str) -> torch.Tensor:
        return matrix_of(self.net[int(name)], grads[f"{name}.weight"], grads.get(f"{name}.bias"))


def run_kfc(net, data, **options):
    compiled = kfc_fx.compile(net)
    opt = kfc(compiled, fisher="empirical", **{"samples": None, **options})
    for x, y in data:
        F.cross_entropy(compiled(x), y).backward()
        opt.step()
        opt.zero_grad()
    return opt


def assert_same(found: nn.Module, expected: nn.Module, tolerance: float = 1e-9) -> None:
    for (name, f), e in zip(found.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(
            f, e, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
