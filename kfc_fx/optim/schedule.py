"""When statistics and refreshes are due, and how much each statistic counts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

GROWTH = 4
"""In the early phase an interval is one ``GROWTH``-th of the steps so far."""


@dataclass(frozen=True)
class Schedule:
    """Intervals T_s (statistics) and T_f (refresh), with a denser start.

    An interval T begins as one step and grows with the steps so far until it is T, at step
    ``GROWTH · T``: curvature changes by the share of training that has passed, and fastest at
    the start. Of the default T = 20 that makes 20 of the first 80 steps. Before ``first_steps``
    everything is due.
    """

    every: int
    refresh_every: int
    first_steps: int = 0

    def statistics_due(self, step: int) -> bool:
        """Whether step ``step`` (from zero) collects statistics."""
        return self._due(step, self.every)

    def refresh_due(self, step: int) -> bool:
        """Whether step ``step`` refreshes inverses or bases after its statistics."""
        return self._due(step, self.refresh_every)

    @property
    def early_phase(self) -> int:
        """Steps after which both intervals are regular."""
        longest = max(self.every, self.refresh_every)
        return max(GROWTH * longest, self.first_steps)

    def _due(self, step: int, interval: int) -> bool:
        if step < self.first_steps:
            return True
        if step < GROWTH * interval:
            return step in early_steps(interval)
        return step % interval == 0


@lru_cache
def early_steps(interval: int) -> frozenset[int]:
    """0, 1, ..., 8, 10, 12, 15, 18, 22, ... below ``GROWTH · interval``."""
    steps, step = set(), 0
    while step < GROWTH * interval:
        steps.add(step)
        step += max(1, step // GROWTH)
    return frozenset(steps)


def averaging_rate(count: int, decay: float) -> float:
    """Weight of a new statistic in the moving average of the ``count`` before it.

    ``max(1 − decay, 2 / (count + 2))``: as long as the statistics are few, each weighs in
    proportion to its number, so that those of the untrained network are soon forgotten; from
    then on the decay is the constant one.
    """
    return max(1 - decay, 2 / (count + 2))
