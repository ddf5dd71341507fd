"""Uses of parameters that no captured graph holds, found in autograd's own graph of the pass.

Whatever Python stands around it, a use that a gradient will flow through is a node of autograd's
graph whose next function accumulates the parameter's gradient. Autograd numbers its nodes in the
order in which they are made. So a use outside of the captured graphs is a node that was made while
none of them ran.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor

from kfc_fx.capture.graph_breaks import GraphBreak
from kfc_fx.plan.spec import UnmatchedUse

Interval = tuple[int, int]
"""Numbers of autograd's nodes ``[start, stop)``."""

SAME_VALUES = (
    "ToCopyBackward",
    "TBackward",
    "TransposeBackward",
    "ViewBackward",
    "UnsafeViewBackward",
    "AliasBackward",
    "PermuteBackward",
)
"""Nodes that pass on a parameter as it is, in another layout or precision; what is made of it in
one graph, such as the copy that autocast keeps, may be read outside."""


MOST_FRAMES = 3
"""Frames of plain Python that a reason names."""

LAYER_NODES = ("Addmm", "Mm", "Bmm", "Baddbmm", "Convolution", "Linear", "Embedding", "UnsafeView")
"""How the nodes of calls begin that are, or may hide, a conv or linear call."""


def next_number() -> int:
    """The number that the next node of autograd's graph will have."""
    return int(torch._C._autograd._get_sequence_nr())


def uses_outside(
    outputs: Iterable[Tensor], start: int, graphs: Sequence[Interval]
) -> Iterator[tuple[Tensor, str]]:
    """Parameters that the outputs depend on through a node outside of the graphs.

    Args:
        outputs: tensors of the model's output.
        start: number of the first node of the pass; what is older is another pass's.
        graphs: the numbers of the nodes that captured graphs have made, in ascending order.

    Returns:
        (parameter, name of the node) pairs, a pair for each such use.
    """
    edges = list(_edges(outputs, start))
    held: dict[Any, Tensor] = {
        used: used.variable for _, used in edges if type(used).__name__ == "AccumulateGrad"
    }
    found = True
    while found:
        found = False
        for node, used in edges:
            if used in held and node not in held and _passes_on(node) and _inside(node, graphs):
                held[node], found = held[used], True
    for node, used in edges:
        if used in held and not _inside(node, graphs):
            yield held[used], node.name()


def use_outside(name: str, node: str, breaks: Sequence[GraphBreak]) -> UnmatchedUse:
    """The account of a use that no graph holds.

    Args:
        name: of the parameter.
        node: name of autograd's node; empty where there is none in the output's graph.
        breaks: where plain Python ran, with dynamo's reasons.
    """
    skipped = [found for found in breaks if found.skipped] or list(breaks)
    return UnmatchedUse(
        parameter=name,
        node="",
        target=f"{node} in plain Python" if node else "plain Python",
        location="",
        reason="; ".join(map(str, skipped[:MOST_FRAMES])) or "no graph holds it",
        may_be_layer=not node or node.startswith(LAYER_NODES),
    )


def _edges(outputs: Iterable[Tensor], start: int) -> Iterator[tuple[Any, Any]]:
    nodes = [output.grad_fn for output in outputs if output.grad_fn is not None]
    waiting: list[Any] = [node for node in nodes if node._sequence_nr() >= start]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        for used, _ in node.next_functions:
            if used is None or used._sequence_nr() < start:
                continue
            yield node, used
            if used not in seen:
                seen.add(used)
                waiting.append(used)


def _passes_on(node: Any) -> bool:
    return node.name().rstrip("0123456789") in SAME_VALUES


def _inside(node: Any, graphs: Sequence[Interval]) -> bool:
    number = node._sequence_nr()
    position = bisect_right(graphs, (number, inf)) - 1
    return position >= 0 and number < graphs[position][1]
