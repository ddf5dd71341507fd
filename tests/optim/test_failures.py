"""Numbers that are not finite, or of nothing, and decompositions that fail: nothing silent."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx
from tests.models import (
    IMAGES,
    LABELS,
    assert_equal,
    assert_same_state,
    backward,
    collector_of,
    conv_network,
    make,
    parameters,
    saved_state,
    train,
)
from tests.options import kfc

SCALINGS = ["adam", "spectral", "eigen", "inverse"]


def assert_finite(compiled: nn.Module, opt: kfc_fx.KFC) -> None:
    assert all(p.isfinite().all() for p in compiled.parameters())
    for name, factors in opt.factors.items():
        assert factors.omega.isfinite().all(), name
        assert factors.output is None or factors.output.isfinite().all(), name


# -- gradients that are not finite ----


@pytest.mark.parametrize(
    ("scaling", "index", "bad"),
    [("adam", 1, float("nan")), ("adam", 3, -float("inf")), ("inverse", 3, float("nan"))],
    ids=["adam-generic", "adam-block", "inverse-block"],
)
def test_skipped_steps_leave_everything_warn_once_and_training_goes_on(scaling, index, bad):
    compiled, opt = make(scaling=scaling, average=5.0, weight_decay=0.1)
    reference, plain = make(scaling=scaling, average=5.0, weight_decay=0.1)
    train(compiled, opt, 2)
    train(reference, plain, 2)
    before, saved = parameters(compiled), saved_state(opt)
    buffers = copy.deepcopy(dict(compiled.named_buffers()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            backward(compiled)
            compiled[index].weight.grad.view(-1)[0] = bad
            opt.step()
            opt.zero_grad()
    assert [w.category for w in caught] == [kfc_fx.KfcWarning]
    assert "step is skipped" in str(caught[0].message)
    assert opt.diagnostics.skipped_steps == 3
    assert opt.diagnostics.steps == 2
    assert_equal(parameters(compiled), before)
    saved["counters"]["skipped_steps"] = 3
    assert_same_state(saved_state(opt), saved)

    for name, buffer in compiled.named_buffers():
        buffer.copy_(buffers[name])
    train(compiled, opt, 3)
    train(reference, plain, 3)
    assert_equal(parameters(compiled), parameters(reference))


def test_large_finite_gradients_in_half_precision_are_no_reason_to_skip():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 5)).half()
    compiled, opt = make(net, lr=1e-3)
    F.cross_entropy(compiled(torch.randn(6, 4).half()).float(), LABELS[:6]).backward()
    for p in net.parameters():
        p.grad.fill_(30000.0)  # finite, and its sum is not
    opt.step()
    assert opt.diagnostics.skipped_steps == 0
    assert opt.diagnostics.steps == 1


def test_finite_gradients_whose_squares_overflow_are_no_reason_to_skip():
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 5))
    compiled, opt = make(net, lr=1e-3)
    F.cross_entropy(compiled(torch.randn(6, 4)), LABELS[:6]).backward()
    net[0].weight.grad[1, 2] = 1e30
    opt.step()
    assert opt.diagnostics.skipped_steps == 0
    assert opt.diagnostics.steps == 1


# -- statistics that are not finite, or of nothing ----


@pytest.mark.parametrize("scaling", ["adam", "eigen", "inverse"])  # "spectral" has no cotangent
def test_first_statistics_that_are_not_finite_are_dropped_and_later_ones_repair(scaling):
    broken = [True]

    def cotangents(z):
        return torch.full_like(z, float("nan")) if broken[0] else z.softmax(1) - 0.2

    compiled = kfc_fx.compile(conv_network(), likelihood=cotangents)
    opt = kfc(compiled, lr=0.01, scaling=scaling, every=1)
    backward(compiled)
    with pytest.warns(kfc_fx.KfcWarning) as caught:
        opt.step()
    messages = "\n".join(str(w.message) for w in caught)
    for name in ("0", "1", "3", "6"):
        assert f"layer '{name}' has a statistic that is not finite" in messages
    assert opt.diagnostics.dropped_statistics == {"0": 1, "1": 1, "3": 1, "6": 1}
    assert_finite(compiled, opt)
    opt.zero_grad()

    broken[0] = False
    reference = kfc_fx.compile(copy.deepcopy(compiled), likelihood=cotangents)
    first = kfc_fx.KFC(reference, lr=0.01, scaling=scaling)
    backward(compiled)
    opt.step()
    backward(reference)
    first.step()
    assert opt.diagnostics.dropped_statistics == {"0": 1, "1": 1, "3": 1, "6": 1}
    for name, expected in first.factors.items():
        for found, wanted in (
            (opt.factors[name].gamma, expected.gamma),
            (opt.factors[name].omega, expected.omega),
        ):
            torch.testing.assert_close(found, wanted, rtol=0, atol=4e-6 * float(wanted.max()))


@pytest.mark.parametrize("statistic", ["omega", "gamma"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_layer_keeps_its_factors_and_does_not_take_the_others_along(statistic, bad):
    compiled, opt = make(every=1, decay=0.5)
    train(compiled, opt, 1)
    before = opt.factors
    caught = []
    for _ in range(2):
        backward(compiled)
        collector_of(compiled).sums.blocks["3"][statistic][0, 1, 1] = bad
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            opt.step()
        caught += seen
        opt.zero_grad()
    (warning,) = caught  # at the first time
    assert "layer '3' has a statistic that is not finite" in str(warning.message)
    assert opt.diagnostics.dropped_statistics == {"3": 2}
    assert torch.equal(opt.factors["3"].omega, before["3"].omega)
    assert torch.equal(opt.factors["3"].gamma, before["3"].gamma)
    for name in ("0", "6"):
        assert not torch.allclose(opt.factors[name].gamma, before[name].gamma)
    assert_finite(compiled, opt)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_an_empty_batch_does_not_poison_the_factors(scaling):
    net = conv_network()
    net[1] = nn.Identity()  # batch norm refuses an empty batch itself
    compiled, opt = make(net, scaling=scaling, every=1)
    train(compiled, opt, 2)
    F.cross_entropy(compiled(IMAGES[:0]), LABELS[:0], reduction="sum").backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kfc_fx.KfcWarning)
        opt.step()
    opt.zero_grad()
    assert_finite(compiled, opt)
    train(compiled, opt, 1)
    assert_finite(compiled, opt)


# -- decompositions that fail ----


def test_a_basis_that_cannot_be_computed_is_the_identity_until_it_can(monkeypatch):
    compiled, opt = make(every=1, refresh_every=1)
    own = torch.linalg.eigh

    def fail_on_wide(matrix):
        if matrix.shape[-1] == 19:
            raise torch.linalg.LinAlgError("did not converge")
        return own(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fail_on_wide)
    for expected_warnings in (1, 0):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(compiled, opt, 1)
        assert len(caught) == expected_warnings
        for warning in caught:
            assert "layer '0' has a factor that cannot be decomposed" in str(warning.message)
    assert opt.diagnostics.inverse_failures == {"0": 2}
    blocks = saved_state(opt)["blocks"]
    assert torch.equal(blocks["0"]["q_omega"][0], torch.eye(19))
    assert not torch.equal(blocks["3"]["q_omega"][0], torch.eye(37))
    assert_finite(compiled, opt)
    monkeypatch.setattr(torch.linalg, "eigh", own)
    train(compiled, opt, 1)
    assert opt.diagnostics.inverse_failures == {"0": 2}
    assert not torch.equal(saved_state(opt)["blocks"]["0"]["q_omega"][0], torch.eye(19))


def test_a_factor_that_is_not_positive_definite_is_inverted_as_the_identity():
    compiled, opt = make(scaling="inverse", every=1, refresh_every=1)
    train(compiled, opt, 1)
    backward(compiled)
    collector_of(compiled).sums.blocks["3"]["omega"] = -1e9 * torch.eye(37)[None]
    with pytest.warns(kfc_fx.KfcWarning, match="layer '3' .* identity takes its place") as caught:
        opt.step()
    assert len(caught) == 1
    assert opt.diagnostics.inverse_failures == {"3": 1}
    blocks = saved_state(opt)["blocks"]
    assert torch.equal(blocks["3"]["omega_inverse"][0], torch.eye(37))
    assert torch.equal(blocks["3"]["gamma_inverse"][0], torch.eye(4))
    assert not torch.equal(blocks["0"]["omega_inverse"][0], torch.eye(19))
    assert all(p.isfinite().all() for p in compiled.parameters())


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_vanishing_nu_is_not_clipped(zero):
    """A negative zero would make the clip scale NaN, and the parameters with it."""
    compiled, opt = make(conv_network(), scaling="inverse")
    train(compiled, opt, 1)
    F.cross_entropy(compiled(IMAGES), LABELS).backward()
    for p in compiled.parameters():
        p.grad.fill_(zero)
    opt.step()
    assert opt.diagnostics.clip_scale == 1.0
    assert all(p.isfinite().all() for p in compiled.parameters())


def test_an_indefinite_factor_is_inverted_with_more_damping_or_not_at_all():
    from kfc_fx.linalg.damped_inverse import damped_inverses

    omega = torch.stack(
        [torch.eye(3), torch.diag(torch.tensor([1.0, 1.0, -1.0])), -9e9 * torch.eye(3)]
    )
    gamma = torch.eye(2).repeat(3, 1, 1)
    omega_inverse, gamma_inverse, failed = damped_inverses(omega, gamma, 0.01)
    assert failed.tolist() == [False, False, True]
    assert omega_inverse[:2].isfinite().all()
    assert torch.equal(omega_inverse[2], torch.eye(3))
    assert torch.equal(gamma_inverse[2], torch.eye(2))


def test_a_singular_factor_without_damping_is_inverted_with_the_least():
    """Its Cholesky factor ends in a zero, for which LAPACK's inverse raises."""
    from kfc_fx.linalg.damped_inverse import damped_inverses

    omega = torch.stack([torch.full((2, 2), 4.0), torch.eye(2)])
    omega_inverse, _, failed = damped_inverses(omega, torch.eye(2).repeat(2, 1, 1), 0.0)
    assert not failed.any()
    assert omega_inverse.isfinite().all()
    assert torch.equal(omega_inverse[1], torch.eye(2))
