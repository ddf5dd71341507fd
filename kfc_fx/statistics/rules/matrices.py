"""What each kind of layer emits: its factor statistics from its input and output cotangent.

A rule is pure data; ``statistics`` returns one tensor per probe, unnormalised sums over examples
and locations, in the order of ``plan.forms.statistic_shapes``, each estimated from a part of the
batch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import prod
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from kfc_fx.kernels.dtypes import statistic_dtype
from kfc_fx.kernels.geometry import ConvGeometry
from kfc_fx.ops.patch_gram import patch_gram
from kfc_fx.ops.row_gram import row_gram
from kfc_fx.ops.separable_gram import separable_gram
from kfc_fx.statistics.share import BatchShare, scaled


class EmissionRule(Protocol):
    """The statistics of one kind of layer."""

    def statistics(
        self, share: BatchShare, x: Tensor, g: Tensor, *others: Tensor
    ) -> tuple[Tensor, ...]:
        """From the layer's input, the cotangent of its output, and other tensors it read."""


@runtime_checkable
class MatrixRule(EmissionRule, Protocol):
    """A layer whose weight is a matrix, the statistics of whose input and output stand alone."""

    def input_statistics(self, share: BatchShare, x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """Those that need no cotangent: Ω, or its two partial traces."""

    def output_statistics(self, share: BatchShare, g: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        """Γ, from the cotangent and what is :meth:`kept` of the inputs."""

    def kept(self, x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """What the statistics of the output need of the inputs."""


@dataclass(frozen=True)
class LinearRule:
    """Rows of ``[..., C_in]`` and ``[..., C_out]``; a diagonal factor keeps squares alone.

    ``C_out`` may be the projections ``[start, stop)`` of those that a weight holds; they share Ω.
    """

    bias: bool
    diagonal_input: bool = False
    diagonal_output: bool = False
    start: int = 0
    stop: int = 1
    projections: int = 1
    reduce: bool = False
    input_parts: int = 1
    output_parts: int = 1

    def statistics(self, share: BatchShare, x: Tensor, g: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        """See :class:`EmissionRule`."""
        return *self.input_statistics(share, x), *self.output_statistics(share, g)

    def kept(self, *_: Tensor) -> tuple[Tensor, ...]:
        """See :class:`MatrixRule`."""
        return ()

    def output_statistics(self, share: BatchShare, g: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        """See :class:`MatrixRule`."""
        g, scale = share.cut(g)
        if self.reduce and g.dim() > 2:
            g = g.sum(tuple(range(1, g.dim() - 1)))
        columns = g.tensor_split((self.stop - self.start) * self.output_parts, dim=-1)
        if self.diagonal_output:
            gamma = torch.stack([_row_squares(own)[:, None] for own in columns])
        else:
            gamma = torch.stack([row_gram(own) for own in columns])
        return scaled((self._placed(gamma, self.output_parts),), scale)

    def input_statistics(self, share: BatchShare, x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        """See :class:`MatrixRule`."""
        x, scale = share.cut(x, self._rows(x), x.shape[-1] // self.input_parts)
        if self.reduce and x.dim() > 2:
            x = x.mean(tuple(range(1, x.dim() - 1)))
        if self.diagonal_input:
            omega = _row_squares(x, bias=self.bias)[None, None]
        elif self.input_parts > 1:
            omega = torch.stack([row_gram(part) for part in x.tensor_split(self.input_parts, -1)])
        else:
            omega = row_gram(x, bias=self.bias)[None]
        if self.projections > 1:
            omega = omega.repeat(self.stop - self.start, 1, 1)
        return scaled((self._placed(omega, self.input_parts),), scale)

    def _rows(self, x: Tensor) -> int:
        """Of one example; a vector is one row."""
        return 1 if self.reduce else prod(x.shape[1:-1])

    def _placed(self, factors: Tensor, parts: int) -> Tensor:
        """Among those of all projections, which share one Ω; the absent ones are zero."""
        if self.projections == 1:
            return factors
        ends = self.start * parts, (self.projections - self.stop) * parts
        return F.pad(factors, (0, 0, 0, 0, *ends))


@dataclass(frozen=True)
class ConvRule:
    """A convolution of ``[N, C, *spatial]``, its Ω dense or in its two partial traces."""

    geometry: ConvGeometry
    bias: bool
    separable: bool = False
    input_parts: int = 1
    output_parts: int = 1

    def statistics(self, share: BatchShare, x: Tensor, g: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        """See :class:`EmissionRule`."""
        return *self.input_statistics(share, x), *self.output_statistics(share, g)

    def kept(self, *_: Tensor) -> tuple[Tensor, ...]:
        """See :class:`MatrixRule`."""
        return ()

    def output_statistics(self, share: BatchShare, g: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        """See :class:`MatrixRule`."""
        g, scale = share.cut(_batched(g, self.geometry))
        return scaled((_pixel_gram(g, self.geometry.groups * self.output_parts),), scale)

    def input_statistics(self, share: BatchShare, x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        """See :class:`MatrixRule`."""
        x = _batched(x, self.geometry)
        locations = prod(self.geometry.output_size(x.shape[2:]))
        channels = x.shape[1] // (self.geometry.groups * self.input_parts)
        if self.separable:
            x, scale = share.cut(x, locations, max(channels, self.geometry.offsets))
            return scaled(separable_gram(x, **_options(self.geometry)), scale)
        x, scale = share.cut(x, locations, channels * self.geometry.offsets)
        if self.input_parts > 1:  # of one offset: parts are groups of channels
            groups = self.geometry.groups * self.input_parts
            omega = _patch_gram(x, replace(self.geometry, groups=groups), bias=False)
        else:
            omega = _patch_gram(x, self.geometry, self.bias)
        return scaled((omega,), scale)


@dataclass(frozen=True)
class ConvTransposeRule:
    """A transposed convolution: the roles swap, patches are those of the output's cotangent.

    ``y[s·t + d·δ − p] += W[:, :, δ]ᵀ x[t]``, so the gradient of W sums ``x[t]`` times the patch
    of g at t, as the convolution with the same geometry cuts it.
    """

    geometry: ConvGeometry

    def statistics(self, share: BatchShare, x: Tensor, g: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        """See :class:`EmissionRule`."""
        return *self.input_statistics(share, x), *self.output_statistics(share, g, *self.kept(x))

    def kept(self, x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        """An empty tensor of the input's spatial size. See :class:`MatrixRule`."""
        return (x.new_empty(0, *_batched(x, self.geometry).shape[2:]),)

    def output_statistics(self, share: BatchShare, g: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        """See :class:`MatrixRule`."""
        g, scale = share.cut(_batched(g, self.geometry))
        gamma = _patch_gram(*_covered(g, kept[0].shape[1:], self.geometry), bias=False)
        return scaled((gamma,), scale)

    def input_statistics(self, share: BatchShare, x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        """See :class:`MatrixRule`."""
        x = _batched(x, self.geometry)
        groups = self.geometry.groups
        x, scale = share.cut(x, prod(x.shape[2:]), x.shape[1] // groups)
        return scaled((_pixel_gram(x, groups),), scale)


@dataclass(frozen=True)
class EmbeddingRule:
    """Rows of a table: the input factor of one-hot rows is diagonal, the tokens' frequencies."""

    tokens: int
    padding_idx: int | None = None
    output_parts: int = 1

    def statistics(self, share: BatchShare, x: Tensor, g: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        """``x`` holds indices; those of ``padding_idx`` count as empty rows. All are counted: that
        costs nothing, and rare tokens are in few examples."""
        indices = x.flatten().long()
        counts = g.new_zeros(self.tokens, dtype=statistic_dtype(g))
        ones = torch.ones_like(indices, dtype=counts.dtype)
        if self.padding_idx is not None:
            ones = (indices != self.padding_idx % self.tokens).to(counts.dtype)
        g, scale = share.cut(g)
        gammas = torch.stack([row_gram(own) for own in g.tensor_split(self.output_parts, -1)])
        return counts.scatter_add(0, indices, ones)[None, None], *scaled((gammas,), scale)


def _row_squares(x: Tensor, *, bias: bool = False) -> Tensor:
    """The diagonal of the row Gram: ``[..., C]`` -> ``[C + bias]``."""
    rows = x.reshape(-1, x.shape[-1])
    squares = torch.linalg.vector_norm(rows, dim=0, dtype=statistic_dtype(x)).square()
    return torch.cat([squares, squares.new_full((1,), len(rows))]) if bias else squares


def _batched(x: Tensor, geometry: ConvGeometry) -> Tensor:
    """With a dimension of examples: ``[C, *spatial]`` is one."""
    return x.unsqueeze(0) if x.dim() == geometry.ndim + 1 else x


def _pixel_gram(x: Tensor, groups: int) -> Tensor:
    return patch_gram(x, (1,) * (x.dim() - 2), groups=groups)


def _patch_gram(x: Tensor, geometry: ConvGeometry, bias: bool) -> Tensor:
    return patch_gram(x, **_options(geometry), bias=bias)


def _options(geometry: ConvGeometry) -> dict[str, Any]:
    """The arguments of a statistics op that say the geometry; they have its fields' names."""
    return {field.name: getattr(geometry, field.name) for field in fields(geometry)}


def _covered(
    g: Tensor, locations: torch.Size, geometry: ConvGeometry
) -> tuple[Tensor, ConvGeometry]:
    """The part of ``g`` that patches at ``locations`` cover, and the padding that gives just
    those: ``output_padding`` appends pixels, which no patch or only a further one reaches."""
    padding = []
    for axis, count in enumerate(locations):
        before = geometry.padding[axis][0]
        reach = geometry.dilation[axis] * (geometry.kernel_size[axis] - 1)
        needed = max(0, geometry.stride[axis] * (count - 1) + reach + 1 - before)
        size = g.shape[2 + axis]
        g = g.narrow(2 + axis, 0, min(size, needed))
        padding.append((before, max(0, needed - size)))
    swapped = ConvGeometry(
        geometry.kernel_size, geometry.stride, tuple(padding), geometry.dilation, geometry.groups
    )
    return g, swapped
