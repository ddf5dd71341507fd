"""Counters and measures of a run."""

from __future__ import annotations

import pytest
import torch

from tests.models import (
    make,
    parameters,
    train,
)

SCALINGS = ["adam", "spectral", "eigen", "inverse"]


@pytest.mark.parametrize("scaling", ["adam", "spectral", "eigen", "inverse"])
def test_the_largest_step_says_that_a_rate_is_too_high(scaling):
    compiled, opt = make(scaling=scaling, clip=None)
    assert opt.diagnostics.largest_step is None

    def step() -> float:
        before = torch.cat([p.flatten() for p in parameters(compiled)])
        train(compiled, opt, 1)
        after = torch.cat([p.flatten() for p in parameters(compiled)])
        return float((after - before).norm() / before.norm())

    taken = [step() for _ in range(4)]
    assert opt.diagnostics.largest_step == pytest.approx(max(taken), rel=1e-4)
    opt.param_groups[0]["lr"] = 100.0
    taken.append(step())
    opt.param_groups[0]["lr"] = 0.0
    step()
    assert opt.diagnostics.largest_step == pytest.approx(taken[-1], rel=1e-4)
    assert opt.diagnostics.largest_step > 10
