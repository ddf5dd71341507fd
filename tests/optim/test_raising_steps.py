"""Steps that raise: nothing half done, and the step can be taken again."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx
from tests.models import (
    LABELS,
    assert_equal,
    assert_same_state,
    backward,
    make,
    parameters,
    saved_state,
    train,
)

SCALINGS = ["adam", "spectral", "eigen", "inverse"]


def step_that_raises(opt: kfc_fx.KFC, failing: str) -> None:
    """A step in which one of the generated functions raises."""
    functions = opt._engine.program.functions
    own = functions[failing]

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    functions[failing] = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        opt.step()
    functions[failing] = own


@pytest.mark.parametrize("failing", ["accumulate", "refresh", "apply"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_step_that_raised_can_be_taken_again_as_if_nothing_had_been(scaling, failing):
    options = {"every": 1, "refresh_every": 1, "average": 3.0, "weight_decay": 0.1}
    compiled, opt = make(scaling=scaling, **options)
    reference, plain = make(scaling=scaling, **options)
    train(compiled, opt, 2)
    train(reference, plain, 2)
    backward(compiled)
    backward(reference)
    before, saved = parameters(compiled), saved_state(opt)
    step_that_raises(opt, failing)
    assert_equal(parameters(compiled), before)
    assert_same_state(saved_state(opt), saved)
    opt.step()
    plain.step()
    assert_equal(parameters(compiled), parameters(reference))
    assert_same_state(saved_state(opt), saved_state(plain))


@pytest.mark.parametrize("failing", ["refresh", "apply"])
def test_a_first_step_that_raised_can_be_taken_again(failing):
    compiled, opt = make()
    reference, plain = make()
    backward(compiled)
    backward(reference)
    step_that_raises(opt, failing)
    opt.step()
    plain.step()
    assert_equal(parameters(compiled), parameters(reference))
    assert_same_state(saved_state(opt), saved_state(plain))


def test_a_model_without_a_forward_mode_derivative_is_told_of_the_other_clip():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return g * 2

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 5)

        def forward(self, x):
            return Opaque.apply(self.layer(x))

    compiled, opt = make(Net(), scaling="inverse", clip_by="exact")
    F.cross_entropy(compiled(torch.randn(6, 4)), LABELS[:6]).backward()
    before = parameters(compiled)
    with pytest.raises(kfc_fx.KfcError, match="clip_by='factors'"):
        opt.step()
    assert_equal(parameters(compiled), before)
    assert opt.diagnostics.steps == 0


def test_a_closure_that_raises_leaves_everything_as_it_was():
    compiled, opt = make()
    train(compiled, opt, 2)
    before, saved = parameters(compiled), saved_state(opt)

    def closure():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        opt.step(closure)
    assert_equal(parameters(compiled), before)
    assert_same_state(saved_state(opt), saved)
