"""Matrix products on CPU, by oneDNN where the BLAS of torch leaves half of the processor unused.

torch multiplies float32 matrices by MKL, which runs its AVX2 code on AMD's processors, whatever
they can do; convolutions go through oneDNN, which runs its AVX-512 code there. On two cores of an
EPYC with AVX-512 a product of side 512 took 0.45 of MKL's time, one of side 256 0.52, one of side
128 0.91.
"""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

LEAST_WORK = 5e6
"""Floating-point operations of one product, for each thread, below which copies into oneDNN's
layouts and the call cost more than it gains."""


@lru_cache(maxsize=1)
def onednn_is_faster() -> bool:
    """Whether it is on this processor: AVX-512 by AMD, with MKL as BLAS.

    Told by names and not by a clock, so that the same run gives the same bits every time.
    """
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return libraries and wide and "AuthenticAMD" in _vendor()


def matmul(first: Tensor, second: Tensor) -> Tensor:
    """``first @ second``, each matrix by whichever library is faster at its size.

    Args:
        first: ``[L, R, K]``, of any strides as the other.
        second: ``[L, K, C]``, of the same dtype.
    """
    if not goes_to_onednn(first, second):
        # Of small matrices, what `@` does to find out that it is `bmm` takes as long as that does.
        own, other = first.shape, second.shape
        stacked = len(own) == len(other) == 3 and own[0] == other[0]
        return torch.bmm(first, second) if stacked else first @ second
    rows, columns = _dense(first), _dense(second.mT)
    parts = [_linear(rows[index], columns[index]) for index in range(len(rows))]
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)


def goes_to_onednn(first: Tensor, second: Tensor) -> bool:
    """Whether :func:`matmul` takes oneDNN for these."""
    if torch.compiler.is_compiling():
        return False
    own, other = first.shape, second.shape  # asked once: a step has many small products
    return (
        len(own) == len(other) == 3
        and 2 * own[1] * other[1] * other[2] >= LEAST_WORK * torch.get_num_threads()
        and own[0] == other[0]
        and first.dtype == torch.float32
        and first.device.type == second.device.type == "cpu"
        and onednn_is_faster()
    )


def _dense(matrices: Tensor) -> Tensor:
    """With rows or columns next to each other in memory: oneDNN took 60 to 1,800 times as long
    where the second matrix was part of a wider one."""
    _, rows, columns = matrices.shape
    if matrices.stride()[1:] in ((columns, 1), (1, rows)):
        return matrices
    # In the order that they have: to transpose them takes fifty times as long, and more.
    return matrices.mT.contiguous().mT if matrices.stride(1) == 1 else matrices.contiguous()


def _linear(rows: Tensor, columns: Tensor) -> Tensor:
    """``rows columnsᵀ``. The op that inductor calls for a linear layer: the one way to oneDNN's
    product of float32 matrices, transposed or not, that needs no layer around it."""
    return torch.ops.mkldnn._linear_pointwise(rows, columns, None, "none", [], "")  # type: ignore[no-any-return]


def _vendor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("vendor_id")), "")
