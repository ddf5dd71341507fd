"""Eigenbases of stacked factors. The generated update calls these."""

from __future__ import annotations

import torch
from torch import Tensor

from kfc_fx.kernels.cpu_matmul import matmul


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
    try:
        values, basis = torch.linalg.eigh(_without_rows_of_zeros(factor))
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        values, basis = factor.new_full(factor.shape[:2], torch.nan), torch.empty_like(factor)
    # Checked besides: LAPACK may report success and give NaN.
    doubtful = ~(are_finite(values) & are_finite(basis))
    failed = torch.zeros_like(doubtful)
    for index in doubtful.nonzero().flatten().tolist():
        values[index], basis[index], failed[index] = _in_float64(factor[index])
    return values, basis, failed


def in_basis(factor: Tensor, basis: Tensor) -> Tensor:
    """The diagonal of ``Qᵀ F Q``: all of it, up to rounding, where Q are the eigenvectors of F.

    Args:
        factor: F, ``[L, D, D]`` symmetric positive semidefinite.
        basis: Q, ``[L, D, D]`` orthonormal.

    Returns:
        ``[L, 1, D]``, none below zero.
    """
    return matmul(factor, basis).mul_(basis).sum(1, keepdim=True).clamp_(min=0)


def from_basis(basis: Tensor, values: Tensor) -> Tensor:
    """``Q diag(λ) Qᵀ`` ``[L, D, D]``, from Q ``[L, D, D]`` and λ ``[L, 1, D]``."""
    return matmul(basis * values, basis.mT)


def _without_rows_of_zeros(factor: Tensor) -> Tensor:
    """``F + ε (tr F / D) I``: the same eigenvectors, and eigenvalues to within rounding.

    Few examples and dead units make factors of low rank with rows of zeros. For most of those of
    side 300, MKL's divide and conquer fails in float32, for some it gives NaN and reports success.
    """
    shifted = factor.clone()
    diagonal = shifted.diagonal(dim1=1, dim2=2)
    diagonal.add_(diagonal.mean(1, keepdim=True), alpha=torch.finfo(factor.dtype).eps)
    return shifted


def are_finite(matrices: Tensor) -> Tensor:
    """Which entries of a stack ``[L, ...]`` hold finite numbers alone: ``[L]``."""
    return matrices.isfinite().flatten(1).all(1)


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


def _in_float64(matrix: Tensor) -> tuple[Tensor, Tensor, bool]:
    """The decomposition of one matrix, so that one that fails does not take others along."""
    try:
        values, basis = torch.linalg.eigh(matrix.double())
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        failed = True
    else:
        failed = not bool(values.isfinite().all() & basis.isfinite().all())
    if failed:
        return torch.ones_like(matrix[0]), torch.eye(*matrix.shape).to(matrix), True
    return values.to(matrix.dtype), basis.to(matrix.dtype), False
