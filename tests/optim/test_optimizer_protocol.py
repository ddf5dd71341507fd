"""KFC among torch's own tools: schedulers, scalers, parameter groups, saved states."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

import kfc_fx
from tests.models import (
    IMAGES,
    LABELS,
    assert_equal,
    backward,
    collector_of,
    conv_network,
    make,
    parameters,
    train,
)
from tests.options import kfc

SCALINGS = ["adam", "spectral", "eigen", "inverse"]


# -- rates ----


@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_rate_scales_the_step(scaling):
    def step_of(lr) -> list[torch.Tensor]:
        net = conv_network().double()
        start = parameters(net)
        compiled, opt = make(net, scaling=scaling, lr=lr, momentum=0.0, clip=None)
        backward(compiled, IMAGES.double())
        opt.step()
        return [p - s for p, s in zip(parameters(net), start, strict=True)]

    once, thrice = step_of(0.01), step_of(0.03)
    torch.testing.assert_close(thrice, [3 * s for s in once])
    torch.testing.assert_close(step_of(torch.tensor(0.03, dtype=torch.float64)), thrice)


def test_a_scheduler_writes_into_a_rate_that_is_a_tensor():
    compiled, opt = make(lr=torch.tensor(0.01, dtype=torch.float64))
    by_hand, plain = make(lr=0.01)
    rate = opt.param_groups[0]["lr"]
    for model, each in ((compiled, opt), (by_hand, plain)):
        train(model, each, 4, scheduler=lr_scheduler.StepLR(each, 2, 0.1))
    assert opt.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(1e-4)
    for found, expected in zip(parameters(compiled), parameters(by_hand), strict=True):
        torch.testing.assert_close(found, expected)


def test_groups_have_their_own_rate_and_decay():
    net = conv_network()
    start = parameters(net)
    compiled = kfc_fx.compile(net)
    groups = [
        {"params": net[:6].parameters(), "weight_decay": 0.5},
        {"params": net[6].parameters(), "lr": 0.04},
    ]
    opt = kfc_fx.KFC(groups, model=compiled, lr=0.01, seed=3)
    plain = conv_network()
    same_seed = kfc_fx.KFC(kfc_fx.compile(plain), lr=0.01, seed=3)
    backward(compiled)
    opt.step()
    backward(plain)
    same_seed.step()
    changes = [p - s for p, s in zip(parameters(plain), start, strict=True)]
    for index, (found, old, change) in enumerate(
        zip(net.parameters(), start, changes, strict=True)
    ):
        decay, factor = (1 - 0.01 * 0.5, 1) if index < 6 else (1, 4)
        torch.testing.assert_close(found, decay * old + factor * change, rtol=1e-4, atol=1e-6)


def test_a_weight_without_its_bias_is_refused():
    net = conv_network()
    compiled = kfc_fx.compile(net)
    with pytest.raises(kfc_fx.OptionError, match="pass both, or freeze the bias"):
        train(compiled, kfc_fx.KFC([net[6].weight], model=compiled, lr=0.1), 1)


def test_named_parameters_are_taken():
    net = conv_network()
    compiled = kfc_fx.compile(net)
    statistics = kfc_fx.Statistics(budget=None)
    opt = kfc_fx.KFC(
        compiled.named_parameters(), 0.01, model=compiled, statistics=statistics, seed=3
    )
    other, plain = make()
    train(compiled, opt, 2)
    train(other, plain, 2)
    assert_equal(parameters(compiled), parameters(other))


def test_a_group_added_later_is_updated_from_then_on():
    net = conv_network()
    compiled = kfc_fx.compile(net)
    opt = kfc(compiled, net[3:].parameters(), lr=0.01, every=1)
    before = parameters(net)
    train(compiled, opt, 2)
    assert_equal(parameters(net)[:4], before[:4])
    assert set(opt.factors) == {"3", "6"}
    omega = opt.factors["3"].omega
    opt.add_param_group({"params": net[:3].parameters(), "lr": 0.02})
    torch.testing.assert_close(opt.factors["3"].omega, omega, rtol=0, atol=0)  # state is kept
    train(compiled, opt, 1)
    assert set(opt.factors) == {"0", "1", "3", "6"}
    for found, old in zip(net.parameters(), before, strict=True):
        assert not torch.equal(found, old)


def test_step_hooks_of_torch_run():
    compiled, opt = make()
    seen = []
    opt.register_step_pre_hook(lambda *_: seen.append("pre"))
    opt.register_step_post_hook(lambda *_: seen.append("post"))
    train(compiled, opt, 1)
    assert seen == ["pre", "post"]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_closure_is_called_once_with_gradients_enabled(scaling):
    compiled, opt = make(scaling=scaling)
    reference, plain = make(scaling=scaling)
    enabled = []

    def closure():
        enabled.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = F.cross_entropy(compiled(IMAGES), LABELS)
        loss.backward()
        return loss

    for _ in range(3):
        loss = opt.step(closure)
        plain.zero_grad()
        expected = F.cross_entropy(reference(IMAGES), LABELS)
        expected.backward()
        plain.step()
        assert torch.equal(loss, expected)
    assert enabled == [True] * 3
    assert_equal(parameters(compiled), parameters(reference))


# -- scaled losses ----


def test_a_gradient_scaler_gives_the_unscaled_run():
    def run(scaler) -> tuple[list[torch.Tensor], kfc_fx.KFC]:
        compiled, opt = make()
        for step in range(3):
            loss = F.cross_entropy(compiled(IMAGES[step:]), LABELS[step:])
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
        return parameters(compiled), opt

    # A power of two scales exactly.
    found, opt = run(torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=1000))
    expected, plain = run(torch.amp.GradScaler("cpu", enabled=False))
    assert_equal(found, expected)
    assert torch.equal(opt.factors["0"].gamma, plain.factors["0"].gamma)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_are_clipped_by_torch_s_own_utility(scaling, scaled):

    def run(clip):
        compiled, opt = make(scaling=scaling, clip=None, every=1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=scaled)
        for _ in range(3):
            scaler.scale(F.cross_entropy(compiled(IMAGES), LABELS)).backward()
            scaler.unscale_(opt)
            clip(list(compiled.parameters()))
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
        return parameters(compiled), opt.factors

    def by_hand(own):
        norm = torch.nn.utils.get_total_norm([p.grad for p in own])
        for parameter in own:
            parameter.grad *= min(1.0, 0.05 / (norm + 1e-6))

    found, _ = run(lambda own: torch.nn.utils.clip_grad_norm_(own, 0.05))
    expected, _ = run(by_hand)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    if scaling in ("eigen", "inverse"):  # the others take steps of the rate's size
        unclipped, _ = run(lambda own: None)
        assert any((a - b).abs().max() > 1e-3 for a, b in zip(found, unclipped, strict=True))


def test_a_gradient_scaler_skips_an_overflow_and_backs_off():
    compiled, opt = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = parameters(compiled)
    scaler.scale(1e6 * F.cross_entropy(compiled(IMAGES), LABELS)).backward()
    scaler.step(opt)
    scaler.update()
    opt.zero_grad()
    assert_equal(parameters(compiled), before)
    assert opt.diagnostics.steps == 0
    assert scaler.get_scale() == 2.0**126
    assert collector_of(compiled).armed
    train(compiled, opt, 1)


@pytest.mark.parametrize("scale", [1000.0, 1e-6])
@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_factors_do_not_depend_on_the_loss_scale(fisher, scale):
    def factors(factor, reduction):
        compiled, opt = make(fisher=fisher, lr=0.0)
        (factor * F.cross_entropy(compiled(IMAGES), LABELS, reduction=reduction)).backward()
        opt.step()
        return {name: (f.omega, f.gamma) for name, f in opt.factors.items()}

    # Sampled targets do not know of the loss; its own gradient is divided by its scale.
    near = {"rtol": 0, "atol": 0} if fisher == "sampled" else {"rtol": 2e-5, "atol": 1e-8}
    expected = factors(1.0, "mean")
    torch.testing.assert_close(factors(scale, "mean"), expected, **near)
    torch.testing.assert_close(factors(scale, "sum"), expected, **near)


# -- other optimizers ----


def test_a_second_optimizer_takes_over_with_its_own_options():
    compiled, first = make(input_factor="dense")
    train(compiled, first, 2)
    second = kfc(compiled, lr=0.01, scaling="inverse", input_factor="separable", seed=3)
    backward(compiled)
    with pytest.raises(kfc_fx.StepError, match="another KFC"):
        first.step()
    second.step()
    second.zero_grad()
    fresh, plain = make(scaling="inverse", input_factor="separable")
    train(fresh, plain, 1)
    assert plain.factors["0"].channel is not None
    assert second.factors["0"].channel is not None
    assert second.diagnostics.steps == 1
    train(compiled, second, 2)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_model_of_mixed_precision_parameters_trains(scaling):
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Linear(4, 6).bfloat16()
            self.norm = nn.LayerNorm(6)
            self.head = nn.Linear(6, 5)

        def forward(self, x):
            return self.head(torch.tanh(self.norm(self.body(x.bfloat16()).float())))

    compiled, opt = make(Mixed(), scaling=scaling, lr=0.02)
    x = torch.randn(12, 4)
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(compiled(x), LABELS)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert opt.factors["body"].omega.dtype == torch.float32
    assert compiled.body.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"lr": -1.0}, "lr must be a number that is not negative"),
        ({"momentum": 0.5}, "may set lr, weight_decay, betas, got 'momentum'"),
        ({"wieght_decay": 0.5}, "may set lr, weight_decay, betas, got 'wieght_decay'"),
        ({"maximize": True}, "may set lr, weight_decay, betas, got 'maximize'"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers"),
        ({"betas": (0.9, 0.99)}, "second of betas is one for all groups"),
        ({"params": [nn.Parameter(torch.zeros(2, 3))]}, r"a parameter of shape \(2, 3\) is not"),
    ],
)
def test_a_group_that_is_refused_is_not_added(extra, message):
    net = conv_network()
    compiled = kfc_fx.compile(net)
    opt = kfc_fx.KFC(net[:6].parameters(), model=compiled, lr=0.01)
    train(compiled, opt, 1)
    with pytest.raises(kfc_fx.OptionError, match=message):
        opt.add_param_group({"params": net[6].parameters(), **extra})
    assert len(opt.param_groups) == 1
    before = net[6].weight.detach().clone()
    train(compiled, opt, 1)
    assert torch.equal(net[6].weight, before)


def test_a_group_may_have_names_and_entries_of_others():
    net = conv_network()
    compiled = kfc_fx.compile(net)
    opt = kfc_fx.KFC([{"params": net.named_parameters(), "name": "all"}], model=compiled, lr=0.01)
    train(compiled, opt, 1)
    assert opt.param_groups[0]["name"] == "all"
