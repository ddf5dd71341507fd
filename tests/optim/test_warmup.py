"""Rates that rise to their own over the first steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 4
STEPS = 6


class Net(nn.Module):
    """Blocks, and a parameter without one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
        self.shift = nn.Parameter(torch.zeros(8))

    def forward(self, x):
        return self.head((self.first(x) + self.shift).tanh())


def made(**options) -> tuple[nn.Module, kfc_fx.KFC]:
    torch.manual_seed(0)
    net = kfc_fx.compile(Net())
    groups = [{"params": [net.head.bias], "lr": 0.003}, {"params": net.first.parameters()}]
    groups += [{"params": [net.head.weight, net.shift], "weight_decay": 0.5}]
    return net, kfc_fx.KFC(groups, lr=0.02, weight_decay=0.1, model=net, seed=0, **options)


def step(net: nn.Module, opt: kfc_fx.KFC) -> None:
    opt.zero_grad()
    F.cross_entropy(net(X), Y).backward()
    opt.step()


@pytest.mark.parametrize("scaling", ["adam", "spectral", "eigen", "inverse"])
def test_a_warmed_up_run_equals_one_whose_rates_are_set_by_hand(scaling):
    net, opt = made(scaling=scaling, warmup=4)
    by_hand, plain = made(scaling=scaling)
    rates = [group["lr"] for group in plain.param_groups]
    for number in range(1, STEPS + 1):
        for group, rate in zip(plain.param_groups, rates, strict=True):
            group["lr"] = min(1.0, number / 4) * rate
        step(net, opt)
        step(by_hand, plain)
        for own, expected in zip(net.parameters(), by_hand.parameters(), strict=True):
            torch.testing.assert_close(own, expected)
    assert [group["lr"] for group in opt.param_groups] == rates
    cold, full = made(scaling=scaling)
    step(cold, full)
    warm, slow = made(scaling=scaling, warmup=4)
    step(warm, slow)
    assert not torch.allclose(cold.first.weight, warm.first.weight)


def test_a_resumed_run_is_past_it():
    net, opt = made(warmup=4)
    for _ in range(3):
        step(net, opt)
    again, other = made(warmup=4)
    again.load_state_dict(net.state_dict())
    other.load_state_dict(opt.state_dict())
    for _ in range(4):
        step(net, opt)
        step(again, other)
    for own, expected in zip(again.parameters(), net.parameters(), strict=True):
        assert torch.equal(own, expected)


def test_it_is_refused_where_steps_have_a_size_of_their_own():
    with pytest.raises(
        kfc_fx.OptionError, match="warmup has nothing to change with quadratic_model"
    ):
        made(scaling=kfc_fx.Inverse(quadratic_model=True), warmup=4)


def test_one_step_is_none_and_zero_is_refused():
    net, opt = made(warmup=1)
    plain, other = made()
    step(net, opt)
    step(plain, other)
    assert torch.equal(net.first.weight, plain.first.weight)
    assert "warmup: over 1 steps" in repr(opt)
    for wrong in (0, 2.5, True):
        with pytest.raises(kfc_fx.OptionError, match="warmup must be a whole number, at least 1"):
            made(warmup=wrong)
