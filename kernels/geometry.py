"""Geometry of a convolution, with every form of padding reduced to numbers.

A linear layer is the convolution over no spatial dimension: all tuples empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

IntOrInts = int | Sequence[int]


@dataclass(frozen=True)
class ConvGeometry:
    """Kernel, stride, padding, dilation and groups of an n-d convolution.

    All tuples have one entry per spatial dimension. ``padding`` holds
    ``(before, after)`` pairs, because ``"same"`` pads unevenly where the total is odd.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @property
    def ndim(self) -> int:
        """Number of spatial dimensions."""
        return len(self.kernel_size)

    @property
    def offsets(self) -> int:
        """Number of kernel offsets, |Δ|."""
        return prod(self.kernel_size)

    @property
    def is_pointwise(self) -> bool:
        """Whether the patches are the pixels themselves, so that their Gram is that of rows."""
        padded = any(map(any, self.padding))
        strided = any(step != 1 for step in self.stride)
        return self.offsets == 1 and self.groups == 1 and not (padded or strided)

    def output_size(self, input_size: Sequence[int]) -> tuple[int, ...]:
        """Spatial size of the output for a spatial input size; never below zero."""
        return tuple(
            max(0, (size + sum(pad) - dilation * (kernel - 1) - 1) // stride + 1)
            for size, kernel, stride, pad, dilation in zip(
                input_size, self.kernel_size, self.stride, self.padding, self.dilation, strict=True
            )
        )


LINEAR = ConvGeometry((), (), (), (), 1)


def conv_geometry(
    kernel_size: Sequence[int],
    *,
    stride: IntOrInts = 1,
    padding: str | int | Sequence[int] | Sequence[tuple[int, int]] = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
) -> ConvGeometry:
    """Build a :class:`ConvGeometry` from arguments in any form that ``F.conv*d`` takes.

    ``padding`` may also be a sequence of ``(before, after)`` pairs.

    Raises:
        ValueError: a tuple of the wrong length, a number out of range, or an unknown
            padding word; ``"same"`` with a stride above one, as in ``F.conv*d``.
    """
    kernel = tuple(int(k) for k in kernel_size)
    ndim = len(kernel)
    strides = _per_dimension("stride", stride, ndim)
    dilations = _per_dimension("dilation", dilation, ndim)
    for name, values in (("kernel_size", kernel), ("stride", strides), ("dilation", dilations)):
        if any(value < 1 for value in values):
            raise ValueError(f"{name} must be at least 1, got {values}")
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    pairs = _padding_pairs(padding, kernel, strides, dilations)
    return ConvGeometry(kernel, strides, pairs, dilations, groups)


def _per_dimension(name: str, value: IntOrInts, ndim: int) -> tuple[int, ...]:
    values = (value,) * ndim if isinstance(value, int) else tuple(int(v) for v in value)
    if len(values) == 1:  # F.conv2d(..., stride=(2,)) means 2 in every dimension
        values *= ndim
    if len(values) != ndim:
        raise ValueError(f"{name} has {len(values)} entries for {ndim} spatial dimensions")
    return values


def _padding_pairs(
    padding: str | int | Sequence[int] | Sequence[tuple[int, int]],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[tuple[int, int], ...]:
    if isinstance(padding, str):
        return _named_padding(padding, kernel, stride, dilation)
    if not isinstance(padding, int) and any(not isinstance(pad, int) for pad in padding):
        pairs = tuple((int(before), int(after)) for before, after in padding)  # type: ignore[misc]
        if len(pairs) != len(kernel):
            raise ValueError(f"padding has {len(pairs)} pairs for {len(kernel)} spatial dimensions")
    else:
        pairs = tuple((p, p) for p in _per_dimension("padding", padding, len(kernel)))  # type: ignore[arg-type]
    if any(min(pair) < 0 for pair in pairs):
        raise ValueError(f"padding must not be negative, got {pairs}")
    return pairs


def _named_padding(
    padding: str, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if padding != "same":
        raise ValueError(f"padding must be 'same', 'valid' or numbers, got {padding!r}")
    if any(step != 1 for step in stride):
        raise ValueError("padding='same' needs stride 1, as in torch.nn.functional.conv2d")
    totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return tuple((total // 2, total - total // 2) for total in totals)
