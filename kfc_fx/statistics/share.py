"""The share of a batch that a statistic is estimated from.

Ω of side D has D (D + 1) / 2 numbers, and every example gives |T| rows for them: a layer of large
maps and few channels knows it from a few examples, while of a linear layer after pooling an example
is one row. So input factors differ in how many examples they take. Output factors all take the
same: cotangents of an example are much alike at all its locations, after global pooling the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, inf

from torch import Tensor


@dataclass(frozen=True)
class BatchShare:
    """Which examples count: the first ones of a batch.

    Of a tensor with N entries in its leading dimension, ``max(1, round(fraction · N))`` are taken.
    An input factor of side D takes no more than ``max(least, ceil(rows · D / locations))``, if the
    leading dimension is the batch's and each entry has several ``locations``.

    Attributes:
        fraction: in (0, 1].
        examples: N of the batch; 0 where that is not known.
        rows: for each unit of a factor's side.
        least: examples that the bound by rows leaves.
    """

    fraction: float = 1.0
    examples: int = 0
    rows: float = inf
    least: int = 1

    def cut(self, x: Tensor, locations: int = 1, side: int = 1) -> tuple[Tensor, float]:
        """The share of a tensor, and by how much the whole is larger.

        The fraction is of the leading dimension, be it examples, the rows of all examples, or time.

        Args:
            x: ``[N, ...]``; a vector stays whole, and so does a tensor without examples.
            locations: rows that an entry of the leading dimension gives; 1 for output factors.
            side: of the factor that is estimated.
        """
        if self == WHOLE:
            return x, 1.0  # the length of a traced batch would be fixed by asking for it
        count = len(x) if x.dim() > 1 else 0
        kept = max(1, round(self.fraction * count))
        locations = int(locations)  # of traced code with a share the sizes are fixed
        if locations > 1 and count == self.examples and self.rows < inf:
            kept = min(kept, max(self.least, ceil(self.rows * side / locations)))
        if kept >= count:
            return x, 1.0
        return x[:kept], count / kept


WHOLE = BatchShare()


def scaled(statistics: tuple[Tensor, ...], scale: float) -> tuple[Tensor, ...]:
    """The sums of a share as those of the whole."""
    return tuple(s * scale for s in statistics) if scale != 1 else statistics
