"""Rewrite a canonical graph so that its sites emit factor statistics."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

from torch import Tensor, fx

from kfc_fx.capture.graph import Stage
from kfc_fx.capture.graph_passes import run_passes
from kfc_fx.capture.nodes import dimensions
from kfc_fx.plan.forms import FactorForms, statistic_shapes
from kfc_fx.plan.spec import BlockSpec, SiteSpec
from kfc_fx.rewrite.region_operands import (
    graph_of,
    pass_probes,
    probe_nodes,
    recompile_regions,
    returned_by,
)
from kfc_fx.statistics.emission import (
    EMISSIONS,
    emit_batched_linear_factors,
    emit_embedding_factors,
    emit_factors,
    emit_linear_factors,
    emit_scale_shift_factors,
    emit_separable_factors,
    emit_transposed_factors,
)
from kfc_fx.statistics.input_factors import INPUT_FACTORS
from kfc_fx.statistics.rules.batched_linear import group_sizes

Emitters = Mapping[str, tuple[BlockSpec, FactorForms]]
"""Weight name to the block that emits and the forms of its factors."""
Span = tuple[int, int]


def emission_order(sites: Sequence[SiteSpec], emitters: Emitters) -> list[str]:
    """Weights that emit in a graph with these sites, in the order of its probes."""
    seen = dict.fromkeys(site.weight for site in sites if site.weight in emitters)
    return list(seen)


def emitting_stages(
    canonical: fx.GraphModule, sites: Sequence[SiteSpec], emitters: Emitters
) -> list[Stage]:
    """The stages that turn a canonical graph into its emitting variant.

    The emitting graph takes the probes of its blocks after the graph's own inputs, in
    :func:`emission_order`, and returns ``(outputs, row counts)``: for each emitting site the
    number N·|T| of output rows, or a tensor of those of each group, in graph order. Where a block
    needs the statistics of its input alone it returns these too, for each such site in graph order.
    """
    live = [site for site in sites if site.weight in emitters]
    passes = [
        ("probes", partial(insert_probes, sites=live, emitters=emitters)),
        ("emissions", partial(insert_emissions, sites=live, emitters=emitters)),
        ("emitting", partial(return_row_counts, sites=live, emitters=emitters)),
    ]
    if any(forms.output == "absent" for _, forms in emitters.values()):
        taken = partial(return_input_statistics, sites=live, emitters=emitters)
        passes.append(("input statistics", taken))
    return run_passes(canonical, passes)


def insert_probes(module: fx.GraphModule, *, sites: Sequence[SiteSpec], emitters: Emitters) -> bool:
    """Add one placeholder per statistic of every block; idempotent."""
    graph = module.graph
    present = probe_nodes(graph)
    last = _last_placeholder(graph)
    changed = False
    for weight in emission_order(sites, emitters):
        block, forms = emitters[weight]
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
        if forms.output == "absent" or any(user.target in EMISSIONS for user in node.users):
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
    """Return, besides the outputs, the number of output rows N·|T| of every site; idempotent."""
    output = next(node for node in module.graph.nodes if node.op == "output")
    if "kfc_row_counts" in output.meta:
        return False
    counts = []
    for site in sites:
        graph = graph_of(module, site)
        count = _row_count(graph, site, emitters[site.weight][0])
        counts.append(returned_by(module, site.region, count))
    output.args = ((output.args[0], tuple(counts)),)
    output.meta["kfc_row_counts"] = len(counts)
    recompile_regions(module)
    return True


def _row_count(graph: fx.Graph, site: SiteSpec, block: BlockSpec) -> fx.Node:
    nodes = {node.name: node for node in graph.nodes}
    # Right behind the site: a later use of its output would keep it in memory.
    with graph.inserting_after(nodes[site.node]):
        if block.sharing == "reduce" and dimensions(nodes[site.node]) > 1:
            return graph.call_method("size", (nodes[site.node], 0))
        if site.batch and site.batch.ends:
            return graph.call_function(group_sizes, (nodes[site.batch.ends],))
        counted, channels = _rows_of(site, block, nodes)
        numel = graph.call_method("numel", (counted,))
    with graph.inserting_after(numel):
        return graph.call_function(operator.floordiv, (numel, channels))


def return_input_statistics(
    module: fx.GraphModule, *, sites: Sequence[SiteSpec], emitters: Emitters
) -> bool:
    """Return the input statistics of every site of a block without Γ, last; idempotent."""
    output = next(node for node in module.graph.nodes if node.op == "output")
    if "kfc_input_statistics" in output.meta:
        return False
    taken: list[fx.Node] = []
    for site in sites:
        block, forms = emitters[site.weight]
        if forms.output != "absent":
            continue
        emission, options = _emission(site, block, forms)
        function = INPUT_FACTORS[emission]
        graph = graph_of(module, site)
        nodes = {node.name: node for node in graph.nodes}
        # Right behind the site: an operation in place may change its input later.
        with graph.inserting_after(nodes[site.node]):
            arguments = (nodes[site.input_node], *_others(site, nodes))
            node = graph.call_function(function, arguments, {**options, "block": block.name})
        node.meta["kfc_block"] = block.name
        taken.append(returned_by(module, site.region, node))
    outputs, counts = output.args[0]  # type: ignore[misc]
    output.args = ((outputs, counts, tuple(taken)),)
    output.meta["kfc_input_statistics"] = len(taken)
    recompile_regions(module)
    return True


def _rows_of(site: SiteSpec, block: BlockSpec, nodes: Mapping[str, fx.Node]) -> tuple[fx.Node, int]:
    """The tensor whose locations are the block's, and its channels: numel over it is N·|T|."""
    if site.transposed_conv:
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
    function, options = _emission(site, block, forms)
    present = probe_nodes(graph)
    probes = [present[block.name, statistic] for statistic in statistic_shapes(block, forms)]
    arguments = (node, nodes[site.input_node], *probes, *_others(site, nodes))
    options |= {"recomputed": True} if site.region else {}
    return graph.call_function(function, arguments, {**options, "block": block.name})


def _others(site: SiteSpec, nodes: Mapping[str, fx.Node]) -> list[fx.Node]:
    """What a statistic reads besides input and cotangent."""
    names = site.norm.running if site.norm else ()
    ends = site.batch.ends if site.batch else None
    return [nodes[name] for name in (*names, *([ends] if ends else []))]


def _emission(
    site: SiteSpec, block: BlockSpec, forms: FactorForms
) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    """The emission of a site, and its options."""
    if site.kind == "embedding":
        return emit_embedding_factors, {"padding_idx": site.padding_idx}
    if site.norm is not None:
        norm = {"norm": site.norm.norm, "groups": site.norm.groups, "eps": site.norm.eps}
        shape = {"shape": block.weight_shape, "bias": block.bias is not None}
        return emit_scale_shift_factors, {**norm, **shape}
    if site.batch is not None:
        axes = {"inputs": site.batch.inputs, "outputs": site.batch.outputs}
        entries = {"bias": block.bias is not None, "entries": (*block.span(site), block.groups)}
        return emit_batched_linear_factors, {**entries, **axes}
    if site.kind == "linear":
        options: dict[str, Any] = {"bias": block.bias is not None}
        options |= {"reduce": True} if block.sharing == "reduce" else {}
        if block.projections > 1:
            options["projections"] = (*block.span(site), block.projections)
        options |= {"diagonal_input": True} if forms.input == "diagonal" else {}
        options |= {"diagonal_output": True} if forms.output == "diagonal" else {}
        return emit_linear_factors, options
    geometry = {field.name: getattr(site.geometry, field.name) for field in fields(site.geometry)}
    if site.transposed_conv:
        return emit_transposed_factors, geometry
    if forms.input == "separable":
        return emit_separable_factors, geometry
    return emit_factors, {**geometry, "bias": block.bias is not None}


def counts_of_spans(
    blocks: Sequence[BlockSpec], spans: Sequence[Span], rows: Sequence[int | Tensor]
) -> tuple[list[BlockSpec], list[Span], list[int]]:
    """Split the sites whose groups differ in their rows.

    Args:
        blocks, spans, rows: for each site its block, the groups ``[start, stop)`` of it, and
            N·|T|: one number for all of these, or a tensor of one for each.

    Returns:
        The same with numbers alone. Reading a tensor waits for its device.
    """
    found: list[tuple[BlockSpec, Span, int]] = []
    for block, (start, stop), count in zip(blocks, spans, rows, strict=True):
        if isinstance(count, Tensor):
            groups = zip(range(start, stop), count.tolist(), strict=True)
            found += [(block, (group, group + 1), own) for group, own in groups]
        else:
            found.append((block, (start, stop), count))
    return [f[0] for f in found], [f[1] for f in found], [f[2] for f in found]
