"""Eigenbases of factors that LAPACK does not always decompose."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfc_fx
from kfc_fx.linalg.eigenbasis import eigendecomposition


def sparse_rows(side: int, seed: int) -> Tensor:
    """Eight examples of ``side`` units, seven in ten of which are dead."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(8, side, generator=generator)
    return rows * (torch.rand(side, generator=generator) < 0.3)


def assert_decomposed(factor: Tensor) -> None:
    values, basis, failed = eigendecomposition(factor)
    assert not failed.any()
    identity = torch.eye(factor.shape[1]).expand_as(factor)
    torch.testing.assert_close(basis.mT @ basis, identity, rtol=0, atol=1e-5)
    found = basis @ torch.diag_embed(values) @ basis.mT
    torch.testing.assert_close(found, factor, rtol=0, atol=1e-5 * factor.abs().max().item())


@pytest.mark.parametrize("side", [100, 130, 240])
def test_factors_of_few_examples_and_dead_units(side):
    """MKL alone gives NaN for some of them and reports no failure."""
    rows = torch.stack([sparse_rows(side, seed) for seed in range(40)])
    factors = rows.mT @ rows
    assert_decomposed(factors)
    for factor in factors[:24]:
        assert_decomposed(factor[None])
    assert_decomposed(torch.zeros_like(factors[:2]))


def test_training_on_few_examples_with_dead_inputs_stays_finite():
    for seed in (2, 7, 12, 15):
        torch.manual_seed(seed)
        compiled = kfc_fx.compile(nn.Sequential(nn.Linear(130, 3, bias=False)))
        opt = kfc_fx.KFC(compiled, lr=1e-4)
        for _ in range(2):
            F.cross_entropy(compiled(sparse_rows(130, seed)), torch.arange(8) % 3).backward()
            opt.step()
            opt.zero_grad()
        assert opt.diagnostics.skipped_steps == 0
        assert all(p.isfinite().all() for p in compiled.parameters())


@pytest.mark.parametrize("in_float64", [True, False])
def test_a_result_that_is_not_finite_counts_as_failed(in_float64, monkeypatch):
    """The matrix alone is decomposed again, in float64; its neighbours stay."""
    own, decomposed = torch.linalg.eigh, []

    def eigh(matrix: Tensor):
        decomposed.append((matrix.dtype, matrix.numel() // 25))
        values, basis = own(matrix)
        if matrix.dim() == 3:
            basis[1, 0, 0] = torch.nan
        elif not in_float64:
            basis[0, 0] = torch.nan
        return values, basis

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    rows = torch.randn(3, 9, 5, generator=torch.Generator().manual_seed(0))
    factors = rows.mT @ rows
    values, basis, failed = eigendecomposition(factors)
    assert decomposed == [(torch.float32, 3), (torch.float64, 1)]
    assert failed.tolist() == [False, not in_float64, False]
    if not in_float64:
        assert torch.equal(basis[1], torch.eye(5))
        assert torch.equal(values[1], torch.ones(5))
        values, basis, factors = values[::2], basis[::2], factors[::2]
    torch.testing.assert_close(basis @ torch.diag_embed(values) @ basis.mT, factors)
