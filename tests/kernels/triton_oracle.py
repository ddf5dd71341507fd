"""Where the Triton tests run, what they poison, and how accurate a kernel must be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from kfc_fx.kernels.geometry import ConvGeometry

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

needs_triton = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()),
    reason="needs a GPU, or the interpreter, in which test_triton_interpreter.py runs it",
)
# The interpreter runs every program of a launch as numpy calls, so examples are few.
few_examples = settings(
    max_examples=6 if INTERPRETED else 60, deadline=None, database=None, derandomize=True
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPSILON = torch.finfo(torch.float32).eps


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what ``torch.empty`` allocates with NaN, so that a place never written is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_as_accurate(result: Tensor, reference: Tensor, in_torch: Tensor, scale: Tensor) -> None:
    """The kernel's largest error is at most twice that of torch in the same dtype.

    ``reference`` is float64; ``scale`` bounds the sum of magnitudes of each entry's terms, so
    that where torch happens to be exact a few roundings of that sum are still allowed.
    """
    assert result.shape == reference.shape
    assert result.dtype == torch.float32
    error = (result.double() - reference).abs().max().item() if result.numel() else 0.0
    allowed = (in_torch.double() - reference).abs().max().item() if result.numel() else 0.0
    floor = 2 * EPSILON * scale.abs().max().item() if scale.numel() else 0.0
    assert error <= 2 * allowed + floor, (error, allowed, floor)


def random_values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Normal values that ``dtype`` holds exactly, with a mean away from zero."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) + 0.25).to(dtype).to(DEVICE)


@dataclass(frozen=True)
class Convolution:
    """An input and a convolution that fits it."""

    x: Tensor
    geometry: ConvGeometry
    bias: bool


@st.composite
def convolutions(draw: st.DrawFn, *, max_stride: int = 3) -> Convolution:
    """Small convolutions of one to three dimensions, of every kind of geometry.

    The output may be empty: a map may be smaller than the kernel.
    """
    ndim = draw(st.integers(0, 3))
    groups = draw(st.integers(1, 3))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(ndim))
    padding = tuple((draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in range(ndim))
    sizes = tuple(draw(st.integers(1, (9, 9, 7, 4)[ndim])) for _ in range(ndim))
    strides = tuple(draw(st.integers(1, max_stride)) for _ in range(ndim))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(ndim))
    geometry = ConvGeometry(kernel, strides, padding, dilation, groups)
    batch = draw(st.sampled_from([1, 2, 5, 9, 33]))
    channels = groups * draw(st.sampled_from([1, 2, 5]))
    dtype = draw(st.sampled_from(DTYPES))
    x = random_values((batch, channels, *sizes), dtype, draw(st.integers(0, 2**16)))
    match draw(st.sampled_from(["contiguous", "channels last", "slice"])):
        case "channels last":
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        case "slice":
            x = torch.stack([x, x], -1)[..., 0]
    return Convolution(x, geometry, draw(st.booleans()))
