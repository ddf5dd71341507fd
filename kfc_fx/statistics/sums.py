"""Sums of statistics over the examples of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

BlockSums = dict[str, dict[str, Tensor]]
"""Sums of statistics by block and statistic."""


@dataclass
class Sums:
    """Sums over all micro-batches since the last step, unnormalised.

    ``blocks[block][statistic]`` is ``Σ_n Σ_t`` of outer products; ``rows[block]`` counts N·|T| of
    each group and ``examples`` N, by which the update divides. ``work`` counts the operations of
    the gradients of these examples, in the layers of captured graphs.
    """

    blocks: BlockSums = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=dict)
    examples: int = 0
    work: int = 0
    _weights: dict[str, Tensor] = field(default_factory=dict)
    _filled: set[str] = field(default_factory=set)

    def add(
        self, taken: BlockSums, rows: Mapping[str, list[int]], examples: int, work: int = 0
    ) -> None:
        """Add those of one forward pass.

        Args:
            taken: its statistics.
            rows: its output rows, of these blocks at least.
            examples: of its batch.
            work: of its gradients.
        """
        for block, values in taken.items():
            add(self.blocks, block, values)
            before = self.rows.get(block, [0] * len(rows[block]))
            self.rows[block] = [sum(pair) for pair in zip(before, rows[block], strict=True)]
        self.examples += examples
        self.work += work

    def follow(self, weights: Mapping[str, Tensor]) -> None:
        """Let sums be lost with the gradients of these weights, by block, once they have some."""
        self._weights |= weights

    def note_gradients(self) -> None:
        """Keep which of the followed weights have a gradient: a backward pass has ended."""
        self._filled = {name for name, weight in self._weights.items() if weight.grad is not None}

    def drop_lost(self, *, or_zero: bool = False) -> None:
        """Drop the sums of blocks whose gradient was dropped: it is None again.

        Args:
            or_zero: also where all gradients are zero, which waits for the device.
        """
        lost = {name for name in self._filled if self._weights[name].grad is None}
        left = [self._weights[name].grad for name in self._filled - lost]
        if or_zero and left and _are_zero([gradient for gradient in left if gradient is not None]):
            lost = set(self._filled)
        for name in lost:
            for kept in (self.blocks, self.rows, self._weights):
                kept.pop(name, None)
        self._filled -= lost
        if lost and not self.blocks:
            self.examples = self.work = 0


def _are_zero(gradients: list[Tensor]) -> bool:
    return not any(bool(gradient.any()) for gradient in gradients)


def add(sums: BlockSums, block: str, statistics: Mapping[str, Tensor]) -> None:
    """Add statistics of a block to those there are."""
    own = sums.setdefault(block, {})
    for name, value in statistics.items():
        own[name] = own[name] + value if name in own else value
