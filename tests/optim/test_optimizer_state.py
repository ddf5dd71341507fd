"""Saved and resumed runs, and Polyak averages."""

from __future__ import annotations

import copy
import io
import json
from dataclasses import replace

import pytest
import torch
from torch.optim import lr_scheduler

import kfc_fx
from tests.models import (
    assert_equal,
    assert_same_state,
    conv_network,
    make,
    parameters,
    saved_state,
    train,
)

SCALINGS = ["adam", "inverse"]


@pytest.mark.parametrize("bound_first", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"average": 5.0, "weight_decay": 0.1},
        {"input_factor": "separable"},
        {"every": 6},
        {"scaling": "eigen", "every": 6, "basis_limit": 4},
        {"scaling": "inverse"},
        {"scaling": "inverse", "input_factor": "separable", "generic": "adamw"},
    ],
    ids=str,
)
def test_a_saved_run_resumes_bit_for_bit(options, bound_first):
    options = {"every": 3, "refresh_every": 6, **options}
    compiled, opt = make(**options)
    train(compiled, opt, 22)  # in the middle of an interval, past the early steps
    buffer = io.BytesIO()
    torch.save({"model": compiled.state_dict(), "opt": opt.state_dict()}, buffer)
    train(compiled, opt, 8)

    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    resumed, again = make(**options)
    if bound_first:
        train(resumed, again, 1)
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["opt"])
    train(resumed, again, 8)
    assert_equal(resumed.state_dict().values(), compiled.state_dict().values())
    assert again.diagnostics.steps == 30
    if "average" in options:
        with opt.averaged(), again.averaged():
            assert_equal(parameters(resumed), parameters(compiled))


@pytest.mark.parametrize("intervals", [(3, 6), (6, 3)])
def test_factors_survive_a_change_of_the_intervals(intervals):
    """Written out where intervals differ, eigenvalues where they are equal: narrow factors whole,
    since a refresh has just diagonalised them."""
    before, after = ({"every": i, "refresh_every": 6} for i in intervals)
    compiled, opt = make(**before)
    train(compiled, opt, 7)  # step 6 had statistics and a refresh
    resumed, again = make(**after)
    train(resumed, again, 1)
    resumed.load_state_dict(compiled.state_dict())
    again.load_state_dict(opt.state_dict())
    kept = {name.split("_")[0] for own in again._engine.state.values() for name in own}
    assert ("eigenvalues" in kept) == (intervals[1] == 6)
    for name, expected in opt.factors.items():
        found = again.factors[name]
        for own, wanted in ((found.omega, expected.omega), (found.gamma, expected.gamma)):
            rounding = 1e-5 * float(wanted.max())
            torch.testing.assert_close(own, wanted, rtol=0, atol=rounding)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"scaling": "spectral"}, {"scaling": "adam"}),
        ({"scaling": "inverse"}, {"scaling": "adam"}),
        ({"scaling": "adam"}, {"scaling": "inverse"}),
        ({"scaling": "inverse", "input_factor": "separable"}, {"scaling": "inverse"}),
        ({"scaling": "adam"}, {"scaling": "adam", "input_factor": "separable"}),
        ({"scaling": "adam"}, {"scaling": "adam", "blocks": {"3": {"scaling": "spectral"}}}),
        ({"scaling": "eigen"}, {"scaling": "eigen", "basis_limit": 4}),
    ],
    ids=str,
)
def test_a_state_of_another_kind_is_refused(before, after):
    """A part of it would fit: a count of statistics, say, that the factors do not have."""
    compiled, opt = make(**before)
    train(compiled, opt, 2)
    other, again = make(**after)
    start = parameters(other)
    if opt.defaults["betas"][1] != again.defaults["betas"][1]:
        with pytest.raises(kfc_fx.OptionError, match="of another scaling, or of other betas"):
            again.load_state_dict(opt.state_dict())
        train(other, again, 1)  # as if nothing had been loaded
        return
    again.load_state_dict(opt.state_dict())
    for _ in range(2):
        with pytest.raises(kfc_fx.OptionError, match=r"does not fit . blocks? .*another scaling"):
            train(other, again, 1)
    assert_equal(parameters(other), start)
    other, again = make(**after)
    other.kfc.trace(torch.randn(4, 2, 6, 6))
    before_loading = again.state_dict()["state"]
    with pytest.raises(kfc_fx.OptionError, match=r"does not fit . blocks? .*another scaling"):
        again.load_state_dict(opt.state_dict())
    torch.testing.assert_close(again.state_dict()["state"], before_loading, rtol=0, atol=0)
    train(other, again, 1)  # as if nothing had been loaded


def test_hooks_on_the_state_dict_see_all_of_it():
    compiled, opt = make()
    train(compiled, opt, 2)
    seen = {}
    opt.register_state_dict_post_hook(lambda _, state: seen.update(saved=state["state"][0].keys()))
    opt.register_state_dict_post_hook(lambda _, state: {**state, "mine": 1})
    state = opt.state_dict()
    assert state["mine"] == 1
    _, again = make()
    again.register_load_state_dict_pre_hook(
        lambda _, state: seen.update(loaded=state["state"][0].keys())
    )
    again.register_load_state_dict_pre_hook(
        lambda _, state: {**state, "param_groups": [{**state["param_groups"][0], "lr": 0.5}]}
    )
    again.register_load_state_dict_post_hook(
        lambda own: seen.update(after=own.state[own.param_groups[0]["params"][0]].keys())
    )
    again.load_state_dict(state)
    assert seen["saved"] == seen["loaded"] == seen["after"] > {"step", "m", "v"}
    assert again.param_groups[0]["lr"] == 0.5


def test_blocks_that_a_loaded_state_lacks_begin_anew_and_soon():
    net = conv_network()
    compiled, opt = make(net)
    net[3].requires_grad_(False)
    train(compiled, opt, 30)
    other, again = make(conv_network())
    again.load_state_dict(opt.state_dict())
    with pytest.warns(kfc_fx.KfcWarning, match=r"nothing for 1 block \(3\), begun anew"):
        train(other, again, 1)
    assert not again.factors["3"].omega.any()
    train(other, again, 1)  # though none are due by the interval, it has statistics
    assert again.factors["3"].omega.any()
    assert again._engine.started


def test_a_state_of_the_same_kind_goes_on_without_a_word():
    compiled, opt = make(momentum=0.0)
    train(compiled, opt, 3)
    other, again = make(momentum=0.9, scaling="eigen")  # the same factors and bases
    again.load_state_dict(opt.state_dict())
    train(other, again, 1)
    assert again._engine.anew == []


def test_a_block_whose_bias_is_frozen_begins_anew_whole():
    net = conv_network()
    compiled, opt = make(net)
    train(compiled, opt, 12)
    net[6].bias.requires_grad_(False)
    train(compiled, opt, 2)
    assert opt.factors["6"].omega.shape == (64, 64)
    assert opt.factors["6"].omega.diagonal().mean() > 0.01
    assert opt._engine.anew == ["6"]


@pytest.mark.parametrize("missing", ["counters", "likelihood", "seed", "entries", "started"])
def test_a_state_dict_that_is_not_whole_changes_nothing(missing):
    compiled, opt = make(lr=0.3)
    train(compiled, opt, 1)
    saved = opt.state_dict()
    run = json.loads(saved["param_groups"][0]["kfc"])
    del run["models"][0][missing]
    saved["param_groups"][0]["kfc"] = json.dumps(run)
    _, other = make(lr=0.1)
    with pytest.raises(kfc_fx.OptionError, match=f"not whole: '{missing}' is missing"):
        other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] == 0.1


def test_a_state_dict_of_another_version_changes_nothing():
    compiled, opt = make(lr=0.3)
    train(compiled, opt, 1)
    saved = opt.state_dict()
    run = json.loads(saved["param_groups"][0]["kfc"])
    saved["param_groups"][0]["kfc"] = json.dumps({**run, "version": 99})
    _, other = make(lr=0.1)
    with pytest.raises(kfc_fx.OptionError, match="version 99 of its form"):
        other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] == 0.1


def test_a_foreign_state_dict_is_refused():
    _, opt = make()
    foreign = torch.optim.SGD(conv_network().parameters(), lr=0.1).state_dict()
    with pytest.raises(kfc_fx.OptionError, match="not of a KFC optimizer"):
        opt.load_state_dict(foreign)


def test_averaged_parameters_are_swapped_in_and_back():
    compiled, opt = make(average=3.0)
    with pytest.raises(kfc_fx.StepError, match="no averaged parameters"), opt.averaged():
        pass
    train(compiled, opt, 3)
    own = parameters(compiled)
    with pytest.raises(ZeroDivisionError), opt.averaged():
        _ = 1 / int(torch.equal(parameters(compiled)[0], own[0]))  # zero: they are others now
    assert_equal(parameters(compiled), own)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_state_dict_is_a_snapshot_and_loading_one_keeps_it(scaling):
    compiled, opt = make(scaling=scaling, average=5.0)
    train(compiled, opt, 3)
    saved = opt.state_dict()
    model = copy.deepcopy(compiled.state_dict())
    snapshot = copy.deepcopy(saved)
    train(compiled, opt, 2)
    assert_same_state(saved_state(opt, saved), saved_state(opt, snapshot))
    after = parameters(compiled)
    for _ in range(2):  # the second time shows that the first did not write into it
        compiled.load_state_dict(model)
        opt.load_state_dict(saved)
        train(compiled, opt, 2)
        assert_equal(parameters(compiled), after)
    assert_same_state(saved_state(opt, saved), saved_state(opt, snapshot))


def test_a_state_loaded_before_the_first_forward_pass_is_there():
    compiled, opt = make(average=5.0, lr=0.02)
    train(compiled, opt, 3)
    saved = copy.deepcopy(opt.state_dict())
    fresh, again = make(average=5.0, lr=0.3)
    fresh.load_state_dict(compiled.state_dict())
    again.load_state_dict(saved)
    assert again.param_groups[0]["lr"] == 0.02
    assert again.diagnostics.steps == 3
    assert_same_state(saved_state(again), saved_state(opt, saved))
    own = parameters(fresh)
    with opt.averaged(), again.averaged():
        assert_equal(parameters(fresh), parameters(compiled))
    assert_equal(parameters(fresh), own)


def test_a_state_saved_before_the_first_step_loads():
    compiled, opt = make()
    fresh, again = make()
    again.load_state_dict(opt.state_dict())
    train(compiled, opt, 2)
    train(fresh, again, 2)
    assert_equal(parameters(compiled), parameters(fresh))


def test_schedulers_resume_with_the_optimizer():
    def build():
        compiled, opt = make()
        return compiled, opt, lr_scheduler.StepLR(opt, 2, 0.5)

    compiled, opt, scheduler = build()
    train(compiled, opt, 3, scheduler)
    saved = copy.deepcopy((compiled.state_dict(), opt.state_dict(), scheduler.state_dict()))
    train(compiled, opt, 3, scheduler)
    fresh, again, schedule = build()
    for target, state in zip((fresh, again, schedule), saved, strict=True):
        target.load_state_dict(state)
    train(fresh, again, 3, schedule)
    assert_equal(parameters(fresh), parameters(compiled))
    assert again.param_groups[0]["lr"] == opt.param_groups[0]["lr"] == 0.01 / 8


def test_averages_are_the_written_out_recursion():
    compiled, opt = make(average=2.0)
    decay = torch.tensor(-0.5).double().exp().item()
    expected = parameters(compiled)
    for _ in range(4):
        train(compiled, opt, 1)
        now = parameters(compiled)
        expected = [decay * e + (1 - decay) * p for e, p in zip(expected, now, strict=True)]
    with opt.averaged():
        torch.testing.assert_close(parameters(compiled), expected)
        assert not torch.equal(parameters(compiled)[0], now[0])
    assert_equal(parameters(compiled), now)


def test_a_state_whose_blocks_are_on_other_ranks_is_not_begun_anew():
    compiled, opt = make()
    train(compiled, opt, 2)
    held = opt._models[0].binding.held()
    first = next(iter(held.plan))
    names = tuple(held.blocks[first])
    left = {name: own for name, own in held.blocks.items() if name != first}
    opt._models[0].binding.take_over(replace(held, blocks=left, elsewhere={first: names}))
    with pytest.raises(kfc_fx.OptionError, match="there is no state of 1 block that this rank"):
        train(compiled, opt, 1)
