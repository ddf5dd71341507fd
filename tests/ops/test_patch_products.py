"""Slots: linear in the data, each distinct product once, and Ω when assembled."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kfc_fx.ops import assemble, patch_gram, patch_products
from tests.ops.convolution_cases import cases, oracle


@settings(max_examples=120, deadline=None, derandomize=True)
@given(cases(), st.booleans())
def test_assembled_slots_are_the_factor(case, bias):
    slots = patch_products(case.x, case.kernel, bias=bias, **case.options)
    omega = assemble(slots, case.x.shape[1:], case.kernel, bias=bias, **case.options)
    expected = oracle(case, bias=bias).to(omega.dtype)
    torch.testing.assert_close(omega, expected, rtol=1e-4, atol=1e-4)
    structured = patch_gram(case.x, case.kernel, bias=bias, method="structured", **case.options)
    torch.testing.assert_close(omega, structured, rtol=0, atol=0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases(dtypes=(torch.float64,)), st.integers(0, 4), st.floats(0, 1))
def test_a_moving_average_may_live_on_the_slots(case, at, decay):
    def mixed(form):
        return decay * form(case.x[:at]) + (1 - decay) * form(case.x[at:])

    arguments = {"bias": True, **case.options}
    slots = mixed(lambda x: patch_products(x, case.kernel, **arguments))
    torch.testing.assert_close(
        assemble(slots, case.x.shape[1:], case.kernel, **arguments),
        mixed(lambda x: patch_gram(x, case.kernel, method="im2col", **arguments)),
    )


@pytest.mark.parametrize(("kernel", "slots"), [(3, 29), (5, 157)])
def test_slots_are_fewer_than_blocks(kernel, slots):
    x = torch.randn(2, 8, 16, 16)
    found = patch_products(x, (kernel, kernel), padding="same")
    assert found.shape == (1, slots * 8 * 8)


def test_slots_of_another_map_are_refused():
    slots = patch_products(torch.randn(2, 4, 8, 8), (3, 3), padding=1)
    with pytest.raises(ValueError, match=r"have shape \(1, 720\)"):
        assemble(slots, (4, 8, 8), (3, 3), padding=0)
    with pytest.raises(ValueError, match="does not divide"):
        assemble(slots, (4, 8, 8), (3, 3), padding=1, groups=3)
