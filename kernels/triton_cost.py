"""Which Triton method makes a patch Gram sooner: products and bytes of each, at a GPU's rates.

Only the ratio of the rates decides. Tiles count whole, with what overhangs the factor, since that
is multiplied too.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from kfc_fx.kernels.products import product_plan
from kfc_fx.kernels.triton_configs import default_rectangular, default_symmetric
from kfc_fx.kernels.triton_product_jobs import job_plan, total_steps
from kfc_fx.plan.geometry import ConvGeometry

# Multiplications in the time of one byte, by precision mode: datasheet ratios of an H100, halved.
PRODUCTS_PER_BYTE = {"half": 75.0, "tf32": 37.0, "ieee": 5.0}
LAUNCH_BYTES = 5_000_000.0  # what memory moves in the time of one launch
STRUCTURED_LAUNCHES = 3
NUMBER = 4  # bytes of a result


@dataclass(frozen=True)
class TritonCost:
    """Estimated time of each method, in bytes that memory would move meanwhile."""

    structured: float
    im2col: float

    @property
    def best(self) -> str:
        """The faster method."""
        return "structured" if self.structured < self.im2col else "im2col"


def estimate(
    geometry: ConvGeometry, shape: tuple[int, ...], mode: str, shared_bytes: int
) -> TritonCost:
    """Costs for an input of ``shape`` ``[N, C, *spatial]``, beyond what both share."""
    return TritonCost(
        _structured(geometry, shape, mode, shared_bytes), _im2col(geometry, shape, mode)
    )


def _structured(
    geometry: ConvGeometry, shape: tuple[int, ...], mode: str, shared_bytes: int
) -> float:
    channels = shape[1] // geometry.groups
    config = default_rectangular(channels, mode, shared_bytes)
    jobs = job_plan(product_plan(geometry, tuple(shape[2:])))
    steps = total_steps(jobs, shape[0], config.block_k)
    tiles = -(-channels // config.block_m) * -(-channels // config.block_n)
    products = geometry.groups * tiles * steps
    products *= config.block_m * config.block_n * config.block_k
    # Jobs are written and read once, slots written and read, Ω written.
    moved = 2 * (len(jobs.jobs) + len(jobs.jobs_of_slot)) * channels**2
    moved += (channels * geometry.offsets) ** 2
    return (
        products / PRODUCTS_PER_BYTE[mode]
        + NUMBER * geometry.groups * moved
        + STRUCTURED_LAUNCHES * LAUNCH_BYTES
    )


def _im2col(geometry: ConvGeometry, shape: tuple[int, ...], mode: str) -> float:
    side = shape[1] // geometry.groups * geometry.offsets
    config = default_symmetric(side, mode)
    rows = -(-side // config.block_m)
    out = (1, *geometry.output_size(shape[2:]))
    steps = prod(out[:-1]) * -(-out[-1] * shape[0] // config.block_k)
    products = geometry.groups * rows * (rows + 1) // 2 * steps
    products *= config.block_m**2 * config.block_k
    return products / PRODUCTS_PER_BYTE[mode] + NUMBER * geometry.groups * side**2
