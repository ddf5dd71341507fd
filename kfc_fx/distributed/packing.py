"""Tensors in one flat buffer, symmetric matrices as their upper triangles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """The place of one tensor in a buffer."""

    shape: tuple[int, ...]
    symmetric: bool = False
    """Whether it holds symmetric matrices ``[..., n, n]``."""

    @property
    def size(self) -> int:
        """Numbers that it takes."""
        if not self.symmetric:
            return prod(self.shape)
        side = self.shape[-1]
        return prod(self.shape[:-2]) * side * (side + 1) // 2


def packed(
    slots: Mapping[str, Slot], values: Mapping[str, Tensor], buffer: Tensor, start: int = 0
) -> None:
    """Write tensors into a buffer, zeros for those that there are not.

    Args:
        slots: in the order of the buffer.
        start: where in the buffer the first begins.
    """
    for name, slot in slots.items():
        own = buffer[start : start + slot.size]
        start += slot.size
        if name not in values:
            own.zero_()
        elif slot.symmetric:
            flat = values[name].reshape(-1, slot.shape[-1] ** 2)
            found = flat.index_select(1, _triangle(slot.shape[-1], str(flat.device)))
            own.copy_(found.flatten())
        else:
            own.copy_(values[name].reshape(-1))


def unpacked(slots: Mapping[str, Slot], buffer: Tensor, start: int = 0) -> dict[str, Tensor]:
    """The inverse of :func:`packed`, in new tensors."""
    found = {}
    for name, slot in slots.items():
        own = buffer[start : start + slot.size]
        start += slot.size
        if not slot.symmetric:
            found[name] = own.reshape(slot.shape).clone()
            continue
        side = slot.shape[-1]
        rows = own.reshape(-1, side * (side + 1) // 2)
        square = rows.new_zeros(len(rows), side * side)
        square.index_copy_(1, _triangle(side, str(rows.device)), rows)
        upper = square.reshape(-1, side, side)
        found[name] = (upper + upper.triu(1).mT).reshape(slot.shape)
    return found


def views_of(slots: Mapping[str, Slot], buffer: Tensor) -> dict[str, Tensor]:
    """The tensors of a buffer in place; none of them is symmetric."""
    found, start = {}, 0
    for name, slot in slots.items():
        found[name] = buffer[start : start + slot.size].view(slot.shape)
        start += slot.size
    return found


def size_of(slots: Iterable[Slot]) -> int:
    """Numbers that slots take together."""
    return sum(slot.size for slot in slots)


@lru_cache(maxsize=64)
def _triangle(side: int, device: str) -> Tensor:
    """Places of the upper triangle in a flattened ``[side, side]``."""
    rows, columns = torch.triu_indices(side, side, device=device)
    return rows * side + columns


BASE, DIGITS = 4096, 3
"""Counts go through a buffer of float32 as digits, whose sums over ranks are exact."""


def digits_of(counts: Sequence[int]) -> Tensor:
    """Counts below ``BASE ** DIGITS`` as numbers whose sums over ranks stay exact."""
    rest = torch.tensor(counts, dtype=torch.int64)
    found = []
    for _ in range(DIGITS):
        found.append(rest % BASE)
        rest = rest // BASE
    return torch.stack(found, 1).flatten()


def counts_of(digits: Tensor) -> list[int]:
    """The counts, or sums of counts, that digits stand for."""
    places = BASE ** torch.arange(DIGITS)
    whole: list[int] = (digits.cpu().round().long().unflatten(0, (-1, DIGITS)) @ places).tolist()
    return whole
