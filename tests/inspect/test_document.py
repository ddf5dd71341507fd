"""The document is valid, complete, and says what the compilation did."""

from __future__ import annotations

import io
from functools import cache

import jsonschema
import pytest
import torch
from rich.console import Console
from torch import nn

import kfc_fx
from kfc_fx.capture.graph_passes import without_passes
from kfc_fx.inspect.document import build_document, load_schema
from kfc_fx.inspect.graph_view import graph_view
from kfc_fx.inspect.inputs import parse_input
from kfc_fx.inspect.inspection import InspectionOptions, inspect_model
from kfc_fx.inspect.page import render
from kfc_fx.inspect.plan_view import plan_view
from tests.inspect.small_networks import (
    INPUTS,
    Broken,
    Checkpointed,
    ConvNet,
    Functional,
    GroupedNet,
    TokenNet,
)


@cache
def inspection(network, capture="dynamo", scaling="adam"):
    torch.manual_seed(0)
    options = InspectionOptions(capture, scaling=scaling)
    return inspect_model(network(), network.__name__, [parse_input(INPUTS[network])], options)


@cache
def document(network, capture="dynamo", scaling="adam"):
    return build_document(inspection(network, capture, scaling))


@pytest.mark.parametrize("capture", ["dynamo", "symbolic"])
@pytest.mark.parametrize("network", INPUTS)
def test_it_fits_its_schema(network, capture):
    validator = jsonschema.Draft202012Validator(load_schema())
    validator.check_schema(load_schema())
    validator.validate(document(network, capture))


@pytest.mark.parametrize("field", ["schema", "blocks", "graphs", "update", "run"])
def test_the_schema_refuses_a_document_without(field):
    incomplete = {key: value for key, value in document(ConvNet).items() if key != field}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(incomplete, load_schema())


@pytest.mark.parametrize("network", INPUTS)
def test_every_number_of_the_model_is_accounted_for(network):
    summary = document(network)["summary"]
    parts = [summary[f"{kind}_parameters"] for kind in ("block", "generic", "frozen")]
    assert sum(parts) == summary["parameters"]
    assert summary["parameters"] == sum(p.numel() for p in network().parameters())


@pytest.mark.parametrize("network", INPUTS)
def test_both_captures_have_the_same_blocks(network):
    by_dynamo, by_tracing = document(network), document(network, "symbolic")
    assert by_dynamo["blocks"] == by_tracing["blocks"]
    assert by_dynamo["update"] == by_tracing["update"]


@pytest.mark.parametrize("capture", ["dynamo", "symbolic"])
@pytest.mark.parametrize("network", INPUTS)
def test_the_code_of_every_stage_runs_and_gives_the_same_as_the_stage(network, capture):
    found = inspection(network, capture)
    (entry,) = document(network, capture)["graphs"]
    for stage, shown in zip(found.graphs[0].stages, entry["stages"], strict=True):
        namespace = {}
        exec(shown["code"], namespace)
        torch.manual_seed(0)
        inputs = [placed(node) for node in stage.module.graph.nodes if node.op == "placeholder"]
        copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
        torch.testing.assert_close(
            namespace["forward"](stage.module, *copies), stage.module(*inputs), rtol=0, atol=0
        )


def placed(node):
    """A value for a placeholder."""
    value = node.meta.get("example_value")
    if "kfc_probe" in node.meta:
        return torch.zeros(node.meta["shape"])
    if not isinstance(value, torch.Tensor):
        return int(value.node.hint)
    shape = [int(s.node.hint) if isinstance(s, torch.SymInt) else s for s in value.shape]
    if not value.dtype.is_floating_point:
        return torch.ones(shape, dtype=value.dtype)
    return torch.rand(shape)


def test_stages_tell_what_each_pass_created_and_erased():
    (graph,) = document(ConvNet)["graphs"]
    by_name = {stage["name"]: stage for stage in graph["stages"]}
    assert list(by_name) == ["captured", "canonical", "probes", "emissions", "emitting"]
    assert len(by_name["emissions"]["created"]) == 5
    assert all("probe" in name for name in by_name["probes"]["created"])
    assert not any(stage["erased"] for stage in graph["stages"])
    assert all(stage["seconds"] > 0 for stage in graph["stages"][1:])


def test_nodes_have_roles_blocks_modules_and_sources():
    (graph,) = document(ConvNet)["graphs"]
    nodes = {node["name"]: node for node in graph["stages"][-1]["nodes"]}
    sites = [node for node in nodes.values() if node["role"] == "site"]
    assert [node["block"] for node in sites] == ["first", "norm", "second", "third", "head"]
    assert sites[0]["module"] == "first"
    assert sites[0]["module_type"] == "Conv2d"
    assert sites[0]["shape"] == [4, 4, 6, 6]
    assert sites[0]["source"].startswith("tests/inspect/small_networks.py:")
    probes = [node for node in nodes.values() if node["role"] == "probe"]
    assert {node["block"] for node in probes} == {"first", "norm", "second", "third", "head"}
    assert all(used in nodes for node in nodes.values() for used in node["args"])


def test_layers_inside_a_checkpoint_are_sites():
    found = build_document(inspect_model(Checkpointed(), "Checkpointed", [parse_input("5x4")]))
    jsonschema.validate(found, load_schema())
    (graph,) = found["graphs"]
    for stage in graph["stages"]:
        nodes = {node["name"]: node for node in stage["nodes"]}
        assert len(nodes) == len(stage["nodes"])
        assert all(used in nodes for node in nodes.values() for used in node["args"])
        sites = [node for node in nodes.values() if node["role"] == "site"]
        assert [node["block"] for node in sites] == ["inside", "head"]
        assert sites[0]["name"].startswith("wrap_body_0.")
        (call,) = (n for n in nodes.values() if n["target"] == "tag_activation_checkpoint")
        assert any(used.startswith("wrap_body_0.") for used in call["args"])
    assert any(n["role"] == "emission" and "." in n["name"] for n in nodes.values())


def test_a_model_in_two_graphs_has_both_and_a_warning():
    found = build_document(inspect_model(Broken(), "Broken", [parse_input("2x4")]))
    assert [graph["index"] for graph in found["graphs"]] == [0, 1]
    assert any("2 graphs" in warning for warning in found["warnings"])
    jsonschema.validate(found, load_schema())


def test_a_model_without_blocks_has_an_empty_update_and_a_warning():
    found = build_document(inspect_model(Functional(), "Functional", [parse_input("2x3")]))
    assert set(found["update"].values()) == {""}
    assert any("nothing to precondition" in warning for warning in found["warnings"])
    jsonschema.validate(found, load_schema())


def test_inspecting_changes_nothing_of_the_model():
    model = ConvNet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    build_document(inspect_model(model, "ConvNet", [parse_input("4x2x6x6")]))
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in model.parameters())


def test_evaluation_mode_is_told():
    found = inspect_model(ConvNet().eval(), "ConvNet", [parse_input("4x2x6x6")])
    assert any("evaluation mode" in warning for warning in build_document(found)["warnings"])


def test_a_large_generic_share_is_told():
    found = inspect_model(
        GroupedNet(), "GroupedNet", [parse_input("4x4x8x8")], InspectionOptions(norm_layers=False)
    )
    assert not [w for w in build_document(found)["warnings"] if "no block" in w]
    bare = InspectionOptions(norm_layers=False, without=frozenset())
    tokens = inspect_model(ConvNetWithTable(), "table", [parse_input("4x2x6x6")], bare)
    (warning,) = [w for w in build_document(tokens)["warnings"] if "no block" in w]
    assert "table [100]" in warning


class ConvNetWithTable(ConvNet):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.ones(100))

    def forward(self, x):
        return super().forward(x) * self.table.sum()


def test_left_out_passes_leave_the_graph_as_it_was_and_are_told():
    without = frozenset({"emissions", "emitting"})
    options = InspectionOptions(without=without)
    found = build_document(inspect_model(ConvNet(), "ConvNet", [parse_input("4x2x6x6")], options))
    stages = {stage["name"]: stage for stage in found["graphs"][0]["stages"]}
    assert {name for name, stage in stages.items() if stage["skipped"]} == without
    assert len(stages["emitting"]["nodes"]) == len(stages["probes"]["nodes"])
    assert any("passes left out: emissions, emitting" in w for w in found["warnings"])


def test_a_pass_that_needs_one_left_out_is_named():
    compiled = kfc_fx.compile(ConvNet())
    failed = pytest.raises(kfc_fx.KfcError, match=r"pass 'emissions' failed.*before it: none")
    with without_passes(["probes"]), failed:
        compiled.kfc.trace(torch.randn(4, 2, 6, 6))


def test_a_symbolic_capture_is_for_looking():
    found = inspection(TokenNet, "symbolic")
    assert any("not for training" in w for w in build_document(found)["warnings"])
    with pytest.raises(kfc_fx.CaptureError, match="for looking"):
        found.compiled(torch.zeros(4, 16, dtype=torch.int64))


def test_the_page_takes_the_document():
    page = render(document(ConvNet))
    assert page.lstrip().lower().startswith("<!doctype html>")


class Halves(nn.Module):
    """A block with a break in its middle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x.relu())


class Looping(nn.Module):
    """A frame that is skipped, with a layer alone in it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Halves() for _ in range(2))
        self.stem = nn.Linear(4, 4)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            print(end="")
            x = block(x)
        return x


def test_a_graph_that_serves_two_modules_is_shown_and_counted_for_each():
    inspection = inspect_model(Looping(), "Looping", [parse_input("2x4")])
    found = build_document(inspection)
    jsonschema.validate(found, load_schema())
    assert found["summary"]["graphs"] < len(found["graphs"])
    assert [graph["layer"] for graph in found["graphs"]].count("stem") == 1
    (skipped,) = (entry for entry in found["breaks"] if entry["skipped"])
    assert "stem" in skipped["alone"]
    assert any(skipped["reason"] in warning for warning in found["warnings"])
    blocks = {block["name"]: block for block in found["blocks"]}
    first, second = (blocks[f"blocks.{number}.first"] for number in range(2))
    assert first["flops"] == second["flops"] > 0
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(plan_view(found), graph_view(found, "emitting"))
    text = console.export_text()
    assert "plain Python" in text
    assert "layer by itself: stem" in text
    assert "blocks: blocks.1.first" in text
