"""|T|: at how many locations a layer is applied to one example."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor, fx

from kfc_fx.capture.nodes import concrete
from kfc_fx.plan.layer_calls import LayerCall


def locations_of(node: fx.Node, call: LayerCall) -> int:
    """|T| of a layer's call with the inputs of the capture; 0 where that is not known.

    Of ``[N, C, *spatial]``, ``[N, ..., C]``, and of a batched linear map ``[N, ...]`` besides its
    axes of entry and row. Examples and locations that share one axis are taken for examples.
    """
    counted = call.x if call.layer.counts_inputs else node
    value = counted.meta.get("example_value") if isinstance(counted, fx.Node) else None
    if not isinstance(value, Tensor):
        return 0
    try:
        return prod(map(concrete, _axes_of_locations(tuple(value.shape), call)))
    except ValueError:
        return 0


def _axes_of_locations(shape: tuple[Any, ...], call: LayerCall) -> tuple[Any, ...]:
    if call.geometry.ndim:
        return shape[-call.geometry.ndim :]
    if call.norm and call.norm.norm in ("batch", "group"):
        return shape[2:]
    if call.batch:
        taken = {axis % len(shape) for axis in call.batch.outputs if axis is not None}
        return tuple(size for axis, size in enumerate(shape) if axis not in taken)[1:]
    return shape[1:-1]
