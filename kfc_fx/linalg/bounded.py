"""Gradients of bounded size. The generated update calls this."""

from __future__ import annotations

import torch
from torch import Tensor


def bounded(matrices: Tensor, largest: float, groups: int = 1) -> Tensor:
    """Matrices of at most a Frobenius norm; larger ones are scaled down to it.

    Args:
        matrices: ``[L, R, C]``.
        largest: the norm.
        groups: entries next to each other that have one norm together: those of a grouped
            convolution.
    """
    norms = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)
    if groups > 1:
        norms = torch.linalg.vector_norm(norms.unflatten(0, (-1, groups)), dim=1, keepdim=True)
        norms = norms.expand(-1, groups, 1, 1).flatten(0, 1)
    tiny = torch.finfo(norms.dtype).tiny
    return matrices * (largest / norms.clamp(min=tiny)).clamp(max=1)
