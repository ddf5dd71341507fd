"""Copies of a model with its optimizer, and states of other optimizers."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx
from tests.models import (
    assert_same_state,
    collector_of,
    conv_network,
    make,
    parameters,
    saved_state,
    train,
)

SCALINGS = ["adam", "spectral", "eigen", "inverse"]


def pickled(pair):
    return pickle.loads(pickle.dumps(pair))


def saved_by_torch(pair):
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = pytest.mark.parametrize("made", [copy.deepcopy, pickled, saved_by_torch])


@COPIES
@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_model_and_its_optimizer_are_copied_together_and_train_on(made, scaling):
    net, opt = make(scaling=scaling, fisher="sampled", weight_decay=0.01, average=5.0)
    train(net, opt, 4)
    other, its = made((net, opt))
    assert set(its.param_groups[0]["params"]) == set(other.parameters())
    assert its.param_groups[0]["lr"] == opt.param_groups[0]["lr"]
    for _ in range(3):
        train(net, opt, 1)
        train(other, its, 1)
        torch.testing.assert_close(parameters(other), parameters(net), rtol=0, atol=0)
    assert_same_state(saved_state(its), saved_state(opt))
    assert not set(other.parameters()) & set(net.parameters())


@COPIES
def test_an_optimizer_that_is_copied_first_brings_its_model(made):
    net, opt = make()
    train(net, opt, 2)
    its, other = made((opt, net))
    train(net, opt, 2)
    train(other, its, 2)
    torch.testing.assert_close(parameters(other), parameters(net), rtol=0, atol=0)


@COPIES
def test_neither_gradients_nor_their_statistics_are_copied(made):
    """As torch copies parameters: without their gradients."""
    net, opt = make(samples=None)
    train(net, opt, 2)
    F.cross_entropy(net(torch.randn(6, 2, 6, 6)), torch.randint(5, (6,))).backward()
    other, _its = made((net, opt))
    assert all(p.grad is None for p in other.parameters())
    assert collector_of(other).sums.examples == 0
    assert collector_of(net).sums.examples == 6


def test_groups_and_several_models_are_copied():
    one, two = kfc_fx.compile(conv_network()), kfc_fx.compile(nn.Linear(5, 3))
    groups = [{"params": list(one.parameters()), "lr": 0.02}, {"params": list(two.parameters())}]
    opt = kfc_fx.KFC(groups, lr=0.01, scaling=kfc_fx.Adam(orthogonalize=0.0))
    copies = copy.deepcopy((one, two, opt))
    assert [group["lr"] for group in copies[2].param_groups] == [0.02, 0.01]
    for a, b, step in ((one, two, opt), copies):
        torch.manual_seed(0)
        for _ in range(2):
            loss = F.cross_entropy(b(a(torch.randn(8, 2, 6, 6))), torch.randint(3, (8,)))
            step.zero_grad()
            loss.backward()
            step.step()
    torch.testing.assert_close(parameters(copies[0]), parameters(one), rtol=0, atol=0)
    torch.testing.assert_close(parameters(copies[1]), parameters(two), rtol=0, atol=0)


# -- a state of the very beginning -----------------------------------------------------------


def test_a_state_of_step_zero_restores_targets_and_counters():
    net, opt = make(fisher="sampled")
    first, weights = copy.deepcopy(opt.state_dict()), copy.deepcopy(net.state_dict())
    train(net, opt, 3)
    after = parameters(net)
    torch.manual_seed(1234)
    net.load_state_dict(weights)
    opt.load_state_dict(first)
    assert opt.diagnostics.steps == opt.diagnostics.statistics_steps == 0
    train(net, opt, 3)
    torch.testing.assert_close(parameters(net), after, rtol=0, atol=0)


# -- layers that are not called --------------------------------------------------------------


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(6, 8)
        self.heads = nn.ModuleList(nn.Linear(8, 3) for _ in range(2))

    def forward(self, x: torch.Tensor, head: int) -> torch.Tensor:
        return self.heads[head](torch.tanh(self.body(x)))


def by_turns(net: nn.Module, opt: kfc_fx.KFC, start: int, stop: int) -> None:
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 6, generator=generator)
        opt.zero_grad()
        head = step // 2 % 2
        F.cross_entropy(net(x, head), torch.randint(3, (16,), generator=generator)).backward()
        opt.step()


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("stop", [9, 10, 11, 12])
def test_heads_by_turns_resume_bit_for_bit(scaling, stop):
    """However often it is saved and loaded in between, also while a head was not called yet."""
    net = kfc_fx.compile(Heads())
    opt = kfc_fx.KFC(net, scaling=scaling, seed=0)
    by_turns(net, opt, 0, stop)
    fresh = kfc_fx.compile(Heads())
    other = kfc_fx.KFC(fresh, scaling=scaling, seed=0)
    fresh.load_state_dict(net.state_dict())
    other.load_state_dict(opt.state_dict())
    for step in range(stop, stop + 7):
        other.load_state_dict(copy.deepcopy(other.state_dict()))
        by_turns(net, opt, step, step + 1)
        by_turns(fresh, other, step, step + 1)
    torch.testing.assert_close(parameters(fresh), parameters(net), rtol=0, atol=0)
    assert saved_state(other)["blocks"].keys() == saved_state(opt)["blocks"].keys()


# -- other optimizers ------------------------------------------------------------------------


def test_the_state_of_an_adamw_run_is_taken_over():
    net = conv_network()
    adamw = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for _ in range(7):
        adamw.zero_grad()
        F.cross_entropy(net(torch.randn(8, 2, 6, 6)), torch.randint(5, (8,))).backward()
        adamw.step()
    saved = adamw.state_dict()
    net = kfc_fx.compile(net, norm_layers=False)
    opt = kfc_fx.KFC(net)
    opt.adopt(saved)
    assert opt.diagnostics.steps == 7
    before = saved_state(opt)["generic"]["1.weight"]
    torch.testing.assert_close(before["m"], adamw.state[net[1].weight]["exp_avg"], rtol=0, atol=0)
    train(net, opt, 1)
    generic = saved_state(opt)["generic"]
    assert generic.keys() == {"1.weight", "1.bias"}  # blocks have moments of their own
    assert not torch.allclose(generic["1.weight"]["m"], before["m"])
    assert opt.diagnostics.statistics_steps == 1
    assert opt.diagnostics.steps == 8


def test_statistics_come_at_the_next_step_after_any_number_of_steps():
    net = conv_network()
    adamw = torch.optim.AdamW(net.parameters(), lr=1e-3)
    F.cross_entropy(net(torch.randn(8, 2, 6, 6)), torch.randint(5, (8,))).backward()
    adamw.step()
    saved = adamw.state_dict()
    for entry in saved["state"].values():
        entry["step"] += 1004
    net = kfc_fx.compile(net)
    opt = kfc_fx.KFC(net)
    opt.adopt(saved)
    train(net, opt, 1)
    assert (opt.diagnostics.steps, opt.diagnostics.statistics_steps) == (1006, 1)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "takes the state_dict of a torch.optim.AdamW"),
        ({"state": {}, "param_groups": [{"params": [0]}]}, "of 1 parameters, and the optimizer"),
        ({"state": {}, "param_groups": [{"params": list(range(8))}]}, "holds no moments"),
        (
            {"state": {0: {"momentum_buffer": 1}}, "param_groups": [{"params": list(range(8))}]},
            "has momentum_buffer for a parameter",
        ),
        (
            {
                "state": {0: {"step": 1, "exp_avg": torch.ones(1), "exp_avg_sq": torch.ones(1)}},
                "param_groups": [{"params": list(range(8))}],
            },
            r"shape \(1,\) for a parameter of shape",
        ),
    ],
)
def test_a_state_that_is_not_of_adamw_is_refused(state, message):
    _, opt = make()
    with pytest.raises(kfc_fx.OptionError, match=message):
        opt.adopt(state)


# -- rates of biases -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scaling", ["adam", "spectral", kfc_fx.Eigen(clip=None), kfc_fx.Inverse(clip=None)]
)
def test_a_bias_may_have_another_rate_than_its_weight(scaling):
    """A step is the sum of those of weights alone and of biases alone."""
    moved = []
    for rates in ((0.01, 0.02), (0.01, 0.0), (0.0, 0.02)):
        net = kfc_fx.compile(conv_network())
        named = dict(net.named_parameters())
        groups = [
            {"params": [p for name, p in named.items() if kind in name], "lr": rate}
            for kind, rate in zip(("weight", "bias"), rates, strict=True)
        ]
        opt = kfc_fx.KFC(groups, scaling=scaling, seed=0)
        before = parameters(net)
        torch.manual_seed(0)
        train(net, opt, 1)
        moved.append([new - old for new, old in zip(parameters(net), before, strict=True)])
    both, weights, biases = moved
    torch.testing.assert_close(both, [w + b for w, b in zip(weights, biases, strict=True)])
    assert all(own.any() for own in both)
