"""Numbers of layers that a graph takes as inputs: strides, groups, the padding token.

Modules of one class that differ in such a number share a graph in which it is symbolic. A layer's
statistics need the number itself, which every run of the graph knows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from kfc_fx.capture.canonicalise import SIGNATURES
from kfc_fx.capture.graph import copy_graph


def number_inputs(module: fx.GraphModule, parameters: Collection[str]) -> tuple[int, ...]:
    """Positions of the inputs that the numbers of layer calls depend on.

    Args:
        module: a canonical graph.
        parameters: names of the nodes that hold parameters; calls of other weights do not count.
    """
    wanted: set[fx.Node] = set()
    for node in module.graph.nodes:
        weights = {used.name for used in node.all_input_nodes}.intersection(parameters)
        if node.target in SIGNATURES and weights:
            for number in _numbers_of(node):
                wanted |= _roots(number)
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    return tuple(position for position, node in enumerate(placeholders) if node in wanted)


def with_numbers(module: fx.GraphModule, values: Mapping[str, int]) -> fx.GraphModule:
    """A copy of a graph whose layer calls have numbers in place of what depends on its inputs.

    Args:
        values: number by the name of the placeholder that holds it.
    """
    copied = copy_graph(module)
    known: dict[fx.Node, Any] = {}
    for node in copied.graph.nodes:
        if node.op == "placeholder" and node.name in values:
            known[node] = values[node.name]
        elif node.op == "call_function" and _is_number(node):
            if all(used in known for used in node.all_input_nodes):
                args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
                known[node] = node.target(*args, **kwargs)
        elif node.target in SIGNATURES:
            numbers = {number: known[number] for number in _numbers_of(node) if number in known}
            node.args, node.kwargs = map_arg(
                (node.args, node.kwargs),
                lambda used, numbers=numbers: numbers.get(used, used),  # type: ignore[misc]
            )
    copied.graph.lint()
    copied.recompile()
    return copied


def _numbers_of(node: fx.Node) -> list[fx.Node]:
    return [used for used in node.all_input_nodes if _is_number(used)]


def _is_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), int | torch.SymInt)


def _roots(number: fx.Node) -> set[fx.Node]:
    """The placeholders that a number is computed from; none, if a tensor is among what it is."""
    found, waiting = set(), [number]
    while waiting:
        node = waiting.pop()
        if node.op == "placeholder":
            found.add(node)
        elif node.op != "call_function" or not all(map(_is_number, node.all_input_nodes)):
            return set()
        waiting += node.all_input_nodes
    return found
