"""What a fault leaves behind, beside a run without it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kfc_fx.tools.faults.subject import Subject, equal, quietly


@dataclass
class Outcome:
    """What a fault has left, over all the places that it was put at.

    Attributes:
        fault: what it was.
        tried: how many times.
        left: how often the state was that of before the step, of after it, or neither.
        raised: errors by name, the empty one for none.
        goes_on: how often the steps after it were those of a run without the fault; where
            statistics were dropped, whether they were finite.
    """

    fault: str
    scaling: str
    tried: int = 0
    left: Counter[str] = field(default_factory=Counter)
    raised: Counter[str] = field(default_factory=Counter)
    goes_on: int = 0

    @property
    def is_right(self) -> bool:
        """Whether each time the state was a whole one, and training went on."""
        whole = self.left["before"] + self.left["after"]
        return self.tried > 0 and whole == self.goes_on == self.tried


@dataclass(frozen=True)
class Reference:
    """A run without faults, and its states from that in which faults come on."""

    subject: Subject
    saved: dict[str, Any]
    states: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, scaling: str, *, due: bool = True) -> Reference:
        """Of a scaling, with states after some more steps.

        Args:
            due: whether the step with faults takes statistics and refreshes.
        """
        subject = Subject.started(scaling) if due else Subject.started(scaling, 9, interval=50)
        saved = subject.saved()
        subject.restore(saved)
        states = [subject.state()]
        for _ in range(3):
            subject.step()
            states.append(subject.state())
        return cls(subject, saved, tuple(states))

    def again(self) -> Subject:
        """The run, where faults come on."""
        self.subject.restore(self.saved)
        return self.subject


Step = Callable[[Subject], None]
"""One step with a fault in it."""


def try_fault(outcome: Outcome, reference: Reference, step: Step) -> Subject:
    """Take a step with a fault, and note what it leaves and how training goes on."""
    subject = reference.again()
    outcome.tried += 1
    outcome.raised[quietly(lambda: step(subject))] += 1
    found = subject.state()
    for name, taken in (("before", 0), ("after", 1)):
        if equal(found, reference.states[taken]):
            outcome.left[name] += 1
            break
    else:
        outcome.left["neither"] += 1
        return subject
    for expected in reference.states[taken + 1 :]:
        if quietly(subject.step) or not equal(subject.state(), expected):
            return subject
    outcome.goes_on += 1
    return subject
