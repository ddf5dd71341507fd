"""Distinct products along the first axis only, patches along the others: for few channels.

    P[phase, phase', shift] = Σ_n Σ_q A_phase[:, q, n] A_phase'[:, q + shift, n]ᵀ

``A: [G, K'·c, Q0, n·T']`` holds the patches of single lines, K' the offsets and T' the locations
of the axes after the first. With three channels a ``c × c`` product is all overhead; this one
has side ``K'·c``, takes any stride, and is exact at the borders of the other axes as they are
im2col. It is K times less work than im2col, in memory ``K'`` maps of a few images.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, prod

import torch
from torch import Tensor

from kfc_fx.kernels.cpu_buffers import Pass, one_pass
from kfc_fx.kernels.cpu_symmetric_product import add_product
from kfc_fx.kernels.dtypes import statistic_dtype
from kfc_fx.kernels.geometry import ConvGeometry
from kfc_fx.kernels.products import (
    AxisProduct,
    ProductPlan,
    elementary_segments,
    segments_within,
)


@dataclass(frozen=True)
class LineSchedule:
    """Jobs along the first axis, intervals as sums of jobs, and each slot's place in them."""

    jobs: tuple[AxisProduct, ...]
    terms: tuple[tuple[int, ...], ...]
    interval: tuple[int, ...]
    first: tuple[int, ...]
    second: tuple[int, ...]


@lru_cache(maxsize=512)
def line_schedule(plan: ProductPlan, inner: int) -> LineSchedule:
    """``inner`` is K', the number of offsets of the axes after the first."""
    intervals: dict[AxisProduct, int] = {}
    places: dict[int, tuple[int, int, int]] = {}
    offsets = range(len(plan.slot_of_pair))
    for i, j in itertools.combinations_with_replacement(offsets, 2):
        slot = plan.slot_of_pair[i][j]
        number = intervals.setdefault(plan.slots[slot][0], len(intervals))
        places.setdefault(slot, (number, i % inner, j % inner))
    jobs: dict[AxisProduct, int] = {}
    terms = [
        tuple(jobs.setdefault(job, len(jobs)) for job in _jobs(product, list(intervals)))
        for product in intervals
    ]
    interval, first, second = zip(*(places[slot] for slot in range(len(places))), strict=True)
    return LineSchedule(tuple(jobs), tuple(terms), interval, first, second)


def _jobs(product: AxisProduct, products: list[AxisProduct]) -> list[AxisProduct]:
    alike = [(p.start, p.stop) for p in products if p.kind == product.kind]
    segments = elementary_segments(alike)
    chosen = segments_within((product.start, product.stop), segments)
    return [AxisProduct(*product.kind, *segments[i]) for i in chosen]


def planned_pass(shape: Sequence[int], geometry: ConvGeometry) -> Pass:
    """How much of ``shape`` ``[N, C, *spatial]`` has its lines laid out at once."""
    stride = geometry.stride[0]
    rows = stride * ceil(shape[2] / stride)
    across = prod(geometry.output_size(shape[2:])[1:])
    patches = shape[1] // geometry.groups * prod(geometry.kernel_size[1:]) * rows * across
    return one_pass(shape, geometry.groups, patches)


def line_products(x: Tensor, plan: ProductPlan, geometry: ConvGeometry, images: int) -> Tensor:
    """The slots of ``x``: ``[N, C, *spatial]`` (at least one axis) -> ``[J, G, C/G, C/G]``.

    ``images`` are laid out at a time.
    """
    dtype = statistic_dtype(x)
    groups, channels = geometry.groups, x.shape[1] // geometry.groups
    inner = prod(geometry.kernel_size[1:])
    work = line_schedule(plan, inner)
    side = channels * inner
    shape = (len(work.jobs), groups, side, side)
    filled = x.numel() and plan.locations
    sums = x.new_empty(shape, dtype=dtype) if filled else x.new_zeros(shape, dtype=dtype)
    if filled:
        for chunk, buffers in enumerate(_line_patches(x, geometry, images, dtype)):
            for total, job in zip(sums.unbind(), work.jobs, strict=True):
                start, stop = job.start + job.shift, job.stop + job.shift
                first = buffers[job.phase][:, :, job.start : job.stop]
                second = buffers[job.other_phase][:, :, start:stop]
                add_product(total, first.flatten(2), second.flatten(2), fresh=chunk == 0)
    whole = _intervals(sums, work)
    whole = whole.view(-1, groups, inner, channels, inner, channels)
    return whole[list(work.interval), :, list(work.first), :, list(work.second)]


def _intervals(sums: Tensor, work: LineSchedule) -> Tensor:
    if all(len(term) == 1 for term in work.terms):
        return sums[[term[0] for term in work.terms]]
    chosen = [[float(job in term) for job in range(len(work.jobs))] for term in work.terms]
    return torch.tensordot(sums.new_tensor(chosen), sums, 1)


def _line_patches(
    x: Tensor, geometry: ConvGeometry, images: int, dtype: torch.dtype
) -> Iterator[list[Tensor]]:
    """Yield, for a few images at a time, the lines of each phase: ``[G, K'·c, Q0, n·T']``."""
    stride, groups = geometry.stride[0], geometry.groups
    rows = ceil(x.shape[2] / stride)
    across = ConvGeometry(
        (1, *geometry.kernel_size[1:]),
        (1, *geometry.stride[1:]),
        ((0, 0), *geometry.padding[1:]),
        (1, *geometry.dilation[1:]),
        groups,
    )
    out = geometry.output_size(x.shape[2:])[1:]
    side = across.offsets * x.shape[1] // groups
    shape = (groups, side, rows, images * prod(out))
    lines = [_line_buffer(x, shape, geometry, dtype) for _ in range(stride)]
    split = (*across.kernel_size, x.shape[1] // groups)
    for part in x.split(images):
        for phase, buffer in enumerate(lines):
            source = part[:, :, phase::stride]
            # [G, K'·c, Q0, n·T'] -> [G, c, *K, n, Q0, *T']
            target = buffer[:, :, : source.shape[2]].unflatten(3, (images, *out)).transpose(2, 3)
            target = target.unflatten(1, split).movedim(len(split), 1)
            _fill_patches(target, source, across)
        yield lines


def _line_buffer(
    x: Tensor, shape: tuple[int, ...], geometry: ConvGeometry, dtype: torch.dtype
) -> Tensor:
    """Zeros of ``shape`` ``[G, K'·c, Q0, n·T']`` in the memory order that suits the products."""
    if x.shape[1] == geometry.groups:
        return x.new_zeros(shape, dtype=dtype)
    # Patches innermost: BLAS packs the operands of a narrow product twice as fast.
    groups, side, rows, across = shape
    return x.new_zeros((groups, rows, across, side), dtype=dtype).permute(0, 3, 1, 2)


def _fill_patches(patches: Tensor, x: Tensor, geometry: ConvGeometry) -> None:
    """Patches of ``x`` into ``[G, c, *kernel, n, *out]``, whose padding is zero already.

    Offset by offset, from the images where they lie: a depthwise layer has so few offsets along
    a line that laying the images out with their padding first costs more than it saves.
    """
    axes = geometry.ndim
    channels = x.shape[1] // geometry.groups
    source = x.unflatten(1, (geometry.groups, channels)).movedim(0, 2)  # [G, c, n, *spatial]
    if len(x) < patches.shape[2 + axes]:
        patches.narrow(2 + axes, len(x), patches.shape[2 + axes] - len(x)).zero_()
        patches = patches.narrow(2 + axes, 0, len(x))
    targets = patches.flatten(2, 1 + axes).unbind(2)
    every = (slice(None),) * 3
    for target, offset in zip(
        targets, itertools.product(*map(range, geometry.kernel_size)), strict=True
    ):
        ranges = [
            _reached(geometry, axis, position, x.shape[2 + axis], target.shape[3 + axis])
            for axis, position in enumerate(offset)
        ]
        locations = tuple(locations for locations, _ in ranges)
        target[every + locations] = source[every + tuple(pixels for _, pixels in ranges)]


def _reached(
    geometry: ConvGeometry, axis: int, position: int, size: int, out: int
) -> tuple[slice, slice]:
    """Locations at which one kernel position is on the map, and the pixels it meets there."""
    stride = geometry.stride[axis]
    origin = geometry.dilation[axis] * position - geometry.padding[axis][0]
    start = max(0, -(origin // stride))
    stop = max(start, min(out, (size - 1 - origin) // stride + 1))
    first = stride * start + origin
    return slice(start, stop), slice(first, first + stride * (stop - start), stride)
