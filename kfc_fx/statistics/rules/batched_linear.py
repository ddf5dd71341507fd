"""The statistics of a batched linear map: entry e of the input meets ``W[e]``, a block each.

N is the number of examples of the forward pass, also where an entry sees some of them alone, as
an expert does: ``Ω_e`` sums over the rows that e saw and is divided by N, ``Γ_e`` is the mean over
those rows. |T| is then the mean number of rows that e saw of one example, and ``Ω_e ⊗ Γ_e`` is
the Fisher matrix of ``W[e]`` per example of the batch, as for any other layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from kfc_fx.ops.grouped_row_gram import grouped_row_gram
from kfc_fx.ops.row_gram import row_gram
from kfc_fx.plan.forms import FactorForms
from kfc_fx.plan.spec import BlockSpec, SiteSpec
from kfc_fx.statistics.share import BatchShare

Axes = tuple[int | None, int]


@dataclass(frozen=True)
class BatchedLinearRule:
    """An input without an entry axis is every entry's. Ω is ``[E, D, D]``, ``D = C_in + bias``, and
    Γ ``[E, C_out, C_out]``."""

    bias: bool
    entries: tuple[int, int, int]
    """``(start, stop, E)``: the entries ``[start, stop)`` of the E that the weight holds."""
    input_axes: Axes
    """Of entry and channel in the input, counted from the end."""
    output_axes: Axes
    """Of entry and row in the output."""

    @classmethod
    def of(cls, block: BlockSpec, site: SiteSpec, _: FactorForms) -> Self:
        """See :class:`~kfc_fx.statistics.rules.matrices.EmissionRule`."""
        assert site.batch is not None
        entries = (*block.span(site), block.groups)
        return cls(block.bias is not None, entries, site.batch.inputs, site.batch.outputs)

    def statistics(
        self, share: BatchShare, x: Tensor, g: Tensor, *ends: Tensor
    ) -> tuple[Tensor, ...]:
        """Of the whole batch: where examples stand in it is not known here. Of rows that stand one
        entry after the other, ``ends`` is where each entry's end."""
        return *self.input_statistics(share, x, *ends), *self.output_statistics(share, g, *ends)

    def kept(self, _: Tensor, *ends: Tensor) -> tuple[Tensor, ...]:
        """The ends of the entries' rows, where the input has them."""
        return ends

    def output_statistics(self, _: BatchShare, g: Tensor, *ends: Tensor) -> tuple[Tensor, ...]:
        """Γ of every entry."""
        gamma = grouped_row_gram(g, ends[0]) if ends else _grams(g, self.output_axes, False)
        return (self._placed(gamma),)

    def input_statistics(self, _: BatchShare, x: Tensor, *ends: Tensor) -> tuple[Tensor, ...]:
        """Ω of every entry."""
        if ends:
            return (self._placed(grouped_row_gram(x, ends[0], bias=self.bias)),)
        omega = _grams(x, self.input_axes, self.bias)
        start, stop = self.entries[:2]
        return (self._placed(omega.expand(stop - start, -1, -1)),)

    def _placed(self, factors: Tensor) -> Tensor:
        """Among those of all entries; the absent ones are zero."""
        start, stop, total = self.entries
        return F.pad(factors, (0, 0, 0, 0, start, total - stop))


def _grams(x: Tensor, axes: Axes, bias: bool) -> Tensor:
    """``[entries, C + bias, C + bias]``, or ``[1, ...]`` without an entry axis."""
    entry, channel = axes
    rows = x.movedim(channel, -1)
    if entry is None:
        return row_gram(rows, bias=bias)[None]
    return torch.stack([row_gram(own, bias=bias) for own in _moved(x, entry, channel)])


def _moved(x: Tensor, entry: int, channel: int) -> tuple[Tensor, ...]:
    return x.movedim((entry, channel), (0, -1)).unbind(0)


def group_sizes(ends: Tensor) -> Tensor:
    """How many rows each entry has: ``[E]`` ends to ``[E]`` differences."""
    return torch.diff(F.pad(ends, (1, 0)))
