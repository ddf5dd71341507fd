"""float32 products that round as float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
