"""A captured graph, and its bindings to the parameters of modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import fx

from kfc_fx.capture.graph import Stage
from kfc_fx.plan.spec import GraphUses
from kfc_fx.rewrite.emitting import Emitter, Emitters
from kfc_fx.rewrite.emitting_graph import EmittingGraph, emitting_blocks, emitting_graph


@dataclass
class GraphBinding:
    """A captured graph with one assignment of the model's parameters, and of the numbers of its
    layers, to its inputs.

    Dynamo runs one graph for several modules, so that a graph has as many of these as there are
    assignments.
    """

    canonical: fx.GraphModule
    """The graph in its canonical form, with the numbers of its layers."""
    parameters: Mapping[str, str]
    """Node name to parameter name, for the nodes that hold a parameter."""
    uses: GraphUses
    without_examples: tuple[int, ...] = ()
    """Positions of the outputs whose values do not depend on the examples."""
    emitting: dict[tuple[Emitter, ...], EmittingGraph] = field(default_factory=dict)
    """The emitting graphs that were built, by the blocks that emit in them."""

    def emitting_for(self, emitters: Emitters, backend: str) -> EmittingGraph | None:
        """The graph in which those blocks emit, built where there is none yet; None where none of
        them has a site in it."""
        emit = emitting_blocks(self.uses.sites, emitters)
        if emit and emit not in self.emitting:
            self.emitting[emit] = emitting_graph(self.canonical, self.uses.sites, emit, backend)
        return self.emitting.get(emit)


@dataclass(frozen=True)
class BoundGraph:
    """A captured graph under one of its bindings, for those who look at it."""

    layer: str
    """Path of the layer that was captured for itself; empty for a frame of the model."""
    stages: tuple[Stage, ...]
    parameters: Mapping[str, str]
    """Node name to parameter name."""
    uses: GraphUses


@dataclass
class CapturedGraph:
    """One graph that was captured from the model, with each of its stages.

    A model with graph breaks has several; so has one that runs in several modes.
    """

    index: int
    layer: str
    """Path of the layer that was captured for itself; empty for a frame of the model."""
    captured: list[Stage]
    """The graph as dynamo gave it, and in its canonical form."""
    parameter_positions: tuple[int, ...]
    """Which of the inputs hold parameters."""
    number_positions: tuple[int, ...]
    """Which of the inputs are numbers that layers are called with."""
    run: Callable[..., object]
    """The plain graph as the chosen backend compiled it."""
    bindings: dict[object, GraphBinding] = field(default_factory=dict)
    last: tuple[object, GraphBinding] | None = None
    """The binding of the last run, and what it was found by."""

    @property
    def first(self) -> GraphBinding:
        """The binding that the graph was captured with."""
        return next(iter(self.bindings.values()))

    @property
    def uses(self) -> GraphUses:
        """Every use of every parameter, under all bindings."""
        found = [binding.uses for binding in self.bindings.values()]
        return GraphUses(
            tuple(site for uses in found for site in uses.sites),
            tuple(use for uses in found for use in uses.unmatched),
        )

    @property
    def stages(self) -> list[Stage]:
        """The graph after every pass that has run: those of the capture, and those of the emitting
        graph that was built last under the first binding, where one was."""
        built = list(self.first.emitting.values())
        return [*self.captured, *(built[-1].stages if built else ())]

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
        what = f"layer {self.layer!r}, " if self.layer else ""
        times = f", {len(self.bindings)} bindings" if len(self.bindings) > 1 else ""
        sites = len(self.first.uses.sites)
        return f"CapturedGraph({self.index}: {what}{sites} sites{times}; stages {names})"
