"""``opt.state``, and the checkpoints that are made of it: torch.distributed.checkpoint's too."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.nn import functional as F

import kfc_fx
from tests.models import assert_same_state, make, parameters, saved_state

SCALINGS = ["adam", "spectral", "eigen", "inverse"]
FORMS = [StateDictOptions(), StateDictOptions(flatten_optimizer_state_dict=True)]
BY_FORM = pytest.mark.parametrize("form", FORMS, ids=["nested", "flattened"])


class Net(nn.Module):
    """A conv layer, a norm, two heads by turns, one never called, a table and a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.GroupNorm(2, 4)
        self.heads = nn.ModuleList(nn.Linear(4, 3) for _ in range(2))
        self.unused = nn.Linear(7, 5)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor, head: int = 0) -> torch.Tensor:
        hidden = self.norm(self.conv(x)).relu().mean((2, 3)) * self.scale
        return self.heads[head](hidden)


def build(**options):
    net = kfc_fx.compile(Net())
    options = {"seed": 3, "statistics": kfc_fx.Statistics(every=3, refresh_every=6), **options}
    return net, kfc_fx.KFC(net, **options)


def train(net, opt, start, stop, head=None) -> None:
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 1, 6, 6, generator=generator)
        labels = torch.randint(3, (8,), generator=generator)
        opt.zero_grad()
        F.cross_entropy(net(x, step // 2 % 2 if head is None else head), labels).backward()
        opt.step()


def trace(net: nn.Module, heads: tuple[int, ...] = (0, 1)) -> None:
    for head in heads:
        net.kfc.trace(torch.randn(8, 1, 6, 6), head)


def assert_goes_on_as(net, opt, other, its, start, head=None) -> None:
    train(net, opt, start, start + 7, head)
    train(other, its, start, start + 7, head)
    torch.testing.assert_close(parameters(other), parameters(net), rtol=0, atol=0)
    assert_same_state(saved_state(its), saved_state(opt))


# -- opt.state -------------------------------------------------------------------------------


def test_there_is_state_as_soon_as_the_plan_is_known():
    net, opt = build()
    assert not opt.state
    trace(net)
    assert opt.state
    for name, parameter in net.named_parameters():
        assert opt.state[parameter], name
    weight = opt.state[net.conv.weight]
    assert {"mass", "m", "v", "q_omega", "q_gamma"} <= weight.keys()
    assert all(isinstance(value, torch.Tensor) for value in opt.state[net.norm.bias].values())
    train(net, opt, 0, 3)
    assert opt.state[net.conv.weight]["step"] == 3
    assert opt.state[net.scale]["m"].any()
    assert opt.state[net.conv.weight].keys() == weight.keys()


def test_the_state_by_parameter_is_that_of_the_running_optimizer():
    net, opt = build()
    train(net, opt, 0, 3)
    opt.state[net.scale]["m"].zero_()
    assert not opt._engine.generic["scale"]["m"].any()
    opt.state[net.conv.weight]["m"].fill_(2.0)
    assert (opt.state_dict()["state"][1]["m"] == 2).all()  # after the bare parameter


def test_a_state_of_other_sizes_cannot_be_written():
    net, opt = build()
    train(net, opt, 0, 2)
    for entry in ({"m": torch.zeros(3)}, {"exp_avg": torch.zeros(4)}):
        with pytest.raises(kfc_fx.OptionError, match=r"use opt\.load_state_dict"):
            opt.state[net.scale] = entry
    with pytest.raises(kfc_fx.OptionError, match=r"opt\.state\.clear\(\)"):
        del opt.state[net.scale]
    with pytest.raises(kfc_fx.OptionError, match="load_state_dict"):
        opt.state = {net.scale: {}}


def test_state_that_a_trainer_moves_and_writes_back_stays():
    """As Lightning does after a checkpoint is loaded."""
    net, opt = build()
    train(net, opt, 0, 3)
    before = copy.deepcopy(saved_state(opt))
    for parameter, entry in opt.state.items():
        moved = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in entry.items()}
        opt.state[parameter] = moved
    assert_same_state(saved_state(opt), before)


@pytest.mark.parametrize("way", ["clear", "assign"])
def test_a_cleared_state_begins_anew(way):
    net, opt = build()
    fresh = copy.deepcopy(net.state_dict())
    train(net, opt, 0, 4)
    after = parameters(net)
    net.load_state_dict(fresh)
    if way == "clear":
        opt.state.clear()
    else:
        opt.state = defaultdict(dict)
    assert opt.diagnostics.steps == 0
    train(net, opt, 0, 4)
    torch.testing.assert_close(parameters(net), after, rtol=0, atol=0)


def test_frozen_parameters_that_were_never_trained_take_no_memory():
    net, opt = build()
    net.unused.requires_grad_(False)
    train(net, opt, 0, 2)
    assert not any(parameter is net.unused.weight for parameter in opt.state)
    assert opt.state[net.unused.weight] == {}


# -- a step that changes nothing -------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_step_of_zeros_at_no_rate_changes_nothing(steps):
    net, opt = build(average=5.0)
    train(net, opt, 0, steps)
    before, saved = parameters(net), saved_state(opt)
    opt.zero_grad()
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    opt.param_groups[0]["lr"] = 0.0
    opt.step()
    torch.testing.assert_close(parameters(net), before, rtol=0, atol=0)
    assert_same_state(saved_state(opt), saved)


@BY_FORM
def test_asking_for_the_state_changes_nothing(form):
    """Before the first forward pass, before the first step, and between steps."""
    net, opt = build()
    other, its = build()
    get_optimizer_state_dict(other, its, options=form)
    trace(net)
    trace(other)
    for step in range(6):
        get_optimizer_state_dict(other, its, options=form)
        train(net, opt, step, step + 1)
        train(other, its, step, step + 1)
    assert_goes_on_as(net, opt, other, its, 6)


# -- torch.distributed.checkpoint ------------------------------------------------------------


@BY_FORM
@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_state_that_is_set_goes_on_bit_for_bit(form, traced, scaling):
    options = {"scaling": scaling, "average": 4.0, "weight_decay": 0.01}
    net, opt = build(**options)
    train(net, opt, 0, 14)
    model, state = get_state_dict(net, opt, options=form)
    other, its = build(**options)
    if traced:
        trace(other)
    if not traced and form.flatten_optimizer_state_dict:
        with pytest.raises(kfc_fx.OptionError, match=r"not whole.*net.kfc.trace"):
            set_state_dict(other, its, model_state_dict=model, optim_state_dict=state, options=form)
        return
    set_state_dict(other, its, model_state_dict=model, optim_state_dict=state, options=form)
    assert_same_state(saved_state(its), saved_state(opt))
    assert_goes_on_as(net, opt, other, its, 14)


def frozen_run(form, *names):
    """A run in which some modules or parameters are frozen after nine steps of eleven, and its
    state dicts."""
    net, opt = build()
    train(net, opt, 0, 9)
    for name in names:
        getattr(net, name).requires_grad_(False)
    train(net, opt, 9, 11)
    return net, opt, *get_state_dict(net, opt, options=form)


@BY_FORM
def test_frozen_parameters_keep_theirs(form):
    """torch.distributed.checkpoint leaves out what stands under a frozen parameter."""
    net, opt, model, state = frozen_run(form, "conv", "scale")
    other, its = build()
    trace(other)
    other.conv.requires_grad_(False)
    other.scale.requires_grad_(False)
    set_state_dict(other, its, model_state_dict=model, optim_state_dict=state, options=form)
    assert_same_state(saved_state(its), saved_state(opt))
    for one in (net, other):
        one.requires_grad_()
    assert_goes_on_as(net, opt, other, its, 11)


@BY_FORM
def test_a_state_may_be_set_before_parameters_are_frozen(form):
    net, opt, model, state = frozen_run(form, "conv")
    other, its = build()
    trace(other)
    set_state_dict(other, its, model_state_dict=model, optim_state_dict=state, options=form)
    other.conv.requires_grad_(False)
    assert_goes_on_as(net, opt, other, its, 11)


def test_state_of_parameters_that_are_frozen_now_is_left_out_with_a_word():
    net, opt = build()
    train(net, opt, 0, 9)
    state = get_optimizer_state_dict(net, opt)
    other, its = build()
    other.conv.requires_grad_(False)
    trace(other)
    with pytest.warns(kfc_fx.KfcWarning, match="nothing for 2 parameters that are frozen here"):
        set_optimizer_state_dict(other, its, state)


@BY_FORM
@pytest.mark.parametrize("scaling", ["adam", "inverse"])
def test_a_checkpoint_on_disk_goes_on_bit_for_bit(form, scaling, tmp_path):
    net, opt = build(scaling=scaling)
    train(net, opt, 0, 14)
    model, state = get_state_dict(net, opt, options=form)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process
        dcp.save({"model": model, "opt": state}, checkpoint_id=tmp_path)
        other, its = build(scaling=scaling)
        trace(other)
        found, its_state = get_state_dict(other, its, options=form)
        dcp.load({"model": found, "opt": its_state}, checkpoint_id=tmp_path)
    set_state_dict(other, its, model_state_dict=found, optim_state_dict=its_state, options=form)
    assert_same_state(saved_state(its), saved_state(opt))
    assert_goes_on_as(net, opt, other, its, 14)


@BY_FORM
def test_a_checkpoint_that_finds_no_place_is_refused(form, tmp_path):
    """torch.distributed.checkpoint drops what the optimizer has no place for, without a word."""
    net, opt = build()
    train(net, opt, 0, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"opt": get_optimizer_state_dict(net, opt, options=form)}, checkpoint_id=tmp_path)
        other, its = build()
        state = get_optimizer_state_dict(other, its, options=form)
        dcp.load({"opt": state}, checkpoint_id=tmp_path)
    before = copy.deepcopy(its.state_dict())
    with pytest.raises(kfc_fx.OptionError, match=r"not whole.*net.kfc.trace"):
        set_optimizer_state_dict(other, its, state, options=form)
    assert its.state_dict()["param_groups"] == before["param_groups"]


def test_a_checkpoint_that_finds_a_part_of_the_places_is_refused(tmp_path):
    net, opt = build()
    train(net, opt, 0, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"opt": get_optimizer_state_dict(net, opt)}, checkpoint_id=tmp_path)
        other, its = build()
        trace(other, (0,))
        state = get_optimizer_state_dict(other, its)
        with pytest.raises(CheckpointException, match=r"Missing key|Size mismatch"):
            dcp.load({"opt": state}, checkpoint_id=tmp_path)


# -- names and places ------------------------------------------------------------------------


def test_state_goes_to_the_parameters_of_its_names_in_any_order():
    net, opt = build()
    train(net, opt, 0, 5)
    other = kfc_fx.compile(Net())
    other.load_state_dict(net.state_dict())
    its = kfc_fx.KFC(
        list(other.parameters())[::-1], seed=3, statistics=opt.options.statistics, model=other
    )
    its.load_state_dict(opt.state_dict())
    assert_goes_on_as(net, opt, other, its, 5)


def test_a_model_of_other_names_takes_state_by_its_place():
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Net()

        def forward(self, x: torch.Tensor, head: int = 0) -> torch.Tensor:
            return self.inner(x, head)

    net, opt = build()
    train(net, opt, 0, 5)
    other = kfc_fx.compile(Wrapper())
    other.inner.load_state_dict(net.state_dict())
    its = kfc_fx.KFC(other, seed=3, statistics=opt.options.statistics)
    its.load_state_dict(opt.state_dict())
    train(net, opt, 5, 12)
    train(other, its, 5, 12)
    torch.testing.assert_close(parameters(other), parameters(net), rtol=0, atol=0)


def test_a_state_of_other_sizes_is_refused_whole():
    net, opt = build(lr=0.3)
    train(net, opt, 0, 3)
    wide = Net()
    wide.heads = nn.ModuleList(nn.Linear(4, 6) for _ in range(2))
    other = kfc_fx.KFC(kfc_fx.compile(wide), lr=0.1)
    with pytest.raises(kfc_fx.OptionError, match=r"of shape \(3, 4\), and .* has \(6, 4\)"):
        other.load_state_dict(opt.state_dict())
    assert other.param_groups[0]["lr"] == 0.1


def test_half_precision_has_its_copies_by_parameter():
    net, opt = make(nn.Sequential(nn.Flatten(), nn.Linear(8, 5)).bfloat16(), master_weights=True)
    net.kfc.trace(torch.randn(4, 8).bfloat16())
    entry = opt.state[net[1].weight]
    assert entry["master_weight"].dtype == torch.float32
    F.cross_entropy(net(torch.randn(4, 8).bfloat16()).float(), torch.randint(5, (4,))).backward()
    opt.step()
    assert opt.state[net[1].weight].keys() == entry.keys()


# -- what a review has found -----------------------------------------------------------------


def test_averages_that_wait_are_not_the_parameters():
    net, opt = build(average=5.0)
    trace(net)
    before = parameters(net)
    opt.state[net.scale]["average"].zero_()
    with pytest.raises(kfc_fx.OptionError, match="waits for the"):
        opt.state[net.scale] = {"average": torch.zeros(())}
    with pytest.raises(kfc_fx.OptionError, match="is counted"):
        opt.state[net.scale] = {"step": torch.tensor(7.0)}
    torch.testing.assert_close(parameters(net), before, rtol=0, atol=0)


def test_a_layer_of_two_models_has_state_of_both():
    shared = nn.Linear(4, 4)
    models = [kfc_fx.compile(nn.Sequential(shared, nn.Linear(4, 3))) for _ in range(2)]
    groups = list(dict.fromkeys(p for model in models for p in model.parameters()))
    opt = kfc_fx.KFC(groups, lr=0.01)
    x, labels = torch.randn(8, 4), torch.arange(8) % 3
    sum(F.cross_entropy(model(x), labels) for model in models).backward()
    opt.step()
    saved = opt.state_dict()
    opt.load_state_dict(copy.deepcopy(saved))
    for number in range(2):
        found = opt.factors[f"{number}.0"]
        assert found.omega.any()
        assert found.gamma.any()


def test_notes_have_one_size_before_and_after_training():
    name = "layer_of_a_rather_long_name" * 5
    net = kfc_fx.compile(nn.Sequential())
    net.add_module(name, nn.Linear(4, 3))
    opt = kfc_fx.KFC(net, average=3.0)
    net.kfc.trace(torch.randn(2, 4))
    weight = getattr(net, name).weight
    before = opt.state[weight]["note"].shape
    F.cross_entropy(net(torch.randn(6, 4)), torch.arange(6) % 3).backward()
    opt.step()
    assert opt.state[weight]["note"].shape == before
