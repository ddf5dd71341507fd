"""Patches of a few images as a view: one strided copy then lays them out, padding and all."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kfc_fx.plan.geometry import ConvGeometry


def padded_images(
    x: Tensor,
    geometry: ConvGeometry,
    dtype: torch.dtype,
    *,
    innermost: Literal["images", "channels"],
) -> Tensor:
    """``x``: ``[n, C, *spatial]`` with its padding, ``[n, C, *padded]``, in ``dtype``.

    The innermost axis in memory makes the runs of the copy of patches: lines times images where
    the patches are columns, kernel lines times channels where they are rows.
    """
    sizes = x.shape[2:]
    padded = [size + sum(pad) for size, pad in zip(sizes, geometry.padding, strict=True)]
    if innermost == "images":
        laid = x.new_zeros((x.shape[1], *padded, len(x)), dtype=dtype).movedim(-1, 0)
    else:
        laid = x.new_zeros((len(x), *padded, x.shape[1]), dtype=dtype).movedim(-1, 1)
    inside = [slice(p, p + size) for (p, _), size in zip(geometry.padding, sizes, strict=True)]
    laid[(slice(None), slice(None), *inside)] = x
    return laid


def patches_of(padded: Tensor, geometry: ConvGeometry) -> Tensor:
    """View of padded images ``[n, C, *padded]`` as patches ``[C, *kernel, n, *out]``."""
    image, channel, *pixel = padded.stride()
    kernel = [step * size for step, size in zip(geometry.dilation, pixel, strict=True)]
    out = [step * size for step, size in zip(geometry.stride, pixel, strict=True)]
    bare = ConvGeometry(
        geometry.kernel_size, geometry.stride, ((0, 0),) * geometry.ndim, geometry.dilation
    )
    locations = bare.output_size(padded.shape[2:])
    return padded.as_strided(
        (padded.shape[1], *geometry.kernel_size, len(padded), *locations),
        (channel, *kernel, image, *out),
    )


def reads_once(geometry: ConvGeometry) -> bool:
    """Whether no pixel is in two patches and none is padding: a layout would be a copy more."""
    steps = zip(geometry.kernel_size, geometry.stride, geometry.dilation, strict=True)
    padded = any(map(any, geometry.padding))
    return not padded and all(k == 1 or k * d <= s for k, s, d in steps)
