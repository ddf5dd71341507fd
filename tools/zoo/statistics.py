"""Whether recorded statistics are what sums of outer products have to be.

A statistic ``[groups, D, D]`` is symmetric and positive semi-definite; that of a diagonal factor,
``[groups, 1, D]`` or ``[groups, D, 1]``, is non-negative. Both are finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

SYMMETRY = 1e-5
"""Largest asymmetry, relative to the largest entry."""

DEFINITENESS = 1e-5
"""Most negative eigenvalue that rounding explains, relative to the Frobenius norm."""

CHOLESKY_LIMIT = 768
"""Wider statistics are tested by Lanczos' iteration, which costs products instead of D³."""

ROUNDING = torch.finfo(torch.float32).eps


def check_statistics(sums: Mapping[str, Mapping[str, Tensor]]) -> Iterator[str]:
    """A line for every statistic that is wrong.

    Args:
        sums: block to statistic to its sum, as the recorder keeps them.
    """
    for block, statistics in sums.items():
        for statistic, value in statistics.items():
            problem = problem_of(value)
            if problem:
                yield f"{statistic} of {block or 'the model'} {problem}"


def problem_of(value: Tensor) -> str:
    """What is wrong with a statistic; empty if nothing is."""
    if value.numel() == 0:
        return ""
    lowest, highest = (bound.item() for bound in value.aminmax())
    largest = max(-lowest, highest)
    if not math.isfinite(largest):
        return "is not finite"
    if value.shape[-1] != value.shape[-2]:
        return "has a negative entry on its diagonal" if lowest < 0 else ""
    if largest == 0:
        return ""
    asymmetry = (value - value.mT).abs_().max().item() / largest
    if asymmetry > SYMMETRY:
        return f"is asymmetric by {asymmetry:.1e}"
    return "" if _semi_definite(value / largest) else "has a negative eigenvalue"


def _semi_definite(value: Tensor) -> bool:
    """Whether the eigenvalues of symmetric matrices of largest entry 1 are ≥ −ε‖·‖."""
    shift = DEFINITENESS * torch.linalg.vector_norm(value, dim=(-2, -1)).clamp(min=1e-6)
    if value.shape[-1] <= CHOLESKY_LIMIT:
        shifted = value.double()
        shifted.diagonal(dim1=-2, dim2=-1).add_(shift[:, None])
        return not bool(torch.linalg.cholesky_ex(shifted).info.any())
    return all(_lowest(matrix) >= -s for matrix, s in zip(value, shift, strict=True))


def _lowest(matrix: Tensor, steps: int = 40) -> float:
    """The lowest eigenvalue of a wide symmetric matrix, from above, by Lanczos' iteration with
    every vector made orthogonal to all before it."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(matrix.shape[0], generator=generator).to(matrix)
    basis = vector.new_zeros(steps, matrix.shape[0])
    images = torch.zeros_like(basis)
    for step in range(steps):
        for _ in range(2):  # once leaves rounding of the size of what was removed
            vector = vector - basis.mT @ (basis @ vector)
        norm = vector.norm()
        if norm <= ROUNDING * matrix.shape[0]:
            break  # the vectors so far span an invariant subspace
        basis[step] = vector / norm
        vector = images[step] = matrix @ basis[step]
    projected = basis @ images.mT
    return torch.linalg.eigvalsh((projected + projected.mT) / 2).min().item()
