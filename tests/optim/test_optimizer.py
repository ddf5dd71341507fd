"""KFC as a ``torch.optim.Optimizer``: what its steps use, and what they change."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx
from tests.networks import (
    IMAGES,
    LABELS,
    assert_equal,
    collector_of,
    conv_network,
    make,
    parameters,
    train,
)


@pytest.mark.parametrize("scale", ["mean", "sum", "thousandth"])
def test_statistics_do_not_depend_on_the_loss_scale(scale):
    def sums(loss_of):
        compiled, _ = make(fisher="empirical")
        loss_of(compiled(IMAGES)).backward()
        return collector_of(compiled).sums.blocks

    losses = {
        "mean": lambda z: F.cross_entropy(z, LABELS),
        "sum": lambda z: F.cross_entropy(z, LABELS, reduction="sum"),
        "thousandth": lambda z: F.cross_entropy(z, LABELS) / 1000,
    }
    for block, expected in sums(losses["mean"]).items():
        torch.testing.assert_close(sums(losses[scale])[block], expected)


def test_micro_batches_give_the_factors_and_gradients_of_the_whole_batch():
    def run(parts: int):
        net = conv_network().double().eval()
        compiled, opt = make(net, fisher="empirical", factor_samples=None)
        for x, y in zip(IMAGES.double().chunk(parts), LABELS.chunk(parts), strict=True):
            F.cross_entropy(compiled(x), y, reduction="sum").backward()
        gradients = [p.grad.clone() for p in net.parameters()]
        opt.step()
        return gradients, opt.factors, parameters(net)

    gradients, factors, stepped = run(1)
    for found, expected in zip(run(3), (gradients, factors, stepped), strict=True):
        if isinstance(expected, dict):
            for name in expected:
                torch.testing.assert_close(found[name].omega, expected[name].omega)
                torch.testing.assert_close(found[name].gamma, expected[name].gamma)
        else:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_ordinary_steps_run_the_plain_graph():
    compiled, opt = make(factor_interval=1000, inverse_interval=1000)
    armed = []
    for _ in range(40):
        armed.append(collector_of(compiled).armed)
        F.cross_entropy(compiled(IMAGES), LABELS).backward()
        assert bool(collector_of(compiled).sums.blocks) == armed[-1]
        opt.step()
        opt.zero_grad()
    early = [*range(9), 10, 12, 15, 18, 22, 27, 33]
    assert [step for step, due in enumerate(armed) if due] == early
    assert opt.diagnostics.statistics_steps == len(early)


def test_a_second_backward_pass_collects_nothing_more():
    compiled, _ = make(fisher="empirical")
    loss = F.cross_entropy(compiled(IMAGES), LABELS)
    loss.backward(retain_graph=True)
    before = copy.deepcopy(collector_of(compiled).sums.blocks)
    loss.backward()
    torch.testing.assert_close(collector_of(compiled).sums.blocks, before, rtol=0, atol=0)
    assert collector_of(compiled).sums.examples == 12


def test_frozen_parameters_stay_and_can_be_unfrozen():
    net = conv_network()
    net[0].weight.requires_grad_(False)
    net[6].bias.requires_grad_(False)
    compiled, opt = make(net)
    before = parameters(net)
    train(compiled, opt, 2)
    assert set(opt.factors) == {"1", "3", "6"}
    assert opt.factors["6"].omega.shape == (64, 64)
    assert compiled.plan.frozen == ("0.weight", "6.bias")
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
    compiled, opt = make(net, factor_interval=1, inverse_interval=4)
    x, y = torch.randn(64, 20), torch.arange(64) % 5

    def moment() -> torch.Tensor:
        block = opt.state_dict()["kfc"]["blocks"]["2"]
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


@pytest.mark.parametrize("scaling", ["adam", "inverse"])
def test_it_trains(scaling):
    compiled, opt = make(scaling=scaling, lr=0.01 if scaling == "adam" else 0.1)
    losses = train(compiled, opt, 40)
    assert losses[-1] < 0.1 * losses[0]


def test_schedulers_change_the_rate_between_steps():
    compiled, opt = make(lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.0 if step else 1.0)
    train(compiled, opt, 1, scheduler)
    assert opt.param_groups[0]["lr"] == 0.0
    before = parameters(compiled)
    train(compiled, opt, 2, scheduler)
    assert_equal(parameters(compiled), before)


def test_groups_have_their_own_rates():
    net = conv_network()
    groups = [{"params": [*net[:6].parameters()]}, {"params": [*net[6].parameters()], "lr": 0.0}]
    compiled = kfc_fx.compile(net)
    opt = kfc_fx.KFC(compiled, groups, lr=0.01)
    before = parameters(net)
    train(compiled, opt, 1)
    changed = [not torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True)]
    assert changed == [True] * 6 + [False] * 2


def test_one_layer_has_one_rate():
    net = conv_network()
    rest = [p for name, p in net.named_parameters() if name != "6.bias"]
    compiled = kfc_fx.compile(net)
    opt = kfc_fx.KFC(compiled, [{"params": rest}, {"params": [net[6].bias], "lr": 0.5}], lr=0.1)
    with pytest.raises(kfc_fx.OptionError, match="'6': weight and bias have different"):
        train(compiled, opt, 1)


def test_a_subset_of_parameters_is_updated_alone():
    net = conv_network()
    compiled = kfc_fx.compile(net)
    opt = kfc_fx.KFC(compiled, net[6].parameters(), lr=0.1)
    before = parameters(net)
    train(compiled, opt, 2)
    assert_equal(parameters(net)[:6], before[:6])
    assert set(opt.factors) == {"6"}
    with pytest.raises(kfc_fx.OptionError, match="pass both, or freeze the bias"):
        train(compiled, kfc_fx.KFC(compiled, [net[6].weight], lr=0.1), 1)


def test_closure_is_called_with_gradients_enabled():
    compiled, opt = make()
    reference, plain = make()

    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(compiled(IMAGES), LABELS)
        loss.backward()
        return loss

    loss = opt.step(closure)
    expected = F.cross_entropy(reference(IMAGES), LABELS)
    expected.backward()
    plain.step()
    assert torch.equal(loss, expected)
    assert_equal(parameters(compiled), parameters(reference))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_clears_gradients_and_their_statistics(set_to_none):
    compiled, opt = make()
    F.cross_entropy(compiled(IMAGES), LABELS).backward()
    opt.zero_grad(set_to_none)
    assert not collector_of(compiled).sums.blocks
    assert all(p.grad is None or not p.grad.any() for p in compiled.parameters())


def test_initialise_takes_factors_without_a_step():
    compiled, opt = make()
    before = copy.deepcopy(compiled.state_dict())
    opt.initialise([(IMAGES[:6], LABELS[:6]), IMAGES[6:]])
    assert_equal(compiled.state_dict().values(), before.values())
    ones = torch.cat([F.unfold(IMAGES, 3, padding=1), torch.ones(12, 1, 36)], 1)
    expected = torch.einsum("nit,njt->ij", ones, ones) / 12
    torch.testing.assert_close(opt.factors["0"].omega, expected, rtol=1e-4, atol=1e-4)
    train(compiled, opt, 1)
    with pytest.raises(kfc_fx.StatisticsError, match="no batch"):
        opt.initialise([])


def test_parameters_without_a_gradient_are_left_alone():
    compiled, opt = make(weight_decay=0.1, norm_layers=False)
    train(compiled, opt, 9)  # the tenth has no refresh, which would turn the moments
    before = parameters(compiled)
    saved = opt.state_dict()["kfc"]
    F.cross_entropy(compiled(IMAGES), LABELS).backward()
    net = compiled.original
    net[0].weight.grad = net[0].bias.grad = net[1].weight.grad = None
    opt.step()
    changed = [not torch.equal(p, b) for p, b in zip(compiled.parameters(), before, strict=True)]
    assert changed == [False, False, False, True, True, True, True, True]
    now = opt.state_dict()["kfc"]
    assert torch.equal(now["blocks"]["0"]["m"], saved["blocks"]["0"]["m"])
    assert torch.equal(
        now["generic"]["1.weight"]["generic_v"], saved["generic"]["1.weight"]["generic_v"]
    )


@pytest.mark.parametrize(
    ("scaling", "lr"), [("adam", 0.01), ("spectral", 0.07), ("eigen", 0.03), ("inverse", 0.03)]
)
def test_the_learning_rate_has_a_default(scaling, lr):
    opt = kfc_fx.KFC(kfc_fx.compile(nn.Linear(3, 2)), scaling=scaling)
    assert opt.param_groups[0]["lr"] == lr


@pytest.mark.parametrize("scaling", ["adam", "spectral", "eigen", "inverse"])
def test_the_largest_step_says_that_a_rate_is_too_high(scaling):
    compiled, opt = make(scaling=scaling, clip=None)
    assert opt.diagnostics.largest_step is None

    def step() -> float:
        before = torch.cat([p.flatten() for p in parameters(compiled)])
        train(compiled, opt, 1)
        after = torch.cat([p.flatten() for p in parameters(compiled)])
        return float((after - before).norm() / before.norm())

    taken = [step() for _ in range(4)]
    assert opt.diagnostics.largest_step == pytest.approx(max(taken), rel=1e-4)
    opt.param_groups[0]["lr"] = 100.0
    taken.append(step())
    opt.param_groups[0]["lr"] = 0.0
    step()
    assert opt.diagnostics.largest_step == pytest.approx(taken[-1], rel=1e-4)
    assert opt.diagnostics.largest_step > 10
