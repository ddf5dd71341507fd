"""Rewrite a canonical graph so that its sites emit factor statistics."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from functools import partial

from torch import fx

from kfc_fx.capture.graph import Stage
from kfc_fx.ops.emission import emit_factors, emit_separable_factors
from kfc_fx.plan.forms import InputFactor, statistic_shapes
from kfc_fx.plan.spec import BlockSpec, SiteSpec
from kfc_fx.rewrite.pipeline import run_passes

Emitters = Mapping[str, tuple[BlockSpec, InputFactor]]
"""Weight name to the block that emits and the form of its input factor."""


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
    number N·|T| of output rows, in graph order.
    """
    live = [site for site in sites if site.weight in emitters]
    passes = [
        ("probes", partial(insert_probes, sites=live, emitters=emitters)),
        ("emissions", partial(insert_emissions, sites=live, emitters=emitters)),
        ("emitting", partial(return_row_counts, sites=live, emitters=emitters)),
    ]
    return run_passes(canonical, passes)


def insert_probes(module: fx.GraphModule, *, sites: Sequence[SiteSpec], emitters: Emitters) -> bool:
    """Add one placeholder per statistic of every block; idempotent."""
    graph = module.graph
    present = _probe_nodes(graph)
    last = _last_placeholder(graph)
    changed = False
    for weight in emission_order(sites, emitters):
        block, form = emitters[weight]
        for statistic, shape in statistic_shapes(block, form).items():
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
    nodes = {node.name: node for node in module.graph.nodes}
    changed = False
    for site in sites:
        node = nodes[site.node]
        if any(user.target in (emit_factors, emit_separable_factors) for user in node.users):
            continue
        block, form = emitters[site.weight]
        with module.graph.inserting_after(node):
            emitted = _emission_node(module.graph, node, nodes, site, block, form)
        emitted.meta = {**node.meta, "kfc_block": block.name}
        node.replace_all_uses_with(emitted, delete_user_cb=lambda user, e=emitted: user is not e)  # type: ignore[misc]
        changed = True
    return changed


def return_row_counts(
    module: fx.GraphModule, *, sites: Sequence[SiteSpec], emitters: Emitters
) -> bool:
    """Return, besides the outputs, the number of output rows N·|T| of every site; idempotent."""
    nodes = {node.name: node for node in module.graph.nodes}
    output = next(node for node in module.graph.nodes if node.op == "output")
    if "kfc_row_counts" in output.meta:
        return False
    counts = []
    for site in sites:
        channels = emitters[site.weight][0].weight_shape[0]
        # Right behind the site: a later use of its output would keep it in memory.
        with module.graph.inserting_after(nodes[site.node]):
            numel = module.graph.call_method("numel", (nodes[site.node],))
        with module.graph.inserting_after(numel):
            counts.append(module.graph.call_function(operator.floordiv, (numel, channels)))
    output.args = ((output.args[0], tuple(counts)),)
    output.meta["kfc_row_counts"] = len(counts)
    return True


def _probe_nodes(graph: fx.Graph) -> dict[tuple[str, str], fx.Node]:
    """Probe placeholders by (block, statistic)."""
    return {n.meta["kfc_probe"]: n for n in graph.nodes if "kfc_probe" in n.meta}


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
    form: InputFactor,
) -> fx.Node:
    geometry = site.geometry
    options = {
        "kernel_size": geometry.kernel_size,
        "stride": geometry.stride,
        "padding": geometry.padding,
        "dilation": geometry.dilation,
        "groups": geometry.groups,
    }
    present = _probe_nodes(graph)
    probes = [present[block.name, statistic] for statistic in statistic_shapes(block, form)]
    arguments = (node, nodes[site.input_node], *probes)
    if form == "separable":
        return graph.call_function(emit_separable_factors, arguments, options)  # type: ignore[arg-type]
    options["bias"] = block.bias is not None
    return graph.call_function(emit_factors, arguments, options)  # type: ignore[arg-type]
