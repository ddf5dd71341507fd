"""Gradients of one step by parameter name, checked, and how far the step went."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfc_fx.errors import StepError


def named_gradients(
    groups: Sequence[Mapping[str, Any]], names: Mapping[Tensor, str], *, maximize: bool = False
) -> dict[str, Tensor]:
    """The gradients that there are of what is minimized, by parameter name.

    Args:
        groups: parameter groups of an optimizer.
        names: parameter to name; others are left out.
        maximize: take those of the negative of what was differentiated, in new tensors.

    Raises:
        StepError: a gradient is sparse.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    gradients = {names[p]: as_real(p.grad) for p in parameters if p in names and p.grad is not None}
    for name, gradient in gradients.items():
        if gradient.is_sparse:
            raise StepError(
                f"the gradient of {name} is sparse, which KFC does not take: make its layer with "
                "sparse=False"
            )
    if maximize and gradients:
        return dict(zip(gradients, torch._foreach_neg(list(gradients.values())), strict=True))
    return gradients


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of real numbers, ``[..., 2]``, in the same memory; others as they
    are."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all entries are finite; one synchronisation for each device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(tensor)
    return all(_are_finite(group, device.type) for device, group in by_device.items())


def _are_finite(tensors: list[Tensor], device: str) -> bool:
    # On a CPU the maximum norm takes 50 times as long as the Euclidean one, which is finite for
    # finite entries unless their squares overflow.
    orders = (2.0, float("inf")) if device == "cpu" else (float("inf"),)
    return any(_have_finite_norms(tensors, order) for order in orders)


def _have_finite_norms(tensors: list[Tensor], order: float) -> bool:
    return bool(torch.stack(list(torch._foreach_norm(tensors, order))).isfinite().all())


def relative_distance(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """``‖after − before‖ / ‖before‖`` over all entries, on the device of the first tensor."""
    moved = _norm([new - old for new, old in zip(after, before, strict=True)])
    return moved / _norm(before).clamp(min=torch.finfo(torch.float32).tiny)


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    device = tensors[0].device
    norms = [torch.linalg.vector_norm(tensor).to(device, torch.float32) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(norms))
