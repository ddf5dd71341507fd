"""Random convolution inputs, and the patch Gram by one loop per patch in float64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Case:
    """An input and the arguments of ``patch_gram``."""

    x: Tensor
    kernel: tuple[int, ...]
    options: dict[str, Any]


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@st.composite
def cases(draw: st.DrawFn, *, dimensions: tuple[int, ...] = (0, 1, 2, 3), dtypes=DTYPES) -> Case:
    """Valid geometries only: the map is drawn to fit the kernel."""
    ndim = draw(st.sampled_from(dimensions))

    def each(low: int, high: int) -> tuple[int, ...]:
        return draw(st.tuples(*[st.integers(low, high)] * ndim))

    kernel, stride, dilation = each(1, 4 if ndim < 3 else 3), each(1, 3), each(1, 2)
    padding = tuple(zip(each(0, 3), each(0, 3), strict=True))
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    spatial = [
        max(1, r - sum(pads)) + more
        for r, pads, more in zip(reach, padding, each(0, 5 if ndim < 3 else 2), strict=True)
    ]
    groups = draw(st.sampled_from((1, 2, 3)))
    channels = groups * draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    x = torch.randn(draw(st.integers(0, 4)), channels, *spatial, generator=generator)
    x = in_memory_format(x.to(draw(st.sampled_from(dtypes))), draw(st.integers(0, 3)))
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return Case(x, kernel, options)


def in_memory_format(x: Tensor, number: int) -> Tensor:
    """The same values contiguous, channels-last, in a larger tensor, or in reversed order."""
    if number == 1:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if number == 2:
        return torch.cat([x, x], dim=1)[:, : x.shape[1]]
    if number == 3:
        order = tuple(reversed(range(x.ndim)))
        return x.permute(order).contiguous().permute(order)
    return x


def patches(case: Case) -> Tensor:
    """``[groups, N·T, C/groups·K]`` in float64, one patch at a time."""
    options, ndim = case.options, len(case.kernel)
    pads = [pad for pair in reversed(options["padding"]) for pad in pair]
    x = F.pad(case.x.double(), pads)
    reach = [d * (k - 1) + 1 for k, d in zip(case.kernel, options["dilation"], strict=True)]
    starts = [
        range(0, x.shape[2 + axis] - reach[axis] + 1, options["stride"][axis])
        for axis in range(ndim)
    ]
    rows = []
    for image, corner in itertools.product(x, itertools.product(*starts)):
        window = tuple(
            slice(start, start + length, step)
            for start, length, step in zip(corner, reach, options["dilation"], strict=True)
        )
        patch = image[(slice(None), *window)]
        rows.append(patch.reshape(options["groups"], -1))
    side = x.shape[1] // options["groups"] * torch.tensor(case.kernel).prod().int().item()
    return torch.stack(rows, 1) if rows else x.new_zeros(options["groups"], 0, side)


def oracle(case: Case, *, bias: bool = False) -> Tensor:
    """Ω in float64."""
    rows = patches(case)
    if bias:
        rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], dim=2)
    return torch.stack([sum_of_outer_products(group) for group in rows])


def sum_of_outer_products(rows: Tensor) -> Tensor:
    total = rows.new_zeros(rows.shape[1], rows.shape[1])
    for row in rows:
        total += torch.outer(row, row)
    return total
