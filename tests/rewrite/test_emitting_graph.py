"""An emitting graph says by name what it takes and returns."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx
from kfc_fx.compilation.captured_graph import GraphBinding
from kfc_fx.plan.forms import FactorForms, factor_forms, statistic_shapes
from kfc_fx.rewrite.emitting_graph import EmittingGraph, counts_by_span, emitting_blocks

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


class Shared(nn.Module):
    """A layer that is used twice around another one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.twice, self.once = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.twice(self.once(self.twice(x).tanh()).tanh())


def captured() -> tuple[nn.Module, GraphBinding]:
    compiled = kfc_fx.compile(Shared())
    compiled.kfc.trace(X)
    return compiled, compiled.kfc.graphs[0].first


def inputs_of(compiled: nn.Module, binding: GraphBinding) -> list[torch.Tensor]:
    """What the graph takes: the examples, and the parameters under their names."""
    placeholders = [n.name for n in binding.canonical.graph.nodes if n.op == "placeholder"]
    named = dict(compiled.named_parameters())
    return [named[binding.parameters[n]] if n in binding.parameters else X for n in placeholders]


def built(binding: GraphBinding, plan: kfc_fx.CurvaturePlan, **forms: FactorForms) -> EmittingGraph:
    emitters = {b.weight: (b, forms.get(b.name, factor_forms(b))) for b in plan.blocks}
    found = binding.emitting_for(emitters, "eager")
    assert found is not None
    return found


def probes_of(graph: EmittingGraph) -> list[torch.Tensor]:
    shapes = [s for emitter in graph.probed for s in statistic_shapes(*emitter).values()]
    return [torch.zeros(()).expand(shape).requires_grad_() for shape in shapes]


def test_it_names_what_it_takes_and_returns():
    compiled, binding = captured()
    graph = built(binding, compiled.kfc.plan, twice=FactorForms(output="absent"))
    twice, once = compiled.kfc.plan.blocks
    assert (twice.name, once.name) == ("twice", "once")
    assert graph.probed == ((once, FactorForms()),)
    assert graph.counted == ((twice, (0, 1)), (once, (0, 1)), (twice, (0, 1)))
    assert graph.alone == ((twice, FactorForms(output="absent")),) * 2
    assert graph.emitters == (*graph.probed, graph.alone[0])
    emitted = graph(inputs_of(compiled, binding), probes_of(graph))
    torch.testing.assert_close(emitted.outputs[0], compiled._call_impl(X))
    assert emitted.rows.blocks == [twice, once, twice]
    assert emitted.rows.rows == [6, 6, 6]
    (first, own), (second, _) = emitted.inputs
    assert first == second == twice
    ones = F.pad(X, (0, 1), value=1.0)
    torch.testing.assert_close(own["omega"], (ones.T @ ones)[None])


def test_there_is_one_for_what_emits():
    compiled, binding = captured()
    plan = compiled.kfc.plan
    assert built(binding, plan) is built(binding, plan)
    assert built(binding, plan) is not built(binding, plan, once=FactorForms(output="absent"))
    assert binding.emitting_for({}, "eager") is None


def test_blocks_emit_in_the_order_of_their_first_sites():
    compiled, binding = captured()
    once = compiled.kfc.plan.block("once")
    emitters = {b.weight: (b, FactorForms()) for b in reversed(compiled.kfc.plan.blocks)}
    sites = binding.uses.sites
    assert [b.name for b, _ in emitting_blocks(sites, emitters)] == ["twice", "once"]
    assert emitting_blocks(sites[1:2], emitters) == ((once, FactorForms()),)
    assert emitting_blocks(sites, {}) == ()


def test_rows_that_differ_from_group_to_group_are_counted_by_group():
    compiled, _ = captured()
    twice, once = compiled.kfc.plan.blocks
    counts = counts_by_span([(twice, (0, 1)), (once, (1, 3))], [5, torch.tensor([2, 7])])
    assert counts.blocks == [twice, once, once]
    assert counts.spans == [(0, 1), (1, 2), (2, 3)]
    assert counts.rows == [5, 2, 7]
    with pytest.raises(ValueError, match="shorter"):
        counts_by_span([(twice, (0, 1))], [])
