"""Which method is fastest on CPU: counts of work, times the speed of each kind of work.

The speeds are those of two AVX-512 cores; a choice depends on their ratios alone, which vary far
less between machines than the speeds. Half precision is widened while it is copied, so dtypes
differ in nothing but float64's doubled cost, which is the same for all methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import log2, prod

from kfc_fx.kernels import cpu_im2col_gram, cpu_line_gram, cpu_structured_gram
from kfc_fx.kernels.cpu_symmetric_product import upper_blocks
from kfc_fx.kernels.geometry import ConvGeometry
from kfc_fx.kernels.products import ProductPlan

CALL = 30e3  # ns for one product of views, however small
PATCH_CALL = 10e3  # ns for one product or copy
TRANSPOSE = 0.52  # ns per element laid out with the channels innermost
COPY = 0.26  # ns per element of the patches of lines, for depthwise layers
PATCH = 0.19  # ns per element of whole patches, in runs over lines and images
STRIDED_COPY = 0.48  # ns per element of either where the stride is not one
GATHER = 1.0  # ns per element of a border column
ASSEMBLE = 2.3  # ns per element of Ω, and per number of the slots
ADVANCED_INDEX = 1.6  # ns per number of the slots taken from line products
WRITE = 0.6  # ns per element of Ω, written by products
MIRROR = 1.1  # ns per element below the diagonal
COMPOSED = 0.25e6  # ns for composing slots, however few
SMALL_PRODUCT = 130.0  # ns for one product of a batch, however small
DOT_RATE = 8.0  # 1e9 operations per second for a batch of scalar products
# side of a product -> 1e9 floating-point operations per second, alone and in a batch
RATES = ((1, 30.0), (3, 16.0), (9, 57.0), (15, 85.0), (32, 150.0), (512, 290.0))
BATCH_RATES = ((1, 28.0), (3, 35.0), (9, 148.0), (25, 100.0), (49, 170.0), (128, 280.0))


@dataclass(frozen=True)
class Cost:
    """Estimated nanoseconds of each way to the dense Ω."""

    structured: float
    lines: float
    im2col: float

    @property
    def best_products(self) -> str:
        """The faster of the two ways to the slots."""
        return "structured" if self.structured <= self.lines else "lines"

    @property
    def best(self) -> str:
        """The fastest way to Ω."""
        return self.best_products if min(self.structured, self.lines) < self.im2col else "im2col"


def rate(side: float, batched: bool) -> float:
    """Speed of a square product with a long sum, by interpolation over the side's logarithm."""
    rates = BATCH_RATES if batched else RATES
    for (low, slow), (high, fast) in pairwise(rates):
        if side <= high:
            share = log2(max(side, low) / low) / log2(high / low)
            return slow + share * (fast - slow)
    return rates[-1][1]


@lru_cache(maxsize=4096)
def estimate(geometry: ConvGeometry, plan: ProductPlan, shape: tuple[int, ...]) -> Cost:
    """Estimates for an input of ``shape`` ``[N, C, *spatial]``."""
    side = shape[1] // geometry.groups * geometry.offsets
    slots = len(plan.slots) * shape[1] ** 2 // geometry.groups
    assembled = COMPOSED + ASSEMBLE * (geometry.groups * side**2 + slots)
    return Cost(
        _structured(geometry, plan, shape) + assembled,
        _lines(geometry, plan, shape) + assembled + ADVANCED_INDEX * slots,
        _im2col(geometry, plan, shape),
    )


def _copy(geometry: ConvGeometry, unstrided: float) -> float:
    return unstrided if all(step == 1 for step in geometry.stride) else STRIDED_COPY


def _product(groups: int, side: float, length: float, calls: int) -> float:
    speed = DOT_RATE if side == 1 and groups > 1 else rate(side, groups > 1)
    small = SMALL_PRODUCT * groups * calls if groups > 1 else 0.0
    return 2 * groups * side**2 * length / speed + small


def _structured(geometry: ConvGeometry, plan: ProductPlan, shape: tuple[int, ...]) -> float:
    images, channels, groups = shape[0], shape[1], geometry.groups
    layout = cpu_structured_gram.buffer_layout(plan, geometry.stride, shape[2:])
    work = cpu_structured_gram.schedule(plan, layout.quotients)
    line = prod(layout.padded[1:])
    length = gathered = 0
    for job in work.jobs:
        rows = job.rows[1] - job.rows[0]
        widths = [high - low for low, high in job.columns]
        whole = all(segment == cpu_structured_gram.LINE for segment in job.columns)
        across = (
            line
            if whole
            else prod(
                size if width == 0 else width
                for size, width in zip(layout.padded[1:], widths, strict=True)
            )
        )
        length += rows * across
        gathered += 0 if whole else rows * across
    buffered = layout.elements(channels)
    buffers = cpu_structured_gram.planned_pass(shape, plan, geometry).count(groups, images)
    return (
        buffers * len(work.jobs) * CALL
        + TRANSPOSE * images * buffered
        + min(GATHER * gathered, TRANSPOSE * prod(layout.padded)) * images * channels
        + _product(groups, channels // groups, images * length, len(work.jobs))
    )


def _lines(geometry: ConvGeometry, plan: ProductPlan, shape: tuple[int, ...]) -> float:
    images, channels, groups = shape[0], shape[1], geometry.groups
    inner = prod(geometry.kernel_size[1:])
    work = cpu_line_gram.line_schedule(plan, inner)
    across = prod(geometry.output_size(shape[2:])[1:])
    length = sum(job.stop - job.start for job in work.jobs) * across
    buffered = channels * inner * shape[2] * across
    buffers = cpu_line_gram.planned_pass(shape, geometry).count(groups, images)
    return (
        buffers * len(work.jobs) * CALL
        + (_copy(geometry, COPY) if channels == groups else TRANSPOSE) * images * buffered
        + _product(groups, channels // groups * inner, images * length, len(work.jobs))
    )


def _im2col(geometry: ConvGeometry, plan: ProductPlan, shape: tuple[int, ...]) -> float:
    images, groups = shape[0], geometry.groups
    side = shape[1] // groups * geometry.offsets
    blocks = upper_blocks(side, images * plan.locations)
    (top, bottom), _ = blocks[0]
    patches = images * groups * side * plan.locations
    buffers = cpu_im2col_gram.planned_pass(shape, geometry).count(groups, images)
    product = _product(groups, bottom - top, images * plan.locations, 1)
    return (
        buffers * (len(blocks) + 2) * PATCH_CALL
        + _copy(geometry, PATCH) * patches
        + (0 if cpu_im2col_gram.reads_once(geometry) else TRANSPOSE * prod(shape))
        + len(blocks) * product
        + WRITE * groups * side**2
        + MIRROR * groups * side * (side - bottom + top) / 2
    )
