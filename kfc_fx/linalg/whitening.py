"""Whitening matrices of stacked input factors. The generated update calls these.

``W`` whitens a factor F under damping when ``W Wᵀ = (F / f + γ I)⁻¹``, f its mean eigenvalue.
Every such W equals the symmetric inverse square root up to a rotation on its right, which
``polar(m W) Wᵀ`` does not depend on: ``polar(m W R) (W R)ᵀ = polar(m W) Wᵀ``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kfc_fx.linalg.damped_inverse import mean_eigenvalue
from kfc_fx.linalg.eigenbasis import are_finite, eigendecomposition

ITERATIONS = 12
"""Of the coupled Newton-Schulz iteration. Warm-started it has converged after 4 to 6; from the
identity, at a condition near 1000, it takes them all."""

RESIDUAL_LIMIT = 1e-2
"""Largest root mean square entry of ``Wᵀ F W − I``, by rows, that passes for convergence."""


def cholesky_whitening(factor: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """``W = L⁻ᵀ`` with the Cholesky factor ``L Lᵀ`` of the damped factor.

    On a CPU the cheapest way by far: a sixth of one product of that size for the decomposition
    and a sixth for the inverse.

    Args:
        factor: ``[L, D, D]`` symmetric positive semidefinite.
        damping: γ, relative to the mean eigenvalue.

    Returns:
        W ``[L, D, D]``, upper triangular, and ``failed`` ``[L]``: where ``eigh`` was needed and
        failed too, W is the identity.
    """
    damped = _damped(factor, damping)
    lower, info = torch.linalg.cholesky_ex(damped)
    identity = torch.eye(factor.shape[1], dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False)
    return _checked(inverse.mT, damped, (info != 0) | ~are_finite(inverse))


def next_whitening(
    factor: Tensor, whitening: Tensor, damping: float, *, first: bool
) -> tuple[Tensor, Tensor]:
    """:func:`newton_schulz_whitening`, or at the ``first`` refresh, where there is no W to go on
    from, :func:`cholesky_whitening`."""
    if first:
        return cholesky_whitening(factor, damping)
    return newton_schulz_whitening(factor, whitening, damping)


def newton_schulz_whitening(
    factor: Tensor, whitening: Tensor, damping: float
) -> tuple[Tensor, Tensor]:
    """:func:`cholesky_whitening` by products alone, from the W of a slightly older factor.

    ``W ← W (Wᵀ F W)^(−1/2)``, the inverse root by the coupled Newton-Schulz iteration (Higham
    2008, equation 6.35): ``Wᵀ F W`` is close to I, where it converges quadratically.

    Args:
        factor: as there.
        whitening: ``[L, D, D]``, the last W.
        damping: as there.

    Returns:
        As there; where the residual says that the iteration has not converged, by ``eigh``.
    """
    damped = _damped(factor, damping)
    identity = torch.eye(factor.shape[1], dtype=factor.dtype, device=factor.device)
    near = whitening.mT @ damped @ whitening
    scale = torch.linalg.matrix_norm(near, keepdim=True).clamp(min=torch.finfo(near.dtype).tiny)
    # A bound on the largest eigenvalue that is close for a matrix that is close to I.
    bound = torch.minimum(scale, near.abs().sum(2, keepdim=True).amax(1, keepdim=True))
    root, inverse_root = near / bound, identity.expand_as(near)
    for _ in range(ITERATIONS):
        step = 1.5 * identity - 0.5 * (inverse_root @ root)
        root, inverse_root = root @ step, step @ inverse_root
    fresh = whitening @ inverse_root / bound.sqrt()
    residual = fresh.mT @ damped @ fresh - identity
    size = torch.linalg.matrix_norm(residual) / factor.shape[1] ** 0.5
    return _checked(fresh, damped, ~(size < RESIDUAL_LIMIT))


def bias_whitening(channel: Tensor, columns: int, locations: Tensor, damping: float) -> Tensor:
    """W of the bias column beside a separable factor: a number, ``[L, 1, 1]``.

    Args:
        channel: ``[L, C, C]``, whose trace is that of Ω without the bias.
        columns: of Ω without the bias.
        locations: |T| as ``[L, 1, 1]``, the entry of Ω that belongs to the bias.
    """
    trace = channel.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    return (locations / _positive(trace / columns) + damping).rsqrt()


def _damped(factor: Tensor, damping: float) -> Tensor:
    damped = factor / _positive(mean_eigenvalue(factor))
    damped.diagonal(dim1=1, dim2=2).add_(damping)
    return damped


def _positive(mean: Tensor) -> Tensor:
    return mean.clamp(min=torch.finfo(mean.dtype).tiny ** 0.5)


def _checked(whitening: Tensor, damped: Tensor, doubtful: Tensor) -> tuple[Tensor, Tensor]:
    """W, that of doubtful entries by ``eigh``, of those that fail in that too the identity."""
    failed = torch.zeros_like(doubtful)
    rows = doubtful.nonzero().flatten()
    if not len(rows):
        return whitening, failed
    values, vectors, lost = eigendecomposition(damped[rows])
    floor = torch.finfo(values.dtype).eps * values.amax(1, keepdim=True).abs()
    found = vectors * values.clamp(min=floor).rsqrt()[:, None, :]
    identity = torch.eye(damped.shape[1], dtype=damped.dtype, device=damped.device)
    whitening, failed = whitening.clone(), failed.clone()
    whitening[rows] = torch.where(lost[:, None, None], identity, found)
    failed[rows] = lost
    return whitening, failed
