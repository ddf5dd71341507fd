"""Factors of one side that are decomposed together, as on GPUs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx
from kfc_fx.codegen.pieces import decompositions
from kfc_fx.engine.screening import screen
from kfc_fx.optim import update_spec
from kfc_fx.statistics.sums import Sums
from tests.options import kfc

SCALINGS = ("adam", "spectral", "eigen")


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 1, bias=False), nn.GELU(), nn.Conv2d(8, 4, 3), nn.GELU(),
        nn.Conv2d(4, 8, 3, groups=2), nn.GELU(), nn.Flatten(), nn.Linear(32, 8, bias=False),
        nn.GELU(), nn.Linear(8, 8, bias=False), nn.GELU(), nn.Linear(8, 5, bias=False),
    ).double()  # fmt: skip


def trained(scaling, **options):
    model = kfc_fx.compile(network())
    opt = kfc(model, lr=0.02, scaling=scaling, fisher="empirical", **options)
    for step in range(12):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(96, 4, 6, 6, generator=generator, dtype=torch.float64)
        y = torch.randint(5, (96,), generator=generator)
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    return opt, torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture(params=[2, 128], ids=["iterated", "decomposed"])
def wide_from(request, monkeypatch):
    monkeypatch.setattr(update_spec, "ORTHOGONAL_ITERATION_FROM", request.param)


@pytest.mark.parametrize("input_factor", ["dense", "separable"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_together_they_are_what_they_are_alone(scaling, input_factor, wide_from, monkeypatch):
    alone, expected = trained(scaling, input_factor=input_factor)
    monkeypatch.setattr(decompositions, "DEVICES", ("cpu",))
    together, found = trained(scaling, input_factor=input_factor)
    assert "factors of side" not in refresh_of(alone)
    assert "factors of side 8" in refresh_of(together)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_wide_factors_are_decomposed_by_stack(monkeypatch):
    monkeypatch.setattr(decompositions, "DEVICES", ("cpu",))
    monkeypatch.setattr(decompositions, "WIDEST", 4)
    opt, _ = trained("adam")
    assert "factors of side 4" in refresh_of(opt)
    assert "factors of side 8" not in refresh_of(opt)


def test_failures_are_told_of_the_block_that_failed(monkeypatch):
    monkeypatch.setattr(decompositions, "DEVICES", ("cpu",))
    opt, _ = trained("adam")
    engine = opt._engine
    key = next(stack.key for stack in engine.spec.stacks if "9" in stack.spans)
    engine.state[key]["eigenvalues_gamma"].fill_(float("nan"))
    engine.accumulate(screen(Sums(), engine.spec.stacks, lambda _: 0.5))
    engine.started = False
    assert engine.refresh(opt._models[0]._option_numbers(engine)) == ["9"]


def refresh_of(opt):
    source = opt.update_source
    begin = source.index("def refresh(")
    return source[begin : source.index("\ndef apply(")]
