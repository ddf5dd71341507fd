"""The first beta of a group is the momentum of its blocks and generic parameters."""

from __future__ import annotations

import pytest
import torch
from torch.optim import lr_scheduler

import kfc_fx
from tests.models import IMAGES, LABELS, assert_equal, backward, conv_network, make, parameters
from tests.options import SCALINGS


def test_betas_are_in_the_defaults():
    betas = {scaling: make(scaling=scaling)[1].defaults["betas"] for scaling in SCALINGS}
    assert betas == {
        "adam": (0.9, 0.95),
        "spectral": (0.95, 0.999),
        "eigen": (0.7, 0.95),
        "inverse": (0.7, 0.0),
    }


@pytest.mark.parametrize("scaling", SCALINGS)
def test_another_first_beta_is_the_momentum_of_blocks_and_generic_parameters(scaling):
    compiled, opt = make(conv_network().double(), scaling=scaling, norm_layers=False)
    opt.param_groups[0]["betas"] = (0.5, opt.defaults["betas"][1])
    other, given = make(conv_network().double(), scaling=scaling, norm_layers=False, momentum=0.5)
    plain, default = make(conv_network().double(), scaling=scaling, norm_layers=False)
    for step in range(3):
        for model, each in ((compiled, opt), (other, given), (plain, default)):
            backward(model, IMAGES[step:].double(), LABELS[step:])
            each.step()
            each.zero_grad()
    assert_equal(parameters(compiled), parameters(other))
    for moved, kept in zip(parameters(compiled), parameters(plain), strict=True):
        assert not torch.equal(moved, kept)


@pytest.mark.parametrize("scaling", ["adam", "inverse"])
@pytest.mark.parametrize(
    "build",
    [
        lambda o: lr_scheduler.OneCycleLR(o, 0.02, 8),
        lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.02, step_size_up=3),
    ],
    ids=["one-cycle", "cyclic"],
)
def test_schedulers_of_torch_cycle_the_momentum(scaling, build):
    compiled, opt = make(scaling=scaling)
    scheduler = build(opt)
    used = []
    for step in range(5):
        used.append(opt.param_groups[0]["betas"][0])
        backward(compiled, IMAGES[step:], LABELS[step:])
        opt.step()
        opt.zero_grad()
        scheduler.step()
    rates = {group["lr"] for group in opt.param_groups}
    by_hand, plain = make(scaling=scaling)
    scheduler = build(plain)  # for its rates alone
    for step in range(5):
        plain.param_groups[0]["betas"] = (used[step], plain.defaults["betas"][1])
        backward(by_hand, IMAGES[step:], LABELS[step:])
        plain.step()
        plain.zero_grad()
        scheduler.step()
    assert len(set(used)) > 2
    assert rates == {group["lr"] for group in plain.param_groups}
    assert_equal(parameters(compiled), parameters(by_hand))


def test_the_default_leaves_generic_parameters_their_own():
    """Of "spectral", whose momentum is 0.95: generic parameters keep AdamW's 0.9."""
    compiled, opt = make(scaling="spectral")
    other, given = make(scaling=kfc_fx.Spectral(), generic=kfc_fx.GenericAdamW(betas=(0.9, 0.999)))
    for model, each in ((compiled, opt), (other, given)):
        for step in range(2):
            backward(model, IMAGES[step:], LABELS[step:])
            each.step()
            each.zero_grad()
    assert_equal(parameters(compiled), parameters(other))
    assert opt._engine.generic["1.weight"].keys() == {"m", "v"}


def test_momentum_may_begin_and_end_while_training():
    compiled, opt = make(conv_network(), momentum=0.0)
    assert "momentum" not in _source(compiled, opt)
    opt.param_groups[0]["betas"] = (0.5, 0.95)
    assert "momentum" in _source(compiled, opt)


def _source(compiled, opt):
    backward(compiled)
    opt.step()
    opt.zero_grad()
    return opt.update_source


def test_the_second_beta_is_the_scaling_s():
    compiled, opt = make()
    with pytest.raises(kfc_fx.OptionError, match=r"second of betas is one for all groups, 0\.95"):
        kfc_fx.KFC([{"params": compiled.parameters(), "betas": (0.9, 0.99)}], model=compiled)
    opt = kfc_fx.KFC(compiled)
    backward(compiled)
    opt.param_groups[0]["betas"] = (0.9, 0.99)
    with pytest.raises(kfc_fx.OptionError, match=r"a group has 0\.99: give it to the scaling"):
        opt.step()
    opt.param_groups[0]["betas"] = (0.9, 0.95)
    opt.step()


def test_each_group_has_its_own_momentum():
    """At a tiny rate gradients hardly differ, so that each group steps as if all had its betas."""

    def moved(first: float, rest: float) -> list[torch.Tensor]:
        net = conv_network().double()
        before = parameters(net)
        groups = [
            {"params": net[:6].parameters(), "betas": (first, 0.95)},
            {"params": net[6:].parameters(), "betas": (rest, 0.95)},
        ]
        opt = kfc_fx.KFC(groups, 1e-9, model=net, seed=3)
        for step in range(4):
            backward(net, IMAGES[step:].double(), LABELS[step:])
            opt.step()
            opt.zero_grad()
        return [new - old for new, old in zip(parameters(net), before, strict=True)]

    low, high, mixed = moved(0.2, 0.2), moved(0.9, 0.9), moved(0.2, 0.9)
    of_first = len(list(conv_network()[:6].parameters()))
    for index, found in enumerate(mixed):
        own, other = (low, high) if index < of_first else (high, low)
        torch.testing.assert_close(found, own[index], rtol=1e-4, atol=1e-14)
        assert not torch.allclose(found, other[index], rtol=1e-2, atol=0)


def test_the_quadratic_model_leaves_no_momentum_to_set():
    compiled, opt = make(scaling="inverse", quadratic_model=True)
    opt.param_groups[0]["betas"] = (0.5, opt.defaults["betas"][1])
    backward(compiled)
    with pytest.raises(kfc_fx.OptionError, match="quadratic_model takes the momentum"):
        opt.step()


def test_betas_of_generic_parameters_are_adamw_s_own():
    """A step of AdamW by other betas, on the scale and shift of a norm."""
    net = conv_network().double()
    compiled = kfc_fx.compile(net, norm_layers=False)
    rule = kfc_fx.GenericAdamW(betas=(0.8, 0.9), lr_ratio=2.0)
    opt = kfc_fx.KFC(compiled, 0.01, generic=rule)
    twin = [p.detach().clone().requires_grad_() for p in net[1].parameters()]
    reference = torch.optim.AdamW(twin, 0.02, betas=(0.8, 0.9), weight_decay=0.0)
    for step in range(3):
        backward(compiled, IMAGES[step:].double(), LABELS[step:])
        for mine, theirs in zip(net[1].parameters(), twin, strict=True):
            theirs.grad = mine.grad.clone()
        reference.step()
        opt.step()
        opt.zero_grad()
    torch.testing.assert_close(list(net[1].parameters()), twin)
