"""Decay that does not work against the step. The generated update calls this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def cautious_shrink(
    parameters: Mapping[str, Tensor],
    added: Mapping[str, Tensor],
    subtracted: Mapping[str, Tensor],
    shrink: Sequence[float | Tensor],
) -> list[Tensor]:
    """What each number of the parameters is multiplied by: ``shrink`` where its step brings it
    nearer to zero or leaves it, 1 where the step takes it away from zero (Chen et al. 2025,
    "Cautious Weight Decay").

    Args:
        parameters: θ by name, before the step.
        added: steps by name that will be added to θ.
        subtracted: steps of the other parameters, that will be subtracted.
        shrink: of each parameter, in their order.

    Returns:
        As many tensors, in the shapes of the parameters.
    """
    factors = []
    for (name, parameter), own in zip(parameters.items(), shrink, strict=True):
        step = added[name] if name in added else -subtracted[name]
        outward = parameter * step
        inward = (outward <= 0).to(torch.promote_types(outward.dtype, torch.float32))
        factors.append(inward.mul_(own - 1).add_(1))
    return factors
