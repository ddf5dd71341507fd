"""How much of an input a CPU kernel lays out at a time: what fits in cache, no more than it reads.

A buffer of the input's own size keeps the memory of a statistic in proportion to it; below
``LEAST_ELEMENTS`` the calls of one more pass would cost more than the memory is worth. A pass
takes few groups of all images before it takes few images: the sums stay long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

MOST_ELEMENTS = 2**21
LEAST_ELEMENTS = 2**18


@dataclass(frozen=True)
class Pass:
    """How many groups and images one buffer holds."""

    groups: int
    images: int

    def count(self, groups: int, images: int) -> int:
        """Number of passes over so many groups and images."""
        return ceil(groups / self.groups) * ceil(images / self.images)


def one_pass(shape: Sequence[int], groups: int, per_group: int, *, least: int = 1) -> Pass:
    """Divide an input into passes of equal size.

    Args:
        shape: ``[N, C, *spatial]``, the whole input.
        groups: of the convolution.
        per_group: elements of the buffer that one group of one image takes.
        least: fewer images than this are not worth a pass.
    """
    elements = min(MOST_ELEMENTS, max(LEAST_ELEMENTS, prod(shape)))
    fitting = elements // max(1, per_group)
    return Pass(
        _equal_parts(groups, max(1, fitting // max(1, shape[0]))),
        _equal_parts(shape[0], max(1, least, fitting)),
    )


def _equal_parts(total: int, most: int) -> int:
    return max(1, ceil(total / max(1, ceil(total / most))))
