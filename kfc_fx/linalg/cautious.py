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
    up = [name for name in parameters if name in added]
    down = [name for name in parameters if name not in added]
    outward = _products(parameters, added, up)
    outward |= dict(zip(down, _negative(_products(parameters, subtracted, down)), strict=True))
    factors = [
        (own <= 0).to(torch.promote_types(own.dtype, torch.float32))
        for own in (outward[name] for name in parameters)
    ]
    torch._foreach_mul_(factors, [own - 1 for own in shrink])
    torch._foreach_add_(factors, 1)
    return factors


def _products(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], names: Sequence[str]
) -> dict[str, Tensor]:
    if not names:
        return {}
    found = torch._foreach_mul([first[n] for n in names], [second[n] for n in names])
    return dict(zip(names, found, strict=True))


def _negative(products: Mapping[str, Tensor]) -> Sequence[Tensor]:
    return torch._foreach_neg(list(products.values())) if products else ()
