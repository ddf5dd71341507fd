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
    each group and ``examples`` N, by which the update divides.
    """

    blocks: BlockSums = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=dict)
    examples: int = 0

    def add(self, taken: BlockSums, rows: Mapping[str, list[int]], examples: int) -> None:
        """Add those of one forward pass.

        Args:
            taken: its statistics.
            rows: its output rows, of these blocks at least.
            examples: of its batch.
        """
        for block, values in taken.items():
            add(self.blocks, block, values)
            before = self.rows.get(block, [0] * len(rows[block]))
            self.rows[block] = [sum(pair) for pair in zip(before, rows[block], strict=True)]
        self.examples += examples


def add(sums: BlockSums, block: str, statistics: Mapping[str, Tensor]) -> None:
    """Add statistics of a block to those there are."""
    own = sums.setdefault(block, {})
    for name, value in statistics.items():
        own[name] = own[name] + value if name in own else value
