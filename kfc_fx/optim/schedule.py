"""When statistics and refreshes are due, and how much each statistic counts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

GROWTH = 4
"""In the early phase an interval is one ``GROWTH``-th of the steps so far."""
WINDOW = 20
"""Steps over which the work of the early phase is averaged."""
LEVELS = (2, 4, 7, 10)
"""How often a stack is due in ``WINDOW`` steps, if not always: few levels, so that few sets of
stacks are due together, each of which has a program of its own."""


@dataclass(frozen=True)
class Schedule:
    """Intervals T_s (statistics) and T_f (refresh), with a denser start.

    An interval T begins as one step and grows with the steps so far until it is T, at step
    ``GROWTH · T``: curvature changes by the share of training that has passed, and fastest at
    the start. Of the default T = 20 that makes 20 of the first 80 steps. Before ``first_steps``
    everything is due.

    Attributes:
        most: how often a stack may be due in any ``WINDOW`` early steps, by its key. A stack that
            is not listed is due at every step at which any may be.
    """

    every: int
    refresh_every: int
    first_steps: int = 0
    most: Mapping[str, int] = field(default_factory=dict)

    def statistics_due(self, step: int, stack: str | None = None) -> bool:
        """Whether step ``step`` (from zero) collects statistics of a stack, or of any."""
        return self._due(step, self.every, stack)

    def refresh_due(self, step: int, stack: str | None = None) -> bool:
        """Whether step ``step`` refreshes inverses or bases of a stack, or of any."""
        return self._due(step, self.refresh_every, stack)

    @property
    def early_phase(self) -> int:
        """Steps after which both intervals are regular, for all stacks."""
        longest = max(self.every, self.refresh_every)
        bounded = any(count < self.full for count in self.most.values())
        return max(GROWTH * longest, self.first_steps) + (WINDOW if bounded else 0)

    @property
    def full(self) -> int:
        """How often a stack that nothing bounds is due in the first ``WINDOW`` steps."""
        return sum(step < WINDOW for step in due_steps(self.every, self.first_steps))

    def left_out(self, step: int, stack: str) -> int:
        """Steps before ``step`` with statistics of some stack, and none of this one."""
        if not self.most:
            return 0
        steps = range(min(step, self.early_phase))
        return sum(self.statistics_due(s) and not self.statistics_due(s, stack) for s in steps)

    def _due(self, step: int, interval: int, stack: str | None) -> bool:
        if step >= max(GROWTH * interval, self.first_steps) + WINDOW:
            return step % interval == 0
        dense = due_steps(interval, self.first_steps)
        counts = self.most.values() if stack is None else [self.most.get(stack, WINDOW)]
        if not self.most:
            return step in dense
        return any(step in thinned(interval, self.first_steps, most) for most in set(counts))


@lru_cache
def due_steps(interval: int, first_steps: int) -> frozenset[int]:
    """0, 1, ..., 8, 10, 12, 15, 18, 22, ... below ``GROWTH · interval``, all of the first steps,
    and multiples of the interval for ``WINDOW`` steps more."""
    steps, step = set(range(first_steps)), 0
    while step < GROWTH * interval:
        steps.add(step)
        step += max(1, step // GROWTH)
    end = max(GROWTH * interval, first_steps)
    return frozenset(steps | {step for step in range(end, end + WINDOW) if step % interval == 0})


@lru_cache
def thinned(interval: int, first_steps: int, most: int) -> frozenset[int]:
    """Those of :func:`due_steps` that are left where at most ``most`` of any ``WINDOW`` may be, but
    for a regular interval of its own: further apart by a constant factor."""
    dense = due_steps(interval, first_steps)
    most = max(most, -(-WINDOW // interval))
    if most >= most_in_window(dense):
        return dense
    factors = [1 + eighths / 8 for eighths in range(8 * WINDOW)]
    found = (_spread(sorted(dense), factor, interval, most) for factor in factors)
    for kept in found:
        if sum(step < WINDOW for step in kept) <= most:
            return frozenset(kept)
    return frozenset(_spread(sorted(dense), 1.0, interval, most, free=0))


def most_in_window(steps: Collection[int]) -> int:
    """How many of some steps are in any ``WINDOW`` successive ones."""
    return max(sum(start <= step < start + WINDOW for step in steps) for start in steps)


def _spread(
    dense: Sequence[int], factor: float, interval: int, most: int, free: int = WINDOW
) -> list[int]:
    """Of ascending steps those next to steps that are apart by a constant factor, up to about an
    interval.

    Args:
        free: from this step on at most so many of ``WINDOW``.
    """
    kept, longest = [dense[0]], interval if most * interval > WINDOW else WINDOW
    while True:
        gap = min(longest, (kept[-1] + 1) * (factor - 1))
        after = kept[-most] + WINDOW if len(kept) >= most else 0
        nearest = kept[-1] + max(1, gap / 2)
        left = [s for s in dense if s >= nearest and (s < free or s >= after)]
        if not left:
            return kept
        kept.append(min(left, key=lambda step: abs(step - kept[-1] - gap)))


def averaging_rate(count: int, decay: float) -> float:
    """Weight of a new statistic in the moving average of the ``count`` before it.

    ``max(1 − decay, 2 / (count + 2))``: as long as the statistics are few, each weighs in
    proportion to its number, so that those of the untrained network are soon forgotten; from
    then on the decay is the constant one.
    """
    return max(1 - decay, 2 / (count + 2))
