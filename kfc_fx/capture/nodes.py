"""Facts of a node of a captured graph: its example, its shape, and the module that it is of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx


def example_of(value: object) -> object:
    """The fake value of a node, as the capture or an export noted it; None where it is unknown."""
    if not isinstance(value, fx.Node):
        return None
    return value.meta.get("example_value", value.meta.get("val"))


def shape_of(value: object) -> tuple[Any, ...] | None:
    """Shape of the tensor that a node holds, dynamic sizes as symbols; None for anything else."""
    example = example_of(value)
    return tuple(example.shape) if isinstance(example, Tensor) else None


def dimensions(value: object) -> int:
    """Number of dimensions of the tensor that a node holds; 0 for anything else."""
    return len(shape_of(value) or ())


def concrete(size: Any) -> int:
    """A size as a number: of a dynamic one, what the inputs of the capture had.

    Raises:
        ValueError: the size is of data, so that the capture had none.
    """
    if isinstance(size, torch.SymInt):
        if size.node.is_nested_int():
            raise ValueError("the size differs from entry to entry of a nested tensor")
        if size.node.hint is None:
            raise ValueError(f"size {size} is known only when the graph runs")
        return int(size.node.hint)
    return int(size)


def module_of(node: fx.Node) -> tuple[str, str]:
    """Path and type name of the innermost module call around a node; empty where there is none.

    The path of the model itself is empty too.
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return "", ""
    path, kind = list(stack.values())[-1]
    name = kind if isinstance(kind, str) else kind.__name__
    return _module_path(path), name.rpartition(".")[2]


def place_in_model(module: fx.GraphModule, kind: type) -> None:
    """Say of nodes that stand in no submodule that they are the model's own, a ``kind``."""
    for node in module.graph.nodes:
        if node.op not in ("placeholder", "output") and not node.meta.get("nn_module_stack"):
            node.meta["nn_module_stack"] = {"": ("", kind)}


def _module_path(path: str) -> str:
    """``layer1.0.conv1`` from dynamo's spelling of the same path."""
    for prefix in ("L['model'].__self__", "L['model']", "L['self']", "model"):
        path = path.removeprefix(prefix)
    path = path.replace("._modules", "").replace("['", ".").replace("']", "")
    return path.strip(".")
