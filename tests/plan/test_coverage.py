"""The plan accounts for every use of every parameter, and refuses a plan that does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx
from kfc_fx.plan.coverage import build_plan, prove_coverage


class Uses(nn.Module):
    """A weight that is also used outside its layer, one reparametrised, one never used."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.penalised = nn.Linear(18, 4)
        self.scaled = nn.Linear(4, 4)
        self.unused = nn.Linear(2, 2)
        self.frozen = nn.Linear(4, 3)
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.penalised(self.conv(x).flatten(1)) + self.penalised.weight.mean()
        return self.frozen(F.linear(x, self.scaled.weight / 2, self.scaled.bias))


def traced(**options) -> nn.Module:
    torch.manual_seed(0)
    compiled = kfc_fx.compile(Uses(), **options)
    compiled.kfc.trace(torch.randn(2, 1, 5, 5))
    return compiled


def test_every_parameter_is_in_a_block_or_has_a_reason():
    plan = traced().kfc.plan
    reasons = {generic.name: generic.reason for generic in plan.generic}
    assert [block.name for block in plan.blocks] == ["conv"]
    assert "also used by node" in reasons["penalised.weight"]
    assert "truediv" in reasons["scaled.weight"]
    assert reasons["unused.weight"] == "not used in any captured graph"
    assert "without a block" in reasons["penalised.bias"]
    assert plan.frozen == ("frozen.weight", "frozen.bias")
    assert "generic  scaled.weight [4, 4]" in str(plan)
    with pytest.raises(kfc_fx.KfcError, match="blocks of this plan: 'conv'"):
        plan.block("nonsense")


def test_strict_names_the_use_that_was_not_matched():
    with pytest.raises(
        kfc_fx.CoverageError, match=r"strict: no curvature block for penalised\.weight"
    ):
        traced(strict=True)


def test_a_corrupted_matcher_is_refused():
    compiled = traced()
    uses = compiled.kfc.graphs[0].uses
    parameters = compiled.kfc._account._parameter_specs()
    forgetful = replace(uses, unmatched=())
    plan = build_plan(parameters, [forgetful])
    with pytest.raises(kfc_fx.CoverageError, match="statistics miss its use"):
        prove_coverage(plan, parameters, [uses])
    with pytest.raises(kfc_fx.CoverageError, match="stands 0 times"):
        prove_coverage(replace(compiled.kfc.plan, generic=()), parameters, [uses])


def test_a_pass_that_raises_names_the_passes_before_it():
    from kfc_fx.capture.graph_passes import run_passes

    def broken(module):
        raise ValueError("corrupted")

    module = traced().kfc.graphs[0].stage("captured")
    with pytest.raises(
        kfc_fx.KfcError, match=r"'second' failed: ValueError: corrupted.*before it: first"
    ):
        run_passes(module, [("first", lambda m: False), ("second", broken)])


def test_passes_are_idempotent():
    from kfc_fx.capture.canonicalise import canonicalise_calls
    from kfc_fx.capture.graph import copy_graph

    canonical = copy_graph(traced().kfc.graphs[0].stage("canonical"))
    assert not canonicalise_calls(canonical)


def test_a_factor_beyond_the_limit_is_generic_with_that_reason():
    net = nn.Sequential(nn.Conv2d(9000, 2, 1), nn.Flatten(), nn.Linear(2, 9000))
    plan = kfc_fx.compile(net).kfc.trace(torch.randn(2, 9000, 1, 1))
    assert [block.name for block in plan.blocks] == ["2"]  # its Γ is diagonal
    assert plan.generic[0].reason == "Ω has side 9000, which exceeds the limit of 8192"
