"""The part of a batch that a statistic is estimated from.

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
class Part:
    """Which examples count, the first of a batch.

    A ``share`` of them at most, in (0, 1]. Where examples have several rows and fewer of them have
    ``rows`` times the side of an input factor, no more are taken for that one, but at least
    ``least``, a share too.
    """

    share: float = 1.0
    rows: float = inf
    least: float = 0.0

    def cut(self, x: Tensor, locations: int = 1, side: int = 1) -> tuple[Tensor, float]:
        """The part of a tensor, and by how much the whole is larger.

        Shares are of the leading dimension, be it examples or the rows of examples.

        Args:
            x: ``[N, ...]``; a vector, and one without examples, stays whole.
            locations: rows that an entry of the leading dimension gives; of one, and of output
                factors, the share is taken.
            side: of the factor that is estimated.
        """
        count = len(x) if x.dim() > 1 else 0
        most = max(1, round(self.share * count))
        enough = max(self.least * count, self.rows * side / locations) if locations > 1 else inf
        kept = most if enough >= most else max(1, ceil(enough))
        if kept >= count:
            return x, 1.0
        return x[:kept], count / kept


WHOLE = Part()


def scaled(statistics: tuple[Tensor, ...], scale: float) -> tuple[Tensor, ...]:
    """The sums of a part as those of the whole."""
    return tuple(s * scale for s in statistics) if scale != 1 else statistics
