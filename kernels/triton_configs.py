"""Tile sizes of the Triton kernels: a small frozen set, and the default for each shape.

The defaults need no tuning run. They follow from three bounds: the accumulator must stay in
registers (at most 64 float32 numbers a thread for a square tile), the stages must fit in shared
memory, and a tile that overhangs a small factor multiplies zeros.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LEAST_STEPS = 8
# Tensor cores truncate each sum to float32, always downwards: on an H100 a part loses about
# rows · 2⁻²⁷ of its value, 2e-4 at this bound. Parts are added up with rounding to nearest.
MOST_ROWS = 2**15
SCRATCH_BYTES = 256 << 20
PARTIAL_ITEMSIZE = 4
INTERPRETER_PROCESSORS = 2
INTERPRETER_SHARED_BYTES = 101_376


@dataclass(frozen=True)
class GramConfig:
    """One tile shape of a Gram kernel.

    ``block_m × block_n`` is the tile of the result, ``block_k`` the number of rows that one step
    of the K loop multiplies, ``stages`` the depth of its load pipeline. It is not chosen where
    fewer than ``least_stages`` fit in shared memory.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    least_stages: int = 2

    @property
    def name(self) -> str:
        """Short form for reports, such as ``128x128x64 w8 s3``."""
        return f"{self.block_m}x{self.block_n}x{self.block_k} w{self.warps} s{self.stages}"

    def stage_bytes(self, itemsize: int) -> int:
        """Shared memory of one stage: both operand tiles."""
        return (self.block_m + self.block_n) * self.block_k * itemsize

    def fits(self, itemsize: int, shared_bytes: int) -> bool:
        """Whether a device with that much shared memory is to use it."""
        return self.least_stages * self.stage_bytes(itemsize) <= shared_bytes


@dataclass(frozen=True)
class Processor:
    """What a launch needs to know of a device."""

    count: int
    shared_bytes: int
    amd: bool = False


SYMMETRIC_16 = (
    GramConfig(32, 32, 64, 2, 4),
    GramConfig(64, 64, 64, 4, 4),
    GramConfig(128, 128, 64, 8, 3),
)
SYMMETRIC_TF32 = (
    GramConfig(32, 32, 32, 2, 4),
    GramConfig(64, 64, 32, 4, 4),
    GramConfig(128, 128, 32, 8, 3),
)
# Without tensor cores an operand tile passes through registers, so the tiles are smaller.
SYMMETRIC_IEEE = (
    GramConfig(32, 32, 16, 4, 2),
    GramConfig(64, 64, 16, 8, 2),
)

# Kernels by precision mode; ``"half"`` stands for bfloat16 and float16 inputs.
SYMMETRIC: dict[str, tuple[GramConfig, ...]] = {
    "half": SYMMETRIC_16,
    "tf32": SYMMETRIC_TF32,
    "ieee": SYMMETRIC_IEEE,
}

# Rectangular tiles for products of two different operands, by the same modes. The widest is for
# GPUs whose tensor cores read shared memory, which have room for all its stages: on others its
# operands pass through registers, and there are none left.
RECTANGULAR: dict[str, tuple[GramConfig, ...]] = {
    "half": (*SYMMETRIC_16, GramConfig(128, 256, 64, 8, 4, least_stages=4)),
    "tf32": (*SYMMETRIC_TF32, GramConfig(128, 256, 32, 8, 4, least_stages=4)),
    "ieee": SYMMETRIC_IEEE,
}


def precision_mode(dtype: torch.dtype) -> str:
    """``"half"``, ``"tf32"`` or ``"ieee"``: how a dtype is multiplied under torch's settings.

    Raises:
        TypeError: a dtype that these kernels do not take.
    """
    if dtype in (torch.bfloat16, torch.float16):
        return "half"
    if dtype != torch.float32:
        raise TypeError(f"Gram kernels take float32, bfloat16 or float16, got {dtype}")
    return "tf32" if _tf32_allowed() else "ieee"


def _tf32_allowed() -> bool:
    # Reading the old setting raises where the program has used the per-backend one.
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:
        return getattr(torch.backends.cuda.matmul, "fp32_precision", "ieee") == "tf32"


def processor(x: Tensor) -> Processor:
    """Multiprocessors and shared memory of the device that holds ``x``."""
    if x.device.type == "cpu":  # the interpreter
        return Processor(INTERPRETER_PROCESSORS, INTERPRETER_SHARED_BYTES)
    return _device_processor(x.device.index)


@functools.cache
def _device_processor(index: int) -> Processor:
    properties = torch.cuda.get_device_properties(index)
    amd = torch.version.hip is not None
    shared = getattr(
        properties, "shared_memory_per_block_optin", properties.shared_memory_per_block
    )
    return Processor(properties.multi_processor_count, shared, amd)


@functools.lru_cache(maxsize=256)
def fit_stages(config: GramConfig, itemsize: int, shared_bytes: int) -> GramConfig:
    """The config with no more stages than shared memory holds, and one at least."""
    stages = max(1, min(config.stages, shared_bytes // config.stage_bytes(itemsize)))
    return config if stages == config.stages else replace(config, stages=stages)


@functools.lru_cache(maxsize=512)
def default_symmetric(side: int, mode: str) -> GramConfig:
    """The largest square tile that wastes at most a quarter of its rows on ``side``."""
    configs = SYMMETRIC[mode]
    for config in reversed(configs[1:]):
        padded = -(-side // config.block_m) * config.block_m
        if padded * 4 <= side * 5:
            return config
    return configs[0] if side <= configs[0].block_m else configs[1]


@functools.lru_cache(maxsize=512)
def default_rectangular(side: int, mode: str, shared_bytes: int) -> GramConfig:
    """The largest tile that fits the device and wastes at most a quarter of its columns."""
    configs = RECTANGULAR[mode]
    itemsize = 2 if mode == "half" else 4
    for config in reversed(configs[1:]):
        padded = -(-side // config.block_n) * config.block_n
        if padded * 4 <= side * 5 and config.fits(itemsize, shared_bytes):
            return config
    return configs[0] if side <= configs[0].block_n else configs[1]


def default_splits(config: GramConfig, tiles: int, steps: int, processors: int) -> int:
    """Into how many parts to cut the K loop of ``tiles`` results of ``block_m × block_m``.

    Every processor gets two programs, but no part fewer than ``LEAST_STEPS`` steps, so that its
    pipeline fills and its partial result costs less than its products. Nor does a part add up
    more than ``MOST_ROWS`` rows, as long as the partial results fit in ``SCRATCH_BYTES``.
    """
    filling = min(-(-2 * processors // max(1, tiles)), steps // LEAST_STEPS)
    accurate = -(-steps // most_steps(config.block_k))
    affordable = SCRATCH_BYTES // (max(1, tiles) * config.block_m**2 * PARTIAL_ITEMSIZE)
    return max(1, filling, min(accurate, affordable))


def most_steps(block_k: int) -> int:
    """How many steps of a K loop one accumulator may add up; see ``MOST_ROWS``."""
    return max(1, MOST_ROWS // block_k)
