"""Bases that follow their factors: orthonormal, as diagonal as QR makes them, safe where that is
hard. Both decompositions run here, that of GPUs too."""

from __future__ import annotations

import pytest
import torch

from kfc_fx.linalg import orthogonal_iteration as module
from kfc_fx.linalg.eigenbasis import eigenbasis
from kfc_fx.linalg.orthogonal_iteration import cholesky_qr, householder_qr, orthogonal_iteration
from kfc_fx.linalg.precision import ieee_products


@pytest.fixture(params=[householder_qr, cholesky_qr], autouse=True)
def decomposition(request, monkeypatch):
    monkeypatch.setitem(module.DECOMPOSITIONS, "cpu", request.param)
    return request.param


@pytest.fixture
def no_householder(monkeypatch):
    def refuse(*_):
        raise AssertionError("Cholesky QR was not trusted")

    monkeypatch.setattr(module, "householder_qr", refuse)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def orthonormal(side: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.linalg.qr(random(2, side, side, seed=seed, dtype=dtype)).Q


def factor(
    side: int, condition: float = 1e3, seed: int = 0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Two second moments of ``8 * side`` rows; those of all seeds share their distribution."""
    scales = torch.logspace(0, -0.5, side, base=condition, dtype=dtype)
    rows = random(2, 8 * side, side, seed=seed + 1, dtype=dtype) * scales
    rows = rows @ orthonormal(side, seed=99, dtype=dtype)
    return rows.mT @ rows / rows.shape[1]


def rotated(factor: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    return basis.mT @ factor @ basis


def correlation(factor: torch.Tensor, basis: torch.Tensor) -> float:
    """Root mean square, by rows, of what is off the diagonal of ``Qᵀ F Q`` scaled to one there."""
    a = rotated(factor.double(), basis.double())
    scale = a.diagonal(dim1=1, dim2=2).rsqrt()
    off = a * scale[:, :, None] * scale[:, None, :] - torch.eye(a.shape[1])
    return float(torch.linalg.matrix_norm(off).max()) / a.shape[1] ** 0.5


def assert_orthonormal(basis: torch.Tensor, atol: float = 1e-5) -> None:
    identity = torch.eye(basis.shape[1], dtype=basis.dtype).expand_as(basis)
    torch.testing.assert_close(basis.mT @ basis, identity, atol=atol, rtol=0)


def assert_same_columns(found: torch.Tensor, expected: torch.Tensor, atol: float) -> None:
    """Up to signs."""
    signs = (found * expected).sum(1, keepdim=True).sign()
    torch.testing.assert_close(found * signs, expected, atol=atol, rtol=0)


def assert_columns_stay(found: torch.Tensor, basis: torch.Tensor, atol: float) -> None:
    """In some order: rounding decides which of equal eigenvalues is the largest."""
    largest = (basis.mT @ found).abs().amax(1)
    torch.testing.assert_close(largest, torch.ones_like(largest), atol=atol, rtol=0)


def test_it_is_the_q_of_qr_of_columns_that_descend():
    matrix = factor(40, 1e4, dtype=torch.float64)
    basis, _ = eigenbasis(factor(40, 1e4, seed=1, dtype=torch.float64))
    found, failed = orthogonal_iteration(matrix, basis)
    order = rotated(matrix, basis).diagonal(dim1=1, dim2=2).argsort(1, descending=True)
    descending = basis.gather(2, order[:, None, :].expand_as(basis))
    assert_same_columns(found, torch.linalg.qr(matrix @ descending).Q, 1e-9)
    assert not failed.any()


def test_refreshed_bases_stay_orthonormal(no_householder):
    basis, _ = eigenbasis(factor(40))
    for seed in range(1, 30):
        basis, failed = orthogonal_iteration(factor(40, seed=seed), basis)
        assert not failed.any()
    assert_orthonormal(basis)


def test_the_first_step_from_an_ascending_basis_is_a_good_one(no_householder):
    old, new = factor(64, 1e6), 0.6 * factor(64, 1e6) + 0.4 * factor(64, 1e6, seed=1)
    basis, _ = eigenbasis(old)
    found, _ = orthogonal_iteration(new, basis)
    assert correlation(new, basis) > 0.2, "nothing to follow"
    assert correlation(new, found) < 0.1
    assert correlation(new, torch.linalg.qr(new @ basis).Q) > 1, "order does not matter here"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", [1, 2, 3, 33])
def test_repeated_it_finds_the_eigenvectors(side, dtype):
    values = 2.0 ** -torch.arange(side, dtype=dtype)
    vectors = orthonormal(side, dtype=dtype)
    matrix = vectors * values @ vectors.mT
    basis = orthonormal(side, seed=1, dtype=dtype)
    for _ in range(40):
        basis, failed = orthogonal_iteration(matrix, basis)
        assert not failed.any()
    few = min(side, 8)
    single = dtype == torch.float32
    assert_same_columns(basis[..., :few], vectors[..., :few], 1e-3 if single else 1e-9)
    assert_orthonormal(basis, 1e-5 if single else 1e-13)


def test_where_a_factor_says_nothing_the_basis_stays():
    rows = random(2, 5, 40)
    matrix = rows.mT @ rows
    basis, _ = eigenbasis(matrix)
    found, failed = orthogonal_iteration(matrix, basis)
    assert_columns_stay(found, basis, 1e-2)
    assert_orthonormal(found)
    assert not failed.any()


@pytest.mark.parametrize("matrix", [torch.zeros(40, 40), 3 * torch.eye(40), 1e-30 * torch.eye(40)])
def test_where_all_eigenvalues_are_alike_the_basis_stays(matrix, no_householder):
    basis = orthonormal(40)
    found, failed = orthogonal_iteration(matrix.expand(2, 40, 40), basis)
    assert_columns_stay(found, basis, 1e-4)
    assert_orthonormal(found)
    assert not failed.any()


@pytest.mark.parametrize("condition", [1e4, 1e8, 1e12])
@pytest.mark.parametrize("rank", [3, 64])
def test_from_any_basis_it_is_orthonormal(condition, rank):
    """Far from the eigenvectors the columns that Cholesky QR is given are nearly dependent."""
    matrix = factor(64, condition) if rank == 64 else factor(64)[:, :, :rank]
    matrix = matrix if rank == 64 else matrix @ matrix.mT * condition
    basis = orthonormal(64, seed=5)
    for _ in range(3):
        basis, failed = orthogonal_iteration(matrix, basis)
        assert_orthonormal(basis)
        assert not failed.any()


def test_an_indefinite_factor_has_its_basis_too():
    matrix = random(2, 20, 20)
    basis, failed = orthogonal_iteration(matrix + matrix.mT, orthonormal(20))
    assert_orthonormal(basis)
    assert not failed.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_factor_keeps_its_basis_and_spares_the_others(bad):
    matrix = factor(20, seed=1)
    basis, _ = eigenbasis(factor(20))
    good, _ = orthogonal_iteration(matrix, basis)
    matrix[0, 3, 3] = bad
    found, failed = orthogonal_iteration(matrix, basis)
    assert failed.tolist() == [True, False]
    assert torch.equal(found[0], basis[0])
    torch.testing.assert_close(found[1], good[1], atol=1e-5, rtol=0)


def test_columns_that_are_nearly_dependent_are_left_to_householder(monkeypatch):
    hard, easy = [[1e-6, 9e-4], [9e-4, 1.0]], [[1.0, 0.0], [0.0, 1.0]]
    matrix, basis = torch.tensor([hard, easy]), torch.eye(2).repeat(2, 1, 1)
    calls = []
    own = module.householder_qr
    monkeypatch.setattr(module, "householder_qr", lambda q, p: calls.append(len(p)) or own(q, p))
    assert_orthonormal(cholesky_qr(basis, matrix))
    assert calls == [1]
    monkeypatch.setattr(module, "INDEPENDENT", 0.0)
    residual = rotated(torch.eye(2), cholesky_qr(basis, matrix)) - torch.eye(2)
    assert residual.abs().max() > 1e-4, "it could have been trusted"
    assert calls == [1]


@pytest.mark.parametrize("setting", ["high", "medium"])
def test_products_are_float32_and_the_setting_returns(setting):
    torch.set_float32_matmul_precision(setting)
    try:
        with ieee_products():
            assert torch.get_float32_matmul_precision() == "highest"
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision("highest")


def test_products_are_float32_where_the_setting_is_the_backends_own():
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        with ieee_products():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
