"""Which Triton method makes a patch Gram sooner: work of each, at the rates of a GPU.

Only the ratios of the rates decide. Tiles count whole, with what overhangs the factor, since that
is multiplied too. The rates below were fitted to 19 layers on an H100, the time of the device: that
of the host differs less between the two. ``kfc_fx.tools.gpu.cost_fit`` fits them to a run of
``gpu_check``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

from kfc_fx.kernels.geometry import ConvGeometry
from kfc_fx.kernels.products import product_plan
from kfc_fx.kernels.triton_configs import default_rectangular, default_symmetric
from kfc_fx.kernels.triton_product_jobs import job_plan, total_steps

# Multiplications in the time that memory takes for a byte, by precision mode; an H100 moves
# 2.9 TB/s. "ieee" is its datasheet's ratio, halved.
PRODUCTS_PER_BYTE = {"half": 45.0, "tf32": 23.0, "ieee": 5.0}
LAUNCH_BYTES = 32e6  # what memory moves in the time of one launch
STRUCTURED_LAUNCHES = 4  # pack, products, sums of slots, assembly
IM2COL_LAUNCHES = 2  # pack and products; a second reduction is as short as the rest is then
NUMBER = 4  # bytes of a result


@dataclass(frozen=True)
class Work:
    """What one method does: multiplications, bytes moved beyond what both share, launches."""

    products: float
    moved_bytes: float
    launches: int

    def time(self, mode: str) -> float:
        """Estimated time, in bytes that memory would move meanwhile."""
        products = self.products / PRODUCTS_PER_BYTE[mode]
        return products + self.moved_bytes + self.launches * LAUNCH_BYTES


@dataclass(frozen=True)
class TritonCost:
    """Work of each method in one precision mode."""

    structured: Work
    im2col: Work
    mode: str

    @property
    def best(self) -> str:
        """The faster method."""
        faster = self.structured.time(self.mode) < self.im2col.time(self.mode)
        return "structured" if faster else "im2col"


@lru_cache(maxsize=512)
def estimate(
    geometry: ConvGeometry, shape: tuple[int, ...], mode: str, shared_bytes: int
) -> TritonCost:
    """Costs for an input of ``shape`` ``[N, C, *spatial]``."""
    return TritonCost(
        _structured(geometry, shape, mode, shared_bytes), _im2col(geometry, shape, mode), mode
    )


def _structured(geometry: ConvGeometry, shape: tuple[int, ...], mode: str, shared: int) -> Work:
    channels = shape[1] // geometry.groups
    config = default_rectangular(channels, mode, shared)
    jobs = job_plan(product_plan(geometry, tuple(shape[2:])))
    steps = total_steps(jobs, shape[0], config.block_k)
    tiles = -(-channels // config.block_m) * -(-channels // config.block_n)
    products = geometry.groups * tiles * steps
    products *= config.block_m * config.block_n * config.block_k
    # Jobs are written and read once, slots written and read, Ω written.
    moved = 2 * (len(jobs.jobs) + len(jobs.jobs_of_slot)) * channels**2
    moved += (channels * geometry.offsets) ** 2
    return Work(products, NUMBER * geometry.groups * moved, STRUCTURED_LAUNCHES)


def _im2col(geometry: ConvGeometry, shape: tuple[int, ...], mode: str) -> Work:
    side = shape[1] // geometry.groups * geometry.offsets
    config = default_symmetric(side, mode)
    rows = -(-side // config.block_m)
    out = (1, *geometry.output_size(shape[2:]))
    steps = prod(out[:-1]) * -(-out[-1] * shape[0] // config.block_k)
    products = geometry.groups * rows * (rows + 1) // 2 * steps
    products *= config.block_m**2 * config.block_k
    return Work(products, NUMBER * geometry.groups * side**2, IM2COL_LAUNCHES)
