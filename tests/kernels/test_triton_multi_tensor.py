"""One launch over many tensors against the same in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.triton_oracle import DEVICE, DTYPES, few_examples, needs_triton, random_values

pytest.importorskip("triton")
pytestmark = needs_triton

SHAPES = st.lists(
    st.sampled_from([(), (1,), (7,), (3, 5), (2048,), (2049,), (70, 65), (0,)]),
    min_size=1,
    max_size=5,
)


def values(shapes: list[tuple[int, ...]], dtype: torch.dtype, seed: int) -> list[Tensor]:
    return [random_values(shape, dtype, seed + i) for i, shape in enumerate(shapes)]


def assert_rounded_once(result: Tensor, reference: Tensor) -> None:
    """As near as float32 arithmetic and one rounding to the result's dtype come."""
    tolerance = 2 * torch.finfo(result.dtype).eps
    torch.testing.assert_close(result.double(), reference, rtol=tolerance, atol=4 * tolerance)


@given(shapes=SHAPES, source=st.sampled_from(DTYPES), decay=st.sampled_from([0.0, 0.5, 0.95]))
@few_examples
def test_moving_average(shapes: list[tuple[int, ...]], source: torch.dtype, decay: float) -> None:
    from kfc_fx.kernels.triton_multi_tensor import moving_average_, moving_average_reference

    factors, new = values(shapes, torch.float32, 0), values(shapes, source, 9)
    expected = [
        moving_average_reference(old.double(), now.double(), decay)
        for old, now in zip(factors, new, strict=True)
    ]
    moving_average_(factors, new, decay)
    for factor, reference in zip(factors, expected, strict=True):
        assert_rounded_once(factor, reference)


@given(shapes=SHAPES, dtype=st.sampled_from(DTYPES), state=st.sampled_from(["none", "p", "both"]))
@few_examples
def test_update(shapes: list[tuple[int, ...]], dtype: torch.dtype, state: str) -> None:
    from kfc_fx.kernels.triton_multi_tensor import update_, update_reference

    numbers = {"shrink": 0.01, "momentum": 0.9, "average_decay": 0.75}
    parameters, directions = values(shapes, dtype, 0), values(shapes, dtype, 9)
    momenta, averages = values(shapes, torch.float32, 20), values(shapes, torch.float32, 30)
    starts = momenta if state != "none" else [torch.zeros_like(p) for p in momenta]
    expected = [
        update_reference(*(t.double() for t in tensors), scale=0.5, **numbers)
        for tensors in zip(parameters, directions, starts, averages, strict=True)
    ]
    update_(
        parameters,
        directions,
        momenta if state != "none" else None,
        averages if state == "both" else None,
        scale=torch.tensor(0.5, device=DEVICE),
        **numbers,
    )
    for i, (theta, p, average) in enumerate(expected):
        assert_rounded_once(parameters[i], theta)
        if state != "none":
            assert_rounded_once(momenta[i], p)
        if state == "both":
            assert_rounded_once(averages[i], average)


def test_unaligned_views() -> None:
    from kfc_fx.kernels.triton_multi_tensor import moving_average_

    flat = random_values((31,), torch.float32, 0)
    before = flat.clone()
    moving_average_(
        [flat[1:11], flat[12:]], [torch.ones_like(t) for t in (flat[1:11], flat[12:])], 0.0
    )
    assert flat[0] == before[0]
    assert flat[11] == before[11]
    assert (flat[1:11] == 1).all()
    assert (flat[12:] == 1).all()


def test_no_tensors() -> None:
    from kfc_fx.kernels.triton_multi_tensor import moving_average_

    moving_average_([], [], 0.5)


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ([], "lists of 1 and 0"),
        ([torch.zeros(3, 2)], "shapes"),
        ([torch.zeros(2, 2, dtype=torch.float64)], "float64"),
        ([torch.zeros(2, 2).mT[:, :]], "strides"),
    ],
)
def test_what_does_not_fit_is_refused(new: list[Tensor], message: str) -> None:
    from kfc_fx.kernels.triton_multi_tensor import moving_average_

    new = [tensor.to(DEVICE) for tensor in new]
    with pytest.raises(ValueError, match=message):
        moving_average_([torch.zeros(2, 2, device=DEVICE)], new, 0.5)
