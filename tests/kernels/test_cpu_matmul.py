"""Products by oneDNN equal those of BLAS, and stand in the update where they pay."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import kfc_fx
from kfc_fx.codegen.text import products
from kfc_fx.kernels import cpu_matmul, cpu_symmetric_product
from kfc_fx.kernels.cpu_row_gram import row_gram
from kfc_fx.kernels.cpu_symmetric_product import upper_blocks

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN"
)


@pytest.fixture
def onednn(monkeypatch):
    """As on a processor where oneDNN is faster, at any size."""
    monkeypatch.setattr(cpu_matmul, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(cpu_symmetric_product, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(cpu_matmul, "LEAST_WORK", 0)
    monkeypatch.setattr(products, "LEAST_WORK", 0)


sides = st.integers(1, 40)


@given(st.integers(1, 3), sides, sides, sides, st.booleans(), st.booleans())
def test_products_of_any_strides(count, rows, inner, columns, left, right):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_matmul, "onednn_is_faster", lambda: True)
        patch.setattr(cpu_matmul, "LEAST_WORK", 0)
        first = torch.randn(count, inner, rows).mT if left else torch.randn(count, rows, inner)
        second = torch.randn(count, columns, inner).mT if right else torch.randn(1, inner, columns)
        second = second.expand(count, inner, columns)
        assert cpu_matmul.goes_to_onednn(first, second)
        found = cpu_matmul.matmul(first, second)
        torch.testing.assert_close(found, first @ second, rtol=1e-5, atol=1e-5)


def test_parts_of_wider_matrices_are_copied_first(onednn, monkeypatch):
    """A column slice has rows that do not follow each other."""
    seen = []
    linear = cpu_matmul._linear
    monkeypatch.setattr(cpu_matmul, "_linear", lambda *m: seen.extend(m) or linear(*m))
    wide = torch.randn(2, 6, 9)
    found = cpu_matmul.matmul(wide[:, :, :5], wide[:, 1:, 2:5])
    torch.testing.assert_close(found, wide[:, :, :5] @ wide[:, 1:, 2:5])
    assert len(seen) == 4
    assert all(1 in m.stride() and m.stride()[0] * m.stride()[1] in m.shape for m in seen)


def test_copies_keep_the_order_that_they_find(onednn, monkeypatch):
    seen = []
    linear = cpu_matmul._linear
    monkeypatch.setattr(cpu_matmul, "_linear", lambda *m: seen.extend(m) or linear(*m))
    wide = torch.randn(1, 6, 9)
    columns = wide[:, :, :5].mT  # [1, 5, 6], next to each other along the first side
    torch.testing.assert_close(cpu_matmul.matmul(columns, columns.mT), columns @ columns.mT)
    assert [m.stride() for m in seen] == [(1, 5), (1, 5)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(300, 130), (2, 200, 1100), (3, 5, 7), (4, 300, 260)])
def test_row_grams_are_the_same_by_either_library(shape, bias, onednn, monkeypatch):
    """Also in blocks, and added up over several copies of images."""
    torch.manual_seed(0)
    calls = []
    linear = cpu_matmul._linear
    monkeypatch.setattr(cpu_matmul, "_linear", lambda *m: calls.append(1) or linear(*m))
    x = torch.randn(shape)
    images = torch.randn(*shape[:1], shape[-1], *shape[1:-1]).movedim(1, -1)
    for rows in (x, images):
        flat = rows.double().reshape(-1, shape[-1])
        flat = torch.cat([flat, flat.new_ones(len(flat), 1)], 1) if bias else flat
        found = row_gram(rows, bias=bias)
        torch.testing.assert_close(found, (flat.T @ flat).float(), rtol=1e-4, atol=1e-3)
    assert calls


def test_onednn_multiplies_wider_blocks(onednn, monkeypatch):
    assert [len(upper_blocks(side, 999)) for side in (300, 1023, 1024, 5000)] == [1, 1, 3, 36]
    monkeypatch.setattr(cpu_symmetric_product, "onednn_is_faster", lambda: False)
    assert [len(upper_blocks(side, 999)) for side in (255, 300, 1024, 5000)] == [1, 3, 10, 36]


def test_what_onednn_is_not_for_goes_to_torch(onednn):
    """Other dtypes, broadcast products, tensors without data."""
    for dtype, shapes in (
        (torch.float64, ((2, 3, 4), (2, 4, 5))),
        (torch.float32, ((2, 1, 3, 4), (2, 6, 4, 5))),
        (torch.float32, ((1, 3, 4), (2, 4, 5))),
    ):
        first, second = (torch.randn(shape, dtype=dtype) for shape in shapes)
        assert not cpu_matmul.goes_to_onednn(first, second)
        torch.testing.assert_close(cpu_matmul.matmul(first, second), first @ second)
    meta = torch.randn(2, 3, 3, device="meta")
    assert cpu_matmul.matmul(meta, meta).shape == (2, 3, 3)


def test_compiled_code_keeps_the_product_that_inductor_knows(onednn):
    first = torch.randn(2, 8, 8)
    compiled = torch.compile(lambda x: cpu_matmul.matmul(x, x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(first), first @ first, rtol=0, atol=0)


def test_small_products_stay_with_blas(monkeypatch):
    monkeypatch.setattr(cpu_matmul, "onednn_is_faster", lambda: True)
    narrow, wide = torch.randn(1, 32, 32), torch.randn(1, 512, 512)
    assert not cpu_matmul.goes_to_onednn(narrow, narrow)
    assert cpu_matmul.goes_to_onednn(wide, wide)


@pytest.mark.parametrize("scaling", ["adam", "spectral", "eigen", "inverse"])
def test_updates_take_the_same_step_by_either_library(scaling, onednn, monkeypatch):
    by_onednn, source = trained(scaling)
    assert "from kfc_fx.kernels.cpu_matmul import matmul" in source
    assert " @ " not in source.split("def apply")[1]
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    monkeypatch.setattr(cpu_matmul, "onednn_is_faster", lambda: False)
    by_blas, source = trained(scaling)
    assert "matmul" not in source
    begin = before()
    for name, value in by_blas.items():
        apart, moved = (by_onednn[name] - value).norm(), (value - begin[name]).norm()
        assert apart < 0.01 * moved, (name, apart, moved)


def test_an_update_of_narrow_layers_alone_keeps_its_operators(monkeypatch):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    assert "matmul" not in trained("adam")[1]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 10))


def before() -> dict[str, torch.Tensor]:
    """The parameters that training begins with."""
    return {n: p.detach() for n, p in network().named_parameters()}


def trained(scaling: str) -> tuple[dict[str, torch.Tensor], str]:
    """Parameters after three steps, and the source of the update."""
    net = network()
    compiled = kfc_fx.compile(net, likelihood="gaussian")
    opt = kfc_fx.KFC(compiled, lr=0.01, scaling=scaling, seed=1)
    for _ in range(3):
        # Not by cross-entropy: along the direction it does not depend on, the sign of a step is
        # rounding.
        outputs = compiled(torch.randn(64, 3, 4, 4))
        ((outputs - torch.randn(64, 10)).square().sum() / 128).backward()
        opt.step()
        opt.zero_grad()
    return {n: p.detach() for n, p in net.named_parameters()}, opt.update_source


@pytest.mark.parametrize(
    ("vendor", "width", "mkl"),
    list(
        product(
            ["vendor_id\t: AuthenticAMD", "vendor_id\t: GenuineIntel"], ["AVX512", "AVX2"], [0, 1]
        )
    ),
)
def test_onednn_is_faster_on_amd_with_avx512_and_mkl(vendor, width, mkl, monkeypatch):
    monkeypatch.setattr(cpu_matmul, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: width)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: bool(mkl))
    expected = "AMD" in vendor and width == "AVX512" and bool(mkl)
    assert cpu_matmul.onednn_is_faster.__wrapped__() == expected
