"""Gradients that are clipped block by block."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx

X = torch.randn(24, 4, 5, 5, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 4
BOUND = 0.7
OPTIONS = {
    **{name: {"scaling": name} for name in ("adam", "spectral", "eigen", "inverse")},
    "several": {"scaling": "adam", "blocks": {"head": "inverse", "first": "spectral"}},
    "no bound on ν": {"scaling": kfc_fx.Eigen(clip=None)},
    "exact ν": {"scaling": kfc_fx.Inverse(clip_by="exact")},
    "compiled": {"compile_update": True},
}


class Net(nn.Module):
    """Dense and grouped convolutions, two of one shape, and a parameter without a block."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 6, 3)
        self.groups = nn.Conv2d(6, 6, 1, groups=3)
        self.again = nn.Conv2d(6, 6, 1, groups=3)
        self.head = nn.Linear(54, 4)
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, x):
        x = self.again(self.groups(self.first(x)).tanh()) * self.scale
        return self.head(x.flatten(1))


def made(**options):
    torch.manual_seed(0)
    net = Net().double()
    return net, kfc_fx.KFC(net, seed=0, **options)


def clipped_by_hand(net: Net) -> list[bool]:
    clipped = []
    for layer in (net.first, net.groups, net.again, net.head):
        grads = [layer.weight.grad, layer.bias.grad]
        norm = torch.cat([g.flatten() for g in grads]).norm()
        clipped.append(bool(norm > BOUND))
        for grad in grads:
            grad.mul_((BOUND / norm).clamp(max=1))
    return clipped


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_steps_are_those_of_gradients_that_are_clipped_by_hand(options):
    (net, opt), (by_hand, its) = made(max_block_norm=BOUND, **options), made(**options)
    clipped = []
    for _ in range(4):
        for model in (net, by_hand):
            model.zero_grad()
            F.cross_entropy(model(X.double()), Y).backward()
        clipped += clipped_by_hand(by_hand)
        opt.step()
        its.step()
        for own, other in zip(net.parameters(), by_hand.parameters(), strict=True):
            torch.testing.assert_close(own, other)
    assert any(clipped)
    assert not all(clipped)


def test_gradients_stay_as_they_are_and_zeros_are_fine():
    net, opt = made(max_block_norm=1e-6)
    F.cross_entropy(net(X.double()), Y).backward()
    net.head.weight.grad.zero_()
    net.head.bias.grad.zero_()
    before = [p.grad.clone() for p in net.parameters()]
    opt.step()
    for parameter, grad in zip(net.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, grad)
        assert parameter.isfinite().all()
    assert "max_block_norm: 1e-06" in repr(opt)


def test_wrong_values():
    for own in ({"quadratic_model": True}, {"adapt_damping": 5}):
        with pytest.raises(kfc_fx.OptionError, match="max_block_norm changes the gradient of the"):
            made(max_block_norm=1.0, scaling=kfc_fx.Inverse(**own))
    for wrong in (0, -1.0, float("inf"), True, "1"):
        with pytest.raises(kfc_fx.OptionError, match="max_block_norm must be a positive number"):
            made(max_block_norm=wrong)
