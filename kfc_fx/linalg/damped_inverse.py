"""Damped inverses of stacked Kronecker blocks. The generated update calls these.

Factored Tikhonov damping (Martens & Grosse 2015, section 6.3): ``Ω ⊗ Γ + γ I`` is approximated
by ``(Ω + π√γ I) ⊗ (Γ + (√γ/π) I)`` with ``π² = (tr Ω / dim Ω) / (tr Γ / dim Γ)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kfc_fx.linalg.eigenbasis import eigendecomposition

RETRIES = 3
"""A factor that is not positive definite is tried again with 10, 100, 1000 times the damping."""


def mean_eigenvalue(factor: Tensor) -> Tensor:
    """``tr F / dim F`` of ``[L, D, D]`` or a diagonal ``[L, 1, D]`` or ``[L, D, 1]``, as
    ``[L, 1, 1]``."""
    entries = factor.flatten(1) if _is_diagonal(factor) else factor.diagonal(dim1=1, dim2=2)
    return entries.mean(1)[:, None, None]


def _is_diagonal(factor: Tensor) -> bool:
    return factor.shape[1] != factor.shape[2]


def damping_ratio(omega_mean: Tensor, gamma_mean: Tensor) -> Tensor:
    """π from the mean eigenvalues of Ω and Γ, ``[L, 1, 1]``; one where both vanish."""
    tiny = torch.finfo(omega_mean.dtype).tiny ** 0.5
    return (omega_mean.clamp(min=tiny) / gamma_mean.clamp(min=tiny)).sqrt()


def damped_inverses(omega: Tensor, gamma: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """Inverses of both factors of each block under factored Tikhonov damping.

    Args:
        omega: ``[L, D, D]`` or a diagonal ``[L, 1, D]``; gamma: ``[L, R, R]`` or ``[L, R, 1]``;
        damping: γ.

    Returns:
        ``(Ω + π√γ I)⁻¹``, ``(Γ + (√γ/π) I)⁻¹`` and ``failed`` ``[L]``: blocks that are not
        positive definite even with more damping are the identity on both sides.
    """
    pi = damping_ratio(mean_eigenvalue(omega), mean_eigenvalue(gamma))
    omega_inverse, omega_failed = _inverse(omega, pi * damping**0.5)
    gamma_inverse, gamma_failed = _inverse(gamma, damping**0.5 / pi)
    failed = omega_failed | gamma_failed
    return _identity_where(failed, omega_inverse), _identity_where(failed, gamma_inverse), failed


def separable_damped_inverses(
    channel: Tensor, offset: Tensor, gamma: Tensor, locations: Tensor | None, damping: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`damped_inverses` for ``Ω = Ω_Δ ⊗ Ω_C / tr Ω``, columns offset-major.

    Args:
        channel: ``[L, C, C]``; offset: ``[L, K, K]``; gamma: ``[L, R, R]``.
        locations: |T| as ``[L]``, the curvature of the bias column, which stands apart; None
            for layers without bias.

    Returns:
        Bases of the channel factor and the offset factor, ``1/(λ + π√γ)`` as
        ``[L, 1, K*C (+1)]``, ``(Γ + (√γ/π) I)⁻¹`` and ``failed`` ``[L]``.
    """
    c_values, c_basis, c_failed = eigendecomposition(channel)
    k_values, k_basis, k_failed = eigendecomposition(offset)
    tiny = torch.finfo(channel.dtype).tiny ** 0.5
    trace = channel.diagonal(dim1=1, dim2=2).sum(1)[:, None].clamp(min=tiny)
    values = (k_values.clamp(min=0)[:, :, None] * c_values.clamp(min=0)[:, None, :]).flatten(1)
    values = values / trace
    if locations is not None:
        values = torch.cat([values, locations[:, None]], 1)
    pi = damping_ratio(values.mean(1)[:, None, None], mean_eigenvalue(gamma))
    scale = 1 / (values[:, None, :] + pi * damping**0.5)
    gamma_inverse, gamma_failed = _inverse(gamma, damping**0.5 / pi)
    failed = c_failed | k_failed | gamma_failed
    scale = torch.where(failed[:, None, None], torch.ones_like(scale), scale)
    return c_basis, k_basis, scale, _identity_where(failed, gamma_inverse), failed


def _inverse(factor: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """``(F + damping I)⁻¹`` by Cholesky, and where that failed; failures are retried."""
    if _is_diagonal(factor):
        reciprocal = 1 / (factor + damping)
        return reciprocal, ~reciprocal.isfinite().flatten(1).all(1)
    identity = torch.eye(factor.shape[1], dtype=factor.dtype, device=factor.device)
    lower, info = torch.linalg.cholesky_ex(factor + damping * identity)
    # LAPACK raises for a triangle with a zero on its diagonal, on behalf of the whole stack.
    inverse = torch.cholesky_inverse(torch.where((info != 0)[:, None, None], identity, lower))
    failed = (info != 0) | ~inverse.isfinite().flatten(1).all(1)
    for index in failed.nonzero().flatten().tolist():
        retried = _retried_inverse(factor[index], damping[index])
        failed[index] = retried is None
        inverse[index] = identity if retried is None else retried
    return inverse, failed


def _retried_inverse(factor: Tensor, damping: Tensor) -> Tensor | None:
    """In float64 with ever more damping."""
    wide = factor.double()
    identity = torch.eye(wide.shape[0], dtype=wide.dtype, device=wide.device)
    floor = mean_eigenvalue(wide[None]).abs().squeeze() * 1e-6
    for attempt in range(1, RETRIES + 1):
        amount = torch.maximum(damping.double().squeeze(), floor) * 10**attempt
        lower, info = torch.linalg.cholesky_ex(wide + amount * identity)
        if not info.any():
            inverse = torch.cholesky_inverse(lower).to(factor.dtype)
            if inverse.isfinite().all():
                return inverse
    return None


def _identity_where(failed: Tensor, inverse: Tensor) -> Tensor:
    if _is_diagonal(inverse):
        return torch.where(failed[:, None, None], torch.ones_like(inverse), inverse)
    identity = torch.eye(inverse.shape[1], dtype=inverse.dtype, device=inverse.device)
    return torch.where(failed[:, None, None], identity, inverse)
