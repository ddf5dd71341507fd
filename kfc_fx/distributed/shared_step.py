"""What the ranks exchange in a step with statistics."""

from __future__ import annotations

from dataclasses import dataclass

from kfc_fx.codegen.spec import UpdateSpec
from kfc_fx.distributed.attempt import Attempt
from kfc_fx.distributed.ranks import Ranks
from kfc_fx.distributed.refresh import refreshed_by_owners
from kfc_fx.distributed.statistics import summed_over_ranks
from kfc_fx.engine.engine import UpdateEngine
from kfc_fx.engine.step_inputs import OptionNumbers
from kfc_fx.statistics.sums import Sums


@dataclass(frozen=True)
class SharedStep:
    """One step of several ranks.

    Attributes:
        attempt: what has failed in it.
        has_statistics: whether statistics are due, which follows from the counters alone.
    """

    ranks: Ranks
    attempt: Attempt
    has_statistics: bool

    def summed(self, sums: Sums, spec: UpdateSpec) -> Sums:
        """The statistics of all ranks."""
        return summed_over_ranks(sums, spec, self.ranks, self.attempt)

    def refreshed(
        self, engine: UpdateEngine, spec: UpdateSpec, options: OptionNumbers
    ) -> list[str]:
        """Refresh the factors of an engine's stacks that a spec has, each on its owner; returns the
        blocks for which that failed."""
        return refreshed_by_owners(engine, spec, options, self.ranks, self.attempt)
