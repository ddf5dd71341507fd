"""The patch Gram equals one loop per patch, whatever the method, geometry, dtype and layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kfc_fx.ops import patch_gram
from kfc_fx.ops.patch_gram import METHODS
from tests.ops.convolution_cases import Case, cases, in_memory_format, oracle

FLOOR = 1e-6  # of the largest entry: rounding of single sums, where torch happens to make none


def assert_as_exact_as(found: torch.Tensor, reference: torch.Tensor, in_torch: torch.Tensor):
    """Error against float64 at most twice torch's own in the same dtype."""
    scale = max(1.0, reference.abs().max().item()) if reference.numel() else 1.0
    floor = scale * (1e-14 if found.dtype == torch.float64 else FLOOR)
    own = (in_torch.double() - reference).abs().max().item() if reference.numel() else 0.0
    error = (found.double() - reference).abs().max().item() if reference.numel() else 0.0
    assert error <= 2 * own + floor


def unfold_and_multiply(case: Case) -> torch.Tensor:
    """What everybody does, in the dtype of the input; 2-d, symmetric padding, one group."""
    options = case.options
    patches = F.unfold(
        case.x,
        case.kernel,
        padding=[before for before, _ in options["padding"]],
        stride=options["stride"],
        dilation=options["dilation"],
    )
    rows = patches.mT.reshape(-1, patches.shape[1])
    return (rows.T @ rows).unsqueeze(0)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(cases(), st.booleans(), st.sampled_from(METHODS))
def test_equals_the_loop_over_patches(case, bias, method):
    omega = patch_gram(case.x, case.kernel, bias=bias, method=method, **case.options)
    expected = oracle(case, bias=bias)
    assert omega.shape == expected.shape
    double = case.x.dtype == torch.float64
    assert omega.dtype == (torch.float64 if double else torch.float32)
    torch.testing.assert_close(
        omega,
        expected.to(omega.dtype),
        rtol=1e-10 if double else 1e-4,
        atol=1e-10 if double else 1e-4,
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases(dtypes=(torch.float64,)), st.booleans())
def test_methods_agree(case, bias):
    first, *rest = (
        patch_gram(case.x, case.kernel, bias=bias, method=method, **case.options)
        for method in METHODS
    )
    for omega in rest:
        torch.testing.assert_close(omega, first)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases(), st.booleans(), st.integers(0, 4))
def test_parts_of_a_batch_add_up(case, bias, at):
    whole = patch_gram(case.x, case.kernel, bias=bias, **case.options)
    parts = sum(
        patch_gram(part, case.kernel, bias=bias, **case.options)
        for part in (case.x[:at], case.x[at:])
    )
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases(dtypes=(torch.float64, torch.float32)), st.booleans(), st.sampled_from(METHODS))
def test_symmetric_and_positive_semidefinite(case, bias, method):
    omega = patch_gram(case.x, case.kernel, bias=bias, method=method, **case.options).double()
    torch.testing.assert_close(omega, omega.mT, rtol=1e-6, atol=1e-6)
    lowest = torch.linalg.eigvalsh(omega).min().item()
    tolerance = 1e-10 if case.x.dtype == torch.float64 else 1e-4
    assert lowest >= -tolerance * max(1.0, omega.abs().max().item())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "padding"),
    [
        ((6, 24, 20, 20), 3, 1, 1),
        ((4, 48, 14, 14), 5, 1, 2),
        ((8, 3, 33, 33), 7, 2, 3),
        ((4, 20, 15, 15), 3, 2, 1),
        ((9, 40, 7, 7), 3, 1, 1),
        ((16, 150, 2, 2), 3, 1, 1),
        ((3, 130, 9, 9), 1, 1, 0),
    ],
)
def test_as_exact_as_torch(shape, kernel, stride, padding, dtype, method):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    pads = ((padding, padding),) * 2
    options = {"stride": (stride,) * 2, "padding": pads, "dilation": (1, 1), "groups": 1}
    case = Case(x, (kernel, kernel), options)
    reference = unfold_and_multiply(Case(x.double(), case.kernel, options))
    found = patch_gram(x, case.kernel, method=method, **options)
    assert_as_exact_as(found, reference, unfold_and_multiply(case))


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 4, 32])
@pytest.mark.parametrize("method", METHODS)
def test_memory_formats_of_real_sizes(number, groups, method):
    x = torch.randn(5, 32, 12, 13, dtype=torch.float64)
    options = {"padding": 1, "groups": groups, "method": method}
    expected = patch_gram(x, (3, 3), **options)
    found = patch_gram(in_memory_format(x, number), (3, 3), **options)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("padding", ["same", "valid", 1, (1, 2), ((0, 1), (2, 1))])
def test_every_form_of_padding(padding):
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    kernel = (3, 2)
    pairs = {
        "same": ((1, 1), (0, 1)),
        "valid": ((0, 0), (0, 0)),
        1: ((1, 1), (1, 1)),
        (1, 2): ((1, 1), (2, 2)),
    }.get(padding, padding)
    options = {"stride": (1, 1), "padding": pairs, "dilation": (1, 1), "groups": 1}
    torch.testing.assert_close(
        patch_gram(x, kernel, padding=padding), oracle(Case(x, kernel, options))
    )


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_one_number_holds_in_every_dimension(dimensions):
    x = torch.randn(2, 3, 6, 7, 5, dtype=torch.float64).flatten(2 + dimensions - 1)
    each = {"stride": 2, "padding": 1, "dilation": 2}
    tuples = {name: (number,) * dimensions for name, number in each.items()}
    kernel = (2,) * dimensions
    torch.testing.assert_close(
        patch_gram(x, 2, **each), patch_gram(x, kernel, **tuples), rtol=0, atol=0
    )
    if dimensions == 2:  # as F.unfold does
        rows = F.unfold(x, 2, **each).mT.flatten(0, 1)
        torch.testing.assert_close(patch_gram(x, 2, **each)[0], rows.mT @ rows)


def test_one_number_needs_spatial_dimensions():
    with pytest.raises(ValueError, match=r"needs x of 2 dimensions .* got shape \(5,\)"):
        patch_gram(torch.randn(5), 3)


def test_expanded_input():
    x = torch.randn(1, 4, 1, 1, dtype=torch.float64).expand(3, 4, 6, 6)
    torch.testing.assert_close(
        patch_gram(x, (3, 3), padding=1, method="structured"),
        patch_gram(x.contiguous(), (3, 3), padding=1, method="im2col"),
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (2, 0), (3, 1)])
def test_a_view_is_read_where_it_lies(method, kernel, padding):
    """Patches that do not overlap are taken from the input's own memory."""
    x = torch.randn(4, 8, 9, 6, dtype=torch.float64)[1:, 2:6, 1:8].mT
    options = {"stride": (2, 2), "padding": ((padding,) * 2,) * 2, "dilation": (1, 1)}
    options["groups"] = 2
    size = (kernel, kernel)
    torch.testing.assert_close(
        patch_gram(x, size, method=method, **options), oracle(Case(x, size, options))
    )


@pytest.mark.parametrize(
    ("shape", "kernel", "options", "message"),
    [
        ((2, 4, 5, 5), (3, 3), {"method": "fft"}, "method must be one of"),
        ((2, 4, 5), (3, 3), {}, "needs x of 4 dimensions"),
        ((2, 4, 5, 5), (3, 3), {"groups": 3}, "groups=3 does not divide the 4 channels"),
        ((2, 4, 5, 2), (3, 3), {}, "spatial dimension 1 is 2 with its padding"),
        ((2, 4, 5, 5), (3, 3), {"stride": 0}, "stride must be at least 1"),
        ((2, 4, 5, 5), (3, 3), {"padding": -1}, "padding must not be negative"),
        ((2, 4, 5, 5), (3, 3), {"padding": "full"}, "padding must be 'same', 'valid' or numbers"),
        ((2, 4, 5, 5, 5, 5), (3, 3, 3, 3), {}, "at most 3"),
    ],
)
def test_what_cannot_be_is_refused(shape, kernel, options, message):
    with pytest.raises(ValueError, match=message):
        patch_gram(torch.randn(shape), kernel, **options)


def test_integers_are_refused():
    with pytest.raises(ValueError, match="dtypes"):
        patch_gram(torch.ones(2, 4, 5, 5, dtype=torch.int64), (3, 3))
