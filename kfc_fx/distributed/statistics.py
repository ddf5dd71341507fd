"""The statistics of all ranks: W ranks are one large batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kfc_fx.codegen.spec import UpdateSpec
from kfc_fx.distributed.attempt import Attempt
from kfc_fx.distributed.packing import (
    DIGITS,
    Slot,
    counts_of,
    digits_of,
    packed,
    size_of,
    unpacked,
)
from kfc_fx.distributed.ranks import Ranks
from kfc_fx.plan.spec import BlockSpec
from kfc_fx.statistics.sums import Sums

HALF = 2**30
"""Work goes through the buffer as two counts, since it may exceed what one can hold."""


@dataclass(frozen=True)
class StatisticsLayout:
    """The buffer that the statistics of a step are summed in: first the matrices, then for each
    block whether it has any and its rows, the examples and the work of their gradients, and last
    whether the rank has failed."""

    slots: dict[str, Slot]
    """By "block.factor"."""
    blocks: tuple[BlockSpec, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def matrices(self) -> int:
        """Numbers of the matrices."""
        return size_of(self.slots.values())

    @property
    def size(self) -> int:
        """Numbers of the whole."""
        rows = sum(block.groups for block in self.blocks)
        return self.matrices + len(self.blocks) + DIGITS * (rows + 3) + 1

    @property
    def bytes(self) -> int:
        """Of the whole."""
        return self.size * self.dtype.itemsize


@lru_cache(maxsize=8)
def statistics_layout(spec: UpdateSpec) -> StatisticsLayout:
    """That of an update: the same on all ranks, whatever a rank has seen."""
    slots: dict[str, Slot] = {}
    dtype = torch.float32
    for stack in spec.stacks:
        dtype = torch.promote_types(dtype, getattr(torch, stack.dtype))
        for block in stack.blocks:
            for factor, shape in stack.factor_shapes.items():
                own = (shape[0] // stack.depth * block.groups, *shape[1:])
                is_square = own[1] == own[2]
                slots[f"{block.name}.{factor}"] = Slot(own, symmetric=is_square)
    blocks = tuple(block for stack in spec.stacks for block in stack.blocks)
    device = torch.device(spec.stacks[0].device)
    return StatisticsLayout(slots, blocks, dtype, device)


def summed_over_ranks(sums: Sums, spec: UpdateSpec, ranks: Ranks, attempt: Attempt) -> Sums:
    """The sums of all ranks, by one collective; ranks and blocks without any add zeros.

    Raises:
        StepError: something has failed on another rank.
    """
    layout = statistics_layout(spec)
    buffer = torch.zeros(layout.size, dtype=layout.dtype, device=layout.device)
    if not attempt.failed:
        with attempt.local():
            _fill(buffer, layout, sums)
    if attempt.failed:
        buffer.zero_()
    buffer[-1] = float(attempt.failed)
    buffer = ranks.add(buffer)
    counts = buffer[layout.matrices :].cpu()
    if counts[-1]:
        attempt.vote()
    return _read(buffer, counts[:-1], layout)


def _fill(buffer: Tensor, layout: StatisticsLayout, sums: Sums) -> None:
    present = [block.name in sums.blocks for block in layout.blocks]
    held = {block.name for block, known in zip(layout.blocks, present, strict=True) if known}
    values = {}
    for name in layout.slots:
        block_name, _, factor = name.rpartition(".")
        if block_name in held:
            values[name] = sums.blocks[block_name][factor]
    packed(layout.slots, values, buffer)
    counts: list[int] = []
    for block in layout.blocks:
        counts += sums.rows[block.name] if block.name in held else [0] * block.groups
    halves = sums.work % HALF, sums.work // HALF
    numbers = torch.cat([torch.tensor(present), digits_of([*counts, sums.examples, *halves])])
    buffer[layout.matrices : -1] = numbers.to(buffer)


def _read(buffer: Tensor, numbers: Tensor, layout: StatisticsLayout) -> Sums:
    values = unpacked(layout.slots, buffer)
    present, digits = numbers.split([len(layout.blocks), len(numbers) - len(layout.blocks)])
    *counts, examples, low, high = counts_of(digits)
    found, start = Sums(examples=examples, work=low + HALF * high), 0
    for block, ranks in zip(layout.blocks, present.tolist(), strict=True):
        if ranks:
            found.rows[block.name] = counts[start : start + block.groups]
        start += block.groups
    for name, value in values.items():
        block_name, _, factor = name.rpartition(".")
        if block_name in found.rows:
            found.blocks.setdefault(block_name, {})[factor] = value
    return found
