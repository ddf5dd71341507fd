"""``cuda_graph``: the step on static tensors. Without a GPU the step is run again instead of
replayed, which shows what is recorded; :mod:`kfc_fx.tools.gpu.check` replays it."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx
from kfc_fx.engine import static_step
from kfc_fx.errors import KfcWarning, OptionError
from kfc_fx.optim import engines
from tests.models import collector_of, saved_state
from tests.options import kfc

SCALINGS = ("adam", "spectral", "eigen", "inverse")


@pytest.fixture
def recorded(monkeypatch):
    """Steps are static from the start; recording keeps the function and counts."""
    made = []

    def record(body, device):
        made.append(device)
        return body

    monkeypatch.setattr(engines, "captures", lambda spec, parameters, wanted: wanted is not False)
    monkeypatch.setattr(static_step, "record", record)
    return made


def network(dtype):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GELU(), nn.Conv2d(4, 4, 3), nn.GELU(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 5), nn.PReLU(),
    ).to(dtype)  # fmt: skip


def optimizer(graph, dtype=torch.float64, **options):
    model = kfc_fx.compile(network(dtype))
    options = {"lr": 0.02, "fisher": "empirical", "weight_decay": 0.01} | options
    return model, kfc(model, cuda_graph=graph, **options)


def backward(model, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    # Enough examples for factors of full rank: bases of a null space are arbitrary.
    x = torch.randn(64, 2, 6, 6, generator=generator).to(next(model.parameters()).dtype)
    y = torch.randint(5, (64,), generator=generator)
    (F.cross_entropy(model(x), y) * scale).backward()


def train(model, opt, steps, first=0, scale=1.0):
    for step in range(first, first + steps):
        for group in opt.param_groups:
            group["lr"] = 0.02 / (1 + step)
        backward(model, step, scale)
        opt.step()
        opt.zero_grad()


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_equal(model, other):
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_static_step_is_the_step(recorded, scaling, dtype):
    options = {"scaling": scaling, "average": 5.0}
    model, opt = optimizer(True, dtype, **options)
    plain, plain_opt = optimizer(False, dtype, **options)
    train(model, opt, 12)
    train(plain, plain_opt, 12)
    assert len(recorded) == 1
    assert_equal(model, plain)
    with opt.averaged(), plain_opt.averaged():
        assert_equal(model, plain)


def test_a_recorded_step_ascends(recorded):
    model, opt = optimizer(True, maximize=True)
    plain, plain_opt = optimizer(False)
    train(model, opt, 6, scale=-1.0)
    train(plain, plain_opt, 6)
    assert len(recorded) == 1
    assert_equal(model, plain)


def test_a_recorded_step_follows_the_momentum_of_its_group(recorded):
    model, opt = optimizer(True)
    plain, plain_opt = optimizer(False)
    for momentum in (0.9, 0.5):
        for each in (opt, plain_opt):
            each.param_groups[0]["betas"] = (momentum, 0.95)
        train(model, opt, 3)
        train(plain, plain_opt, 3)
    assert recorded
    assert_equal(model, plain)


def skipped_steps(model, opt, bad):
    for _ in range(2):
        backward(model, 9)
        model[0].weight.grad[0, 0, 0, 0] = bad
        opt.step()
        opt.zero_grad()
    return opt.diagnostics.skipped_steps


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_change_nothing(recorded, scaling, bad):
    model, opt = optimizer(True, scaling=scaling, average=5.0)
    plain, plain_opt = optimizer(False, scaling=scaling, average=5.0)
    train(model, opt, 23)  # neither statistics nor a refresh are due at the next two
    train(plain, plain_opt, 23)
    before, saved = parameters(model), saved_state(opt)
    with pytest.warns(KfcWarning, match="a gradient is not finite"):
        assert skipped_steps(model, opt, bad) == 2
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, new)
    assert opt.diagnostics.steps == 23
    after = saved_state(opt)
    for part in ("blocks", "generic"):
        for name, entry in saved[part].items():
            for key, value in entry.items():
                assert torch.equal(value, after[part][name][key]), (name, key)
    for name, value in saved["average"].items():
        assert torch.equal(value, after["average"][name])
    train(model, opt, 4, first=23)
    train(plain, plain_opt, 4, first=23)
    assert_equal(model, plain)


def test_a_refresh_counts_what_was_skipped_and_warns_once(recorded):
    model, opt = optimizer(True, refresh_every=4)
    train(model, opt, 17)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(8):
            backward(model, seed, scale=float("nan"))
            opt.step()
            opt.zero_grad()
    texts = [str(w.message) for w in caught]
    assert sum("a gradient is not finite" in text for text in texts) == 1
    # Statistics of such a loss are not finite either: said once for each block.
    assert sum("a statistic that is not finite" in text for text in texts) == len(opt.factors)
    assert len(texts) == 1 + len(opt.factors)
    assert opt.diagnostics.skipped_steps == 8
    assert opt.diagnostics.steps == 17
    assert opt.diagnostics.missed_statistics == 0


def test_steps_without_some_gradients_run_in_between(recorded):
    model, opt = optimizer(True)
    plain, plain_opt = optimizer(False)
    for step in range(9):
        for each, own in ((model, opt), (plain, plain_opt)):
            backward(each, step)
            if step % 3 == 1:
                each[3].weight.grad = None
            own.step()
            own.zero_grad()
    assert len(recorded) == 1
    assert_equal(model, plain)


def test_parameters_that_never_have_a_gradient_are_left_out_of_the_graph(recorded, monkeypatch):
    """As the unused pooler of a pretrained model: the step waits for nothing all the same."""

    def with_unused(graph):
        net = network(torch.float64)
        net.append(nn.Identity())
        net[-1].unused = nn.Linear(3, 3, dtype=torch.float64)
        model = kfc_fx.compile(net)
        return model, kfc(model, lr=0.02, fisher="empirical", cuda_graph=graph)

    model, opt = with_unused(True)
    plain, plain_opt = with_unused(False)
    train(plain, plain_opt, 5)
    monkeypatch.setattr(
        "kfc_fx.optim.model_step.all_finite", lambda _: pytest.fail("asked the host")
    )
    train(model, opt, 5)
    assert len(recorded) == 1
    assert_equal(model, plain)
    opt.diagnostics.steps = 23  # neither statistics nor a refresh are due
    collector_of(model).arm(False)
    backward(model, 9, scale=float("nan"))
    before = parameters(model)
    opt.step()
    with pytest.warns(KfcWarning, match="a gradient is not finite"):
        assert opt.diagnostics.skipped_steps == 1
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, new)


def test_parameters_that_moved_elsewhere_are_recorded_anew(recorded):
    model, opt = optimizer(True)
    plain, plain_opt = optimizer(False)
    for each, own in ((model, opt), (plain, plain_opt)):
        train(each, own, 4)
        weight = each[0].weight
        weight.data = weight.data.clone()
        train(each, own, 4, first=4)
    assert len(recorded) == 2
    assert_equal(model, plain)


def test_rates_by_group_and_saved_states_carry_over(recorded):
    def grouped(graph):
        model = kfc_fx.compile(network(torch.float64))
        layers = model
        groups = [
            {"params": layers[0].parameters(), "lr": 0.05},
            {"params": [*layers[1].parameters(), *layers[3].parameters()], "weight_decay": 0.1},
            {"params": [*layers[7].parameters(), *layers[8].parameters()], "lr": 0.01},
        ]
        return model, kfc(
            model, groups, lr=0.02, cuda_graph=graph, fisher="empirical", generic="sgd"
        )

    def run(model, opt, steps):
        for step in steps:
            backward(model, step)
            opt.step()
            opt.zero_grad()

    (model, opt), (plain, plain_opt) = grouped(True), grouped(False)
    run(model, opt, range(6))
    run(plain, plain_opt, range(6))
    assert_equal(model, plain)
    resumed, resumed_opt = grouped(True)
    resumed.load_state_dict(model.state_dict())
    resumed_opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    run(resumed, resumed_opt, range(6, 9))
    run(plain, plain_opt, range(6, 9))
    assert_equal(resumed, plain)


@pytest.mark.parametrize("master_weights", [False, True])
def test_half_precision(recorded, master_weights):
    model, opt = optimizer(True, torch.bfloat16, master_weights=master_weights)
    plain, plain_opt = optimizer(False, torch.bfloat16, master_weights=master_weights)
    train(model, opt, 6)
    train(plain, plain_opt, 6)
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=1e-3)


def test_a_stale_backward_pass_is_noticed(recorded):
    model, opt = optimizer(True)
    train(model, opt, 2)
    backward(model, 2)
    loss = model(torch.randn(8, 2, 6, 6, dtype=torch.float64)).sum()
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_step_that_cannot_be_recorded_goes_on_and_says_so(recorded, monkeypatch):
    def refuse(body, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(static_step, "record", refuse)
    model, opt = optimizer(None)
    plain, plain_opt = optimizer(False)
    with pytest.warns(KfcWarning, match="cannot be captured in a CUDA graph"):
        train(model, opt, 4)
    train(plain, plain_opt, 4)
    assert_equal(model, plain)


def test_what_cannot_be_a_graph_is_refused():
    model, opt = optimizer(True)
    backward(model, 0)
    with pytest.raises(OptionError, match=r"cuda_graph=True: the parameters are on cpu"):
        opt.step()
