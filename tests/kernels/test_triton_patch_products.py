"""The structured kernel against float64, and its schedule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from torch import Tensor

from kfc_fx.kernels.geometry import ConvGeometry, conv_geometry
from kfc_fx.kernels.products import product_plan
from tests.kernels.triton_oracle import (
    DEVICE,
    DTYPES,
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


def check(x: Tensor, geometry: ConvGeometry) -> Tensor:
    from kfc_fx.kernels.triton_patch_products import patch_products, patch_products_reference

    plan = product_plan(geometry, tuple(x.shape[2:]))

    def reference(values: Tensor) -> Tensor:
        return patch_products_reference(values, plan, geometry.stride, geometry.groups)

    with poisoned_memory():
        result = patch_products(x, plan, geometry.stride, geometry.groups)
    wide = x.double()
    assert_as_accurate(result, reference(wide), reference(x.float()), reference(wide.abs()))
    for number in plan.reaches:
        assert torch.equal(result[number], result[number].mT)
    return result


@given(case=convolutions(max_stride=2))
@few_examples
def test_agrees_with_float64(case: Convolution) -> None:
    plan = product_plan(case.geometry, tuple(case.x.shape[2:]))
    assume(len(plan.slots) * case.geometry.groups < 60)  # the interpreter is slow
    check(case.x, case.geometry)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_padding(dtype: torch.dtype) -> None:
    check(random_values((20, 5, 6, 4), dtype, 0), conv_geometry((3, 3), padding=1))


def test_several_tiles() -> None:
    check(random_values((9, 70, 3), torch.bfloat16, 1), conv_geometry((2,), padding=1))


def test_long_jobs_are_cut_into_parts() -> None:
    from kfc_fx.kernels.triton_product_jobs import job_plan, product_schedule, total_steps

    jobs = job_plan(product_plan(conv_geometry((3, 3), padding=1), (28, 28)))
    schedule = product_schedule(jobs, (1, 1), (28, 28), 64, 64, 50)
    assert max(part.last_step - part.first_step for part in schedule.parts) <= 50
    steps = sum(part.last_step - part.first_step for part in schedule.parts)
    assert steps == total_steps(jobs, 64, 64)
    targets = [part.target for part in schedule.parts]
    assert sorted(set(targets)) == sorted(targets)
    check(random_values((40, 3, 30), torch.float32, 2), conv_geometry((2,)))


def test_no_part_adds_up_more_rows_than_it_may_unless_memory_runs_out() -> None:
    from kfc_fx.kernels import triton_configs as configs
    from kfc_fx.kernels.triton_patch_products import _schedule
    from kfc_fx.kernels.triton_product_jobs import job_plan

    jobs = job_plan(product_plan(conv_geometry((3, 3), padding=1), (112, 112)))
    for side, batch in ((128, 16), (1024, 128), (4096, 128)):
        tiles = (side // 128) * (side // 256 or 1)
        schedule = _schedule(jobs, (1, 1), (112, 112), batch, 64, (side, 1), tiles, 132)
        most = max(part.last_step - part.first_step for part in schedule.parts) * 64
        partial, limit = side**2 * 4, configs.SCRATCH_BYTES
        parts = len(schedule.parts) - len(jobs.jobs)  # a job has one whether or not it is cut
        assert most <= configs.MOST_ROWS or (parts + len(jobs.jobs)) * partial > limit
        assert parts * partial <= limit


def test_each_autocorrelation_is_multiplied_once() -> None:
    from kfc_fx.kernels.triton_product_jobs import job_plan, total_steps

    for kernel, distinct, jobs_in_all in ((3, 13, 29), (5, 41, 157)):
        geometry = conv_geometry((kernel, kernel), padding="same")
        jobs = job_plan(product_plan(geometry, (56, 56)))
        assert len(jobs.jobs) == jobs_in_all
        assert total_steps(jobs, 64, 64) <= distinct * 56 * 56


def test_same_bits_every_time() -> None:
    x = random_values((9, 6, 5), torch.float32, 3)
    geometry = conv_geometry((3,), padding=1, groups=2)
    assert torch.equal(check(x, geometry), check(x, geometry))


def test_maps_smaller_than_the_kernel_and_empty_batch() -> None:
    geometry = conv_geometry((3, 3))
    assert not check(random_values((2, 3, 2, 2), torch.float32, 2), geometry).any()
    assert not check(torch.zeros(0, 3, 4, 4, device=DEVICE), geometry).any()
