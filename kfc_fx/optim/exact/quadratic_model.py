"""The quadratic model of the loss that steps are measured by.

``M(δ) = ∇ᵀδ + ½ δᵀ(F + λI)δ`` around the present parameters, F the exact Fisher matrix of the
batch (Martens & Grosse 2015, sections 6.4 and 7).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

ROUNDINGS = 100
"""Roundings of the Fisher products within which a curvature counts as zero: vectors that are nearly
parallel, as a step and the one before may be, leave nothing but rounding across them."""


def inner_products(
    vectors: Sequence[Mapping[str, Tensor]], others: Sequence[Mapping[str, Tensor]]
) -> Tensor:
    """``⟨vᵢ, wⱼ⟩`` over all parameters that both have, float64 ``[k, l]``."""
    rows = [torch.stack([_inner_product(vector, other) for other in others]) for vector in vectors]
    return torch.stack(rows)


def best_combination(fisher: Tensor, squares: Tensor, slopes: Tensor, damping: float) -> Tensor:
    """The x that minimises ``M(Σ xᵢ vᵢ)`` (Martens & Grosse 2015, equation 12 and section 7).

    Args:
        fisher: ``vᵢᵀ F vⱼ``, ``[k, k]``.
        squares: ``⟨vᵢ, vⱼ⟩``, ``[k, k]``.
        slopes: ``⟨∇, vᵢ⟩``, ``[k]``.
        damping: λ.

    Returns:
        ``[k]`` in float64, zero for a vector that is zero; of vectors that are parallel the
        combination of least length.
    """
    curvature = fisher.double() + damping * squares.double()
    # Vectors may differ by orders of magnitude in length: of unit curvature, they are comparable.
    lengths = curvature.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(lengths > 0, 1 / lengths, torch.zeros_like(lengths))
    scaled = curvature * inverse[:, None] * inverse
    values, vectors = torch.linalg.eigh(scaled)
    least = ROUNDINGS * torch.finfo(fisher.dtype).eps * values[-1]
    weights = torch.where(values > least, 1 / values, torch.zeros_like(values))
    solved = vectors @ (weights * (vectors.mT @ (-slopes.double() * inverse)))
    return solved * inverse


def predicted_change(fisher: Tensor, square: Tensor, slope: Tensor, damping: float) -> Tensor:
    """``M(δ)`` from ``δᵀFδ``, ``⟨δ, δ⟩`` and ``⟨∇, δ⟩``."""
    return slope + (fisher + damping * square) / 2


def _inner_product(vector: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Tensor:
    products = [
        (value.double() * other[name].double()).sum()
        for name, value in vector.items()
        if name in other
    ]
    return torch.stack(products).sum()
