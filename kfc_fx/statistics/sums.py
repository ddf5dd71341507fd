"""Sums of statistics, and the record of one armed forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from kfc_fx.plan.forms import FactorForms
from kfc_fx.plan.spec import BlockSpec
from kfc_fx.statistics.share import WHOLE, Part

Fisher = Literal["sampled", "empirical"]


Sums = dict[str, dict[str, Tensor]]
"""Sums of statistics by block and statistic."""


@dataclass
class Statistics:
    """Sums over all micro-batches since the last step, unnormalised.

    ``sums[block][statistic]`` is ``Σ_n Σ_t`` of outer products; ``rows[block]`` counts N·|T| of
    each group and ``examples`` N, by which the update divides.
    """

    sums: Sums = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=dict)
    examples: int = 0

    def add(self, sums: Sums, record: ForwardRecord, examples: int) -> None:
        """Add those of one forward pass."""
        for block, values in sums.items():
            add(self.sums, block, values)
            counts = record.rows[block]
            before = self.rows.get(block, [0] * len(counts))
            self.rows[block] = [sum(pair) for pair in zip(before, counts, strict=True)]
        self.examples += examples


@dataclass(eq=False)
class ForwardRecord:
    """One armed forward pass: the blocks that ran in it and their output rows."""

    fisher: Fisher
    """What Γ of this pass is taken from."""
    rows: dict[str, list[int]] = field(default_factory=dict)
    probes: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    inputs: Sums = field(default_factory=dict)
    """Statistics of the blocks that need those of their input alone."""
    square: Tensor | None = None
    """What statistics that are quadratic in the cotangent are multiplied by while
    :class:`GradientPass` runs; None while it does not."""
    collected: Sums = field(default_factory=dict)
    """What it has taken so far."""
    graphs: int = 0
    """Runs of captured graphs in it."""
    emitted: dict[str, tuple[BlockSpec, FactorForms]] = field(default_factory=dict)
    """What each block was, by its name, when it emitted."""
    missing: str = ""
    """Why it gives no statistics; empty where it does."""
    part: Part = WHOLE
    """Of the batch, that statistics are estimated from."""
    again: Callable[[ForwardRecord], AbstractContextManager[None]] | None = None
    """Lets layers that are called within the backward pass emit, where some may be: an
    ``autograd.Function``, such as a reentrant checkpoint, has called layers."""

    def drop(self, block: str) -> None:
        """Take nothing of a block: what it is has changed while the pass ran."""
        for kept in (self.rows, self.probes, self.inputs, self.emitted):
            kept.pop(block, None)

    def collect(self, block: str, statistic: str, *, quadratic: bool) -> Callable[[Tensor], None]:
        """What takes a statistic of a block while :class:`GradientPass` runs."""

        def take(value: Tensor) -> None:
            if self.square is not None and block in self.rows:
                scaled = value * self.square.to(value) if quadratic else value
                add(self.collected, block, {statistic: scaled})

        return take


def add(sums: Sums, block: str, statistics: Mapping[str, Tensor]) -> None:
    """Add statistics of a block to those there are."""
    own = sums.setdefault(block, {})
    for name, value in statistics.items():
        own[name] = own[name] + value if name in own else value
