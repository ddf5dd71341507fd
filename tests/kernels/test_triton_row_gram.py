"""The row Gram kernel against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.triton_oracle import (
    DEVICE,
    DTYPES,
    assert_as_accurate,
    few_examples,
    needs_triton,
    poisoned_memory,
    random_values,
)

pytest.importorskip("triton")
pytestmark = needs_triton


def check(x: Tensor, *, bias: bool, config: object = None) -> Tensor:
    from kfc_fx.kernels.triton_row_gram import row_gram, row_gram_reference

    with poisoned_memory():
        result = row_gram(x, bias=bias, config=config)
    reference = row_gram_reference(x.double(), bias=bias)
    in_torch = row_gram_reference(x.float(), bias=bias)
    magnitude = row_gram_reference(x.double().abs(), bias=bias)
    assert_as_accurate(result, reference, in_torch, magnitude)
    assert torch.equal(result, result.mT)
    return result


@st.composite
def row_tensors(draw: st.DrawFn) -> Tensor:
    """``[..., C]`` as a linear layer, an ``NCHW`` gradient and slices of either have it."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    channels = draw(st.sampled_from([1, 3, 16, 31, 64, 70]))
    dtype = draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(0, 2**16))
    match draw(st.sampled_from(["rows", "channels first", "every second row", "every second"])):
        case "rows":
            return random_values((*sizes, channels), dtype, seed)
        case "channels first":
            batch, *spatial = sizes
            return random_values((batch, channels, *spatial), dtype, seed).movedim(1, -1)
        case "every second row":
            return random_values((2 * sizes[0], *sizes[1:], channels), dtype, seed)[::2]
        case _:
            return random_values((*sizes, 2 * channels), dtype, seed)[..., ::2]


@given(x=row_tensors(), bias=st.booleans())
@few_examples
def test_agrees_with_float64(x: Tensor, bias: bool) -> None:
    check(x, bias=bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_many_rows_are_cut_into_parts(dtype: torch.dtype, bias: bool) -> None:
    check(random_values((1500, 20), dtype, 0), bias=bias)


@pytest.mark.parametrize("side", [127, 128, 129, 200])
def test_several_tiles(side: int) -> None:
    check(random_values((90, side), torch.bfloat16, 1), bias=True)


def test_locations_are_read_in_place() -> None:
    from kfc_fx.kernels.triton_row_gram import row_layout

    gradient = torch.zeros(3, 5, 4, 8, device=DEVICE)
    assert row_layout(gradient.movedim(1, -1)).x.data_ptr() == gradient.data_ptr()
    unaligned = torch.zeros(3, 5, 7, 7, device=DEVICE).movedim(1, -1)
    assert row_layout(unaligned).x.is_contiguous()


@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 5), (4, 0), (0, 0)])
@pytest.mark.parametrize("bias", [False, True])
def test_empty(shape: tuple[int, ...], bias: bool) -> None:
    result = check(torch.zeros(shape, device=DEVICE), bias=bias)
    if bias:
        assert result[-1, -1] == shape[0]


def test_same_bits_every_time() -> None:
    x = random_values((900, 70), torch.float32, 2)
    assert torch.equal(check(x, bias=True), check(x, bias=True))


def test_parts_of_a_batch_add_up() -> None:
    x = random_values((40, 33), torch.float32, 3)
    whole = check(x, bias=True)
    parts = check(x[:17], bias=True) + check(x[17:], bias=True)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-4)


@given(x=row_tensors(), bias=st.booleans())
@few_examples
def test_tf32_mode_rounds_its_input_once(x: Tensor, bias: bool) -> None:
    from kfc_fx.kernels.triton_pack import round_to_tf32_reference
    from kfc_fx.kernels.triton_row_gram import row_gram

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        result = row_gram(x.float(), bias=bias)
    finally:
        torch.set_float32_matmul_precision(before)
    rounded = round_to_tf32_reference(x.float().contiguous())
    torch.testing.assert_close(result, check(rounded, bias=bias), rtol=1e-5, atol=1e-4)


def test_tf32_mode_of_a_batch_of_maps() -> None:
    from kfc_fx.kernels.triton_row_gram import rounded_layout

    x = random_values((17, 5, 3, 3), torch.float32, 5).movedim(1, -1)
    layout = rounded_layout(x)
    assert layout.x.shape == (5, 1, 1, 9, 20)
    torch.testing.assert_close(layout.x[..., :17].flatten(1).sum(1), x.sum((0, 1, 2)), rtol=1e-3,
                               atol=1e-2)  # fmt: skip


def test_float64_is_refused() -> None:
    from kfc_fx.kernels.triton_row_gram import row_gram

    with pytest.raises(TypeError, match="float64"):
        row_gram(torch.zeros(2, 2, dtype=torch.float64, device=DEVICE))


def test_no_part_adds_up_more_rows_than_it_may_unless_memory_runs_out() -> None:
    from kfc_fx.kernels import triton_configs as configs
    from kfc_fx.kernels.triton_split_reduction import lower_tiles

    for side, rows in ((1040, 2**21), (64, 2**24), (4608, 200_000), (2**14, 2**20)):
        config = configs.default_symmetric(side, "half")
        tiles, steps = lower_tiles(side, config.block_m), rows // config.block_k
        parts = configs.default_splits(config, tiles, steps, 132)
        scratch = parts * tiles * config.block_m**2 * 4
        assert parts == 1 or scratch <= configs.SCRATCH_BYTES
        more = (parts + 1) * tiles * config.block_m**2 * 4
        assert rows <= parts * configs.MOST_ROWS or more > configs.SCRATCH_BYTES


def test_parts_short_enough_for_accuracy_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from kfc_fx.kernels import triton_configs as configs

    config = configs.default_symmetric(20, "half")
    monkeypatch.setattr(configs, "MOST_ROWS", 4 * config.block_k)
    assert configs.default_splits(config, 1, 24, 1) == 6
    check(random_values((24 * config.block_k, 20), torch.bfloat16, 6), bias=True)
