"""Ω in the compact form of its distinct products, and back.

    patch_gram(x, ...) = assemble(patch_products(x, ...), ...)

Many blocks of Ω are the same product of shifted activations (``kernels.products``); the slots
hold each once: for kernel 3, stride 1 and "same" padding, 29 ``C × C`` products in place of 81
blocks. Slots are linear in the data, so sums over micro-batches and moving averages are taken on
them, and Ω is assembled only where it is factored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfc_fx.kernels import cpu_patch_gram
from kfc_fx.kernels.cpu_assemble import assemble_slots
from kfc_fx.kernels.geometry import ConvGeometry, IntOrInts
from kfc_fx.kernels.products import ProductPlan, product_plan
from kfc_fx.ops.convolution import Padding, checked_geometry, decoded, encoded
from kfc_fx.ops.library import define, statistic_dtype


def patch_products(
    x: Tensor,
    kernel_size: Sequence[int],
    *,
    stride: IntOrInts = 1,
    padding: Padding = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
    bias: bool = False,
) -> Tensor:
    """The distinct products that Ω consists of, each once.

    Args:
        x: ``[N, C, *spatial]``.
        kernel_size, stride, padding, dilation, groups, bias: as for ``patch_gram``.

    Returns:
        ``[groups, numbers]`` slots, with ``numbers = J·(C/groups)²``, and with a bias
        ``B·C/groups + 1`` more: the sums over each distinct reach of an offset, and the number
        of patches. float64 for a float64 input, else float32.

    Raises:
        ValueError: a geometry that does not fit ``x``.
    """
    geometry = checked_geometry(x, kernel_size, stride, padding, dilation, groups)
    return torch.ops.kfc_fx.patch_products.default(x, encoded(geometry), bias)


def assemble(
    slots: Tensor,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    *,
    stride: IntOrInts = 1,
    padding: Padding = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
    bias: bool = False,
) -> Tensor:
    """Ω from the slots of ``patch_products``.

    Args:
        slots: ``[groups, numbers]``.
        input_size: ``(C, *spatial)``, what the slots were computed from.
        kernel_size, stride, padding, dilation, groups, bias: as for ``patch_products``.

    Returns:
        ``[groups, D, D]`` as ``patch_gram``, in the dtype of ``slots``.

    Raises:
        ValueError: slots of another size than the geometry has on ``input_size``.
    """
    geometry = checked_geometry(
        slots.new_empty((0, *input_size)), kernel_size, stride, padding, dilation, groups
    )
    return torch.ops.kfc_fx.assemble.default(slots, list(input_size), encoded(geometry), bias)


def _products_on_any_device(
    x: Tensor,
    numbers: list[int],
    bias: bool,
) -> Tensor:
    geometry = decoded(numbers)
    return cpu_patch_gram.patch_products(x, geometry, bias=bias)


def _fake_products(
    x: Tensor,
    numbers: list[int],
    bias: bool,
) -> Tensor:
    geometry = decoded(numbers)
    # The number of slots depends on the map: its size is specialised, the batch is not.
    plan = product_plan(geometry, tuple(int(size) for size in x.shape[2:]))
    count = plan.numbers(x.shape[1] // geometry.groups, bias)
    return x.new_empty((geometry.groups, count), dtype=statistic_dtype(x))


def _plan_of_slots(
    slots: Tensor, input_size: Sequence[int], geometry: ConvGeometry, bias: bool
) -> ProductPlan:
    channels, *spatial = input_size
    plan = product_plan(geometry, tuple(spatial))
    expected = (geometry.groups, plan.numbers(channels // geometry.groups, bias))
    if slots.shape != expected:
        raise ValueError(
            f"slots of a map {tuple(spatial)} of {channels} channels have shape {expected}, "
            f"got {tuple(slots.shape)}"
        )
    return plan


def _assemble_on_any_device(
    slots: Tensor,
    input_size: list[int],
    numbers: list[int],
    bias: bool,
) -> Tensor:
    geometry = decoded(numbers)
    plan = _plan_of_slots(slots, input_size, geometry, bias)
    return assemble_slots(slots, plan, input_size[0] // geometry.groups, bias)


def _fake_assemble(
    slots: Tensor,
    input_size: list[int],
    numbers: list[int],
    bias: bool,
) -> Tensor:
    geometry = decoded(numbers)
    _plan_of_slots(slots, input_size, geometry, bias)
    side = input_size[0] // geometry.groups * geometry.offsets + bias
    return slots.new_empty((geometry.groups, side, side))


define(
    "patch_products(Tensor x, int[] geometry, bool bias) -> Tensor",
    _products_on_any_device,
    _fake_products,
)
define(
    "assemble(Tensor slots, int[] input_size, int[] geometry, bool bias) -> Tensor",
    _assemble_on_any_device,
    _fake_assemble,
)
