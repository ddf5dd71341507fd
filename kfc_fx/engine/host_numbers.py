"""Numbers of the host for the entries of stacks, without waiting for the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kfc_fx.codegen.spec import StackSpec


def stack_columns(
    values: Mapping[str, Sequence[float]], stacks: Sequence[StackSpec]
) -> dict[str, Tensor]:
    """Numbers for each entry of each stack, on the stack's device and in its dtype.

    Args:
        values: by the stack's key, ``depth`` numbers, or as many for each column.

    Returns:
        ``[depth, 1, 1]``, or ``[depth, 1, columns]``.
    """
    by_place: dict[tuple[str, str], list[StackSpec]] = {}
    for stack in stacks:
        by_place.setdefault((stack.device, stack.dtype), []).append(stack)
    found: dict[str, Tensor] = {}
    for (device, dtype), held in by_place.items():
        numbers = [number for stack in held for number in values[stack.key]]
        moved = _moved(torch.tensor(numbers, dtype=getattr(torch, dtype)), device)
        for stack, own in zip(held, moved.split([len(values[s.key]) for s in held]), strict=True):
            found[stack.key] = own.reshape(stack.depth, 1, -1)
    return found


def _moved(numbers: Tensor, device: str) -> Tensor:
    """One copy for all; from pinned memory, since a copy from other memory would wait."""
    if not device.startswith("cuda"):
        return numbers.to(device)
    return numbers.pin_memory().to(device, non_blocking=True)
