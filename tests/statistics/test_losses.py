"""The likelihood that each loss tells, and factors at its scale."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import kfc_fx
from kfc_fx.statistics.likelihoods.evidence import find_likelihood
from kfc_fx.tools.losses.case import LossCase
from kfc_fx.tools.losses.check import check_loss
from kfc_fx.tools.losses.models import found_likelihood, model_losses
from kfc_fx.tools.losses.table import loss_cases

CASES = {case.name: case for case in loss_cases()}
SOFT = (0.97, 1.03)
"""Bounds of the scale where targets are soft, or there is a penalty."""


@pytest.mark.parametrize("name", CASES)
def test_a_loss_tells_its_likelihood_and_the_scale_of_its_factors(name: str):
    case = CASES[name]
    found = check_loss(case)
    assert found.decision == case.decision
    assert bool(found.doubt) == case.doubtful
    assert found.direction < 1e-9
    if case.examples is not None:
        assert found.scale is not None
        bounds = (1 - 1e-6, 1 + 1e-6) if case.exact == "scale" else SOFT
        assert bounds[0] < found.scale < bounds[1]


@pytest.mark.parametrize("scale", [2.0**16, 0.25])
@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if case.exact == "scale" and case.examples]
)
def test_a_gradient_scaler_changes_neither(name: str, scale: float):
    case = CASES[name]
    scaled = LossCase(**vars(case) | {"loss": lambda z: scale * case.loss(z)})
    assert check_loss(scaled).decision == case.decision
    assert check_loss(scaled).scale == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if not case.doubtful and case.exact != "soft"]
)
def test_the_likelihood_is_found_in_lower_precision_and_of_any_spread(name, spread, dtype):
    """Of what autocast gives: the output in half precision, the loss in single precision."""
    if dtype == torch.bfloat16 and "pos_weight" in name and spread < 1:
        pytest.skip("five units of rounding tell no two weights apart")
    case = CASES[name]
    torch.manual_seed(0)
    z = case.output(spread * torch.randn(case.shape)).to(dtype).requires_grad_()
    case.loss(z.double()).backward()
    found = find_likelihood(z.detach().float(), z.grad, case.shape[0])
    assert found is not None
    assert repr(found.likelihood) == case.decision


@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(32,), (64, 1), (32, 10), (16, 500), (8, 3, 6, 6)]),
    spread=st.floats(0.05, 5),
    error=st.floats(0.05, 3),
    kind=st.sampled_from(["mse_loss", "l1_loss", "smooth_l1_loss"]),
)
def test_a_regression_is_taken_for_nothing_else(seed, shape, spread, error, kind):
    """Whatever its outputs are like, and however near its targets."""
    generator = torch.Generator().manual_seed(seed)
    z = (spread * torch.randn(shape, generator=generator)).requires_grad_()
    y = z.detach() + error * torch.randn(shape, generator=generator)
    getattr(F, kind)(z, y).backward()
    found = find_likelihood(z.detach(), z.grad, shape[0])
    assert found is not None
    assert isinstance(found.likelihood, kfc_fx.Gaussian)


@pytest.mark.parametrize("library", ["torchvision", "transformers", "diffusers"])
def test_models_of_other_libraries_tell_theirs(library: str, subtests):
    for needed in (library, *(["diffusers"] if library == "transformers" else [])):
        pytest.importorskip(needed, reason=f"{needed} is not installed: pip install kfc_fx[zoo]")
    for case in model_losses(library):
        with subtests.test(case.name):
            assert found_likelihood(case) == case.decision


@pytest.mark.parametrize("shape", [(1, 2), (1, 3), (2,), (3,), (4,), (2, 2)])
def test_a_few_residuals_are_no_classes(shape):
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        z = torch.randn(shape, generator=generator).requires_grad_()
        F.mse_loss(z, torch.randn(shape, generator=generator)).backward()
        found = find_likelihood(z.detach(), z.grad, shape[0])
        assert isinstance(found.likelihood, kfc_fx.Gaussian)


@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 1)])
def test_numbers_that_are_too_few_are_told(shape):
    """One binary label looks like a squared error of one number."""
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    F.binary_cross_entropy_with_logits(z, torch.ones(shape)).backward()
    found = find_likelihood(z.detach(), z.grad, shape[0])
    assert "so few numbers do not tell" in found.doubt
