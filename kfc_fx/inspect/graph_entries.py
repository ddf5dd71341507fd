"""The document's account of the captured graphs: every stage, its code and its nodes."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from torch import fx

from kfc_fx.capture.graph import CapturedGraph, Stage
from kfc_fx.inspect.graph_text import print_graph
from kfc_fx.inspect.inspection import Inspection, changed_nodes
from kfc_fx.inspect.nodes import dtype_of, module_of, shape_of, source_of, target_name
from kfc_fx.ops.emission import EMISSIONS
from kfc_fx.ops.input_factors import INPUT_FACTORS


def graph_entries(inspection: Inspection) -> list[dict[str, Any]]:
    """One entry for each captured graph."""
    owners = {name: b.name for b in inspection.plan.blocks for name in b.parameters}
    return [
        {"index": graph.index, "stages": _stage_entries(graph, owners)}
        for graph in inspection.graphs
    ]


def _stage_entries(graph: CapturedGraph, owners: Mapping[str, str]) -> list[dict[str, Any]]:
    pairs = pairwise([None, *graph.stages])
    return [_stage_entry(graph, before, stage, owners) for before, stage in pairs if stage]


def _stage_entry(
    graph: CapturedGraph, before: Stage | None, stage: Stage, owners: Mapping[str, str]
) -> dict[str, Any]:
    created, erased = changed_nodes(before, stage)
    sites = {site.node: owners.get(site.weight) for site in graph.uses.sites if not site.region}
    return {
        "name": stage.name,
        "code": print_graph(stage.module, stage.name, created, erased),
        "created": created,
        "erased": erased,
        "seconds": stage.seconds,
        "skipped": stage.skipped,
        "nodes": [
            _node_entry(node, graph.parameters, sites, owners) for node in stage.module.graph.nodes
        ],
    }


def _node_entry(
    node: fx.Node,
    parameters: Mapping[str, str],
    sites: Mapping[str, str | None],
    owners: Mapping[str, str],
) -> dict[str, Any]:
    shape = shape_of(node)
    path, kind = module_of(node)
    role = _role(node, parameters, sites)
    block = {
        "parameter": owners.get(parameters.get(node.name, "")),
        "probe": node.meta.get("kfc_probe", (None,))[0],
        "emission": node.meta.get("kfc_block"),
        "site": sites.get(node.name),
    }
    return {
        "name": node.name,
        "op": node.op,
        "target": target_name(node),
        "args": [used.name for used in node.all_input_nodes],
        "shape": None if shape is None else list(shape),
        "dtype": dtype_of(node),
        "module": path,
        "module_type": kind,
        "source": source_of(node),
        "block": block.get(role),
        "role": role,
    }


def _role(node: fx.Node, parameters: Mapping[str, str], sites: Mapping[str, str | None]) -> str:
    if node.op == "output":
        return "output"
    if node.name in parameters:
        return "parameter"
    if "kfc_probe" in node.meta:
        return "probe"
    if node.op == "placeholder":
        return "input"
    if node.target in EMISSIONS or node.target in INPUT_FACTORS.values():
        return "emission"
    return "site" if sites.get(node.name) is not None else "op"
