"""A convolution's geometry as op arguments, and the checks that every op makes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from kfc_fx.kernels.geometry import ConvGeometry, IntOrInts, conv_geometry

Padding = str | int | Sequence[int] | Sequence[tuple[int, int]]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def checked_geometry(
    x: Tensor,
    kernel_size: IntOrInts,
    stride: IntOrInts,
    padding: Padding,
    dilation: IntOrInts,
    groups: int,
) -> ConvGeometry:
    """The geometry of a convolution of ``x``: ``[N, C, *spatial]``.

    ``kernel_size`` may be one number for every spatial dimension, as in ``F.unfold``.

    Raises:
        ValueError: arguments that ``conv_geometry`` refuses; more than 3 spatial dimensions, or
            another number of them than ``kernel_size`` has; channels that ``groups`` does not
            divide; a padded map smaller than the kernel; a dtype that is not floating point.
    """
    if isinstance(kernel_size, int):
        kernel_size = (kernel_size,) * (x.ndim - 2)
    geometry = conv_geometry(
        kernel_size, stride=stride, padding=padding, dilation=dilation, groups=groups
    )
    if geometry.ndim > 3:
        raise ValueError(f"kernel_size has {geometry.ndim} dimensions; at most 3 are supported")
    if x.ndim != 2 + geometry.ndim:
        raise ValueError(
            f"kernel_size {geometry.kernel_size} needs x of {2 + geometry.ndim} dimensions "
            f"[N, C, *spatial], got shape {tuple(x.shape)}"
        )
    if x.shape[1] % groups:
        raise ValueError(f"groups={groups} does not divide the {x.shape[1]} channels of x")
    check_dtype(x)
    _check_map(x.shape[2:], geometry)
    return geometry


def check_dtype(x: Tensor) -> None:
    """Raise ValueError where statistics of ``x`` could not be accumulated."""
    if x.dtype not in DTYPES:
        raise ValueError(f"x must have one of the dtypes {DTYPES}, got {x.dtype}")


def _check_map(spatial: Sequence[int], geometry: ConvGeometry) -> None:
    for axis, size in enumerate(spatial):
        padded = size + sum(geometry.padding[axis])
        reach = geometry.dilation[axis] * (geometry.kernel_size[axis] - 1) + 1
        if padded < reach:
            raise ValueError(
                f"the convolution has no output: spatial dimension {axis} is {padded} with its "
                f"padding, and the kernel reaches over {reach}"
            )


def encoded(geometry: ConvGeometry) -> list[int]:
    """A geometry as one list of numbers, which is how an op takes it: kernel sizes, strides,
    padding before, padding after, dilations, and last the groups."""
    before, after = ([pad[end] for pad in geometry.padding] for end in (0, 1))
    per_axis = (geometry.kernel_size, geometry.stride, before, after, geometry.dilation)
    return [*itertools.chain(*per_axis), geometry.groups]


def decoded(numbers: Sequence[int]) -> ConvGeometry:
    """The inverse of :func:`encoded`."""
    return _decoded(tuple(numbers))


@lru_cache(maxsize=512)
def _decoded(numbers: tuple[int, ...]) -> ConvGeometry:
    *per_axis, groups = numbers
    axes = len(per_axis) // 5
    kernel_size, stride, before, after, dilation = (
        tuple(per_axis[axes * field : axes * (field + 1)]) for field in range(5)
    )
    padding = tuple(zip(before, after, strict=True))
    return ConvGeometry(kernel_size, stride, padding, dilation, groups)
