"""No CPU statistic depends on what its memory held before: places never written would be NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kfc_fx.kernels import cpu_assemble, cpu_buffers, cpu_im2col_gram, cpu_row_gram
from kfc_fx.kernels import cpu_separable_gram as cpu_separable
from kfc_fx.ops import (
    grouped_row_gram,
    patch_gram,
    row_gram,
    separable_gram,
)
from tests.kernels.triton_oracle import poisoned_memory
from tests.ops.convolution_cases import Case, cases

drawn = settings(max_examples=100, deadline=None, derandomize=True)
pieces = pytest.mark.parametrize("elements", [None, 1, 200])


@pytest.fixture
def small_buffers(elements: int | None) -> Iterator[None]:
    """So few elements at a time that small inputs take many passes."""
    with pytest.MonkeyPatch.context() as patched:
        if elements is not None:
            patched.setattr(cpu_buffers, "LEAST_ELEMENTS", 1)
            patched.setattr(cpu_buffers, "MOST_ELEMENTS", elements)
            patched.setattr(cpu_row_gram, "BUFFER_ELEMENTS", elements)
            patched.setattr(cpu_separable, "BUFFER_ELEMENTS", elements)
            patched.setattr(cpu_assemble, "CHUNK_ELEMENTS", elements)
            patched.setattr(cpu_assemble, "LEAST_ROWS", 1)
            patched.setattr(cpu_im2col_gram, "LEAST_ROWS", 1)
        yield


def assert_written(statistics: Callable[[], tuple[Tensor, ...]]) -> None:
    expected = statistics()
    with poisoned_memory():
        found = statistics()
    torch.testing.assert_close(found, expected)


def of_patches(case: Case, bias: bool) -> tuple[Tensor, ...]:
    x, arguments = case.x, {"kernel_size": case.kernel, **case.options}
    separable = separable_gram(x, **arguments) if case.kernel else ()
    return (
        *(patch_gram(x, bias=bias, method=m, **arguments) for m in ("structured", "im2col")),
        *separable,
    )


@pieces
@pytest.mark.usefixtures("small_buffers")
def test_statistics_of_patches():
    @drawn
    @given(cases(), st.booleans())
    def are_written(case: Case, bias: bool) -> None:
        assert_written(lambda: of_patches(case, bias))

    are_written()


@pieces
@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize("shape", [(9, 40, 12, 11), (3, 8, 40, 30), (2, 300, 4, 4), (0, 6, 9, 8)])
@pytest.mark.parametrize("stride", [1, 2])
def test_statistics_of_wider_patches(shape, stride):
    """Sides of several blocks, sums of several pieces, and layers with a channel a group."""
    for groups in {1, 2, shape[1]}:
        options = {"stride": (stride,) * 2, "padding": ((1, 1),) * 2, "groups": groups}
        case = Case(torch.randn(shape), (3, 3), {**options, "dilation": (1, 1)})
        assert_written(lambda case=case: of_patches(case, True))


@pieces
@pytest.mark.usefixtures("small_buffers")
def test_statistics_of_rows():
    @drawn
    @given(
        st.sampled_from([(0,), (1,), (200,), (2, 5), (5, 0), (3, 40), (2, 3, 5), (0, 2, 1)]),
        st.sampled_from([0, 1, 3, 300]),
        st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
        st.booleans(),
        st.booleans(),
    )
    def are_written(lead, side, dtype, bias, channels_first) -> None:
        x = torch.randn(*lead, side).to(dtype)
        x = x.movedim(-1, 0).contiguous().movedim(0, -1) if channels_first else x
        rows = x.reshape(prod(lead), side)
        ends = torch.tensor([0, len(rows) // 2, len(rows)])
        assert_written(lambda: (row_gram(x, bias=bias), grouped_row_gram(rows, ends, bias=bias)))

    are_written()
