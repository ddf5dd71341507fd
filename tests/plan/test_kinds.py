"""The table of layer kinds: complete, and all that a new kind needs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from kfc_fx.plan import layer_calls
from kfc_fx.plan.kinds import KINDS, LINEAR, Sides
from kfc_fx.plan.layer_calls import LayerCall
from kfc_fx.statistics.rules.matrices import LinearRule, MatrixRule
from kfc_fx.statistics.rules.table import RULES, rule
from tests.models import first_factors

CONVOLUTION = {
    "kernel_size": (3,),
    "stride": (1,),
    "padding": ((0, 0),),
    "dilation": (1,),
    "groups": 1,
}
OPTIONS = {
    "linear": {"bias": True},
    "batched_linear": {
        "bias": True,
        "entries": (0, 2, 2),
        "input_axes": (-3, -1),
        "output_axes": (-3, -1),
    },
    "embedding": {"tokens": 5},
    "scale_shift": {"norm": "layer", "shape": (4,), "bias": True},
    **{name: {**CONVOLUTION, "bias": True} for name in KINDS if name.startswith("conv")},
    **{name: CONVOLUTION for name in KINDS if name.startswith("conv_transpose")},
}


def test_every_kind_has_a_rule():
    assert set(RULES) == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_matrices_have_input_statistics_of_their_own(name):
    """A scaling that takes steps by a matrix needs no Γ, so that Ω must come without a cotangent."""
    assert isinstance(rule(name, OPTIONS[name]), MatrixRule) == KINDS[name].is_matrix


@pytest.mark.parametrize(
    ("kind", "shape", "inputs_first", "groups", "expected"),
    [
        ("linear", (6, 4), False, 1, Sides(1, 6, 4)),
        ("linear", (4, 6), True, 1, Sides(1, 6, 4)),
        ("linear", (6, 4), False, 3, Sides(3, 2, 4)),
        ("conv2d", (6, 2, 3, 5), False, 2, Sides(2, 3, 2, 15)),
        ("conv_transpose2d", (6, 2, 3, 5), True, 2, Sides(2, 30, 3)),
        ("batched_linear", (7, 6, 4), False, 1, Sides(7, 6, 4)),
        ("batched_linear", (7, 4, 6), True, 1, Sides(7, 6, 4)),
        ("embedding", (9, 4), True, 1, Sides(1, 4, 9)),
        ("scale_shift", (3, 5), False, 1, Sides(15, 1, 1)),
    ],
)
def test_sides(kind, shape, inputs_first, groups, expected):
    assert KINDS[kind].sides(shape, inputs_first, groups) == expected


# -- a kind that is made of an entry, a rule and a matcher ------------------------------------


@torch.compiler.allow_in_graph
def doubled_linear(x: Tensor, weight: Tensor) -> Tensor:
    """A function that the library does not know."""
    return F.linear(2 * x, weight)


class DoubledLinearRule(LinearRule):
    """Ω of twice the input."""

    def input_statistics(self, part, x, *_):
        return super().input_statistics(part, 2 * x)


def match_doubled_linear(node: fx.Node) -> LayerCall:
    x, weight = node.args
    return LayerCall("doubled_linear", x, weight, positions=frozenset((1,)))


class Doubled(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(5, 4) / 2)
        self.head = nn.Linear(5, 3)
        self.function = function

    def forward(self, x):
        return self.head(self.function(x, self.weight).tanh())


def written_out(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x + x, weight)


@pytest.mark.parametrize("scaling", ["adam", "spectral"])
def test_a_kind_is_an_entry_a_rule_and_a_matcher(monkeypatch, scaling):
    monkeypatch.setitem(KINDS, "doubled_linear", LINEAR)
    monkeypatch.setitem(RULES, "doubled_linear", DoubledLinearRule)
    monkeypatch.setitem(layer_calls._CALLS, doubled_linear, match_doubled_linear)
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    expected_model, expected = first_factors(Doubled(written_out), x, y, scaling=scaling)
    compiled, factors = first_factors(Doubled(doubled_linear), x, y, scaling=scaling)
    assert [block.kind for block in compiled.kfc.plan.blocks] == ["doubled_linear", "linear"]
    assert [block.kind for block in expected_model.kfc.plan.blocks] == ["linear", "linear"]
    assert set(factors) == set(expected) == {"", "head"}
    for name, own in factors.items():
        torch.testing.assert_close(own.omega, expected[name].omega)
        if scaling == "adam":
            torch.testing.assert_close(own.gamma, expected[name].gamma)
