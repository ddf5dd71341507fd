"""Eigenbases that follow a factor. The generated update calls these."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kfc_fx.kernels.cpu_matmul import matmul
from kfc_fx.linalg.eigenbasis import eigenbasis
from kfc_fx.linalg.precision import ieee_products

FLOOR = 2.0
"""δ, in units of the rounding of the largest eigenvalue: about what ``Qᵀ F Q`` is rounded by. At 8
the smallest eigenvectors are told apart visibly less."""

INDEPENDENT = 0.3
"""Least distance of a column of length one from the span of those before it that Cholesky QR is
trusted with: it leaves columns orthonormal to 1e-5 in single precision."""


def next_basis(factor: Tensor, basis: Tensor, *, first: bool) -> tuple[Tensor, Tensor]:
    """:func:`orthogonal_iteration`, or at the ``first`` refresh, where there is no basis to go on
    from, :func:`kfc_fx.linalg.eigenbasis.eigenbasis`."""
    return eigenbasis(factor) if first else orthogonal_iteration(factor, basis)


def orthogonal_iteration(factor: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """One step of orthogonal iteration, ``Q ← qr(F Q)`` (Golub & Van Loan, section 8.2.4).

    Warm-started from the basis of a slightly older factor it follows the eigenvectors at the
    price of a few products. Columns come by descending ``qᵀ F q``, whatever their order was: QR
    takes of each column what lies along those before it, and a small eigenvector that has picked
    up some of a large one must lose it, not hand it on.

    The decomposition is Householder's, but on GPUs, which do its panels one column after the
    other, :func:`cholesky_qr`; on a CPU that one has twice the operations and is slower.

    Args:
        factor: ``[L, D, D]`` symmetric positive semidefinite.
        basis: ``[L, D, D]`` orthonormal.

    Returns:
        The new basis and ``failed`` ``[L]``: where the result was not finite the old one stays.
    """
    decompose = DECOMPOSITIONS.get(factor.device.type, householder_qr)
    with ieee_products():
        turned = decompose(*_descending(factor, basis))
    failed = ~turned.isfinite().flatten(1).all(1)
    return torch.where(failed[:, None, None], basis, turned), failed


def cholesky_qr(basis: Tensor, product: Tensor) -> Tensor:
    """The Q of ``qr(F Q)`` by products and two Cholesky decompositions.

    With ``L Lᵀ = Qᵀ F Q`` it is the Q of ``F Q = (Q L) Lᵀ``, hence of ``Q L``. Where ``Qᵀ F Q``
    is nearly diagonal and descends, the columns of ``Q L`` are nearly orthogonal once they have
    length one, whatever the condition of F, and Cholesky QR (Fukaya et al. 2020) is as good as
    Householder's. It also takes out what Q itself has lost of its orthogonality.

    Args:
        basis: Q, ``[L, D, D]`` orthonormal, by descending ``qᵀ F q``.
        product: ``F Q``, F positive definite.

    Returns:
        ``[L, D, D]``; by Householder's QR where a decomposition failed, or columns came too close
        to dependence.
    """
    lower, indefinite = torch.linalg.cholesky_ex(basis.mT @ product)
    near = basis @ (lower / torch.linalg.vector_norm(lower, dim=1, keepdim=True))
    upper, dependent = torch.linalg.cholesky_ex(near.mT @ near, upper=True)
    turned = torch.linalg.solve_triangular(upper, near, upper=True, left=False)
    independent = upper.diagonal(dim1=1, dim2=2).amin(1) > INDEPENDENT
    rows = ((indefinite != 0) | (dependent != 0) | ~independent).nonzero().flatten()
    if not len(rows):
        return turned
    return turned.index_copy(0, rows, householder_qr(basis[rows], product[rows]))


def householder_qr(_: Tensor, product: Tensor) -> Tensor:
    """The same by LAPACK's QR, for which the condition of ``F Q`` does not matter."""
    return torch.linalg.qr(product).Q


DECOMPOSITIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cuda": cholesky_qr}
"""By type of device; on the others :func:`householder_qr`."""


def _descending(factor: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """``(Q, (F + δI) Q)``, columns by descending ``qᵀ F q``.

    δ, next to the rounding of F's largest eigenvalue, moves no eigenvector: directions of which
    the factor knows nothing stay where they were.
    """
    # Eigenvectors in rows: that is how LAPACK left them in memory, and whole rows move quickly.
    rows = basis.mT
    product = matmul(rows, factor)
    quotients = (rows * product).sum(2)
    number = torch.finfo(factor.dtype)
    largest = quotients.amax(1).clamp(min=number.tiny**0.5)[:, None, None]
    product = torch.addcmul(product, rows, largest, value=FLOOR * number.eps)
    order = quotients.argsort(1, descending=True)
    matrix = torch.arange(len(factor), device=factor.device)[:, None]
    return rows[matrix, order].mT, product[matrix, order].mT
