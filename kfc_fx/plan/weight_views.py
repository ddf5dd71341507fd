"""Views under which a layer call reads a parameter: a transpose, some of its rows, a cast.

Of a batched weight, ``[E, ...]``, the rows are entries, and a transpose is one of every entry.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from kfc_fx.capture.nodes import dimensions, shape_of

ATEN = torch.ops.aten
MATRIX_TRANSPOSES = ("mT", ATEN.mT)
TRANSPOSES = ("t", torch.t, ATEN.numpy_T, ATEN.mT, ATEN.t.default)
SWAPS = ("transpose", torch.transpose, "swapaxes", torch.swapaxes, ATEN.transpose.int)
PERMUTATIONS = ("permute", torch.permute, ATEN.permute.default)
SPLITS = (
    ATEN.split_with_sizes.default,
    ATEN.split.Tensor,
    ATEN.chunk.default,
    torch.split,
    torch.chunk,
    "split",
    "chunk",
)
UNBINDS = (ATEN.unbind.int, torch.unbind, "unbind")
CASTS = (ATEN._to_copy.default, ATEN.to.dtype)

Rows = tuple[int, int]


@dataclass(frozen=True)
class WeightView:
    """``base``, or its transpose, or ``rows`` (start, stop) of it."""

    base: fx.Node
    transposed: bool = False
    rows: Rows | None = None


def weight_view(node: object) -> WeightView | None:
    """What a node shows of the tensor it was made from; of any other node, the node itself."""
    if not isinstance(node, fx.Node):
        return None
    made = _one_view(node)
    if made is None:
        return WeightView(node)
    below = weight_view(made.base)
    if below is None or (made.rows and (below.rows or _turns_rows(below))):
        return WeightView(node)
    if made.transposed and below.rows and dimensions(below.base) == 2:
        return WeightView(node)
    return WeightView(below.base, made.transposed != below.transposed, made.rows or below.rows)


def _turns_rows(view: WeightView) -> bool:
    return view.transposed and dimensions(view.base) == 2


def is_view(node: fx.Node) -> bool:
    """Whether a node is a view that :func:`weight_view` looks through, or a split on the way."""
    return _one_view(node) is not None or _pieces(node) is not None


def _one_view(node: fx.Node) -> WeightView | None:
    if node.op not in ("call_function", "call_method") or not node.args:
        return None
    source, *rest = node.args
    if not isinstance(source, fx.Node):
        return None
    if node.target in CASTS:
        return WeightView(source)
    if node.target is operator.getitem:
        rows = _rows(source, rest[0])
        base = source.args[0] if rows and _pieces(source) else source
        return WeightView(base, rows=rows) if rows else None  # type: ignore[arg-type]
    return WeightView(source, transposed=True) if _transposes(node, rest) else None


def _transposes(node: fx.Node, rest: Sequence[object]) -> bool:
    """Whether a node swaps the two dimensions of a matrix, or of each matrix of a batch."""
    count = dimensions(node.args[0])
    if count not in (2, 3):
        return False
    if node.target is getattr:
        return bool(rest) and rest[0] in ("mT", "T")[: 4 - count]
    if node.target in SWAPS:
        axes = [axis for axis in rest if isinstance(axis, int)]
        return sorted(axis % count for axis in axes) == [count - 2, count - 1]
    if node.target in PERMUTATIONS:
        order = rest[0] if isinstance(rest[0], tuple | list) else rest
        return [a % count for a in order] == [*range(count - 2), count - 1, count - 2]  # type: ignore[operator]
    return node.target in (TRANSPOSES if count == 2 else MATRIX_TRANSPOSES)


def _rows(source: fx.Node, index: object) -> Rows | None:
    """Rows that ``source[index]`` shows, of a split's input or of a tensor that is sliced."""
    pieces = _pieces(source)
    if pieces is not None:
        return pieces[index] if isinstance(index, int) else None
    shape = shape_of(source)
    if shape and isinstance(index, int):
        return (index % shape[0], index % shape[0] + 1)
    if not shape or not isinstance(index, slice) or index.step not in (None, 1):
        return None
    if not all(isinstance(end, int | None) for end in (index.start, index.stop)):
        return None
    start, stop, _ = index.indices(shape[0])
    return (start, stop) if start < stop else None


def _pieces(node: fx.Node) -> list[Rows] | None:
    """Rows of each piece, if a node splits a tensor along its first dimension."""
    if node.target in UNBINDS:
        source, *axis = node.args
        size: object = 1
    elif node.target in SPLITS and len(node.args) > 1:
        source, size, *axis = node.args
    else:
        return None
    shape = shape_of(source)
    axis = axis or [node.kwargs.get("dim", 0)]
    if not shape or axis[0] not in (0, -len(shape)):
        return None
    total = shape[0]
    if isinstance(size, list | tuple):
        ends = list(itertools.accumulate(size))
    elif isinstance(size, int):
        chunks = "chunk" in getattr(node.target, "__name__", str(node.target))
        step = -(-total // size) if chunks else size
        ends = [min(end, total) for end in range(step, total + step, step)]
    else:
        return None
    return list(itertools.pairwise([0, *ends]))
