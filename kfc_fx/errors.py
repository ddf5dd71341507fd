"""Errors of kfc_fx. Each message says what was found, where, and what to do."""

import difflib
from collections.abc import Iterable


class KfcError(RuntimeError):
    """Base of every error that kfc_fx raises on purpose."""


class TargetError(KfcError):
    """What is to be inspected cannot be found, built, loaded or called."""


class OptionError(KfcError, ValueError):
    """An option has a value that is unknown or out of range."""


class CaptureError(KfcError):
    """The model could not be captured as a graph, or the captured graph did not run."""


class CoverageError(KfcError):
    """The plan does not account for every use of every trainable parameter."""


class OutputError(KfcError, TypeError):
    """The model's output holds no prediction that the likelihood could be taken of."""


class StatisticsError(KfcError):
    """Factor statistics were due and did not arrive."""


class StepError(KfcError):
    """An optimizer step cannot be taken, for instance before any backward pass."""


class KfcWarning(UserWarning):
    """Something was dropped or replaced; training goes on, and a counter counts it."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the member of ``known`` nearest to ``name``, or ``""``."""
    by_lower_case = {candidate.lower(): candidate for candidate in known}
    nearest = difflib.get_close_matches(name.lower(), by_lower_case, n=1, cutoff=0.5)
    return f" (did you mean {by_lower_case[nearest[0]]!r}?)" if nearest else ""
