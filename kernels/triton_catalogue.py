"""Every Triton kernel in every configuration that ships."""

from __future__ import annotations

from kfc_fx.kernels import (
    triton_assemble,
    triton_im2col_gram,
    triton_pack,
    triton_patch_products,
    triton_row_gram,
    triton_separable_gram,
    triton_split_reduction,
)
from kfc_fx.kernels.triton_case import KernelCase

KERNEL_MODULES = (
    triton_assemble,
    triton_im2col_gram,
    triton_pack,
    triton_patch_products,
    triton_row_gram,
    triton_separable_gram,
    triton_split_reduction,
)


def shipped_cases() -> list[KernelCase]:
    """All cases, in the order of the kernels' modules."""
    return [case for module in KERNEL_MODULES for case in module.offline_cases()]
