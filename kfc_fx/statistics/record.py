"""The record of one armed forward pass, and where the statistics of its emissions go.

An emission finds the record by its probes: each probe of a forward pass has a
:class:`Destination`. So a backward pass takes the statistics of exactly those forward passes whose
records are running, whichever other passes it goes through, run beside it, or run within it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kfc_fx.plan.forms import FactorForms
from kfc_fx.plan.spec import BlockSpec
from kfc_fx.statistics.request import Fisher
from kfc_fx.statistics.share import WHOLE, BatchShare
from kfc_fx.statistics.sums import BlockSums, add


@dataclass(eq=False)
class ForwardRecord:
    """One armed forward pass: the blocks that ran in it, their output rows, what was taken."""

    fisher: Fisher | None
    """What Γ of this pass is taken from; None until the likelihood is known."""
    share: BatchShare = WHOLE
    """Of the batch, that statistics are estimated from."""
    examples: int = 0
    """Of the inputs; 0 where that is not known."""
    flops: int = 0
    """Operations of the gradients of one example, in the layers of the graphs that ran."""
    rows: dict[str, list[int]] = field(default_factory=dict)
    """Output rows N·|T| of each group, by block."""
    emitted: dict[str, tuple[BlockSpec, FactorForms]] = field(default_factory=dict)
    """What each block was, by its name, when it emitted."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """The weight of each block as it was when it emitted."""
    probes: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """Leaves whose gradients are the statistics, by block, in the order of its statistics."""
    inputs: BlockSums = field(default_factory=dict)
    """Statistics of the blocks that need those of their input alone."""
    taken: BlockSums = field(default_factory=dict)
    """Statistics that the loss's own backward pass has given so far."""
    running: bool = False
    """Whether a backward pass takes the statistics of this forward pass now."""
    square: Tensor | float = 1.0
    """What statistics that are quadratic in the cotangent are multiplied by."""
    seconds: float = 0.0
    """Spent on statistics within the loss's own backward pass."""
    graphs: int = 0
    """Runs of captured graphs in it."""
    left_out: Collection[str] = ()
    """Blocks whose statistics are not wanted."""
    missing: str = ""
    """Why it gives no statistics; empty where it does."""
    again: Callable[[], AbstractContextManager[None]] | None = None
    """Lets layers that are called within the backward pass emit, where some may be: an
    ``autograd.Function``, such as a reentrant checkpoint, has called layers."""

    def wants(self, block: str) -> bool:
        """Whether the statistics of a block are wanted."""
        return block not in self.left_out

    def drop(self, block: str) -> None:
        """Take nothing of a block: what it is has changed while the pass ran."""
        for kept in (self.rows, self.probes, self.inputs, self.emitted, self.weights):
            kept.pop(block, None)

    def note_emission(self, block: BlockSpec, forms: FactorForms, weight: Tensor) -> None:
        """Keep what a block was when it emitted."""
        self.emitted[block.name] = (block, forms)
        self.weights[block.name] = weight

    def note_rows(self, block: BlockSpec, span: tuple[int, int], rows: int) -> None:
        """Add the output rows N·|T| of a site to the groups ``[start, stop)`` of its block."""
        counts = self.rows.setdefault(block.name, [0] * block.groups)
        for group in range(*span):
            counts[group] += rows


@dataclass(frozen=True, eq=False)
class Destination:
    """Where the statistic that an emission computes for a probe goes."""

    record: ForwardRecord
    block: str
    statistic: str
    quadratic: bool
    """Whether the statistic is quadratic in the cotangent."""
    wanted: bool = True
    """Whether it is due: else the emission is the identity in the backward pass too."""

    def take(self, value: Tensor) -> None:
        """Add a statistic of the loss's own backward pass to those of the record."""
        if self.wanted and self.record.running and self.block in self.record.rows:
            scaled = value * torch.as_tensor(self.record.square).to(value)
            own = scaled if self.quadratic else value
            add(self.record.taken, self.block, {self.statistic: own})


class _Probe(torch.autograd.Function):
    """An alias of a leaf for one forward pass.

    Its gradient reaches the leaf in the backward pass for sampled targets alone. In the loss's own
    it goes to the record: nothing is accumulated, and a compiled graph, whose backward computes
    every output that it was traced with, gives nothing outside of these passes.
    """

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, destination: Destination) -> Tensor:  # type: ignore[override]
        ctx.set_materialize_grads(False)
        ctx.destination = destination
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None]:  # type: ignore[override]
        record = ctx.destination.record
        if gradient is None or not record.running:
            return None, None
        if record.fisher == "sampled":
            return gradient, None
        ctx.destination.take(gradient.detach())
        return None, None


def probe_for(leaf: Tensor, destination: Destination) -> Tensor:
    """A probe of one forward pass; :func:`destinations_of` finds its destination."""
    probe = _Probe.apply(leaf, destination)
    probe._kfc_destination = destination
    return probe


def destinations_of(probes: Sequence[Tensor]) -> tuple[Destination, ...]:
    """Where the statistics of probes go; empty while a compiler traces a graph with stand-ins."""
    found = (getattr(probe, "_kfc_destination", None) for probe in probes)
    return tuple(destination for destination in found if destination is not None)
