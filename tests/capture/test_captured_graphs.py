"""How many graphs are captured, what they are shared by, and what can be seen of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx
from tests.models import (
    IMAGES,
    LABELS,
    TokenNet,
    assert_equal_state,
    backward,
    collector_of,
    count_calls_of_emitting_graphs,
    count_compiled_emitting_graphs,
    make,
    token_network,
)
from tests.options import kfc

BLOCKS = {"conv", "norm", "grouped", "tokens", "head"}


def test_trace_captures_without_a_trace_in_the_model(monkeypatch):
    emitted = count_calls_of_emitting_graphs(monkeypatch)
    net, reference = token_network(), token_network()
    compiled, _ = make(net)
    state = torch.get_rng_state()
    plan = compiled.kfc.trace(x=IMAGES)
    assert torch.equal(state, torch.get_rng_state())
    assert_equal_state(net, reference)
    assert all(p.grad is None for p in net.parameters())
    assert not emitted
    assert not collector_of(compiled).sums.blocks
    assert plan is compiled.kfc.plan
    assert {block.name for block in plan.blocks} == BLOCKS
    assert plan.generic == ()
    assert len(compiled.kfc.graphs) == 1


def test_nothing_captured_is_an_error_that_says_so():
    with pytest.raises(kfc_fx.CaptureError, match=r"model\.kfc\.trace"):
        kfc_fx.compile(token_network()).kfc.plan  # noqa: B018


def test_every_stage_can_be_seen_as_code():
    compiled = kfc_fx.compile(token_network())
    compiled.kfc.trace(IMAGES)
    (graph,) = compiled.kfc.graphs
    names = [stage.name for stage in graph.stages]
    assert names == ["captured", "canonical", "probes", "emissions", "emitting"]
    assert all("def forward(self" in stage.code for stage in graph.stages)
    assert "probe_" not in graph.stage("canonical").code
    assert "probe_conv" in graph.stage("probes").code
    assert graph.stage("probes").code.count("emit") == 0
    assert graph.stage("emissions").code.count("_emission_emit(") == 5
    assert "numel" not in graph.stage("emissions").code
    assert graph.stage("emitting").code.count("numel()") == 5
    assert "captured, canonical" in repr(graph)
    with pytest.raises(KeyError, match="stages: captured, canonical"):
        graph.stage("nonsense")


def test_looking_at_graphs_builds_and_compiles_none(monkeypatch):
    compiled_functions = count_compiled_emitting_graphs(monkeypatch)
    compiled = kfc_fx.compile(token_network())
    compiled(IMAGES)
    (graph,) = compiled.kfc.graphs
    assert [stage.name for stage in graph.stages] == ["captured", "canonical"]
    repr(graph), repr(compiled), graph.uses
    assert not compiled_functions
    assert not graph.first.emitting
    (bound,) = compiled.kfc.emitting_graphs()
    assert [stage.name for stage in bound.stages][2:] == ["probes", "emissions", "emitting"]
    assert compiled.kfc.emitting_graphs()[0].stages == bound.stages == tuple(graph.stages)
    assert len(graph.first.emitting) == 1
    assert not compiled_functions


def test_stages_are_of_the_emitting_graph_that_was_built_last():
    """Not of the one that ran last, or was looked at."""
    compiled, opt = make(token_network(), every=1)
    backward(compiled)
    opt.step()
    (graph,) = compiled.kfc.graphs
    first = list(graph.stages)
    spectral = kfc_fx.KFC(compiled, lr=0.01, scaling="spectral")
    assert graph.stages == first
    (asked,) = compiled.kfc.emitting_graphs()
    assert asked.stages[-1].name == "input statistics"
    assert graph.stages == list(asked.stages)
    adam = kfc_fx.KFC(compiled, lr=0.01)
    (asked,) = compiled.kfc.emitting_graphs()
    assert list(asked.stages) == first
    assert graph.stages[-1].name == "input statistics"
    assert len(graph.first.emitting) == 2
    assert spectral.options != adam.options


def test_tracing_shares_its_graph_with_training():
    compiled, opt = make(token_network(), every=1)
    images = IMAGES.clone()  # fresh: dynamo guards whether an input's batch was marked dynamic
    compiled.kfc.trace(images)
    for size in (6, 4):
        backward(compiled, images[:size], LABELS[:size])
        opt.step()
        opt.zero_grad()
    assert len(compiled.kfc.graphs) == 1


def test_batch_sizes_share_one_graph():
    compiled, opt = make(token_network(), every=2)
    for size in (6, 4, 12, 3, 5, 7):
        backward(compiled, IMAGES[:size], LABELS[:size])
        opt.step()
        opt.zero_grad()
    assert len(compiled.kfc.graphs) == 1


def test_image_sizes_cost_one_more_graph():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, stride=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    )  # fmt: skip
    compiled, opt = make(net, every=1)
    for size, side in ((8, 16), (6, 20), (4, 24), (5, 13), (3, 32)):
        F.cross_entropy(compiled(torch.randn(size, 2, side, side + 1)), LABELS[:size]).backward()
        opt.step()
        opt.zero_grad()
    assert len(compiled.kfc.graphs) == 2


def test_a_batch_of_one_costs_at_most_one_more_graph():
    compiled, opt = make(token_network().eval(), every=1)
    for size in (1, 6, 1, 4, 3):
        backward(compiled, IMAGES[:size], LABELS[:size])
        opt.step()
        opt.zero_grad()
    assert len(compiled.kfc.graphs) <= 2


def test_many_models_of_one_class_do_not_use_up_each_others_recompiles():
    kept = []
    for _ in range(12):  # the recompile limit is 8
        torch.manual_seed(0)
        compiled = kfc_fx.compile(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 5)))
        kept.append((compiled, kfc(compiled, lr=0.1, every=1)))
    x = torch.randn(6, 4)
    for _ in range(2):
        for compiled, opt in kept:
            backward(compiled, x, LABELS[:6])
            opt.step()
            opt.zero_grad()
    for compiled, opt in kept:
        assert len(compiled.kfc.graphs) == 1
        assert opt.diagnostics.statistics_steps == 2


class Broken(TokenNet):
    def forward(self, x):
        x = self.norm(self.conv(x))
        torch._dynamo.graph_break()
        return self.head(self.tokens(x.flatten(2).transpose(1, 2))).mean(1)


def test_statistics_survive_a_graph_break():
    torch.manual_seed(0)
    compiled, opt = make(Broken())
    reference = copy.deepcopy(compiled)
    assert torch.equal(backward(compiled), backward(reference))
    for name in ("conv", "tokens", "head"):
        own, other = compiled.get_submodule(name), reference.get_submodule(name)
        assert torch.equal(own.weight.grad, other.weight.grad)
    opt.step()
    assert len(compiled.kfc.graphs) == 2
    assert set(opt.factors) == {"conv", "norm", "tokens", "head"}
    assert opt.factors["conv"].gamma.trace() > 0
