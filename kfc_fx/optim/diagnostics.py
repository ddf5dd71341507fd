"""Counters and last values of an optimizer, for a person to look at."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kfc_fx.errors import warn

COUNTS = ("steps", "statistics_steps", "refreshes", "skipped_steps", "missed_statistics")
COUNTS_BY_BLOCK = ("dropped_statistics", "inverse_failures")
LAST_VALUES = (
    *("damping", "reduction_ratio", "largest_step"),
    *("nu", "clip_scale", "step_size", "momentum"),
)


@dataclass
class Diagnostics:
    """What happened so far; ``opt.diagnostics`` returns it.

    Last values that are computed on the model's device stay there until they are read.
    """

    steps: int = 0
    statistics_steps: int = 0
    refreshes: int = 0
    skipped_steps: int = 0
    """Steps that were not taken because a gradient was not finite."""
    missed_statistics: int = 0
    """Steps at which statistics were due and no backward pass gave any."""
    dropped_statistics: Counter[str] = field(default_factory=Counter)
    """Statistics that were not finite, by block."""
    inverse_failures: Counter[str] = field(default_factory=Counter)
    """Decompositions that failed and were replaced by the identity, by block."""
    seconds: Counter[str] = field(default_factory=Counter)
    """Seconds of the host so far: in "gradient" (between steps, but for the next part),
    "statistics", "refresh" and "update". A GPU may still be at work when they end."""
    damping: float | None = None
    """Of the scaling that the optimizer was made with, None for "adam", which has none; changes
    where it is adapted."""
    reduction_ratio: float | None = None
    """Last change of the loss over what the quadratic model predicted; None before the first."""
    last_largest_step: Tensor | None = field(default=None, repr=False)
    last_nu: Tensor | None = field(default=None, repr=False)
    last_clip_scale: Tensor | None = field(default=None, repr=False)
    last_step_size: Tensor | None = field(default=None, repr=False)
    last_momentum: Tensor | None = field(default=None, repr=False)

    @property
    def largest_step(self) -> float | None:
        """Largest norm of a step over that of the parameters before it, of the steps with a
        refresh so far; None before the first. "adam" and "spectral" take steps of the size that
        the rate gives them, whatever the gradient: where it is too high, this alone says so."""
        return None if self.last_largest_step is None else float(self.last_largest_step)

    def note_step(self, size: Tensor) -> None:
        """Keep the size of a step if it is the largest; asks the device for nothing."""
        known = self.last_largest_step
        self.last_largest_step = size if known is None else torch.maximum(size, known)

    @property
    def nu(self) -> float | None:
        """Last ν = vᵀ(F + γ)v, before clipping; None where nothing clips."""
        return None if self.last_nu is None else float(self.last_nu)

    @property
    def clip_scale(self) -> float | None:
        """Last factor by which the step was scaled, one where it was not clipped."""
        return None if self.last_clip_scale is None else float(self.last_clip_scale)

    @property
    def step_size(self) -> float | None:
        """Last step size by the quadratic model, in units of ``lr``; None without one."""
        return None if self.last_step_size is None else float(self.last_step_size)

    @property
    def momentum(self) -> float | None:
        """Last momentum by the quadratic model; None without one."""
        return None if self.last_momentum is None else float(self.last_momentum)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time of the body to one part of ``seconds``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - start  # type: ignore[assignment]

    def count(self, counter: str, blocks: Iterable[str], what: str) -> None:
        """Count by block, and warn once for each, at the line that called ``step``."""
        counts = getattr(self, counter)
        for block in blocks:
            counts[block] += 1
            if counts[block] == 1:
                warn(f"layer {block!r} {what} (opt.diagnostics.{counter} counts these)")

    def as_dict(self) -> dict[str, float]:
        """Everything as flat numbers, for loggers; reading it may wait for the device.

        Counts by block are their sums, seconds are ``seconds_gradient`` and so on. What is None is
        left out.
        """
        numbers: dict[str, float | None] = {
            name: getattr(self, name) for name in (*COUNTS, *LAST_VALUES)
        }
        numbers |= {name: sum(getattr(self, name).values()) for name in COUNTS_BY_BLOCK}
        numbers |= {f"seconds_{part}": seconds for part, seconds in self.seconds.items()}
        return {name: number for name, number in numbers.items() if number is not None}

    def counters(self) -> dict[str, object]:
        """The counters as plain data, for ``state_dict``."""
        counters: dict[str, object] = {name: getattr(self, name) for name in (*COUNTS, "damping")}
        return counters | {name: dict(getattr(self, name)) for name in COUNTS_BY_BLOCK}

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Put the counters back as they were if the body raises."""
        before = self.counters()
        try:
            yield
        except BaseException:
            self.restore(before)
            raise

    def restore(self, counters: dict[str, object]) -> None:
        """Continue from saved counters."""
        for name, value in counters.items():
            setattr(self, name, Counter(value) if isinstance(value, dict) else value)


def joined(several: Sequence[Diagnostics]) -> Diagnostics:
    """Those of several models as one, to look at: sums of counts, the largest of what is a size."""
    found = Diagnostics(damping=several[0].damping, reduction_ratio=several[0].reduction_ratio)
    found.steps = max(own.steps for own in several)
    for own in several:
        for name in COUNTS[1:]:
            setattr(found, name, getattr(found, name) + getattr(own, name))
        for name in (*COUNTS_BY_BLOCK, "seconds"):
            getattr(found, name).update(getattr(own, name))
        if own.last_largest_step is not None:
            found.note_step(own.last_largest_step)
        for name in ("last_nu", "last_clip_scale"):
            value, known = getattr(own, name), getattr(found, name)
            least = torch.minimum if name == "last_clip_scale" else torch.maximum
            if value is not None:
                setattr(found, name, value if known is None else least(known, value))
    return found
