"""Activation checkpoints: calls whose body is a graph of its own, run again in the backward pass.

A captured graph holds ``tag_activation_checkpoint(body, *operands)``; the body's placeholders are
the operands, in their order, and it returns a tuple.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

import torch
import torch.utils.checkpoint
from torch import fx

REGION = "tag_activation_checkpoint"


@dataclass(frozen=True)
class Region:
    """A call of a checkpoint, and its body."""

    call: fx.Node
    name: str
    """The attribute of the graph module that holds the body."""
    body: fx.GraphModule

    @property
    def operands(self) -> list[tuple[fx.Node, object]]:
        """(placeholder of the body, argument of the call) pairs."""
        inside = [node for node in self.body.graph.nodes if node.op == "placeholder"]
        return list(zip(inside, self.call.args[1:], strict=True))


def regions(graph: fx.Graph) -> Iterator[Region]:
    """The checkpoints of a graph, in its order; not those whose body has two calls."""
    module = graph.owning_module
    for node in graph.nodes:
        if getattr(node.target, "__name__", "") != REGION or module is None:
            continue
        held = node.args[0]
        body = getattr(module, str(held.target), None) if isinstance(held, fx.Node) else None
        if isinstance(body, fx.GraphModule) and len(held.users) == 1 and _fits(node, body):
            yield Region(node, str(held.target), body)


def _fits(call: fx.Node, body: fx.GraphModule) -> bool:
    """Whether operands and placeholders correspond one by one, and a tuple is returned."""
    nodes = list(body.graph.nodes)
    count = sum(node.op == "placeholder" for node in nodes)
    return count == len(call.args) - 1 and isinstance(nodes[-1].args[0], tuple | list)


def is_run_again() -> bool:
    """Whether a checkpoint runs its body a second time, to have the tensors that it did not keep.

    What the body computes is dropped then. It is another matter in a checkpoint that is reentrant:
    the first run of that one has no gradients, and the second one is differentiated.
    """
    if torch._C._current_graph_task_id() < 0:
        return False  # not within a backward pass
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
            if frame.f_code.co_name == "recompute_fn":
                return True
            if frame.f_code.co_name == "backward":
                return False
        frame = frame.f_back
    return False
