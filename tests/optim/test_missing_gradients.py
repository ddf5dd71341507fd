"""Parameters and blocks without a gradient, frozen ones, and steps without any."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx
from tests.models import (
    IMAGES,
    LABELS,
    assert_equal,
    backward,
    conv_network,
    make,
    parameters,
    saved_state,
    train,
)

SCALINGS = ["adam", "spectral", "eigen", "inverse"]


def test_a_step_before_any_backward_is_an_error():
    compiled, opt = make()
    with pytest.raises(kfc_fx.StepError, match=r"call loss\.backward\(\) before opt\.step\(\)"):
        opt.step()
    train(compiled, opt, 1)
    with pytest.raises(kfc_fx.StepError, match=r"call loss\.backward\(\)"):
        opt.step()


def test_a_sparse_gradient_is_refused_by_name():
    net = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Linear(4, 5))
    compiled, opt = make(net)
    F.cross_entropy(compiled(LABELS), LABELS).backward()
    with pytest.raises(kfc_fx.StepError, match=r"gradient of 0\.weight is sparse"):
        opt.step()


@pytest.mark.parametrize(
    ("scaling", "average"), [*((scaling, None) for scaling in SCALINGS), ("adam", 5.0)]
)
def test_parameters_without_a_gradient_stay_with_their_state(scaling, average):
    options = {"average": average, "refresh_every": 1000, "norm_layers": False}
    compiled, opt = make(scaling=scaling, weight_decay=0.1, **options)
    # The next step has no refresh, which would turn the moments.
    train(compiled, opt, 21 if scaling == "inverse" else 9)
    before, saved = parameters(compiled), saved_state(opt)
    F.cross_entropy(compiled(IMAGES), LABELS).backward()
    net = compiled
    missing = [net[0].weight, net[0].bias, net[1].weight]
    for p in missing:
        p.grad = None
    opt.step()
    changed = [not torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True)]
    assert changed == [False, False, False, True, True, True, True, True]
    now = saved_state(opt)
    moments = {
        "adam": ("m", "v"),
        "spectral": ("m",),
        "eigen": ("v", "p"),
        "inverse": ("p",),
    }[scaling]
    for name in moments:
        assert torch.equal(now["blocks"]["0"][name], saved["blocks"]["0"][name])
        assert not torch.equal(now["blocks"]["3"][name], saved["blocks"]["3"][name])
    generic = saved["generic"]["1.weight"]
    assert all(torch.equal(now["generic"]["1.weight"][k], v) for k, v in generic.items())


def test_half_a_block_without_a_gradient_keeps_the_whole_block():
    compiled, opt = make()
    train(compiled, opt, 1)
    before = parameters(compiled[0])
    backward(compiled)
    compiled[0].bias.grad = None
    opt.step()
    assert_equal(parameters(compiled[0]), before)


def test_frozen_parameters_stay_and_can_be_unfrozen():
    net = conv_network()
    net[0].weight.requires_grad_(False)
    net[6].bias.requires_grad_(False)
    compiled, opt = make(net)
    before = parameters(net)
    train(compiled, opt, 2)
    assert set(opt.factors) == {"1", "3", "6"}
    assert opt.factors["6"].omega.shape == (64, 64)
    assert compiled.kfc.plan.frozen == ("0.weight", "6.bias")
    assert torch.equal(net[0].weight, before[0])
    net[0].weight.requires_grad_(True)
    train(compiled, opt, 4)
    assert set(opt.factors) == {"0", "1", "3", "6"}
    assert not torch.equal(net[0].weight, before[0])


@pytest.mark.parametrize("width", [16, 160], ids=["decomposed", "by orthogonal iteration"])
def test_moments_turn_with_bases_that_begin_anew_where_a_block_joins(width):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
    net.append(nn.Linear(width, 5))
    net[0].requires_grad_(False)
    compiled, opt = make(net, every=1, refresh_every=4)
    x, y = torch.randn(64, 20), torch.arange(64) % 5

    def moment() -> torch.Tensor:
        block = saved_state(opt)["blocks"]["2"]
        return block["q_gamma"] @ block["m"] @ block["q_omega"].mT

    for step in range(12):
        if step == 6:
            net[0].requires_grad_(True)
        before = moment() if step > 5 else None
        F.cross_entropy(compiled(x), y).backward()
        gradient = torch.cat([net[2].weight.grad, net[2].bias.grad[:, None]], 1)
        opt.step()
        opt.zero_grad()
        if before is not None:
            torch.testing.assert_close(moment(), 0.9 * before + 0.1 * gradient, rtol=0, atol=1e-5)
    assert set(opt.factors) == {"0", "2", "4"}
