"""Statistics that are due and do not come: an error at first, later a warning."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import kfc_fx
from tests.models import (
    IMAGES,
    LABELS,
    backward,
    collector_of,
    conv_network,
    make,
    past,
    train,
)

SCALINGS = ["adam", "spectral", "eigen", "inverse"]


def test_a_forward_pass_without_gradients_is_an_error_at_the_step():
    compiled, opt = make()
    with torch.no_grad():
        F.cross_entropy(compiled(IMAGES), LABELS)
    with pytest.raises(kfc_fx.StepError, match="output of the compiled model"):
        opt.step()


def test_a_forward_pass_through_the_original_before_any_capture_is_an_error():
    compiled, opt = make()
    backward(past(compiled))
    with pytest.raises(kfc_fx.KfcError, match=r"model\.kfc\.trace.*call the model"):
        opt.step()


def test_a_forward_pass_around_the_compiled_model_is_an_error():
    compiled, opt = make()
    F.cross_entropy(compiled(IMAGES), LABELS)  # captured, but the loss comes from elsewhere
    F.cross_entropy(past(compiled)(IMAGES), LABELS).backward()
    with pytest.raises(kfc_fx.StatisticsError, match="call the model with gradients enabled"):
        opt.step()


def test_an_optimizer_made_after_the_forward_pass_says_so():
    compiled = kfc_fx.compile(conv_network())
    backward(compiled)
    opt = kfc_fx.KFC(compiled, lr=0.1)
    with pytest.raises(kfc_fx.StatisticsError, match="after KFC was made"):
        opt.step()


def test_statistics_missed_later_are_counted_and_warned_of():
    compiled, opt = make(every=1)
    train(compiled, opt, 2)
    F.cross_entropy(past(compiled)(IMAGES), LABELS).backward()
    with pytest.warns(kfc_fx.KfcWarning, match="due at step 2"):
        opt.step()
    assert opt.diagnostics.missed_statistics == 1


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_clears_gradients_and_their_statistics(set_to_none):
    compiled, opt = make()
    F.cross_entropy(compiled(IMAGES), LABELS).backward()
    opt.zero_grad(set_to_none)
    assert not collector_of(compiled).sums.blocks
    assert all(p.grad is None or not p.grad.any() for p in compiled.parameters())
