"""Eigenbases of stacked factors. The generated update calls these."""

from __future__ import annotations

import torch
from torch import Tensor


def eigenbasis(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal eigenvectors of symmetric matrices, eigenvalues ascending.

    Args:
        factor: ``[L, D, D]`` symmetric.

    Returns:
        ``basis`` ``[L, D, D]`` with eigenvectors in columns, and ``failed`` ``[L]`` bool: where
        ``eigh`` did not converge, not in float64 either, the basis is the identity.
    """
    _, basis, failed = eigendecomposition(factor)
    return basis, failed


def eigendecomposition(factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(eigenvalues [L, D] ascending, eigenvectors [L, D, D], failed [L])``.

    Where it failed, eigenvalues are one and eigenvectors the identity.
    """
    if factor.shape[1] == 2:
        return _of_two_by_two(factor)
    no_failure = torch.zeros(factor.shape[0], dtype=torch.bool, device=factor.device)
    try:
        values, basis = torch.linalg.eigh(factor)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return _one_by_one(factor)
    return values, basis, no_failure


def _of_two_by_two(factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In closed form: LAPACK would take the matrices one by one, and norm layers have one for
    every channel."""
    a, b, c = factor[:, 0, 0], factor[:, 0, 1], factor[:, 1, 1]
    failed = ~(a + b + c).isfinite()
    angle = torch.atan2(2 * b, a - c) / 2
    cos, sin = angle.cos(), angle.sin()
    radius = torch.hypot((a - c) / 2, b)
    values = torch.stack([(a + c) / 2 - radius, (a + c) / 2 + radius], 1)
    basis = torch.stack([torch.stack([-sin, cos], 1), torch.stack([cos, sin], 1)], 2)
    values = torch.where(failed[:, None], torch.ones_like(values), values)
    identity = torch.eye(2, dtype=factor.dtype, device=factor.device)
    return values, torch.where(failed[:, None, None], identity, basis), failed


def orthogonal_iteration(factor: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """One step of orthogonal iteration, ``Q ← qr(F Q)`` (Golub & Van Loan, section 8.2.4).

    Warm-started from the basis of a slightly older factor it follows the eigenvectors at the
    price of one product and one QR decomposition.

    Args:
        factor: ``[L, D, D]`` symmetric positive semidefinite.
        basis: ``[L, D, D]`` orthonormal.

    Returns:
        The new basis and ``failed`` ``[L]``: where the result was not finite the old one stays.
    """
    turned = torch.linalg.qr(factor @ basis).Q
    failed = ~turned.isfinite().flatten(1).all(1)
    return torch.where(failed[:, None, None], basis, turned), failed


def _one_by_one(factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each matrix alone, in float64, so that one that fails does not take the others along."""
    values = factor.new_ones(factor.shape[:2])
    basis = torch.eye(factor.shape[1], dtype=factor.dtype, device=factor.device)
    basis = basis.repeat(factor.shape[0], 1, 1)
    failed = torch.zeros(factor.shape[0], dtype=torch.bool, device=factor.device)
    for index, matrix in enumerate(factor):
        try:
            found, vectors = torch.linalg.eigh(matrix.double())
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            failed[index] = True
            continue
        values[index], basis[index] = found.to(factor.dtype), vectors.to(factor.dtype)
    return values, basis, failed
