"""|T|: at how many locations a layer is applied to one example."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor, fx

from kfc_fx.capture.nodes import concrete
from kfc_fx.plan.layer_calls import LayerCall


def batch_axis(dimensions: int, batch_dim: int) -> int:
    """The axis of the examples in a tensor whose last axis is that of channels: ``batch_dim``, or
    the first one where that is not before the channels."""
    return batch_dim if dimensions > batch_dim + 1 else 0


def locations_of(node: fx.Node, call: LayerCall, batch_dim: int = 0) -> int:
    """|T| of a layer's call with the inputs of the capture; 0 where that is not known.

    Of ``[N, C, *spatial]``, ``[N, ..., C]`` with N at ``batch_dim``, and of a batched linear map
    ``[N, ...]`` besides its axes of entry and row. Examples and locations that share one axis are
    taken for examples.
    """
    counted = call.x if call.layer.counts_inputs else node
    value = counted.meta.get("example_value") if isinstance(counted, fx.Node) else None
    if not isinstance(value, Tensor):
        return 0
    try:
        return prod(map(concrete, _axes_of_locations(tuple(value.shape), call, batch_dim)))
    except ValueError:
        return 0


def _axes_of_locations(shape: tuple[Any, ...], call: LayerCall, batch_dim: int) -> tuple[Any, ...]:
    if call.geometry.ndim:
        return shape[-call.geometry.ndim :]
    if call.norm and call.norm.norm in ("batch", "group"):
        return shape[2:]
    if call.batch:
        taken = {axis % len(shape) for axis in call.batch.outputs if axis is not None}
        return tuple(size for axis, size in enumerate(shape) if axis not in taken)[1:]
    examples = batch_axis(len(shape), batch_dim)
    return tuple(size for axis, size in enumerate(shape[:-1]) if axis != examples)
