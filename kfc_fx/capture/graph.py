"""A captured graph and its stages: what every pass left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import fx

from kfc_fx.plan.regions import regions
from kfc_fx.plan.spec import GraphUses


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


@dataclass
class CapturedGraph:
    """One graph that was captured from the model, with each of its stages.

    A model with graph breaks has several; so has one that runs in several modes.
    """

    index: int
    parameters: Mapping[str, str]
    """Node name to parameter name, for the nodes that hold a parameter."""
    stages: list[Stage]
    uses: GraphUses
    run: Callable[..., object]
    """The plain graph as the chosen backend compiled it."""
    emitting: dict[object, Callable[..., object]] = field(default_factory=dict)
    """Compiled emitting variants, by what they emit."""

    def stage(self, name: str) -> fx.GraphModule:
        """The graph module of one stage.

        Raises:
            KeyError: no stage has that name; the message lists the names.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage.module
        raise KeyError(f"no stage {name!r}; stages: {', '.join(s.name for s in self.stages)}")

    def __repr__(self) -> str:
        names = ", ".join(stage.name for stage in self.stages)
        return f"CapturedGraph({self.index}: {len(self.uses.sites)} sites; stages {names})"


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
