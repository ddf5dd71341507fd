"""Give each conv and linear call one spelling, so that the matcher has one set of patterns."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import fx
from torch.nn import functional as F


def _linear(input, weight, bias=None): ...  # type: ignore[no-untyped-def]
def _conv(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1): ...  # type: ignore[no-untyped-def]


SIGNATURES: dict[Callable[..., object], inspect.Signature] = {
    F.linear: inspect.signature(_linear),
    torch.conv1d: inspect.signature(_conv),
    torch.conv2d: inspect.signature(_conv),
    torch.conv3d: inspect.signature(_conv),
}
"""Builtins carry no signature of their own; these are the documented ones."""


def canonicalise_calls(module: fx.GraphModule) -> bool:
    """Make every argument of conv and linear calls positional, defaults written out.

    Changes the graph in place, keeps its numerics bit for bit, and is idempotent.

    Returns:
        Whether anything changed.
    """
    changed = False
    for node in module.graph.nodes:
        signature = SIGNATURES.get(node.target) if node.op == "call_function" else None
        if signature is None:
            continue
        bound = signature.bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        if bound.args != node.args or node.kwargs:
            node.args, node.kwargs = bound.args, {}
            changed = True
    return changed
