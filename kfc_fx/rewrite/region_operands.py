"""What goes into a checkpointed region and comes out of it besides what the model has there.

Emissions stand inside, where the layers are; their probes become operands of the region, so that
the backward pass, which runs the region again, sends the statistics to them as to any probe.
"""

from __future__ import annotations

import operator

from torch import fx

from kfc_fx.capture.regions import Region, regions
from kfc_fx.plan.spec import SiteSpec


def graph_of(module: fx.GraphModule, site: SiteSpec) -> fx.Graph:
    """The graph that holds a site's node: the module's, or that of a region."""
    return _region(module, site.region).body.graph if site.region else module.graph


def probe_nodes(graph: fx.Graph) -> dict[tuple[str, str], fx.Node]:
    """Probe placeholders by (block, statistic)."""
    return {n.meta["kfc_probe"]: n for n in graph.nodes if "kfc_probe" in n.meta}


def pass_probes(module: fx.GraphModule, name: str, block: str) -> None:
    """Make the probes of a block operands of a region, where they are not yet."""
    region = _region(module, name)
    graph = region.body.graph
    present = probe_nodes(graph)
    for key, outer in probe_nodes(module.graph).items():
        if key[0] != block or key in present:
            continue
        last = [node for node in graph.nodes if node.op == "placeholder"][-1]
        with graph.inserting_after(last):
            inner = graph.placeholder(str(outer.target))
        inner.meta = dict(outer.meta)
        region.call.args = (*region.call.args, outer)


def returned_by(module: fx.GraphModule, name: str, node: fx.Node) -> fx.Node:
    """A node of a region as a node of the module's graph; without a region, the node itself."""
    if not name:
        return node
    region = _region(module, name)
    output = list(region.body.graph.nodes)[-1]
    outputs = (*output.args[0], node)  # type: ignore[misc]
    output.args = (outputs,)
    with module.graph.inserting_after(region.call):
        return module.graph.call_function(operator.getitem, (region.call, len(outputs) - 1))


def recompile_regions(module: fx.GraphModule) -> None:
    """Make the code of every region that of its graph."""
    for region in regions(module.graph):
        region.body.graph.lint()
        region.body.recompile()


def _region(module: fx.GraphModule, name: str) -> Region:
    return next(region for region in regions(module.graph) if region.name == name)
