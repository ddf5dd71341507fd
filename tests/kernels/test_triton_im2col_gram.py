"""Packing and the implicit-im2col SYRK against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from torch import Tensor

from kfc_fx.kernels.geometry import ConvGeometry, conv_geometry
from tests.kernels.triton_oracle import (
    DEVICE,
    DTYPES,
    Convolution,
    assert_as_accurate,
    convolutions,
    few_examples,
    needs_triton,
    poisoned_memory,
    random_values,
)

pytest.importorskip("triton")
pytestmark = needs_triton


def check(x: Tensor, geometry: ConvGeometry, *, bias: bool) -> Tensor:
    from kfc_fx.kernels.triton_im2col_gram import im2col_gram, im2col_gram_reference

    def reference(values: Tensor) -> Tensor:
        return im2col_gram_reference(values, geometry, bias=bias)

    with poisoned_memory():
        result = im2col_gram(x, geometry, bias=bias)
    wide = x.double()
    assert_as_accurate(result, reference(wide), reference(x.float()), reference(wide.abs()))
    assert torch.equal(result, result.mT)
    return result


@given(case=convolutions())
@few_examples
def test_agrees_with_float64(case: Convolution) -> None:
    check(case.x, case.geometry, bias=case.bias)


@given(case=convolutions())
@few_examples
def test_packing_moves_every_value(case: Convolution) -> None:
    from kfc_fx.kernels.triton_pack import pack, pack_reference

    with poisoned_memory():
        packed = pack(case.x, case.geometry)
    assert torch.equal(packed.buffer, pack_reference(case.x, case.geometry))


def test_rounding_to_tf32() -> None:
    from kfc_fx.kernels.triton_pack import pack, pack_reference, round_to_tf32_reference

    x = random_values((5, 3, 4), torch.float32, 0)
    x[0, 0] = torch.tensor([float("inf"), float("-inf"), float("nan"), 3.4e38])
    geometry = conv_geometry((1,))
    rounded = pack(x, geometry, round_tf32=True).buffer
    reference = round_to_tf32_reference(pack_reference(x, geometry))
    assert torch.equal(rounded.view(torch.int32), reference.view(torch.int32))
    finite = x[1:]
    assert ((round_to_tf32_reference(finite) - finite).abs() <= finite.abs() * 2**-11).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_batch_and_several_tiles(dtype: torch.dtype) -> None:
    x = random_values((70, 8, 5, 5), dtype, 1)
    check(x, conv_geometry((3, 3), padding=1), bias=True)


@pytest.mark.parametrize("bias", [False, True])
def test_maps_smaller_than_the_kernel(bias: bool) -> None:
    x = random_values((2, 3, 2, 2), torch.float32, 2)
    assert not check(x, conv_geometry((3, 3)), bias=bias).any()


def test_same_bits_every_time() -> None:
    x = random_values((9, 6, 6, 6), torch.float32, 3)
    geometry = conv_geometry((3, 3), padding=1, stride=2)
    assert torch.equal(check(x, geometry, bias=True), check(x, geometry, bias=True))


def test_empty_batch() -> None:
    x = torch.zeros(0, 4, 6, 6, device=DEVICE)
    assert not check(x, conv_geometry((3, 3), groups=2), bias=True).any()
