"""Separable input factor of a convolution: Ω ≈ Ω_C ⊗ Ω_Δ / tr Ω.

The two partial traces of the patch Gram, without patches. The channel factor is one product
over the padded map, each pixel weighted by how many offsets reach it:

    Ω_C = Σ_p w_p x_p x_pᵀ

The offset factor needs scalars only: with ``M_d(p) = Σ_n Σ_c x_c(p) x_c(p + d)`` for each
distinct difference d of offsets, ``Ω_Δ(δ, δ') = Σ_t M_{δ'−δ}(t + δ)``, exact at the borders
because the map is padded as the convolution pads it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from kfc_fx.plan.geometry import ConvGeometry, IntOrInts, conv_geometry


def separable_gram(
    x: Tensor,
    kernel_size: Sequence[int],
    *,
    stride: IntOrInts = 1,
    padding: str | int | Sequence[int] | Sequence[tuple[int, int]] = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """The two partial traces of ``patch_gram(x, ...)``, unnormalised.

    Args:
        x: ``[N, C, *spatial]``.
        kernel_size, stride, padding, dilation, groups: as for ``patch_gram``.

    Returns:
        ``channel``: ``[groups, C/groups, C/groups]``, the trace over kernel offsets, and
        ``offset``: ``[groups, K, K]`` with ``K = prod(kernel_size)``, the trace over channels;
        float64 for a float64 input, else float32.
    """
    geometry = conv_geometry(
        kernel_size, stride=stride, padding=padding, dilation=dilation, groups=groups
    )
    return torch.ops.kfc_fx.separable_gram(
        x,
        list(geometry.kernel_size),
        list(geometry.stride),
        [before for before, _ in geometry.padding],
        [after for _, after in geometry.padding],
        list(geometry.dilation),
        groups,
    )


@torch.library.custom_op("kfc_fx::separable_gram", mutates_args=())
def _separable_gram(
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding_before: list[int],
    padding_after: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    padding = tuple(zip(padding_before, padding_after, strict=True))
    geometry = ConvGeometry(tuple(kernel_size), tuple(stride), padding, tuple(dilation), groups)
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    out = geometry.output_size(x.shape[2:])
    padded = F.pad(x, [pad for pair in reversed(padding) for pad in pair])
    padded = padded.unflatten(1, (groups, -1))  # [N, G, C/G, *padded]
    return _channel_factor(padded, geometry, out), _offset_factor(padded, geometry, out)


@_separable_gram.register_fake
def _(x, kernel_size, stride, padding_before, padding_after, dilation, groups):  # type: ignore[no-untyped-def]
    channels, offsets = x.shape[1] // groups, prod(kernel_size)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.new_empty((groups, channels, channels), dtype=dtype),
        x.new_empty((groups, offsets, offsets), dtype=dtype),
    )


def _channel_factor(padded: Tensor, geometry: ConvGeometry, out: Sequence[int]) -> Tensor:
    weighted = padded
    for axis in range(geometry.ndim):
        counts = _reach_counts(padded.shape[3 + axis], geometry, axis, out[axis])
        root = torch.tensor(counts, dtype=padded.dtype, device=padded.device).sqrt()
        shape = [1] * geometry.ndim
        shape[axis] = -1
        weighted = weighted * root.reshape(shape)
    rows = weighted.flatten(3).permute(1, 2, 0, 3).flatten(2)  # [G, C/G, N*P]
    return rows @ rows.mT


def _reach_counts(size: int, geometry: ConvGeometry, axis: int, out: int) -> list[int]:
    """How many (location, offset) pairs of one axis fall on each index of the padded map."""
    counts = [0] * size
    for location, offset in itertools.product(range(out), range(geometry.kernel_size[axis])):
        counts[location * geometry.stride[axis] + offset * geometry.dilation[axis]] += 1
    return counts


def _offset_factor(padded: Tensor, geometry: ConvGeometry, out: Sequence[int]) -> Tensor:
    offsets = list(itertools.product(*map(range, geometry.kernel_size)))
    result = padded.new_zeros(padded.shape[1], len(offsets), len(offsets))
    if not all(out):
        return result
    maps: dict[tuple[int, ...], Tensor] = {}
    for (i, first), (j, second) in itertools.combinations_with_replacement(enumerate(offsets), 2):
        difference = tuple(
            (b - a) * d for a, b, d in zip(first, second, geometry.dilation, strict=True)
        )
        if difference not in maps:
            maps[difference] = _autocorrelation(padded, difference)
        start = [a * d for a, d in zip(first, geometry.dilation, strict=True)]
        total = _sum_over_locations(maps[difference], difference, start, geometry.stride, out)
        result[:, i, j] = total
        result[:, j, i] = total
    return result


def _autocorrelation(padded: Tensor, difference: Sequence[int]) -> Tensor:
    """``M_d(p)`` for every p with p and p + d in the map: ``[G, *overlap]``."""
    here, there = padded, padded
    for axis, step in enumerate(difference):
        size = padded.shape[3 + axis] - abs(step)
        here = here.narrow(3 + axis, max(-step, 0), size)
        there = there.narrow(3 + axis, max(step, 0), size)
    return (here * there).sum((0, 2))


def _sum_over_locations(
    correlation: Tensor,
    difference: Sequence[int],
    start: Sequence[int],
    stride: Sequence[int],
    out: Sequence[int],
) -> Tensor:
    """Sum of ``M_d(t·stride + start)`` over the output locations t, per group."""
    window = [slice(None)]
    for step, first, jump, count in zip(difference, start, stride, out, strict=True):
        origin = first - max(-step, 0)  # the overlap of a negative step starts later
        window.append(slice(origin, origin + (count - 1) * jump + 1, jump))
    return correlation[tuple(window)].flatten(1).sum(1)
