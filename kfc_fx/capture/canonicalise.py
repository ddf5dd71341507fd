"""Give each call of a layer one spelling, so that the matcher has one set of patterns."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from kfc_fx.capture.attention import expand_attention
from kfc_fx.capture.regions import regions


def _linear(input, weight, bias=None): ...  # type: ignore[no-untyped-def]
def _conv(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1): ...  # type: ignore[no-untyped-def]
def _conv_transpose(  # type: ignore[no-untyped-def]
    input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
): ...
def _addmm(input, mat1, mat2, *, beta=1, alpha=1): ...  # type: ignore[no-untyped-def]
def _baddbmm(input, batch1, batch2, *, beta=1, alpha=1): ...  # type: ignore[no-untyped-def]
def _product(input, other): ...  # type: ignore[no-untyped-def]
def _batch_product(input, mat2): ...  # type: ignore[no-untyped-def]


SIGNATURES: dict[Callable[..., object], inspect.Signature] = {
    F.linear: inspect.signature(_linear),
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), inspect.signature(_conv)),
    **dict.fromkeys(
        (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
        inspect.signature(_conv_transpose),
    ),
    torch.addmm: inspect.signature(_addmm),
    torch.baddbmm: inspect.signature(_baddbmm),
    torch.matmul: inspect.signature(_product),
    torch.bmm: inspect.signature(_batch_product),
    F.embedding: inspect.signature(F.embedding),
    F.batch_norm: inspect.signature(F.batch_norm),
    F.layer_norm: inspect.signature(F.layer_norm),
    F.group_norm: inspect.signature(F.group_norm),
    F.rms_norm: inspect.signature(F.rms_norm),
}
"""Builtins carry no signature of their own; these are the documented ones."""

FUNCTIONS: dict[object, Callable[..., Any]] = {
    torch.ops.aten.linear.default: F.linear,
    operator.matmul: torch.matmul,
    torch.mm: torch.matmul,
    torch.rms_norm: F.rms_norm,
}
METHODS: dict[str, Callable[..., Any]] = {
    "addmm": torch.addmm,
    "baddbmm": torch.baddbmm,
    "bmm": torch.bmm,
    "matmul": torch.matmul,
    "mm": torch.matmul,
    "__matmul__": torch.matmul,
}


def canonicalise(module: fx.GraphModule) -> bool:
    """Open packed attention, then :func:`canonicalise_calls`, in regions too. Idempotent."""
    expanded = expand_attention(module)
    changed = canonicalise_calls(module) or expanded
    for region in regions(module.graph):
        if canonicalise(region.body):
            region.body.recompile()
            changed = True
    return changed


def canonicalise_calls(module: fx.GraphModule) -> bool:
    """Make the arguments of the calls in ``SIGNATURES`` positional, defaults written out, and
    spell operators and methods as the functions that they are.

    Changes the graph in place, keeps its numerics bit for bit, and is idempotent.

    Returns:
        Whether anything changed.
    """
    changed = False
    for node in module.graph.nodes:
        target = _function(node)
        signature = SIGNATURES.get(target) if target else None
        if signature is None:
            continue
        bound = signature.bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        spelling = (target, bound.args, bound.kwargs)
        if (node.target, node.args, node.kwargs) != spelling:
            node.op = "call_function"
            node.target, node.args, node.kwargs = spelling
            changed = True
    return changed


def _function(node: fx.Node) -> Any:
    if node.op == "call_method":
        return METHODS.get(str(node.target))
    return FUNCTIONS.get(node.target, node.target) if node.op == "call_function" else None
