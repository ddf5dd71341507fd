"""What each kind of layer emits: its factor statistics from its input and output cotangent.

A rule is pure data: its fields are the options of an emission in a graph. ``statistics`` returns
one tensor per probe, unnormalised sums over examples and locations, in the order of
``plan.forms.statistic_shapes``, each estimated from a part of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import prod
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from kfc_fx.kernels.dtypes import statistic_dtype
from kfc_fx.kernels.geometry import ConvGeometry
from kfc_fx.ops.patch_gram import patch_gram
from kfc_fx.ops.row_gram import row_gram
from kfc_fx.ops.separable_gram import separable_gram
from kfc_fx.plan.forms import FactorForms
from kfc_fx.plan.locations import batch_axis
from kfc_fx.plan.spec import BlockSpec, SiteSpec
from kfc_fx.statistics.share import BatchShare, scaled


class EmissionRule(Protocol):
    """The statistics of one kind of layer."""

    @classmethod
    def of(cls, block: BlockSpec, site: SiteSpec, forms: FactorForms) -> Self:
        """The rule of a site of a block whose factors have these forms."""

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

    Ω is ``[P, D, D]``, ``D = C_in + bias``, and Γ ``[P, C_out, C_out]``; diagonal factors are
    ``[P, 1, D]`` and ``[P, C_out, 1]``. A factor that is cut into k parts has k times the entries,
    each of a k-th of the side, and no bias column.
    """

    bias: bool
    diagonal_input: bool = False
    diagonal_output: bool = False
    projections: tuple[int, int, int] = (0, 1, 1)
    """``(start, stop, P)``: the output is of the projections ``[start, stop)`` of the P that the
    weight holds; all share Ω."""
    reduce: bool = False
    """Average the input and sum the cotangent over all dimensions but the first and last."""
    input_parts: int = 1
    output_parts: int = 1
    batch_dim: int = 0
    """Of tensors that have it before their last dimension; else examples are first."""

    @classmethod
    def of(cls, block: BlockSpec, site: SiteSpec, forms: FactorForms) -> Self:
        """See :class:`EmissionRule`."""
        return cls(
            bias=block.bias is not None,
            diagonal_input=forms.input == "diagonal",
            diagonal_output=forms.output == "diagonal",
            projections=(*block.span(site), block.projections),
            reduce=block.sharing == "reduce",
            input_parts=forms.input_parts,
            output_parts=forms.output_parts,
            batch_dim=block.batch_dim,
        )

    def statistics(self, share: BatchShare, x: Tensor, g: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        """See :class:`EmissionRule`."""
        return *self.input_statistics(share, x), *self.output_statistics(share, g)

    def kept(self, *_: Tensor) -> tuple[Tensor, ...]:
        """See :class:`MatrixRule`."""
        return ()

    def output_statistics(self, share: BatchShare, g: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        """See :class:`MatrixRule`."""
        g, scale = share.cut(examples_first(g, self.batch_dim))
        if self.reduce and g.dim() > 2:
            g = g.sum(tuple(range(1, g.dim() - 1)))
        columns = g.tensor_split(self._used * self.output_parts, dim=-1)
        if self.diagonal_output:
            gamma = torch.stack([_row_squares(own)[:, None] for own in columns])
        else:
            gamma = torch.stack([row_gram(own) for own in columns])
        return scaled((self._placed(gamma, self.output_parts),), scale)

    def input_statistics(self, share: BatchShare, x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        """See :class:`MatrixRule`."""
        x = examples_first(x, self.batch_dim)
        x, scale = share.cut(x, self._rows(x), x.shape[-1] // self.input_parts)
        if self.reduce and x.dim() > 2:
            x = x.mean(tuple(range(1, x.dim() - 1)))
        if self.diagonal_input:
            omega = _row_squares(x, bias=self.bias)[None, None]
        elif self.input_parts > 1:
            omega = torch.stack([row_gram(part) for part in x.tensor_split(self.input_parts, -1)])
        else:
            omega = row_gram(x, bias=self.bias)[None]
        if self.projections[2] > 1:
            omega = omega.repeat(self._used, 1, 1)
        return scaled((self._placed(omega, self.input_parts),), scale)

    @property
    def _used(self) -> int:
        start, stop, _ = self.projections
        return stop - start

    def _rows(self, x: Tensor) -> int:
        """Of one example; a vector is one row."""
        return 1 if self.reduce else prod(x.shape[1:-1])

    def _placed(self, factors: Tensor, parts: int) -> Tensor:
        """Among those of all projections, which share one Ω; the absent ones are zero."""
        start, stop, projections = self.projections
        if projections == 1:
            return factors
        ends = start * parts, (projections - stop) * parts
        return F.pad(factors, (0, 0, 0, 0, *ends))


@dataclass(frozen=True)
class _Convolution:
    """The numbers of a convolution, as a graph holds them."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def geometry(self) -> ConvGeometry:
        """The same as one value."""
        return ConvGeometry(self.kernel_size, self.stride, self.padding, self.dilation, self.groups)


@dataclass(frozen=True)
class ConvRule(_Convolution):
    """A convolution of ``[N, C, *spatial]``, its Ω dense or in its two partial traces.

    Ω is ``[groups, D, D]``, ``D = C_in/groups * |Δ| + bias``, or its traces over offsets and over
    channels, ``[groups, C_in/groups, C_in/groups]`` and ``[groups, |Δ|, |Δ|]``; Γ is
    ``[groups, C_out/groups, C_out/groups]``. Factors may be cut as those of :class:`LinearRule`, Ω
    of one offset.
    """

    bias: bool
    separable: bool = False
    input_parts: int = 1
    output_parts: int = 1

    @classmethod
    def of(cls, block: BlockSpec, site: SiteSpec, forms: FactorForms) -> Self:
        """See :class:`EmissionRule`."""
        return cls(
            **_options(site.geometry),
            bias=block.bias is not None,
            separable=forms.input == "separable",
            input_parts=forms.input_parts,
            output_parts=forms.output_parts,
        )

    def statistics(self, share: BatchShare, x: Tensor, g: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        """See :class:`EmissionRule`."""
        return *self.input_statistics(share, x), *self.output_statistics(share, g)

    def kept(self, *_: Tensor) -> tuple[Tensor, ...]:
        """See :class:`MatrixRule`."""
        return ()

    def output_statistics(self, share: BatchShare, g: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        """See :class:`MatrixRule`."""
        g, scale = share.cut(_batched(g, self.geometry))
        return scaled((_pixel_gram(g, self.groups * self.output_parts),), scale)

    def input_statistics(self, share: BatchShare, x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        """See :class:`MatrixRule`."""
        x = _batched(x, self.geometry)
        locations = prod(self.geometry.output_size(x.shape[2:]))
        channels = x.shape[1] // (self.groups * self.input_parts)
        if self.separable:
            x, scale = share.cut(x, locations, max(channels, self.geometry.offsets))
            return scaled(separable_gram(x, **_options(self.geometry)), scale)
        x, scale = share.cut(x, locations, channels * self.geometry.offsets)
        if self.input_parts > 1:  # of one offset: parts are groups of channels
            groups = self.groups * self.input_parts
            omega = _patch_gram(x, replace(self.geometry, groups=groups), bias=False)
        else:
            omega = _patch_gram(x, self.geometry, self.bias)
        return scaled((omega,), scale)


@dataclass(frozen=True)
class ConvTransposeRule(_Convolution):
    """A transposed convolution: the roles swap, patches are those of the output's cotangent.

    ``y[s·t + d·δ − p] += W[:, :, δ]ᵀ x[t]``, so the gradient of W sums ``x[t]`` times the patch
    of g at t, as the convolution with the same geometry cuts it. Ω is
    ``[groups, C_in/groups, C_in/groups]`` and Γ ``[groups, R, R]``, ``R = C_out/groups * |Δ|``.
    Factors may be cut as those of :class:`LinearRule`, Γ between channels.
    """

    input_parts: int = 1
    output_parts: int = 1

    @classmethod
    def of(cls, block: BlockSpec, site: SiteSpec, forms: FactorForms) -> Self:
        """See :class:`EmissionRule`."""
        return cls(
            **_options(site.geometry),
            input_parts=forms.input_parts,
            output_parts=forms.output_parts,
        )

    def statistics(self, share: BatchShare, x: Tensor, g: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        """See :class:`EmissionRule`."""
        return *self.input_statistics(share, x), *self.output_statistics(share, g, *self.kept(x))

    def kept(self, x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        """An empty tensor of the input's spatial size. See :class:`MatrixRule`."""
        return (x.new_empty(0, *_batched(x, self.geometry).shape[2:]),)

    def output_statistics(self, share: BatchShare, g: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        """See :class:`MatrixRule`."""
        g, scale = share.cut(_batched(g, self.geometry))
        covered, geometry = _covered(g, kept[0].shape[1:], self.geometry)
        geometry = replace(geometry, groups=self.groups * self.output_parts)
        gamma = _patch_gram(covered, geometry, bias=False)
        return scaled((gamma,), scale)

    def input_statistics(self, share: BatchShare, x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        """See :class:`MatrixRule`."""
        x = _batched(x, self.geometry)
        groups = self.groups * self.input_parts
        x, scale = share.cut(x, prod(x.shape[2:]), x.shape[1] // groups)
        return scaled((_pixel_gram(x, groups),), scale)


@dataclass(frozen=True)
class EmbeddingRule:
    """Rows ``[..., E]`` of a table ``[tokens, E]``: the input factor of one-hot rows is diagonal,
    the tokens' frequencies ``[1, 1, tokens]``; Γ is ``[1, E, E]``, or its parts."""

    tokens: int
    padding_idx: int | None = None
    output_parts: int = 1
    batch_dim: int = 0

    @classmethod
    def of(cls, block: BlockSpec, site: SiteSpec, forms: FactorForms) -> Self:
        """See :class:`EmissionRule`."""
        return cls(block.channels, site.padding_idx, forms.output_parts, block.batch_dim)

    def statistics(self, share: BatchShare, x: Tensor, g: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        """``x`` holds indices; those of ``padding_idx`` count as empty rows. All are counted: that
        costs nothing, and rare tokens are in few examples."""
        indices = x.flatten().long()
        counts = g.new_zeros(self.tokens, dtype=statistic_dtype(g))
        ones = torch.ones_like(indices, dtype=counts.dtype)
        if self.padding_idx is not None:
            ones = (indices != self.padding_idx % self.tokens).to(counts.dtype)
        g, scale = share.cut(examples_first(g, self.batch_dim))
        gammas = torch.stack([row_gram(own) for own in g.tensor_split(self.output_parts, -1)])
        return counts.scatter_add(0, indices, ones)[None, None], *scaled((gammas,), scale)


def examples_first(x: Tensor, batch_dim: int, channel_dims: int = 1) -> Tensor:
    """A view with the dimension of the examples in front, if it is before those of channels."""
    axis = batch_axis(x.dim() - channel_dims + 1, batch_dim)
    return x.movedim(axis, 0) if axis else x


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
