"""Which precision products round to, and which is fast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

LEAST_IN_BFLOAT16 = 64
"""Short side from which matrices are multiplied in bfloat16 where a device is faster in it."""


@contextmanager
def ieee_products() -> Iterator[None]:
    """float32 matrix products in float32, where the program lets them be TF32.

    TF32 keeps 11 significant bits: eigenvalues below a thousandth of the largest are lost in it,
    and columns are orthonormal to a thousandth only. The setting is the process's own; it is put
    back at the end.
    """
    # Reading the old setting raises where the program has used the per-backend one.
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        with _ieee_by_backend():
            yield
        return
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _ieee_by_backend() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def has_fast_bfloat16(device: str) -> bool:
    """Whether products of bfloat16 have units of their own: tensor cores, AVX512-BF16, AMX."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if kind == "cpu" and torch.backends.mkldnn.is_available():
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False
