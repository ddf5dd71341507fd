"""Moments in half the bytes. The generated update calls these."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

HALF = torch.bfloat16
GOLDEN = -1640531527
"""2³² over the golden ratio, which spreads what it multiplies (Knuth 1998, section 6.4)."""
DROPPED = 0xFFFF
"""The bits of a float32 that bfloat16 does not have."""
IN_CACHE = 1 << 15
"""Numbers that a core's cache holds while they are rounded."""


def kept_dtype(dtype: torch.dtype, *, halves: bool) -> torch.dtype:
    """The type in which moments are kept that are computed with in ``dtype``."""
    return HALF if halves and dtype == torch.float32 else dtype


def widened(values: Sequence[Tensor]) -> list[Tensor]:
    """Each in float32, to be computed with; those in another type than bfloat16 as they are."""
    return [value.float() if value.dtype == HALF else value for value in values]


def halved(values: Sequence[Tensor]) -> list[Tensor]:
    """Each by :func:`rounded`; those in float64 as they are."""
    return [rounded(value) if value.dtype == torch.float32 else value for value in values]


def rounded(value: Tensor) -> Tensor:
    """A float32 in bfloat16, up or down by chance, with its value as the mean.

    A moving average changes by less than half a unit of bfloat16 at most steps: to the nearest it
    would stay where it is, and only rise. The chance is a hash of the bits of the value, so that a
    run that goes on from a saved one takes the same.
    """
    if value.device.type != "cpu" or torch.compiler.is_compiling():
        return _rounded(value.contiguous())
    found = torch.empty(value.shape, dtype=HALF)
    parts = value.contiguous().view(-1).split(IN_CACHE)
    for part, own in zip(found.view(-1).split(IN_CACHE), parts, strict=True):
        part.copy_(_rounded(own))
    return found


def _rounded(value: Tensor) -> Tensor:
    bits = value.view(torch.int32)
    chance = bits * GOLDEN
    chance >>= 16
    chance &= DROPPED
    chance += bits
    chance &= ~DROPPED
    return chance.view(torch.float32).to(HALF)
