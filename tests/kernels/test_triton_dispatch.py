"""The CUDA implementations of the ops, whole: slots, assembly, and the choice of method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kfc_fx.kernels.cpu_assemble import pack_slots, reach_sums
from kfc_fx.kernels.geometry import ConvGeometry, conv_geometry
from kfc_fx.kernels.products import product_plan
from kfc_fx.ops import cuda_dispatch
from kfc_fx.ops.convolution import encoded
from tests.kernels.triton_oracle import (
    DEVICE,
    Convolution,
    assert_as_accurate,
    convolutions,
    few_examples,
    needs_triton,
    poisoned_memory,
    random_values,
)

pytest.importorskip("triton")
pytestmark = needs_triton


class CalledOperators(TorchDispatchMode):
    """Notes the names of the ATen operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def check(x: Tensor, geometry: ConvGeometry, *, bias: bool, method: str) -> None:
    from kfc_fx.kernels.triton_im2col_gram import im2col_gram_reference

    def reference(values: Tensor) -> Tensor:
        return im2col_gram_reference(values, geometry, bias=bias)

    with poisoned_memory():
        result = cuda_dispatch.patch_gram(x, encoded(geometry), bias, method)
    wide = x.double()
    assert_as_accurate(result, reference(wide), reference(x.float()), reference(wide.abs()))
    assert torch.equal(result, result.mT)


@given(case=convolutions(max_stride=2), method=st.sampled_from(["auto", "structured", "im2col"]))
@few_examples
def test_every_method_agrees_with_float64(case: Convolution, method: str) -> None:
    plan = product_plan(case.geometry, tuple(case.x.shape[2:]))
    assume(len(plan.slots) * case.geometry.groups < 60)  # the interpreter is slow
    assume(plan.locations)
    check(case.x, case.geometry, bias=case.bias, method=method)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_assembly_puts_every_slot_in_its_place(groups: int, bias: bool) -> None:
    from kfc_fx.kernels.triton_assemble import assemble, assemble_reference

    plan = product_plan(conv_geometry((3, 2), padding=1), (5, 6))
    numbers = len(plan.slots) * 4**2 + (len(plan.reaches) * 4 + 1 if bias else 0)
    slots = torch.arange(groups * numbers, dtype=torch.float32, device=DEVICE)
    slots = slots.reshape(groups, -1)
    with poisoned_memory():
        omega = assemble(slots, plan, 4, bias)
    assert torch.equal(omega, assemble_reference(slots, plan, 4, bias))


def test_the_biass_part_of_slots_reads_no_lists_and_no_numbers() -> None:
    """On CUDA the host would wait for the device at each of them."""
    x = random_values((2, 6, 5, 6), torch.float32, 2)
    plan = product_plan(conv_geometry((3, 3), padding=1, groups=2), (5, 6))
    products = torch.zeros(len(plan.slots), 2, 3, 3, device=DEVICE)
    called = CalledOperators()
    with called:
        pack_slots(products, reach_sums(x, plan, (1, 1), 2), 60)
    waits = {"index", "lift_fresh", "_local_scalar_dense", "_to_copy", "copy_"}
    assert {"sum", "stack"} <= called.names
    assert not called.names & waits


def test_pointwise_convolutions_are_row_grams() -> None:
    assert conv_geometry((1, 1)).is_pointwise
    assert not conv_geometry((1, 1), stride=2).is_pointwise
    check(random_values((3, 9, 4, 5), torch.float32, 0), conv_geometry((1, 1)), bias=True,
          method="auto")  # fmt: skip


@pytest.mark.parametrize("bias", [False, True])
def test_float64_takes_the_plain_way(bias: bool) -> None:
    x = random_values((4, 3), torch.float64, 1)
    result = cuda_dispatch.row_gram(x, bias)
    assert result.dtype == torch.float64
    rows = torch.cat([x, torch.ones_like(x[:, :1])], 1) if bias else x
    torch.testing.assert_close(result, rows.mT @ rows)


def test_the_cheaper_method_follows_the_shape() -> None:
    from kfc_fx.kernels.triton_cost import estimate

    same = conv_geometry((3, 3), padding=1)
    assert estimate(same, (64, 128, 56, 56), "half", 232_448).best == "structured"
    assert estimate(same, (64, 512, 28, 28), "half", 232_448).best == "structured"
    valid = conv_geometry((5, 5))
    assert estimate(valid, (8, 64, 8, 8), "half", 232_448).best == "im2col"
    depthwise = conv_geometry((3, 3), padding=1, groups=64)
    assert estimate(depthwise, (64, 64, 28, 28), "half", 232_448).best == "im2col"


@pytest.mark.parametrize(
    ("kernel", "stride", "shape", "mode", "faster"),
    [
        # Milliseconds of an H100, structured and im2col:
        (3, 1, (128, 64, 32, 32), "half", "structured"),  # 0.103, 0.267
        (3, 1, (128, 128, 16, 16), "half", "structured"),  # 0.103, 0.206
        (3, 1, (128, 256, 8, 8), "half", "structured"),  # 0.108, 0.206
        (7, 2, (64, 3, 224, 224), "half", "im2col"),  # 2.731, 0.223
        (3, 1, (64, 64, 56, 56), "half", "structured"),  # 0.204, 0.386
        (3, 1, (64, 128, 28, 28), "half", "structured"),  # 0.177, 0.298
        (3, 1, (64, 256, 14, 14), "half", "structured"),  # 0.145, 0.259
        (3, 1, (64, 512, 7, 7), "half", "structured"),  # 0.199, 0.248
        (3, 1, (16, 128, 112, 112), "half", "structured"),  # 0.345, 1.176
        (5, 1, (128, 32, 15, 15), "half", "structured"),  # 0.040, 0.123
        (3, 1, (128, 3, 32, 32), "tf32", "im2col"),  # 0.066, 0.039
        (3, 1, (128, 64, 32, 32), "tf32", "structured"),  # 0.180, 0.465
        (3, 1, (128, 128, 16, 16), "tf32", "structured"),  # 0.158, 0.358
        (3, 1, (128, 256, 8, 8), "tf32", "structured"),  # 0.151, 0.316
        (3, 1, (128, 512, 4, 4), "tf32", "structured"),  # 0.187, 0.305
        (7, 2, (64, 3, 224, 224), "tf32", "im2col"),  # 5.433, 0.380
    ],
)
def test_the_choice_is_right_where_methods_differed_by_a_fifth(
    kernel: int, stride: int, shape: tuple[int, ...], mode: str, faster: str
) -> None:
    from kfc_fx.kernels.triton_cost import estimate

    geometry = conv_geometry((kernel, kernel), stride=stride, padding=kernel // 2)
    assert estimate(geometry, shape, mode, 232_448).best == faster
