"""The patch Gram and its slots in ATen: choose a method, then run it. Any device can run it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from kfc_fx.kernels import cpu_line_gram, cpu_structured_gram
from kfc_fx.kernels.cpu_assemble import assemble_slots, fill_bias, pack_slots, reach_sums
from kfc_fx.kernels.cpu_cost import estimate
from kfc_fx.kernels.cpu_im2col_gram import fill_im2col_gram
from kfc_fx.kernels.cpu_row_gram import row_gram
from kfc_fx.kernels.dtypes import statistic_dtype
from kfc_fx.kernels.geometry import ConvGeometry
from kfc_fx.kernels.products import ProductPlan, product_plan


def patch_gram(x: Tensor, geometry: ConvGeometry, *, bias: bool, method: str) -> Tensor:
    """``x``: ``[N, C, *spatial]`` -> ``[G, D, D]``; methods as in ``kfc_fx.ops.patch_gram``."""
    if method != "structured" and geometry.is_pointwise:  # patches are the rows themselves
        return row_gram(x.movedim(1, -1), bias=bias).unsqueeze(0)
    x, geometry = with_two_axes(x, geometry)
    plan = product_plan(geometry, tuple(x.shape[2:]))
    if method == "auto":
        method = estimate(geometry, plan, tuple(x.shape)).best
    if method == "im2col":
        return _im2col(x, plan, geometry, bias)
    slots = patch_products(x, geometry, bias=bias)
    return assemble_slots(slots, plan, x.shape[1] // geometry.groups, bias)


def _im2col(x: Tensor, plan: ProductPlan, geometry: ConvGeometry, bias: bool) -> Tensor:
    side = x.shape[1] // geometry.groups * geometry.offsets
    dtype = statistic_dtype(x)
    omega = x.new_empty((geometry.groups, side + bias, side + bias), dtype=dtype)
    fill_im2col_gram(omega[:, :side, :side], x, geometry)
    if bias:
        sums = reach_sums(x, plan, geometry.stride, geometry.groups)
        fill_bias(omega, sums, len(x) * plan.locations, plan)
    return omega


def patch_products(x: Tensor, geometry: ConvGeometry, *, bias: bool) -> Tensor:
    """``x``: ``[N, C, *spatial]`` -> slots ``[G, numbers]``, as ``cpu_assemble`` lays them out."""
    x, geometry = with_two_axes(x, geometry)
    plan = product_plan(geometry, tuple(x.shape[2:]))
    lines = estimate(geometry, plan, tuple(x.shape)).best_products == "lines"
    products = _line_products if lines else _structured_products
    sums = reach_sums(x, plan, geometry.stride, geometry.groups) if bias else None
    return pack_slots(products(x, plan, geometry), sums, len(x) * plan.locations)


def _line_products(x: Tensor, plan: ProductPlan, geometry: ConvGeometry) -> Tensor:
    planned = cpu_line_gram.planned_pass(x.shape, geometry)
    parts = [
        cpu_line_gram.line_products(part, plan, within, planned.images)
        for part, within in _group_parts(x, geometry, planned.groups)
    ]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _structured_products(x: Tensor, plan: ProductPlan, geometry: ConvGeometry) -> Tensor:
    planned = cpu_structured_gram.planned_pass(x.shape, plan, geometry)
    parts = [
        cpu_structured_gram.structured_products(
            part, plan, within.stride, within.groups, planned.images
        )
        for part, within in _group_parts(x, geometry, planned.groups)
    ]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _group_parts(
    x: Tensor, geometry: ConvGeometry, groups: int
) -> Iterator[tuple[Tensor, ConvGeometry]]:
    """``x`` by a few groups at a time, and the geometry of a part."""
    for part in x.split(groups * (x.shape[1] // geometry.groups), dim=1):
        yield part, replace(geometry, groups=part.shape[1] * geometry.groups // x.shape[1])


def with_two_axes(x: Tensor, geometry: ConvGeometry) -> tuple[Tensor, ConvGeometry]:
    """Put axes of size one in front: a line is a map of one row. The slots are the same."""
    missing = max(0, 2 - geometry.ndim)
    lifted = ConvGeometry(
        (1,) * missing + geometry.kernel_size,
        (1,) * missing + geometry.stride,
        ((0, 0),) * missing + geometry.padding,
        (1,) * missing + geometry.dilation,
        geometry.groups,
    )
    return x.reshape(*x.shape[:2], *(1,) * missing, *x.shape[2:]), lifted
