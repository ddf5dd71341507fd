"""How often each stack may be due in the early phase, so that statistics and refreshes cost no more
than a share of the gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf

from kfc_fx.codegen.spec import UpdateSpec
from kfc_fx.engine.work import fisher_pass_flops, stack_work
from kfc_fx.optim.schedule import LEVELS, WINDOW, Schedule
from kfc_fx.statistics.request import Fisher, StatisticsRequest
from kfc_fx.statistics.sums import Sums


def most_due(
    spec: UpdateSpec,
    sums: Sums,
    request: StatisticsRequest,
    schedule: Schedule,
    budget: float | None,
    *,
    fisher: Fisher,
    by_block: bool,
) -> dict[str, int]:
    """Most times that each stack may be due in any ``WINDOW`` early steps, by its key.

    All costs are counted from the rows that have given statistics, which all ranks know alike, as
    if their batches were one: a run is the same whichever ranks divide it. Stacks get equal parts
    of the budget; what a cheap one leaves over goes to the others.

    Args:
        spec: of the whole update.
        sums: of all blocks, of one step, and of all ranks.
        schedule: its intervals.
        budget: share of the work of the gradients; None for no bound.
        fisher: what Γ is estimated from.
        by_block: whether statistics are taken of the blocks alone that are due.
    """
    full = schedule.full
    if budget is None or not sums.work:
        return {stack.key: full for stack in spec.stacks}
    share = replace(request, ranks=1).share(sums.examples, fisher)
    works = {stack.key: stack_work(spec, stack, sums.rows, share) for stack in spec.stacks}
    fixed = fisher_pass_flops(spec, sums.rows, share) if fisher == "sampled" else 0.0
    if not by_block:
        fixed += sum(work.statistics for work in works.values())
    costs = {key: work.total if by_block else work.refresh for key, work in works.items()}
    return shared_out(costs, fixed, budget * WINDOW * sums.work, full)


def shared_out(costs: Mapping[str, float], fixed: float, total: float, full: int) -> dict[str, int]:
    """Counts by key, whose costs together are at most ``total``, but for the lowest level: that a
    stack has whatever it costs, since its first factors are of the untrained network alone.

    Args:
        costs: of one time, by key.
        fixed: of every step at which some is due.
        total: what there is.
        full: the largest count.
    """
    levels = [*(level for level in LEVELS if level < full), full]
    most = _highest(levels, inf if not fixed else total / 2 / fixed)
    left, found = total - most * fixed, {}
    for number, key in enumerate(sorted(costs, key=lambda key: (costs[key], key))):
        part = left / (len(costs) - number)
        affordable = min(most, part / costs[key] if costs[key] else inf)
        found[key] = _highest(levels, affordable)
        left -= found[key] * costs[key]
    return found


def _highest(levels: Sequence[int], bound: float) -> int:
    """The highest level up to a bound, or the lowest."""
    return max((level for level in levels if level <= bound), default=levels[0])
