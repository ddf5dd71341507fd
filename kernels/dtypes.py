"""The dtype that statistics accumulate in."""

from __future__ import annotations

import torch
from torch import Tensor


def statistic_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the statistics of ``x`` and of their sums: float64 of float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
