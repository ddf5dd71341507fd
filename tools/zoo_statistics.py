"""Whether recorded statistics are what sums of outer products have to be.

A statistic ``[groups, D, D]`` is symmetric and positive semi-definite; that of a diagonal factor,
``[groups, 1, D]`` or ``[groups, D, 1]``, is non-negative. Both are finite.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

SYMMETRY = 1e-5
"""Largest asymmetry, relative to the largest entry."""

DEFINITENESS = 1e-5
"""Most negative eigenvalue that rounding explains, relative to the Frobenius norm."""

CHOLESKY_LIMIT = 1536
"""Wider statistics are tested by subspace iteration, which costs products instead of D³."""


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
    if not bool(value.isfinite().all()):
        return "is not finite"
    if value.shape[-1] != value.shape[-2]:
        return "has a negative entry on its diagonal" if bool((value < 0).any()) else ""
    largest = value.abs().max().item() if value.numel() else 0.0
    if largest == 0:
        return ""
    asymmetry = (value - value.mT).abs().max().item() / largest
    if asymmetry > SYMMETRY:
        return f"is asymmetric by {asymmetry:.1e}"
    return "" if _semi_definite(value / largest) else "has a negative eigenvalue"


def _semi_definite(value: Tensor) -> bool:
    """Whether the eigenvalues of symmetric matrices of largest entry 1 are ≥ −ε‖·‖."""
    shift = DEFINITENESS * value.double().square().sum((-2, -1)).sqrt().clamp(min=1e-6)
    if value.shape[-1] <= CHOLESKY_LIMIT:
        shifted = value.double() + torch.diag_embed(shift[:, None].expand(value.shape[:-1]))
        return not bool(torch.linalg.cholesky_ex(shifted).info.any())
    return all(_lowest(matrix) >= -s for matrix, s in zip(value, shift, strict=True))


def _lowest(matrix: Tensor, vectors: int = 8, iterations: int = 20) -> float:
    """The lowest eigenvalue of a wide symmetric matrix, from above.

    Subspace iteration on ``‖S‖ I − S``, whose dominant eigenvectors are the lowest ones of S.
    """
    bound = matrix.abs().sum(1).max()
    basis = torch.randn(matrix.shape[0], vectors, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(basis.to(matrix)).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(bound * basis - matrix @ basis).Q
    return torch.linalg.eigvalsh(basis.mT @ (matrix @ basis)).min().item()
