"""Which calls apply a layer: from a canonical node to its operands and how it reads them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch.nn import functional as F

from kfc_fx.capture.nodes import dimensions, shape_of
from kfc_fx.kernels.geometry import LINEAR, ConvGeometry, conv_geometry
from kfc_fx.plan.kinds import KINDS, LayerKind
from kfc_fx.plan.spec import BatchSpec, NormSpec
from kfc_fx.plan.weight_views import weight_view


@dataclass(frozen=True)
class LayerCall:
    """A call that applies a layer: its operands and how it reads the weight."""

    kind: str
    x: object
    weight: object
    bias: object = None
    positions: frozenset[int] = frozenset((1, 2))
    """Which arguments of the call weight and bias are."""
    geometry: ConvGeometry = LINEAR
    inputs_first: bool = False
    padding_idx: int | None = None
    norm: NormSpec | None = None
    packed: int = 1
    """How many projections of one input the rows of the whole weight hold."""
    batch: BatchSpec | None = None

    @property
    def layer(self) -> LayerKind:
        """What is known of its kind."""
        return KINDS[self.kind]


_CONVOLUTIONS: dict[object, str] = {
    torch.conv1d: "conv1d",
    torch.conv2d: "conv2d",
    torch.conv3d: "conv3d",
    torch.conv_transpose1d: "conv_transpose1d",
    torch.conv_transpose2d: "conv_transpose2d",
    torch.conv_transpose3d: "conv_transpose3d",
}


def layer_call(node: fx.Node) -> LayerCall | None:
    """The layer that a node of a canonical graph applies, if it does."""
    matcher = _CALLS.get(node.target) if node.op == "call_function" else None
    return matcher(node) if matcher else None


def _linear(node: fx.Node) -> LayerCall:
    x, weight, bias = node.args
    view = weight_view(weight)
    name, packed = node.meta.get("kfc_packed", (None, 1))
    packed = packed if view and view.base.name == name else 1
    return LayerCall("linear", x, weight, bias, packed=packed)


def _convolution(node: fx.Node) -> LayerCall | None:
    x, weight, bias, stride, padding, dilation, groups = node.args
    geometry = _geometry(weight, stride, padding, dilation, groups)
    if geometry is None:
        return None
    return LayerCall(_CONVOLUTIONS[node.target], x, weight, bias, geometry=geometry)


def _transposed_convolution(node: fx.Node) -> LayerCall | None:
    """The bias is added where the outputs are, and patches count where the inputs are, so that
    it is no homogeneous coordinate."""
    x, weight, _, stride, padding, _, groups, dilation = node.args
    geometry = _geometry(weight, stride, padding, dilation, groups)
    if geometry is None:
        return None
    kind = _CONVOLUTIONS[node.target]
    positions = frozenset((1,))
    return LayerCall(kind, x, weight, None, positions, geometry, inputs_first=True)


def _addmm(node: fx.Node) -> LayerCall | None:
    bias, x, weight = node.args
    if (
        any(node.kwargs[scale] != 1 for scale in ("beta", "alpha"))
        or dimensions(weight) != 2
        or dimensions(bias) != 1
    ):
        return None
    return LayerCall("linear", x, weight, bias, frozenset((0, 2)), inputs_first=True)


def _matmul(node: fx.Node) -> LayerCall | None:
    x, weight = node.args
    if dimensions(weight) != 2 or not dimensions(x):
        return None
    return LayerCall("linear", x, weight, None, frozenset((1,)), inputs_first=True)


def _einsum(node: fx.Node) -> LayerCall | None:
    """``...c,oc->...o`` and ``...c,co->...o``, in any letters and either order."""
    if len(node.args) != 3 or not isinstance(node.args[0], str) or node.kwargs:
        return None
    operands, _, output = node.args[0].replace(" ", "").partition("->")
    terms = operands.split(",")
    for position in (1, 2):
        x_term, w_term = terms[2 - position], terms[position - 1]
        x, weight = node.args[3 - position], node.args[position]
        rows, contracted = output[-1:], x_term[-1:]
        shared = x_term[:-1] == output[:-1] and contracted not in output and rows not in x_term
        if shared and dimensions(weight) == 2 and sorted(w_term) == sorted(rows + contracted):
            first = w_term == contracted + rows
            return LayerCall("linear", x, weight, None, frozenset((position,)), inputs_first=first)
    return None


def _embedding(node: fx.Node) -> LayerCall | None:
    indices, weight, padding_idx, max_norm, _, scale_by_frequency, sparse = node.args
    if max_norm is not None or scale_by_frequency or sparse or isinstance(padding_idx, fx.Node):
        return None
    positions = frozenset((1,))
    return LayerCall(
        "embedding",
        indices,
        weight,
        None,
        positions,
        inputs_first=True,
        padding_idx=padding_idx,  # type: ignore[arg-type]
    )


def _scale_shift(
    x: object, weight: object, bias: object, positions: Sequence[int], norm: NormSpec
) -> LayerCall:
    return LayerCall("scale_shift", x, weight, bias, frozenset(positions), norm=norm)


def _batch_norm(node: fx.Node) -> LayerCall:
    x, mean, variance, weight, bias, training, _, eps = node.args
    running = () if training or mean is None else (mean.name, variance.name)  # type: ignore[union-attr]
    return _scale_shift(x, weight, bias, (3, 4), NormSpec("batch", eps=eps, running=running))  # type: ignore[arg-type]


def _layer_norm(node: fx.Node) -> LayerCall:
    x, _, weight, bias, eps = node.args
    return _scale_shift(x, weight, bias, (2, 3), NormSpec("layer", eps=eps))  # type: ignore[arg-type]


def _group_norm(node: fx.Node) -> LayerCall | None:
    x, groups, weight, bias, eps = node.args
    if isinstance(groups, fx.Node):
        return None  # a number that is computed in the graph
    return _scale_shift(x, weight, bias, (2, 3), NormSpec("group", groups, eps))  # type: ignore[arg-type]


def _rms_norm(node: fx.Node) -> LayerCall:
    x, _, weight, eps = node.args
    return _scale_shift(x, weight, None, (2,), NormSpec("rms", eps=eps))  # type: ignore[arg-type]


def _product(node: fx.Node) -> LayerCall | None:
    """``weight * x`` with a vector for the last dimension: a norm written out, a layer scale."""
    if len(node.args) != 2 or node.kwargs:
        return None
    for position, weight in enumerate(node.args):
        x = node.args[1 - position]
        shape, wide = shape_of(weight), shape_of(x)
        if shape and wide and len(shape) == 1 and len(wide) > 1 and wide[-1] == shape[0]:
            return _scale_shift(x, weight, None, (position,), NormSpec("none"))
    return None


_CALLS: dict[object, Callable[[fx.Node], LayerCall | None]] = {
    F.linear: _linear,
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _convolution),
    **dict.fromkeys(
        (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
        _transposed_convolution,
    ),
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    torch.einsum: _einsum,
    F.embedding: _embedding,
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.rms_norm: _rms_norm,
    torch.mul: _product,
    operator.mul: _product,
}


def _geometry(
    weight: object, stride: object, padding: object, dilation: object, groups: object
) -> ConvGeometry | None:
    shape = shape_of(weight)
    numbers = [stride, padding, dilation, groups]
    if shape is None or any(isinstance(n, fx.Node) for v in numbers for n in _leaves(v)):
        return None  # a stride or padding that is computed in the graph
    return conv_geometry(
        shape[2:],
        stride=stride,  # type: ignore[arg-type]
        padding=padding,  # type: ignore[arg-type]
        dilation=dilation,  # type: ignore[arg-type]
        groups=groups,  # type: ignore[arg-type]
    )


def _leaves(value: object) -> list[object]:
    return list(value) if isinstance(value, tuple | list) else [value]
