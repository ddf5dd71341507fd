"""Which products a patch Gram is made of, and which of its blocks share one.

Block (δ, δ') of Ω sums ``x[s·o + d·δ − p] · x[s·o + d·δ' − p]ᵀ`` over the output locations o at
which both positions lie on the map. Split the map into its phases modulo the stride s, and write
a position as ``phase + s·q``: per axis, the block is then a pair of phases, a shift of q, and an
interval of q. Blocks which agree in all of that, on every axis, are one *slot*: for kernel 3,
stride 1, "same" padding, 81 blocks have 29 slots. ``Ω(δ', δ) = Ω(δ, δ')ᵀ`` leaves the pairs with
δ ≤ δ'. Nothing here depends on a device.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from kfc_fx.kernels.geometry import ConvGeometry


@dataclass(frozen=True, order=True)
class AxisProduct:
    """One axis of a product: ``Σ_q x[phase + s·q] · x[other_phase + s·(q + shift)]``.

    q runs over ``start ≤ q < stop``; an empty interval is ``(0, 0)``.
    """

    phase: int
    other_phase: int
    shift: int
    start: int
    stop: int

    @property
    def kind(self) -> tuple[int, int, int]:
        """What remains of the product without its interval."""
        return (self.phase, self.other_phase, self.shift)


Product = tuple[AxisProduct, ...]


@dataclass(frozen=True, eq=False)  # hashed by identity: plans are cached, and keys of caches
class ProductPlan:
    """The distinct products (slots) of one geometry on one map, and who uses them.

    ``slot_of_pair[i][j]`` is the slot of block (δ_i, δ_j) for i ≤ j, and the slot whose transpose
    it is for i > j. ``reaches`` are the slots of the diagonal blocks: their intervals are the
    pixels which an offset reaches, and ``reach_of_offset[i]`` numbers them, for the bias column.
    """

    slots: tuple[Product, ...]
    slot_of_pair: tuple[tuple[int, ...], ...]
    reaches: tuple[int, ...]
    reach_of_offset: tuple[int, ...]
    locations: int


@lru_cache(maxsize=512)
def product_plan(geometry: ConvGeometry, spatial: tuple[int, ...]) -> ProductPlan:
    """The plan of one geometry on a map of size ``spatial``."""
    tables = axis_products(geometry, spatial)
    offsets = list(itertools.product(*map(range, geometry.kernel_size)))
    numbers: dict[Product, int] = {}
    pairs = [[0] * len(offsets) for _ in offsets]
    for (i, first), (j, second) in itertools.combinations_with_replacement(enumerate(offsets), 2):
        product = tuple(table[a][b] for table, a, b in zip(tables, first, second, strict=True))
        pairs[i][j] = pairs[j][i] = numbers.setdefault(product, len(numbers))
    reaches = list(dict.fromkeys(pairs[i][i] for i in range(len(offsets))))
    return ProductPlan(
        slots=tuple(numbers),
        slot_of_pair=tuple(map(tuple, pairs)),
        reaches=tuple(reaches),
        reach_of_offset=tuple(reaches.index(pairs[i][i]) for i in range(len(offsets))),
        locations=prod(geometry.output_size(spatial)),
    )


def axis_products(
    geometry: ConvGeometry, spatial: tuple[int, ...]
) -> list[list[list[AxisProduct]]]:
    """Per axis, the product of every pair of kernel positions: ``[axes][K][K]``."""
    out = geometry.output_size(spatial)
    return [
        [
            [_axis_product(geometry, axis, spatial[axis], out[axis], a, b) for b in range(kernel)]
            for a in range(kernel)
        ]
        for axis, kernel in enumerate(geometry.kernel_size)
    ]


def _axis_product(
    geometry: ConvGeometry, axis: int, size: int, out: int, first: int, second: int
) -> AxisProduct:
    stride, dilation = geometry.stride[axis], geometry.dilation[axis]
    before = geometry.padding[axis][0]
    # x[stride·o + origin] is on the map for -origin <= stride·o < size - origin.
    origins = [dilation * position - before for position in (first, second)]
    start = max(0, -(min(origins) // stride))
    stop = min(out, (size - 1 - max(origins)) // stride + 1)
    (quotient, phase), (other_quotient, other_phase) = (divmod(o, stride) for o in origins)
    interval = (start + quotient, stop + quotient) if start < stop else (0, 0)
    return AxisProduct(phase, other_phase, other_quotient - quotient, *interval)


def elementary_segments(intervals: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Disjoint segments, in order, of which every one of the intervals is a union."""
    ends = sorted({end for interval in intervals for end in interval})
    return [
        (start, stop)
        for start, stop in itertools.pairwise(ends)
        if any(low <= start and stop <= high for low, high in intervals)
    ]


def segments_within(interval: tuple[int, int], segments: Sequence[tuple[int, int]]) -> list[int]:
    """Which of the elementary segments make up one interval."""
    low, high = interval
    return [i for i, (start, stop) in enumerate(segments) if low <= start and stop <= high]
