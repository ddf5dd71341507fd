"""CUDA implementations of the statistics ops: Triton kernels, or ATen where those do not apply.

Importing this registers them. Triton is imported when the first CUDA tensor arrives, so that the
package needs neither Triton nor a GPU. float64 takes the ATen way, as does a machine without
Triton or with a GPU that Triton does not compile for.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from kfc_fx.kernels import cpu_patch_gram, cpu_separable_gram
from kfc_fx.kernels.cpu_assemble import pack_slots, reach_sums
from kfc_fx.kernels.dtypes import statistic_dtype
from kfc_fx.kernels.geometry import ConvGeometry
from kfc_fx.kernels.products import ProductPlan, product_plan
from kfc_fx.ops.convolution import decoded
from kfc_fx.ops.library import LIBRARY

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_CAPABILITY = (8, 0)


def patch_gram(
    x: Tensor,
    numbers: list[int],
    bias: bool,
    method: str,
) -> Tensor:
    """``kfc_fx::patch_gram`` on CUDA."""
    geometry = decoded(numbers)
    if not uses_triton(x):
        return cpu_patch_gram.patch_gram(x, geometry, bias=bias, method=method)
    if geometry.is_pointwise:
        from kfc_fx.kernels.triton_row_gram import row_gram as triton_row_gram

        return triton_row_gram(x.movedim(1, -1), bias=bias).unsqueeze(0)
    if method == "auto":
        method = _cheaper_method(x, geometry)
    if method == "structured":
        return _structured_gram(x, geometry, bias)
    from kfc_fx.kernels.triton_im2col_gram import im2col_gram

    return im2col_gram(x, geometry, bias=bias)


def row_gram(x: Tensor, bias: bool) -> Tensor:
    """``kfc_fx::row_gram`` on CUDA."""
    if uses_triton(x):
        from kfc_fx.kernels.triton_row_gram import row_gram as triton_row_gram

        return triton_row_gram(x, bias=bias)
    rows = x.to(statistic_dtype(x)).flatten(0, -2)
    if bias:
        rows = torch.cat([rows, rows.new_ones(rows.shape[0], 1)], dim=1)
    return rows.mT @ rows


def separable_gram(x: Tensor, numbers: list[int]) -> tuple[Tensor, Tensor]:
    """``kfc_fx::separable_gram`` on CUDA."""
    geometry = decoded(numbers)
    if not uses_triton(x):
        return cpu_separable_gram.separable_gram(x, geometry)
    from kfc_fx.kernels.triton_separable_gram import separable_gram as triton_separable_gram

    return triton_separable_gram(x, geometry)


def uses_triton(x: Tensor) -> bool:
    """Whether the Triton kernels take ``x``: its dtype, and the device that holds it."""
    return x.dtype in TRITON_DTYPES and _device_compiles(x.device.type, x.device.index or 0)


@cache
def _device_compiles(kind: str, index: int) -> bool:
    if find_spec("triton") is None:
        return False
    if kind != "cuda":  # the interpreter, in tests
        return True
    if torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(index) >= LEAST_CAPABILITY


def _cheaper_method(x: Tensor, geometry: ConvGeometry) -> str:
    from kfc_fx.kernels.triton_configs import precision_mode, processor
    from kfc_fx.kernels.triton_cost import estimate

    mode = precision_mode(x.dtype)
    return estimate(geometry, tuple(x.shape), mode, processor(x).shared_bytes).best


def product_slots(x: Tensor, geometry: ConvGeometry, bias: bool) -> tuple[Tensor, ProductPlan]:
    """The distinct products of Ω by Triton, as ``cpu_assemble`` lays them out, and their plan."""
    from kfc_fx.kernels.triton_patch_products import patch_products

    x, geometry = cpu_patch_gram.with_two_axes(x, geometry)
    plan = product_plan(geometry, tuple(x.shape[2:]))
    products = patch_products(x, plan, geometry.stride, geometry.groups)
    sums = reach_sums(x, plan, geometry.stride, geometry.groups) if bias else None
    return pack_slots(products, sums, len(x) * plan.locations), plan


def _structured_gram(x: Tensor, geometry: ConvGeometry, bias: bool) -> Tensor:
    from kfc_fx.kernels.triton_assemble import assemble

    slots, plan = product_slots(x, geometry, bias)
    return assemble(slots, plan, x.shape[1] // geometry.groups, bias)


for _implementation in (patch_gram, row_gram, separable_gram):
    LIBRARY.impl(_implementation.__name__, _implementation, "CUDA")
