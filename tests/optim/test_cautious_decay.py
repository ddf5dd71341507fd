"""Decay that leaves alone what a step takes away from zero."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 4
LR, DECAY = 0.02, 2.0


class Net(nn.Module):
    """Blocks with and without bias, one that is not always used, parameters without a block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 4, bias=False)
        self.beside = nn.Linear(6, 8)
        self.shift, self.scale = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))

    def forward(self, x, beside: bool = False):
        hidden = self.first(x) * self.scale + self.shift
        return self.head((hidden + self.beside(x) if beside else hidden).tanh())


def made(*, decay: float, dtype: torch.dtype = torch.float32, **options):
    torch.manual_seed(0)
    net = kfc_fx.compile(Net().to(dtype))
    groups = [{"params": [net.shift], "weight_decay": 0.0}]
    groups.append({"params": [p for p in net.parameters() if p is not net.shift]})
    return net, kfc_fx.KFC(groups, lr=LR, weight_decay=decay, model=net, seed=0, **options)


def step(net: nn.Module, opt: kfc_fx.KFC, beside: bool) -> None:
    opt.zero_grad()
    F.cross_entropy(net(X.to(net.shift.dtype), beside), Y).backward()
    opt.step()


OPTIONS = {
    **{name: {"scaling": name} for name in ("adam", "spectral", "eigen", "inverse")},
    "float64": {"dtype": torch.float64},
    "sgd": {"generic": "sgd"},
    "compiled": {"compile_update": True},
    "average": {"average": 5.0},
    "quadratic model": {"scaling": kfc_fx.Inverse(quadratic_model=True)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_what_a_step_takes_away_from_zero_does_not_decay(options):
    """The steps of a twin without decay tell what decays, as its paper defines it."""
    net, opt = made(decay=DECAY, cautious_decay=True, **options)
    twin, plain = made(decay=0.0, **options)
    kept = decayed = 0
    for beside in (True, False, True, False):
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        twin.load_state_dict(net.state_dict())
        step(net, opt, beside)
        step(twin, plain, beside)
        for name, moved in twin.named_parameters():
            own, old = net.get_parameter(name).detach(), before[name]
            inward = (moved.detach() - old) * old <= 0
            still = name == "shift" or (name.startswith("beside") and not beside)
            share = 0.0 if still else LR * DECAY
            expected = moved.detach() - share * old * inward
            torch.testing.assert_close(own, expected, rtol=2e-5, atol=1e-6)
            kept, decayed = kept + int((~inward).sum()), decayed + int(inward.sum())
    assert min(kept, decayed) > 50


@pytest.mark.parametrize("master_weights", [False, True])
def test_half_precision_is_rounded_once(master_weights):
    options = {"dtype": torch.bfloat16, "master_weights": master_weights}
    net, opt = made(decay=DECAY, cautious_decay=True, **options)
    twin, plain = made(decay=0.0, **options)
    before = net.head.weight.detach().float()
    step(net, opt, False)
    step(twin, plain, False)
    moved = twin.head.weight.detach().float() - before
    expected = before * torch.where(moved * before <= 0, 1 - LR * DECAY, 1.0) + moved
    torch.testing.assert_close(net.head.weight.float(), expected, rtol=1e-2, atol=1e-3)


def test_nothing_changes_without_decay_and_code_tells():
    net, opt = made(decay=0.0, cautious_decay=True)
    twin, plain = made(decay=0.0)
    for _ in range(2):
        step(net, opt, False)
        step(twin, plain, False)
    for own, other in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(own, other)
    assert "cautious_shrink" not in opt.update_source
    assert "cautious_decay: True" in repr(opt)
    opt.param_groups[0]["weight_decay"] = 0.1
    step(net, opt, False)
    assert "cautious_shrink" in opt.update_source


def test_wrong_values():
    with pytest.raises(kfc_fx.OptionError, match="cautious_decay must be True or False"):
        made(decay=0.1, cautious_decay=1.0)
