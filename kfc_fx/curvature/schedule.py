"""When statistics and refreshes are due."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Intervals T_s (statistics) and T_f (refresh), with a denser start.

    The steps in ``early`` have statistics and a refresh whatever the intervals say.
    """

    factor_interval: int
    inverse_interval: int
    early: tuple[int, ...]

    def statistics_due(self, step: int) -> bool:
        """Whether step ``step`` (from zero) collects statistics."""
        return step in self.early or step % self.factor_interval == 0

    def refresh_due(self, step: int) -> bool:
        """Whether step ``step`` refreshes inverses or bases after its statistics."""
        return step in self.early or step % self.inverse_interval == 0


def powers_of_two(limit: int) -> tuple[int, ...]:
    """0, 1, 2, 4, 8, ... below ``limit``."""
    steps, step = [0], 1
    while step < limit:
        steps.append(step)
        step *= 2
    return tuple(steps)


EARLY_STEPS = {
    "adam": powers_of_two(20),
    "spectral": powers_of_two(20),
    "eigen": powers_of_two(20),
    "inverse": tuple(range(20)),
}
"""By scaling. Curvature grows fastest in the first steps: a stale inverse overshoots then, a
stale basis only rotates."""


def early_steps(scalings: Iterable[str]) -> tuple[int, ...]:
    """The early steps of any of the scalings."""
    return tuple(sorted({step for scaling in scalings for step in EARLY_STEPS[scaling]}))
