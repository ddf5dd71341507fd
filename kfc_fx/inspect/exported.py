"""Programs that ``torch.export`` saved, with their aten calls spelled as functions of layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from kfc_fx.errors import TargetError, first_line
from kfc_fx.inspect.quiet import without_logs


def load_exported(path: Path) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The module of a saved program, and the example inputs it was saved with.

    Raises:
        TargetError: the file is not there or is no such program, or the program takes other
            things than tensors.
    """
    if not path.is_file():
        raise TargetError(f"there is no file {str(path)!r}")
    try:
        with without_logs():
            program = torch.export.load(path)
    except Exception as error:
        message = f"{path} is no program of torch.export: {first_line(error)}"
        raise TargetError(message) from error
    args, kwargs = program.example_inputs or ((), {})
    if kwargs or not all(isinstance(argument, Tensor) for argument in args):
        raise TargetError(f"{path}: a program must take tensors, by position, and nothing else")
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    spell_layer_calls(module)
    return module, tuple(args)


def spell_layer_calls(module: fx.GraphModule) -> None:
    """Replace the aten overloads of layers by the functions that the matcher knows."""
    for node in module.graph.nodes:
        if node.target in LAYERS:
            function, order = LAYERS[node.target]
            if order is not None:
                node.args = tuple(node.args[index] for index in order if index < len(node.args))
                node.kwargs = {}
            node.target = function
        elif node.target is aten.embedding.default:
            table, indices, *rest = node.args
            padding = rest[0] if rest and rest[0] != NO_PADDING else None
            node.target, node.args, node.kwargs = F.embedding, (indices, table, padding), {}
    module.graph.lint()
    module.recompile()


aten: Any = torch.ops.aten
NO_PADDING = -1
"""How aten spells an embedding without ``padding_idx``."""

LAYERS: dict[object, tuple[Callable[..., Any], tuple[int, ...] | None]] = {
    aten.linear.default: (F.linear, None),
    aten.addmm.default: (torch.addmm, None),
    aten.matmul.default: (torch.matmul, None),
    aten.mm.default: (torch.matmul, None),
    **{
        overload: (getattr(torch, name), None)
        for name in ("conv1d", "conv2d", "conv3d")
        for overload in (getattr(aten, name).default, getattr(aten, name).padding)
    },
    aten.conv_transpose1d.default: (torch.conv_transpose1d, None),
    aten.conv_transpose2d.input: (torch.conv_transpose2d, None),
    aten.conv_transpose3d.input: (torch.conv_transpose3d, None),
    aten.batch_norm.default: (F.batch_norm, (0, 3, 4, 1, 2, 5, 6, 7)),
    aten.layer_norm.default: (F.layer_norm, (0, 1, 2, 3, 4)),
    aten.group_norm.default: (F.group_norm, (0, 1, 2, 3, 4)),
}
"""Overload to function, and which of its arguments that takes where their order differs."""
