"""Distinct products of a patch Gram by matrix products over views of one padded buffer.

    P[kind, box] = Σ_n Σ_{q in box} X_phase[:, n, q] X_phase'[:, n, q + shift]ᵀ

Each phase of the map (one, for stride 1) is laid out as ``[G, Q0, n, Q1 + R1, ..., C/G]``: the
first axis outermost, then a few images, then the other axes, each padded with zeros by the
reach R of the shifts, and the channels innermost. A shift of the map is then a constant offset of
the flat buffer, and a range of the first axis is contiguous, so a product over whole lines is one
matrix product over two views. What an interval leaves out of a line is taken off again: a product
of a few gathered columns. No patches exist; beside the result there is one buffer of a few images.
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
    Product,
    ProductPlan,
    elementary_segments,
    segments_within,
)

COMBINED_COLUMNS = 2**12

Segment = tuple[int, int]
Kind = tuple[tuple[int, int, int], ...]
LINE: Segment = (-1, -1)  # the whole padded axis, whatever its size


@dataclass(frozen=True)
class Job:
    """One matrix product: rows of the first axis and, per other axis, a segment or ``LINE``."""

    kind: Kind
    rows: Segment
    columns: tuple[Segment, ...]

    @property
    def first(self) -> tuple[int, ...]:
        """Phase of the first factor."""
        return tuple(phase for phase, _, _ in self.kind)

    @property
    def second(self) -> tuple[int, ...]:
        """Phase of the second factor."""
        return tuple(phase for _, phase, _ in self.kind)


@dataclass(frozen=True)
class Schedule:
    """The jobs, and each slot as a signed sum of them: ``terms[slot] = ((job, sign), ...)``."""

    jobs: tuple[Job, ...]
    terms: tuple[tuple[tuple[int, int], ...], ...]


@lru_cache(maxsize=512)
def schedule(plan: ProductPlan, quotients: tuple[int, ...]) -> Schedule:
    """Cut the slots into jobs; ``quotients`` is the size of a phase along each axis."""
    kinds: dict[Kind, list[int]] = {}
    for number, slot in enumerate(plan.slots):
        kinds.setdefault(tuple(axis.kind for axis in slot), []).append(number)
    jobs: dict[Job, int] = {}
    terms: list[tuple[tuple[int, int], ...]] = [()] * len(plan.slots)
    for kind, numbers in kinds.items():
        slots = [plan.slots[number] for number in numbers]
        expansions = _expansions(slots, quotients)
        for number, expansion in zip(numbers, expansions, strict=True):
            terms[number] = tuple(
                (jobs.setdefault(Job(kind, rows, columns), len(jobs)), sign)
                for rows, columns, sign in expansion
            )
    return Schedule(tuple(jobs), tuple(terms))


def _expansions(
    slots: list[Product], quotients: tuple[int, ...]
) -> list[list[tuple[Segment, tuple[Segment, ...], int]]]:
    """Per slot of one kind, its box as a signed sum of boxes of common segments."""
    rows = _disjoint([slot[0] for slot in slots])
    columns = [
        _whole_lines_less_borders([slot[axis] for slot in slots], quotients[axis])
        for axis in range(1, len(quotients))
    ]
    return [
        [
            (row, tuple(segment for segment, _ in chosen), prod(sign for _, sign in chosen))
            for row in rows[slot[0]]
            for chosen in itertools.product(
                *(table[axis] for table, axis in zip(columns, slot[1:], strict=True))
            )
        ]
        for slot in slots
    ]


def _disjoint(products: list[AxisProduct]) -> dict[AxisProduct, list[Segment]]:
    intervals = {product: (product.start, product.stop) for product in products}
    segments = elementary_segments(list(intervals.values()))
    return {
        product: [segments[i] for i in segments_within(interval, segments)]
        for product, interval in intervals.items()
    }


def _whole_lines_less_borders(
    products: list[AxisProduct], size: int
) -> dict[AxisProduct, list[tuple[Segment, int]]]:
    shift = products[0].shift
    valid = (max(0, -shift), min(size, size - shift))
    intervals = [(product.start, product.stop) for product in products]
    segments = elementary_segments([valid, *intervals])
    core = (max(start for start, _ in intervals), min(stop for _, stop in intervals))
    if core[0] >= core[1] or 2 * (core[1] - core[0]) <= valid[1] - valid[0]:
        return {p: [(s, 1) for s in found] for p, found in _disjoint(products).items()}
    return {
        product: [(LINE, 1)]
        + [(s, -1) for i, s in enumerate(segments) if i not in segments_within(interval, segments)]
        for product, interval in zip(products, intervals, strict=True)
    }


def planned_pass(shape: Sequence[int], plan: ProductPlan, geometry: ConvGeometry) -> Pass:
    """How much of ``shape`` ``[N, C, *spatial]`` is laid out at once."""
    layout = buffer_layout(plan, geometry.stride, tuple(shape[2:]))
    per_group = layout.elements(shape[1] // geometry.groups)
    return one_pass(shape, geometry.groups, per_group)


def structured_products(
    x: Tensor, plan: ProductPlan, stride: tuple[int, ...], groups: int, images: int
) -> Tensor:
    """The slots of ``x``: ``[N, C, *spatial]`` (at least one axis) -> ``[J, G, C/G, C/G]``.

    ``images`` are laid out at a time.
    """
    dtype = statistic_dtype(x)
    channels = x.shape[1] // groups
    spatial = tuple(x.shape[2:])
    layout = buffer_layout(plan, stride, spatial)
    work = schedule(plan, layout.quotients)
    shape = (len(work.jobs), groups, channels, channels)
    sums = x.new_empty(shape, dtype=dtype) if x.numel() else x.new_zeros(shape, dtype=dtype)
    if x.numel():
        buffers = Buffers(x, layout, work.jobs, groups, images, dtype)
        for chunk, part in enumerate(x.split(images)):
            buffers.fill(part)
            for number, total in enumerate(sums.unbind()):
                add_product(total, *buffers.operands(number), fresh=chunk == 0)
    return _combine(sums, work)


def _combine(sums: Tensor, work: Schedule) -> Tensor:
    if all(term == ((number, 1),) for number, term in enumerate(work.terms)):
        return sums
    signs = torch.zeros(len(work.terms), len(work.jobs), dtype=sums.dtype)
    for slot, terms in enumerate(work.terms):
        for job, sign in terms:
            signs[slot, job] = sign
    signs = signs.to(sums.device)
    if len(work.terms) > len(work.jobs):
        return torch.tensordot(signs, sums, 1)
    # In place, a few columns at a time: fresh memory for the slots would cost more than the sums.
    for part in sums.view(len(sums), -1).split(COMBINED_COLUMNS, dim=1):
        part[: len(signs)] = signs @ part
    return sums[: len(signs)]


@dataclass(frozen=True)
class Layout:
    """Per axis the size of a phase and its padding; ``margin`` is the longest flat shift."""

    stride: tuple[int, ...]
    phases: tuple[tuple[int, ...], ...]
    quotients: tuple[int, ...]
    padded: tuple[int, ...]
    margin: int

    def elements(self, channels: int) -> int:
        """Size of the buffer that one image of so many channels takes."""
        return len(self.phases) * channels * prod(self.padded)

    def flat_shift(self, kind: Kind) -> int:
        """Offset in the flat buffer of a shift of the axes after the first."""
        total = 0
        for (_, _, shift), size in zip(kind[1:], self.padded[1:], strict=True):
            total = total * size + shift
        return total


@lru_cache(maxsize=512)
def buffer_layout(plan: ProductPlan, stride: tuple[int, ...], spatial: tuple[int, ...]) -> Layout:
    """The layout of a map of size ``spatial``."""
    quotients = tuple(ceil(size / step) for size, step in zip(spatial, stride, strict=True))
    reach = [max(abs(slot[axis].shift) for slot in plan.slots) for axis in range(len(spatial))]
    reach[0] = 0  # the first axis is outermost: its shifts never leave a line
    padded = tuple(size + pad for size, pad in zip(quotients, reach, strict=True))
    phases = {tuple(axis.phase for axis in slot) for slot in plan.slots}
    phases |= {tuple(axis.other_phase for axis in slot) for slot in plan.slots}
    bare = Layout(stride, tuple(sorted(phases)), quotients, padded, 0)
    kinds = {tuple(axis.kind for axis in slot) for slot in plan.slots}
    margin = max(abs(bare.flat_shift(kind)) for kind in kinds)
    return Layout(stride, bare.phases, quotients, padded, margin)


class Buffers:
    """The padded phases of a few images, and the operands of jobs as views of them."""

    def __init__(
        self,
        x: Tensor,
        layout: Layout,
        jobs: Sequence[Job],
        groups: int,
        images: int,
        dtype: torch.dtype,
    ) -> None:
        self.layout = layout
        self.jobs = jobs
        self.groups = groups
        self.row: int = images * prod(layout.padded[1:])
        self.shape: tuple[int, ...] = (layout.padded[0], images, *layout.padded[1:])
        channels = x.shape[1] // groups
        length = prod(self.shape) + 2 * layout.margin
        # Channels innermost: BLAS packs the operands of a narrow product twice as fast.
        shape = (groups, length, channels)
        flat = [x.new_zeros(shape, dtype=dtype).mT for _ in layout.phases]
        self.flat: dict[tuple[int, ...], Tensor] = dict(zip(layout.phases, flat, strict=True))
        self.columns: dict[tuple[tuple[int, ...], tuple[Segment, ...]], Tensor] = {}
        self.lines: list[tuple[Tensor, Tensor] | None] = [self._line_operands(job) for job in jobs]

    def fill(self, x: Tensor) -> None:
        """Lay out ``x``: ``[at most the planned images, C, *spatial]``."""
        self.columns.clear()
        for phase in self.layout.phases:
            # [n, C, q...] -> [G, C/G, q0, n, q1...]
            steps = zip(phase, self.layout.stride, strict=True)
            source = x[(slice(None), slice(None), *(slice(p, None, s) for p, s in steps))]
            source = source.unflatten(1, (self.groups, -1)).movedim(0, 3)
            target = self.images(phase)
            if len(x) < target.shape[3]:
                target[:, :, :, len(x) :] = 0
            target = target[:, :, :, : len(x)]
            target[tuple(slice(0, size) for size in source.shape)] = source

    def images(self, phase: tuple[int, ...]) -> Tensor:
        """One phase as ``[G, C/G, Q0, n, Q1 + R1, ...]``."""
        margin = self.layout.margin
        flat = self.flat[phase]
        return flat[:, :, margin : flat.shape[2] - margin].unflatten(2, self.shape)

    def operands(self, number: int) -> tuple[Tensor, Tensor]:
        """The two factors of a job: ``[G, C/G, L]`` each."""
        lines = self.lines[number]
        if lines is not None:
            return lines
        job = self.jobs[number]
        shift = job.kind[0][2]
        here, there = zip(*self._ranges(job), strict=True)
        first, second = self._gathered(job.first, here), self._gathered(job.second, there)
        return (
            first[:, :, job.rows[0] : job.rows[1]].flatten(2),
            second[:, :, job.rows[0] + shift : job.rows[1] + shift].flatten(2),
        )

    def _line_operands(self, job: Job) -> tuple[Tensor, Tensor] | None:
        """The factors of a product of whole lines: the same views for every fill."""
        if any(segment != LINE for segment in job.columns):
            return None
        start, stop = (row + job.kind[0][2] for row in job.rows)
        shift = self.layout.flat_shift(job.kind)
        return self._lines(job.first, job.rows, 0), self._lines(job.second, (start, stop), shift)

    def _lines(self, phase: tuple[int, ...], rows: Segment, shift: int) -> Tensor:
        start = self.layout.margin + shift
        return self.flat[phase][:, :, start + rows[0] * self.row : start + rows[1] * self.row]

    def _ranges(self, job: Job) -> Iterator[tuple[Segment, Segment]]:
        sizes = self.layout.quotients[1:]
        for (_, _, shift), segment, size in zip(job.kind[1:], job.columns, sizes, strict=True):
            low, high = segment
            if segment == LINE:
                low, high = max(0, -shift), min(size, size - shift)
            yield (low, high), (low + shift, high + shift)

    def _gathered(self, phase: tuple[int, ...], ranges: tuple[Segment, ...]) -> Tensor:
        """``[G, C/G, Q0, n, *lengths]``, channels innermost, and kept until the next fill."""
        key = (phase, ranges)
        if key not in self.columns:
            view = self.images(phase)
            for axis, (low, high) in enumerate(ranges):
                view = view.narrow(4 + axis, low, high - low)
            self.columns[key] = view.movedim(1, -1).contiguous().movedim(-1, 1)
        return self.columns[key]
