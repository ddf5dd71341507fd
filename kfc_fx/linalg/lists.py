"""Work on lists of tensors, one for each stack. The generated update calls these."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def where_active(
    active: Sequence[Tensor], new: Sequence[Tensor], old: Sequence[Tensor]
) -> list[Tensor]:
    """Of each tensor the new entries where they are active, and the old ones elsewhere.

    Args:
        active: of bool, each ``[L, 1, 1]``.
        new: each ``[L, R, C]``.
        old: as ``new``.
    """
    return [torch.where(*each) for each in zip(active, new, old, strict=True)]
