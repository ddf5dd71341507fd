"""Which collector takes the statistics of which parameter."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from kfc_fx.statistics.collector import Collector


class Owners:
    """The collectors of a model by parameter; the last one that asked for a parameter has it.

    A collector lives as long as whoever attached it.
    """

    def __init__(self) -> None:
        self._of_all: weakref.ref[Collector] | None = None
        self._of: dict[str, weakref.ref[Collector]] = {}
        self._distinct: tuple[weakref.ref[Collector], ...] = ()
        self.assignments: int = 0
        """Grows with every call of :meth:`assign`."""

    def assign(self, collector: Collector, parameters: Iterable[str] | None) -> None:
        """Give parameters to a collector: all of the model, those to come too, for None."""
        self.assignments += 1
        if parameters is None:
            self._of_all, self._of = weakref.ref(collector), {}
        else:
            self._of |= dict.fromkeys(parameters, weakref.ref(collector))
        references = [*([self._of_all] if self._of_all else []), *self._of.values()]
        self._distinct = tuple(dict.fromkeys(references))  # each call of the model asks for these

    def owner_of(self, parameter: str) -> Collector | None:
        """The collector that has a parameter."""
        found = self._of.get(parameter, self._of_all)
        return found() if found is not None else None

    @property
    def collectors(self) -> tuple[Collector, ...]:
        """All that have some parameter."""
        alive = (reference() for reference in self._distinct)
        return tuple(collector for collector in alive if collector is not None)
