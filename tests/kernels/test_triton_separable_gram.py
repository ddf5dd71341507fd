"""The partial traces of the patch Gram, and the pass that packs for them, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kfc_fx.kernels.cpu_separable_gram import reach_counts
from kfc_fx.kernels.geometry import ConvGeometry, conv_geometry
from kfc_fx.ops import cuda_dispatch
from kfc_fx.ops.convolution import encoded
from tests.kernels.triton_oracle import (
    DEVICE,
    DTYPES,
    EPSILON,
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


def check(x: Tensor, geometry: ConvGeometry) -> tuple[Tensor, Tensor]:
    """Hold both traces to those of the dense factor in float64.

    Only rounding the weighted pixels of a dtype of two bytes may cost more than torch's own
    error: half a last place of each factor of a product.
    """
    from kfc_fx.kernels.triton_separable_gram import separable_gram_reference

    with poisoned_memory():
        channel, offset = cuda_dispatch.separable_gram(x, encoded(geometry))
    exact, in_torch, magnitude = (
        separable_gram_reference(values, geometry)
        for values in (x.double(), x.float(), x.double().abs())
    )
    assert_as_accurate(offset, exact[1], in_torch[1], magnitude[1])
    if x.dtype == torch.float32:
        assert_as_accurate(channel, exact[0], in_torch[0], magnitude[0])
    else:
        assert channel.dtype == torch.float32
        error = (channel.double() - exact[0]).abs()
        bound = (1.01 * torch.finfo(x.dtype).eps + 8 * EPSILON) * magnitude[0]
        # Weights near zero leave subnormal numbers in float16.
        assert (error <= bound + torch.finfo(torch.float16).smallest_normal * EPSILON).all()
    for result in (channel, offset):
        assert torch.equal(result, result.mT)
    return channel, offset


@given(case=convolutions())
@few_examples
def test_traces_of_the_dense_factor(case: Convolution) -> None:
    check(case.x, case.geometry)


@given(case=convolutions(), together=st.sampled_from([1, 5]))
@few_examples
def test_packing_moves_and_weighs_every_value(case: Convolution, together: int) -> None:
    from kfc_fx.kernels import triton_separable_gram as separable
    from kfc_fx.kernels.triton_pack import pack_reference

    x, geometry = case.x, case.geometry
    channels = x.shape[1] // geometry.groups
    together = together if channels % together == 0 else channels
    sizes = x.shape[2:]
    if geometry.ndim == 0 or 0 in geometry.output_size(sizes):
        return
    with pytest.MonkeyPatch.context() as patched, poisoned_memory():
        patched.setattr(separable, "channels_together", lambda *_: together)
        weighted, maps, most = separable.separable_pack(x, geometry)
    plain = pack_reference(x, geometry)  # [C, D', H', W', N']
    blocks = plain.unflatten(0, (-1, together)).movedim(1, 4).flatten(4)
    assert torch.equal(maps.buffer, blocks)
    weight = torch.ones((), dtype=torch.float64)
    for axis, out in enumerate(geometry.output_size(sizes)):
        counts = reach_counts(geometry, axis, sizes[axis], out)
        weight = weight.unsqueeze(-1) * torch.tensor(counts, dtype=torch.float64)
    assert most == max(1, weight.max())
    unpadded = pack_reference(x, conv_geometry((1,) * geometry.ndim)).double()
    expected = unpadded.flatten(1, 3) * (weight / most).sqrt().flatten().to(DEVICE)[:, None]
    error = (weighted.buffer[:, 0, 0].double() - expected).abs()
    assert (error <= torch.finfo(x.dtype).eps * expected.abs() + 2.0**-25).all()
    assert (weighted.buffer[:, 0, 0][expected == 0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_channels_add_up_in_their_group(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kfc_fx.kernels import triton_separable_gram as separable

    x = random_values((5, 12, 5, 6), dtype, 0)
    geometry = conv_geometry((3, 3), padding=1, groups=2)
    whole = check(x, geometry)
    monkeypatch.setattr(separable, "channels_together", lambda *_: 2)
    for blocked, result in zip(check(x, geometry), whole, strict=True):
        torch.testing.assert_close(blocked, result)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [(5, 5), (7, 7)])
def test_larger_kernels(dtype: torch.dtype, kernel: tuple[int, int]) -> None:
    x = random_values((9, 3, 13, 12), dtype, 1)
    check(x, conv_geometry(kernel, stride=2, padding=3))


@pytest.mark.parametrize("groups", [1, 2])
def test_pixels_that_nothing_reaches_count_for_nothing(groups: int) -> None:
    x = random_values((3, 4, 9, 8), torch.float32, 2)
    for geometry in (
        conv_geometry((1, 1), stride=3, padding=1, groups=groups),
        conv_geometry((2, 2), stride=3, groups=groups),
        conv_geometry((2, 2), stride=2, dilation=2, padding=((1, 0), (0, 2)), groups=groups),
    ):
        lines = [
            torch.tensor(reach_counts(geometry, axis, x.shape[2 + axis], out)) > 0
            for axis, out in enumerate(geometry.output_size(x.shape[2:]))
        ]
        reached = lines[0][:, None] & lines[1]
        assert not reached.all()
        changed = torch.where(reached.to(DEVICE), x, torch.inf)
        others = cuda_dispatch.separable_gram(changed, encoded(geometry))
        for result, other in zip(check(x, geometry), others, strict=True):
            assert torch.equal(result, other)


def test_large_float16_does_not_overflow_when_it_is_weighted() -> None:
    x = torch.full((1, 2, 4, 4), 65_000.0, dtype=torch.float16, device=DEVICE)
    channel, _ = check(x, conv_geometry((3, 3), padding=1))
    assert channel.isfinite().all()


@pytest.mark.parametrize("padding", [0, 1])
def test_tf32_mode_rounds_its_input_once(padding: int) -> None:
    from kfc_fx.kernels.triton_pack import round_to_tf32_reference

    x = random_values((6, 5, 6, 7), torch.float32, 3)
    geometry = conv_geometry((2, 2), stride=2, padding=padding)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        channel, offset = cuda_dispatch.separable_gram(x, encoded(geometry))
    finally:
        torch.set_float32_matmul_precision(before)
    # Every pixel that is reached is met once, so no weight is rounded.
    rounded = check(round_to_tf32_reference(x), geometry)
    assert not torch.equal(channel, check(x, geometry)[0])
    torch.testing.assert_close(channel, rounded[0], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(offset, rounded[1], rtol=1e-6, atol=1e-5)


def test_same_bits_every_time() -> None:
    x = random_values((9, 6, 6, 6), torch.float32, 4)
    geometry = conv_geometry((3, 3), padding=1, stride=2)
    for first, second in zip(check(x, geometry), check(x, geometry), strict=True):
        assert torch.equal(first, second)


def test_weights_are_copied_to_the_device_once() -> None:
    from kfc_fx.kernels import triton_separable_gram as separable

    x = random_values((2, 4, 5, 7), torch.float32, 5)
    geometry = conv_geometry((3, 2), padding=1)
    check(x, geometry)
    misses = separable._counts.cache_info().misses
    check(x[:1], conv_geometry((3, 2), padding=1))
    assert separable._counts.cache_info().misses == misses


@pytest.mark.parametrize("shape", [(0, 4, 6, 6), (2, 4, 2, 2)])
def test_without_patches(shape: tuple[int, ...]) -> None:
    x = torch.ones(shape, device=DEVICE)
    channel, offset = cuda_dispatch.separable_gram(x, encoded(conv_geometry((3, 3), groups=2)))
    assert channel.shape == (2, 2, 2)
    assert offset.shape == (2, 9, 9)
    assert not channel.any()
    assert not offset.any()


def test_float64_takes_the_plain_way() -> None:
    x = random_values((2, 4, 5, 5), torch.float64, 6)
    results = cuda_dispatch.separable_gram(x, encoded(conv_geometry((3, 3), padding=1)))
    assert [result.dtype for result in results] == [torch.float64] * 2


def test_fewest_channels_that_fill_lines_lie_together() -> None:
    from kfc_fx.kernels.triton_separable_gram import LEAST_LINE, channels_together

    assert channels_together(64, 1, LEAST_LINE, 132) == 1
    assert channels_together(64, 1, LEAST_LINE // 4, 132) == 4
    assert channels_together(512, 1, LEAST_LINE, 132) == 2  # 264 programs
    assert channels_together(509, 1, LEAST_LINE, 132) == 509  # a prime
    assert channels_together(6, 100, LEAST_LINE, 132) == 3
    assert channels_together(3, 1, 1, 132) == 3
