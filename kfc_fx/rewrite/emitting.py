"""The passes that rewrite a canonical graph so that its sites emit factor statistics."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import fx

from kfc_fx.capture.graph import Stage
from kfc_fx.capture.graph_passes import run_passes
from kfc_fx.capture.nodes import dimensions
from kfc_fx.plan.forms import FactorForms, statistic_shapes
from kfc_fx.plan.locations import batch_axis
from kfc_fx.plan.spec import BlockSpec, SiteSpec
from kfc_fx.rewrite.region_operands import (
    graph_of,
    pass_probes,
    probe_nodes,
    recompile_regions,
    returned_by,
)
from kfc_fx.statistics.emission import emit
from kfc_fx.statistics.input_factors import input_statistics
from kfc_fx.statistics.rules.batched_linear import group_sizes
from kfc_fx.statistics.rules.table import options_of

Emitter = tuple[BlockSpec, FactorForms]
"""A block that emits, and the forms of its factors."""
Emitters = Mapping[str, Emitter]
"""The blocks that emit, by the name of their weight."""


def emitting_stages(
    canonical: fx.GraphModule, sites: Sequence[SiteSpec], emitters: Emitters
) -> list[Stage]:
    """The stages that turn a canonical graph into an emitting one.

    The emitting graph takes the probes of the blocks with Γ after the graph's own inputs, in the
    order of ``emitters``. It returns ``(outputs, row counts, input statistics)``. Row counts are
    those of every site, in graph order: the number N·|T| of output rows, or a tensor of those of
    each group. Input statistics are those of every site of a block without Γ, in graph order.

    Args:
        sites: those of the blocks that emit.
        emitters: the blocks that emit here.
    """
    passes = [
        ("probes", partial(insert_probes, emitters=emitters)),
        ("emissions", partial(insert_emissions, sites=sites, emitters=emitters)),
        ("emitting", partial(return_row_counts, sites=sites, emitters=emitters)),
    ]
    if any(forms.output == "absent" for _, forms in emitters.values()):
        taken = partial(return_input_statistics, sites=sites, emitters=emitters)
        passes.append(("input statistics", taken))
    return run_passes(canonical, passes)


def insert_probes(module: fx.GraphModule, *, emitters: Emitters) -> bool:
    """Add one placeholder per statistic of every block; idempotent."""
    graph = module.graph
    present = probe_nodes(graph)
    last = _last_placeholder(graph)
    changed = False
    for block, forms in emitters.values():
        if forms.output == "absent":
            continue
        for statistic, shape in statistic_shapes(block, forms).items():
            if (block.name, statistic) in present:
                continue
            with graph.inserting_after(last) if last else graph.inserting_before():
                last = graph.placeholder(_unused_name(graph, f"probe_{block.name}_{statistic}"))
            last.meta["kfc_probe"] = (block.name, statistic)
            last.meta["shape"] = shape
            changed = True
    return changed


def insert_emissions(
    module: fx.GraphModule, *, sites: Sequence[SiteSpec], emitters: Emitters
) -> bool:
    """Send the output of every site through its emission; idempotent."""
    changed = False
    for site in sites:
        graph = graph_of(module, site)
        nodes = {node.name: node for node in graph.nodes}
        node = nodes[site.node]
        block, forms = emitters[site.weight]
        if forms.output == "absent" or any(user.target is emit for user in node.users):
            continue
        if site.region:
            pass_probes(module, site.region, block.name)
        with graph.inserting_after(node):
            emitted = _emission_node(graph, node, nodes, site, block, forms)
        emitted.meta = {**node.meta, "kfc_block": block.name}
        node.replace_all_uses_with(emitted, delete_user_cb=lambda user, e=emitted: user is not e)  # type: ignore[misc]
        changed = True
    recompile_regions(module)
    return changed


def return_row_counts(
    module: fx.GraphModule, *, sites: Sequence[SiteSpec], emitters: Emitters
) -> bool:
    """Return, besides the outputs, the number of output rows N·|T| of every site, and no input
    statistics yet; idempotent."""
    output = next(node for node in module.graph.nodes if node.op == "output")
    if "kfc_row_counts" in output.meta:
        return False
    counts = []
    for site in sites:
        graph = graph_of(module, site)
        count = _row_count(graph, site, emitters[site.weight][0])
        counts.append(returned_by(module, site.region, count))
    output.args = ((output.args[0], tuple(counts), ()),)
    output.meta["kfc_row_counts"] = len(counts)
    recompile_regions(module)
    return True


def _row_count(graph: fx.Graph, site: SiteSpec, block: BlockSpec) -> fx.Node:
    nodes = {node.name: node for node in graph.nodes}
    # Right behind the site: a later use of its output would keep it in memory.
    with graph.inserting_after(nodes[site.node]):
        if block.sharing == "reduce" and dimensions(nodes[site.node]) > 1:
            axis = batch_axis(dimensions(nodes[site.node]), block.batch_dim)
            return graph.call_method("size", (nodes[site.node], axis))
        if site.batch and site.batch.ends:
            return graph.call_function(group_sizes, (nodes[site.batch.ends],))
        counted, channels = _rows_of(site, block, nodes)
        numel = graph.call_method("numel", (counted,))
    with graph.inserting_after(numel):
        return graph.call_function(operator.floordiv, (numel, channels))


def return_input_statistics(
    module: fx.GraphModule, *, sites: Sequence[SiteSpec], emitters: Emitters
) -> bool:
    """Return the input statistics of every site of a block without Γ; idempotent."""
    output = next(node for node in module.graph.nodes if node.op == "output")
    if "kfc_input_statistics" in output.meta:
        return False
    taken: list[fx.Node] = []
    for site in sites:
        block, forms = emitters[site.weight]
        if forms.output != "absent":
            continue
        graph = graph_of(module, site)
        nodes = {node.name: node for node in graph.nodes}
        # Right behind the site: an operation in place may change its input later.
        with graph.inserting_after(nodes[site.node]):
            options = _options(site, block, forms)
            node = graph.call_function(input_statistics, (_inputs(site, nodes),), options)
        node.meta["kfc_block"] = block.name
        taken.append(returned_by(module, site.region, node))
    outputs, counts, _ = output.args[0]  # type: ignore[misc]
    output.args = ((outputs, counts, tuple(taken)),)
    output.meta["kfc_input_statistics"] = len(taken)
    recompile_regions(module)
    return True


def _rows_of(site: SiteSpec, block: BlockSpec, nodes: Mapping[str, fx.Node]) -> tuple[fx.Node, int]:
    """The tensor whose locations are the block's, and its channels: numel over it is N·|T|."""
    if site.layer.counts_inputs:
        return nodes[site.input_node], block.channels * block.groups
    start, stop = block.span(site)
    return nodes[site.node], block.rows * (stop - start)


def _unused_name(graph: fx.Graph, wanted: str) -> str:
    name = "".join(c if c.isalnum() else "_" for c in wanted)
    taken = {node.target for node in graph.nodes if node.op == "placeholder"}
    while name in taken:
        name += "_"
    return name


def _last_placeholder(graph: fx.Graph) -> fx.Node | None:
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    return placeholders[-1] if placeholders else None


def _emission_node(
    graph: fx.Graph,
    node: fx.Node,
    nodes: Mapping[str, fx.Node],
    site: SiteSpec,
    block: BlockSpec,
    forms: FactorForms,
) -> fx.Node:
    present = probe_nodes(graph)
    probes = tuple(present[block.name, statistic] for statistic in statistic_shapes(block, forms))
    options = _options(site, block, forms)
    options |= {"recomputed": True} if site.region else {}
    return graph.call_function(emit, (node, _inputs(site, nodes), probes), options)


def _inputs(site: SiteSpec, nodes: Mapping[str, fx.Node]) -> tuple[fx.Node, ...]:
    """What the statistics of a site read besides the cotangent: the layer's input first."""
    running = site.norm.running if site.norm else ()
    ends = [site.batch.ends] if site.batch and site.batch.ends else []
    return tuple(nodes[name] for name in (site.input_node, *running, *ends))


def _options(site: SiteSpec, block: BlockSpec, forms: FactorForms) -> dict[str, Any]:
    return {"kind": site.kind, **options_of(block, site, forms), "block": block.name}
