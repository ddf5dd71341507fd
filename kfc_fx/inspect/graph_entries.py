"""The document's account of the captured graphs: every stage, its code and its nodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import fx

from kfc_fx.capture.graph import Stage
from kfc_fx.capture.nodes import module_of
from kfc_fx.capture.regions import Region, regions
from kfc_fx.compilation.captured_graph import BoundGraph
from kfc_fx.inspect.graph_text import print_graph
from kfc_fx.inspect.inspection import Inspection, changed_nodes
from kfc_fx.inspect.nodes import dtype_of, shown_shape, source_of, target_name
from kfc_fx.statistics.emission import emit
from kfc_fx.statistics.input_factors import input_statistics


def graph_entries(inspection: Inspection) -> list[dict[str, Any]]:
    """One entry for each captured graph, under each assignment of parameters to its inputs."""
    owners = {name: b.name for b in inspection.plan.blocks for name in b.parameters}
    return [
        {"index": index, "layer": graph.layer, "stages": _stage_entries(graph, owners)}
        for index, graph in enumerate(inspection.graphs)
    ]


def _stage_entries(graph: BoundGraph, owners: Mapping[str, str]) -> list[dict[str, Any]]:
    pairs = pairwise([None, *graph.stages])
    return [_stage_entry(graph, before, stage, owners) for before, stage in pairs if stage]


def _stage_entry(
    graph: BoundGraph, before: Stage | None, stage: Stage, owners: Mapping[str, str]
) -> dict[str, Any]:
    created, erased = changed_nodes(before, stage)
    sites = {
        f"{site.region}.{site.node}" if site.region else site.node: owners.get(site.weight)
        for site in graph.uses.sites
    }
    return {
        "name": stage.name,
        "code": print_graph(stage.module, stage.name, created, erased),
        "created": created,
        "erased": erased,
        "seconds": stage.seconds,
        "skipped": stage.skipped,
        "nodes": [
            _node_entry(shown, graph.parameters, sites, owners)
            for shown in _shown_nodes(stage.module.graph)
        ],
    }


@dataclass(frozen=True)
class ShownNode:
    """A node under the name that it has among all that are shown, and the names of its inputs."""

    node: fx.Node
    name: str
    arguments: tuple[str, ...]


def _shown_nodes(graph: fx.Graph) -> Iterator[ShownNode]:
    """The nodes of a graph; before the call of a checkpoint those of its body, between the
    operands and the call."""
    bodies = {region.call: region for region in regions(graph)}
    for node in graph.nodes:
        region = bodies.get(node)
        if region is None:
            yield ShownNode(node, node.name, tuple(used.name for used in node.all_input_nodes))
            continue
        yield from _inside(region)
        results = [f"{region.name}.{used.name}" for used in _output(region).all_input_nodes]
        held = [used.name for used in node.all_input_nodes if used.op == "get_attr"]
        yield ShownNode(node, node.name, (*held, *results))


def _inside(region: Region) -> Iterator[ShownNode]:
    outer = {
        inner: operand.name for inner, operand in region.operands if isinstance(operand, fx.Node)
    }
    for node in region.body.graph.nodes:
        if node.op not in ("placeholder", "output"):
            used = [outer.get(n, f"{region.name}.{n.name}") for n in node.all_input_nodes]
            yield ShownNode(node, f"{region.name}.{node.name}", tuple(used))


def _output(region: Region) -> fx.Node:
    return next(node for node in region.body.graph.nodes if node.op == "output")


def _node_entry(
    shown: ShownNode,
    parameters: Mapping[str, str],
    sites: Mapping[str, str | None],
    owners: Mapping[str, str],
) -> dict[str, Any]:
    node = shown.node
    shape = shown_shape(node)
    path, kind = module_of(node)
    role = _role(shown, parameters, sites)
    block = {
        "parameter": owners.get(parameters.get(shown.name, "")),
        "probe": node.meta.get("kfc_probe", (None,))[0],
        "emission": node.meta.get("kfc_block"),
        "site": sites.get(shown.name),
    }
    return {
        "name": shown.name,
        "op": node.op,
        "target": target_name(node),
        "args": list(shown.arguments),
        "shape": None if shape is None else list(shape),
        "dtype": dtype_of(node),
        "module": path,
        "module_type": kind,
        "source": source_of(node),
        "block": block.get(role),
        "role": role,
    }


def _role(shown: ShownNode, parameters: Mapping[str, str], sites: Mapping[str, str | None]) -> str:
    node = shown.node
    if node.op == "output":
        return "output"
    if shown.name in parameters:
        return "parameter"
    if "kfc_probe" in node.meta:
        return "probe"
    if node.op == "placeholder":
        return "input"
    if node.target in (emit, input_statistics):
        return "emission"
    return "site" if sites.get(shown.name) is not None else "op"
