"""What fits an option: small checks, and frozen values whose fields are checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, get_type_hints

from kfc_fx.errors import OptionError


@dataclass(frozen=True)
class Check:
    """A condition on the value of an option, and the words for it after "must be"."""

    holds: Callable[[Any], bool]
    fits: str

    def __call__(self, name: str, value: object) -> None:
        """Raise :class:`OptionError` that names the option, its value and what fits."""
        if not self.holds(value):
            raise OptionError(f"{name} must be {self.fits}, got {value!r}")


def is_number(value: object) -> bool:
    """Whether a value is a finite real number: no bool, no text, no tensor, neither nan nor inf."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: object) -> bool:
    """Whether a value is an integer, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


POSITIVE = Check(lambda value: is_number(value) and value > 0, "a positive number")
NOT_NEGATIVE = Check(lambda value: is_number(value) and value >= 0, "a number that is not negative")
SHARE = Check(lambda value: is_number(value) and 0 <= value <= 1, "a number in [0, 1]")
DECAY = Check(lambda value: is_number(value) and 0 <= value < 1, "a number in [0, 1)")
COUNT = Check(lambda value: is_whole(value) and value >= 1, "a whole number, at least 1")
INTEGER = Check(is_whole, "a whole number")
FLAG = Check(lambda value: isinstance(value, bool), "True or False")
BETAS = Check(
    lambda value: (
        isinstance(value, tuple | list) and len(value) == 2 and all(map(DECAY.holds, value))
    ),
    "two numbers in [0, 1): the decays of the first and of the second moment",
)


def one_of(*known: str) -> Check:
    """One of some names."""
    names = ", ".join(map(repr, known))
    return Check(lambda value: isinstance(value, str) and value in known, f"one of {names}")


def either(check: Check, *others: object) -> Check:
    """What ``check`` asks for, or one of a few other values, None for one."""

    def holds(value: object) -> bool:
        return any(value is other or _same_text(value, other) for other in others) or check.holds(
            value
        )

    return Check(holds, " or ".join([check.fits, *map(repr, others)]))


def _same_text(value: object, other: object) -> bool:
    return isinstance(value, str) and value == other


@dataclass(frozen=True)
class Checked:
    """A frozen value whose fields are options, ``name: Annotated[type, check] = default``.

    Each is checked when the value is made, and a list becomes a tuple.

    Raises:
        OptionError: a field has a value of the wrong type or out of range.
    """

    def __post_init__(self) -> None:
        title = self.title()
        for name, check in checks_of(type(self)).items():
            value = getattr(self, name)
            check(f"{title}: {name}" if title else name, value)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))

    @classmethod
    def title(cls) -> str:
        """What errors call the value."""
        return cls.__name__


def checks_of(kind: type[Checked]) -> dict[str, Check]:
    """The options among the fields of a class of values, and what fits each."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        name: check
        for name, hint in hints.items()
        for check in getattr(hint, "__metadata__", ())
        if isinstance(check, Check)
    }
