"""Examples that a loss counts."""

from __future__ import annotations

import torch
from torch import Tensor


def counted_share(counts: Tensor, batch_dim: int = 0) -> Tensor:
    """The share of the examples that count, in (0, 1]; 1 where none does.

    Γ is the mean over the examples that the loss counts. Within an example that counts, ignored
    locations have zero cotangents, and Ω sums over them as over the others.

    Args:
        counts: which entries of the output count.
    """
    if counts.dim() <= batch_dim:
        return torch.ones((), device=counts.device)
    examples = counts.movedim(batch_dim, 0).flatten(1).any(1) if counts.dim() > 1 else counts
    share = examples.float().mean()
    return torch.where(share > 0, share, 1)
