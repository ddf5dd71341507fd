"""Half-precision parameters that are updated through a copy in single precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx
from tests.models import saved_state
from tests.options import kfc

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 4


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 4))


def trained(net: nn.Module, steps: int, **options):
    compiled = kfc_fx.compile(net, norm_layers=False)
    opt = kfc(compiled, lr=1e-4, seed=0, weight_decay=0.1, average=2.0, **options)
    run(compiled, opt, steps)
    return compiled, opt


def run(compiled, opt, steps: int) -> None:
    for _ in range(steps):
        F.cross_entropy(compiled(X.to(next(compiled.parameters()).dtype)).float(), Y).backward()
        opt.step()
        opt.zero_grad()


@pytest.mark.parametrize("scaling", ["adam", "spectral"])
def test_small_steps_are_lost_in_rounding_and_kept_by_master_weights(scaling):
    """30 steps, each far below the spacing of bfloat16 numbers, move a weight only by master_weights."""

    def moved(**options) -> float:
        net = network().bfloat16()
        before = net[3].weight.detach().clone()
        trained(net, 30, scaling=scaling, **options)
        return float((net[3].weight.detach().float() - before.float()).abs().sum())

    wide = network()
    before = wide[3].weight.detach().clone()
    trained(wide, 30, scaling=scaling)
    expected = float((wide[3].weight.detach() - before).abs().sum())
    assert abs(moved(master_weights=True) - expected) < 0.3 * expected
    assert abs(moved() - expected) > 0.6 * expected


def test_parameters_are_the_rounded_master_weights_and_the_average_is_wide():
    net = network().bfloat16()
    _, opt = trained(net, 3, master_weights=True)
    master_weights = saved_state(opt)["master_weights"]
    assert set(master_weights) == {name for name, _ in net.named_parameters()}
    for name, parameter in net.named_parameters():
        assert torch.equal(master_weights[name].bfloat16(), parameter)
        assert not torch.equal(master_weights[name], parameter.float())
        assert opt._engine.average[name].dtype == torch.float32


def test_only_half_precision_parameters_have_master_weights_and_without_them_no_trace_is_left():
    net = network()
    net[3].bfloat16()
    compiled = kfc_fx.compile(nn.Sequential(net[:3], Cast(), net[3]))
    opt = kfc_fx.KFC(compiled, lr=0.01, master_weights=True)
    F.cross_entropy(compiled(X).float(), Y).backward()
    opt.step()
    assert set(saved_state(opt)["master_weights"]) == {"2.weight", "2.bias"}
    assert "master_weights" not in trained(network(), 1, master_weights=True)[1].update_source


class Cast(nn.Module):
    def forward(self, x):
        return x.bfloat16()


def test_a_checkpoint_loaded_into_the_model_counts():
    net = network().bfloat16()
    compiled, opt = trained(net, 2, master_weights=True)
    other = network().bfloat16()
    with torch.no_grad():
        other[3].weight.add_(0.5)
    compiled.load_state_dict(other.state_dict())
    run(compiled, opt, 1)
    assert (net[3].weight - other[3].weight).abs().max() < 0.01
    assert (net[3].weight - network()[3].weight).abs().min() > 0.4


def test_resumed_bit_for_bit(tmp_path):
    net = network().bfloat16()
    compiled, opt = trained(net, 4, master_weights=True)
    torch.save({"net": net.state_dict(), "opt": opt.state_dict()}, tmp_path / "state.pt")
    run(compiled, opt, 4)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again = network().bfloat16()
    again.load_state_dict(saved["net"])
    copied = kfc_fx.compile(again, norm_layers=False)
    other = kfc_fx.KFC(copied, lr=1e-4, seed=0, weight_decay=0.1, average=2.0, master_weights=True)
    other.load_state_dict(saved["opt"])
    run(copied, other, 4)
    for (name, value), (_, expected) in zip(
        saved_state(opt)["master_weights"].items(),
        saved_state(other)["master_weights"].items(),
        strict=True,
    ):
        assert torch.equal(value, expected), name
