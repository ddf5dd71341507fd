"""Which stacks of an engine are due at a step, and how much their statistics weigh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from kfc_fx.codegen.spec import UpdateSpec
from kfc_fx.optim.budget import most_due
from kfc_fx.optim.engines import Engine
from kfc_fx.optim.options import KFCOptions
from kfc_fx.optim.schedule import Schedule, averaging_rate
from kfc_fx.statistics.collector import Collector
from kfc_fx.statistics.likelihoods.categorical import Categorical
from kfc_fx.statistics.sums import Sums


class Dues:
    """The schedule of one model, and how its budget is shared out among the stacks.

    Args:
        by_block: whether statistics are taken of the blocks alone that are due: a compiled backward
            pass takes those of all.
    """

    def __init__(self, options: KFCOptions, *, by_block: bool) -> None:
        self._options = options.statistics
        self._by_block = by_block
        self.schedule: Schedule = Schedule(
            self._options.every, self._options.refresh_every, options.first_steps
        )

    def all_due(self, engine: Engine) -> bool:
        """Whether all stacks are due where any is: nothing bounds them, or some have no factors."""
        return not self.schedule.most or not engine.started or engine.waiting

    def any_statistics(self, engine: Engine | None, step: int) -> bool:
        """Whether statistics of some stack that there is are due at a step."""
        if engine is None or self.all_due(engine):
            return self.schedule.statistics_due(step)
        return bool(self.of_statistics(engine, step))

    def of_statistics(self, engine: Engine, step: int) -> frozenset[str]:
        """Keys of the stacks that get statistics at a step, if any does."""
        return self._of(engine, step, self.schedule.statistics_due)

    def of_refresh(self, engine: Engine, step: int) -> frozenset[str]:
        """Keys of the stacks that are refreshed at a step, if any is."""
        return self._of(engine, step, self.schedule.refresh_due)

    def left_out(self, engine: Engine | None, step: int) -> frozenset[str]:
        """Names of the blocks whose statistics the next forward pass need not take."""
        if engine is None or not self._by_block:
            return frozenset()
        due = self.of_statistics(engine, step)
        idle = (stack for stack in engine.spec.stacks if stack.key not in due)
        return frozenset(block.name for stack in idle for block in stack.blocks)

    def rate(self, stack: str, step: int, count: int) -> float:
        """Weight of a new statistic of a stack in its moving average.

        Args:
            count: of statistics so far, of any stack.
        """
        own = max(0, count - self.schedule.left_out(step, stack))
        return averaging_rate(own, self._options.decay)

    def share_out(self, spec: UpdateSpec, sums: Sums, collector: Collector) -> None:
        """Bound how often stacks are due in the early phase, by what they cost for this batch. For
        the same stacks that is done once.

        Args:
            sums: of all blocks, of one step, and of all ranks.
        """
        if {stack.key for stack in spec.stacks} == self.schedule.most.keys():
            return
        most = most_due(
            spec,
            sums,
            collector.request,
            self.schedule,
            self._options.budget,
            fisher=collector.request.fisher_for(collector.likelihood or Categorical()),
            by_block=self._by_block,
        )
        self.schedule = replace(self.schedule, most=most)

    def _of(
        self, engine: Engine, step: int, is_due: Callable[[int, str | None], bool]
    ) -> frozenset[str]:
        keys = frozenset(stack.key for stack in engine.spec.stacks)
        if self.all_due(engine):
            return keys
        return frozenset(key for key in keys if is_due(step, key))
