"""What dynamo is let do for some models and not for others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Permission:
    """Whether the model that runs innermost lets dynamo do something.

    Dynamo's own code is replaced once and asks here. Were it replaced while a model runs, passes
    that end in another order than they began in would leave the wrong code behind.
    """

    def __init__(self) -> None:
        self._running: list[tuple[object, bool]] = []

    def __bool__(self) -> bool:
        return bool(self._running) and self._running[-1][1]

    @contextmanager
    def given(self, allowed: bool) -> Iterator[None]:
        """While it lasts, a model runs that gives the permission or does not."""
        own = (object(), allowed)
        self._running.append(own)
        try:
            yield
        finally:
            self._running.remove(own)
