"""Stages of a graph: what every pass left behind."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import fx

from kfc_fx.capture.regions import regions


@dataclass(frozen=True)
class Stage:
    """The graph as one pass left it."""

    name: str
    module: fx.GraphModule
    seconds: float = 0.0
    """How long the pass took."""
    skipped: bool = False
    """Whether the pass was left out, so that the graph is as the stage before has it."""

    @property
    def code(self) -> str:
        """The stage as Python source."""
        return self.module.code


def copy_graph(module: fx.GraphModule) -> fx.GraphModule:
    """A graph module with a graph of its own and the same parameters and submodules, but for the
    bodies of its regions, which are copied too.

    Node metadata is shared, not copied: it holds fake tensors, which passes only read.
    """
    graph = fx.Graph()
    names: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(module.graph, names)
    graph.output(output)
    for node in module.graph.nodes:
        if node in names:
            names[node].meta = copy.copy(node.meta)
    copied = fx.GraphModule(module, graph)
    copied.meta = dict(module.meta)
    for region in list(regions(graph)):
        setattr(copied, region.name, copy_graph(region.body))
    return copied
