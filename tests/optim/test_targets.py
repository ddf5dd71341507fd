"""Which models an optimizer is for: parameters find them, and several may share one step."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx
from tests.models import assert_equal, parameters, saved_state

X, Y = torch.randn(24, 6), torch.arange(24) % 3


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))


def loss_of(net: nn.Module) -> torch.Tensor:
    return F.cross_entropy(net(X), Y)


def train(opt: torch.optim.Optimizer, *nets: nn.Module, steps: int = 6) -> None:
    for _ in range(steps):
        opt.zero_grad()
        sum(loss_of(net) for net in nets).backward()
        opt.step()


def reference(seed: int = 0, **options) -> nn.Module:
    net = mlp(seed)
    train(kfc_fx.KFC(net, 0.01, **options), net)
    return net


@pytest.mark.parametrize(
    "given",
    [
        lambda net: net.parameters(),
        lambda net: list(net.named_parameters()),
        lambda net: [{"params": net.parameters()}],
        lambda net: [{"params": list(net[0].parameters())}, {"params": list(net[2].parameters())}],
        lambda net: [{"params": list(net.named_parameters())}],
    ],
    ids=["parameters", "named", "group", "groups", "named group"],
)
def test_parameters_find_their_compiled_model(given):
    net = kfc_fx.compile(mlp())
    train(kfc_fx.KFC(given(net), lr=0.01), net)
    assert_equal(parameters(net), parameters(reference()))


def test_parameters_of_no_compiled_model_get_the_line_to_write():
    kept = kfc_fx.compile(mlp())
    with pytest.raises(kfc_fx.OptionError, match=r"kfc_fx\.compile\(model\).*model=model"):
        kfc_fx.KFC(mlp().parameters(), lr=0.01)
    kfc_fx.uncompile(kept)
    with pytest.raises(kfc_fx.OptionError, match="belongs to a compiled model"):
        kfc_fx.KFC(kept.parameters())


def test_a_factory_that_gets_groups_alone_names_the_model():
    net = mlp()
    train(kfc_fx.KFC(net.parameters(), 0.01, model=net), net)
    assert_equal(parameters(net), parameters(reference()))


def test_compiled_models_that_are_gone_have_no_parameters():
    kfc_fx.compile(mlp())
    gc.collect()
    alive = kfc_fx.Compilation.installed_ones()
    assert all(compilation.known_to_model for compilation in alive)


class Scaled(nn.Module):
    """A criterion with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.log_temperature = nn.Parameter(torch.zeros(()))

    def forward(self, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits / self.log_temperature.exp(), y)


def test_parameters_beside_the_model_are_generic():
    net, criterion = kfc_fx.compile(mlp()), Scaled()
    opt = kfc_fx.KFC([*net.parameters(), *criterion.parameters()], lr=0.01)
    step = torch.optim.AdamW([nn.Parameter(torch.zeros(()))], lr=0.01, weight_decay=0.0)
    for _ in range(4):
        opt.zero_grad()
        criterion(net(X), Y).backward()
        step.param_groups[0]["params"][0].grad = criterion.log_temperature.grad.clone()
        opt.step()
        step.step()
    torch.testing.assert_close(criterion.log_temperature, step.param_groups[0]["params"][0])
    assert set(opt.factors) == {"0", "2"}
    assert "1 parameter by GenericAdamW" in repr(opt)
    saved = copy.deepcopy(opt.state_dict())
    again = kfc_fx.KFC([*net.parameters(), *criterion.parameters()], lr=0.01)
    again.load_state_dict(saved)
    assert saved_state(again)["generic"].keys() == {"outside.0"}


def test_one_optimizer_steps_two_models():
    first, second = kfc_fx.compile(mlp(0)), kfc_fx.compile(mlp(1))
    opt = kfc_fx.KFC([*first.parameters(), *second.parameters()], lr=0.01)
    train(opt, first, second)
    # a budget for each model, as if it was alone
    assert_equal(parameters(first), parameters(reference(0)))
    assert_equal(parameters(second), parameters(reference(1)))
    assert set(opt.factors) == {"0.0", "0.2", "1.0", "1.2"}
    assert opt.diagnostics.steps == 6
    alone = kfc_fx.KFC(kfc_fx.compile(mlp(0)), lr=0.01)
    train(alone, alone._models[0].compilation.model)
    assert opt.diagnostics.statistics_steps == 2 * alone.diagnostics.statistics_steps
    assert opt.update_source.count("def apply(") == 2
    assert "4 by adam" in repr(opt)


def test_a_step_that_raises_for_one_model_moves_none(monkeypatch):
    nets = [kfc_fx.compile(mlp(0)), kfc_fx.compile(mlp(1))]
    opt = kfc_fx.KFC([p for net in nets for p in net.parameters()], lr=0.01)
    train(opt, *nets, steps=2)
    before = [parameters(net) for net in nets]
    opt.zero_grad()
    sum(loss_of(net) for net in nets).backward()

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory, say")

    with monkeypatch.context() as patched:
        patched.setattr(opt._models[1].engine(opt.param_groups), "apply", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            opt.step()
    for net, kept in zip(nets, before, strict=True):
        assert_equal(parameters(net), kept)
    assert opt.diagnostics.steps == 2
    opt.step()
    assert opt.diagnostics.steps == 3


def test_models_take_turns():
    """As generator and discriminator do: what has no gradient takes no step and misses nothing."""
    first, second = kfc_fx.compile(mlp(0)), kfc_fx.compile(mlp(1))
    opt = kfc_fx.KFC([*first.parameters(), *second.parameters()], lr=0.01)
    for _ in range(6):
        for net in (first, second):
            opt.zero_grad()
            loss_of(net).backward()
            opt.step()
    assert_equal(parameters(first), parameters(reference(0)))
    assert_equal(parameters(second), parameters(reference(1)))
    assert opt.diagnostics.missed_statistics == 0


def test_a_step_of_two_models_is_resumed_bit_for_bit():
    nets = [kfc_fx.compile(mlp(0)), kfc_fx.compile(mlp(1))]
    opt = kfc_fx.KFC([p for net in nets for p in net.parameters()], lr=0.01)
    train(opt, *nets, steps=3)
    copies = [copy.deepcopy(net) for net in nets]
    again = kfc_fx.KFC([p for net in copies for p in net.parameters()], lr=0.01)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(opt, *nets, steps=3)
    train(again, *copies, steps=3)
    for net, copied in zip(nets, copies, strict=True):
        assert_equal(parameters(net), parameters(copied))
    one = kfc_fx.KFC(copies[0].parameters(), lr=0.01)
    with pytest.raises(kfc_fx.OptionError, match="of 2 models, and the optimizer has 1"):
        one.load_state_dict(opt.state_dict())


def test_two_optimizers_share_a_model():
    """Each steps its own layers, with its own statistics, as often as it likes."""
    net = kfc_fx.compile(mlp())
    body = kfc_fx.KFC(net[0].parameters(), lr=0.01)
    head = kfc_fx.KFC(net[2].parameters(), 0.03, scaling="inverse")
    for number in range(6):
        net.zero_grad()
        loss_of(net).backward()
        body.step()
        if number % 2 == 0:
            head.step()
    assert set(body.factors) == {"0"}
    assert set(head.factors) == {"2"}
    assert body.diagnostics.steps == body.diagnostics.statistics_steps == 6
    assert head.diagnostics.steps == head.diagnostics.statistics_steps == 3


def test_factors_of_two_optimizers_are_those_of_one():
    options = {"statistics": kfc_fx.Statistics(fisher="empirical", samples=None), "lr": 0.0}
    net = kfc_fx.compile(mlp())
    parts = [kfc_fx.KFC(net[i].parameters(), **options) for i in (0, 2)]
    loss_of(net).backward()
    for part in parts:
        part.step()
    whole = kfc_fx.compile(mlp())
    opt = kfc_fx.KFC(whole, **options)
    loss_of(whole).backward()
    opt.step()
    for name, part in zip(("0", "2"), parts, strict=True):
        torch.testing.assert_close(part.factors[name].omega, opt.factors[name].omega)
        torch.testing.assert_close(part.factors[name].gamma, opt.factors[name].gamma)


def test_the_last_optimizer_made_for_a_parameter_has_its_statistics():
    net = kfc_fx.compile(mlp())
    before = kfc_fx.KFC(net, lr=0.01)
    after = kfc_fx.KFC(net[2].parameters(), lr=0.01)
    loss_of(net).backward()
    after.step()
    with pytest.raises(kfc_fx.StepError, match=r"another KFC was made for 2\.weight"):
        before.step()


def test_a_refused_optimizer_leaves_the_others_as_they_were():
    net = kfc_fx.compile(mlp())
    opt = kfc_fx.KFC(net, lr=0.01)
    with pytest.raises(kfc_fx.OptionError):
        kfc_fx.KFC([{"params": net.parameters(), "damping": 1.0}])
    train(opt, net, steps=1)
    assert opt.diagnostics.statistics_steps == 1


@pytest.mark.parametrize(
    "scaling", [kfc_fx.Inverse(quadratic_model=True), kfc_fx.Eigen(clip_by="exact")], ids=str
)
def test_the_exact_fisher_matrix_is_of_one_model(scaling):
    nets = [kfc_fx.compile(mlp()), kfc_fx.compile(mlp())]
    with pytest.raises(kfc_fx.OptionError, match="of one model, and the parameters are of 2"):
        kfc_fx.KFC([p for net in nets for p in net.parameters()], scaling=scaling)


def test_of_models_that_share_all_parameters_the_one_compiled_last_is_meant():
    net = kfc_fx.compile(mlp())
    twins = [copy.copy(net) for _ in range(3)]
    for twin in twins:
        kfc_fx.compile(twin)
    kept = kfc_fx.KFC(net.parameters(), lr=0.01)
    assert kept._models[0].compilation is twins[-1].kfc


def test_of_nested_compiled_models_the_outer_one_is_meant():
    outer = nn.Sequential(mlp(), nn.Linear(3, 3))
    kfc_fx.compile(outer[0])
    kfc_fx.compile(outer)
    opt = kfc_fx.KFC(outer.parameters(), lr=0.01)
    F.cross_entropy(outer(X), Y).backward()
    opt.step()
    assert set(opt.factors) == {"0.0", "0.2", "1"}
