"""What a captured graph is at one of its runs: which parameters and numbers its inputs hold."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from kfc_fx.capture.concrete_numbers import with_numbers
from kfc_fx.capture.dynamo import constant_nodes, tensors_of_nodes
from kfc_fx.capture.nodes import concrete
from kfc_fx.capture.parameter_names import ParameterNames
from kfc_fx.compilation.captured_graph import CapturedGraph, GraphBinding
from kfc_fx.plan.match import match_uses, outputs_without_examples


@dataclass
class Call:
    """One call of the model that runs."""

    module: nn.Module
    """What was called: the model, or a module of it."""
    first_graph: int
    """Number of graphs there were when it began."""
    first_node: int
    """The number of the first node of autograd's graph that it may make."""
    graphs: list[tuple[int, int]] = field(default_factory=list)
    """The numbers of autograd's nodes that each captured graph made."""
    failure: Exception | None = None
    """What has gone wrong while a graph was captured."""
    constants: dict[int, weakref.ref[Tensor]] = field(default_factory=dict)
    """Tensors that graphs have returned and whose values do not depend on the examples."""

    def is_constant(self, value: object) -> bool:
        """Whether a graph has returned this tensor as one without data of the examples."""
        known = self.constants.get(id(value))
        return known is not None and known() is value

    def note_constants(self, values: Iterable[object]) -> None:
        """Keep what a graph returned that does not depend on the examples."""
        for value in values:
            if isinstance(value, Tensor):
                self.constants[id(value)] = weakref.ref(value)

    def constants_among(self, inputs: Sequence[object]) -> tuple[int, ...]:
        """Positions of the inputs that a graph has returned as values without examples."""
        if not self.constants:
            return ()
        known = [self.constants.get(id(value)) for value in inputs]
        return tuple(
            position
            for position, (value, found) in enumerate(zip(inputs, known, strict=True))
            if found is not None and found() is value
        )


def parameter_inputs(example_inputs: Sequence[Any], names: ParameterNames) -> tuple[int, ...]:
    """Positions of the inputs that hold parameters, the model's or others."""
    return tuple(
        position
        for position, value in enumerate(example_inputs)
        if isinstance(value, nn.Parameter) or names.name_of(value)
    )


def binding_of(
    graph: CapturedGraph,
    inputs: tuple[Any, ...],
    names: ParameterNames,
    constants: tuple[int, ...],
    batch_dim: int = 0,
) -> GraphBinding:
    """The binding of a graph for the inputs of one run; a new one is made where there is none.

    Args:
        constants: positions of other inputs that hold no data of the examples.
        batch_dim: dimension of the examples in the inputs of layers whose channels are last.
    """
    given = [inputs[position] for position in graph.parameter_positions]
    numbers = tuple(concrete(inputs[position]) for position in graph.number_positions)
    fast = (names.version, tuple(map(id, given)), constants, numbers)
    if graph.last is not None and graph.last[0] == fast:
        return graph.last[1]
    own = tuple(map(names.name_of, given))
    key = (own, constants, numbers)
    if key not in graph.bindings:
        graph.bindings[key] = _bind(graph, inputs, names, own, constants, numbers, batch_dim)
    graph.last = (fast, graph.bindings[key])
    return graph.bindings[key]


def _bind(
    graph: CapturedGraph,
    inputs: tuple[Any, ...],
    names: ParameterNames,
    own: tuple[str | None, ...],
    constants: tuple[int, ...],
    numbers: tuple[int, ...],
    batch_dim: int,
) -> GraphBinding:
    captured, canonical = graph.captured[0].module, graph.captured[1].module
    given, held = tensors_of_nodes(captured, inputs)
    nodes = list(given)
    of_inputs = zip(graph.parameter_positions, own, strict=True)
    parameters = {nodes[position]: name for position, name in of_inputs if name is not None}
    for node, value in held.items():
        if name := names.name_of(value):
            parameters[node] = name
    if numbers:
        of_layers = (nodes[position] for position in graph.number_positions)
        canonical = with_numbers(canonical, dict(zip(of_layers, numbers, strict=True)))
    without = constant_nodes(captured) | {nodes[position] for position in constants}
    return GraphBinding(
        canonical=canonical,
        parameters=parameters,
        uses=match_uses(canonical.graph, parameters, without, batch_dim=batch_dim),
        without_examples=outputs_without_examples(canonical.graph, {*parameters, *without}),
    )
