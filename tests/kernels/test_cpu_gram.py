"""Parts of the CPU path: the plan of products, small buffers, and the choice of method."""

from __future__ import annotations

import itertools

import pytest
import torch

from kfc_fx.kernels import (
    cpu_assemble,
    cpu_buffers,
    cpu_cost,
    cpu_im2col_gram,
    cpu_line_gram,
    cpu_row_gram,
    cpu_structured_gram,
    cpu_symmetric_product,
)
from kfc_fx.kernels.geometry import conv_geometry
from kfc_fx.kernels.products import elementary_segments, product_plan, segments_within
from kfc_fx.ops import patch_gram


@pytest.mark.parametrize(
    ("kernel", "stride", "differences"), [(3, 1, 13), (5, 1, 41), (7, 1, 85), (3, 2, 34)]
)
def test_distinct_products_without_borders(kernel, stride, differences):
    geometry = conv_geometry((kernel, kernel), stride=stride, padding=kernel // 2)
    plan = product_plan(geometry, (32, 32))
    assert len({tuple(axis.kind for axis in slot) for slot in plan.slots}) == differences


def test_full_padding_has_no_borders():
    plan = product_plan(conv_geometry((3, 3), padding=2), (8, 8))
    assert len(plan.slots) == 13


def test_a_pair_and_its_mirror_share_a_slot():
    plan = product_plan(conv_geometry((3, 2), padding=1, dilation=2), (9, 8))
    for i, j in itertools.product(range(6), repeat=2):
        assert plan.slot_of_pair[i][j] == plan.slot_of_pair[j][i]


def test_intervals_are_unions_of_elementary_segments():
    intervals = [(0, 5), (1, 6), (2, 6), (0, 0), (8, 9)]
    segments = elementary_segments(intervals)
    assert segments == [(0, 1), (1, 2), (2, 5), (5, 6), (8, 9)]
    for low, high in intervals:
        covered = [range(*segments[i]) for i in segments_within((low, high), segments)]
        assert [q for part in covered for q in part] == list(range(low, high))


@pytest.mark.parametrize("elements", [1, 1000])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize(("stride", "kernel"), [(1, (3, 3)), (2, (3, 4)), (1, (5, 2))])
def test_small_buffers_add_up(elements, groups, stride, kernel, monkeypatch):
    x = torch.randn(5, 6, 9, 8, dtype=torch.float64)
    options = {"stride": stride, "padding": 1, "groups": groups, "bias": True}
    expected = patch_gram(x, kernel, method="im2col", **options)
    monkeypatch.setattr(cpu_buffers, "LEAST_ELEMENTS", 1)
    monkeypatch.setattr(cpu_buffers, "MOST_ELEMENTS", elements)
    monkeypatch.setattr(cpu_row_gram, "BUFFER_ELEMENTS", elements)
    monkeypatch.setattr(cpu_im2col_gram, "LEAST_ROWS", 1)
    monkeypatch.setattr(cpu_assemble, "CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(cpu_assemble, "LEAST_ROWS", 1)
    for method in ("structured", "im2col"):
        found = patch_gram(x, kernel, method=method, **options)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("stride", [(1, 1), (2, 1), (2, 3)])
@pytest.mark.parametrize("spatial", [(7, 6), (2, 2), (1, 9)])
@pytest.mark.parametrize("images", [2, 3])
def test_both_ways_to_the_slots_agree(stride, spatial, images):
    x = torch.randn(3, 4, *spatial, dtype=torch.float64)
    geometry = conv_geometry((3, 3), padding=1, stride=stride, groups=2)
    plan = product_plan(geometry, spatial)
    torch.testing.assert_close(
        cpu_structured_gram.structured_products(x, plan, stride, 2, images),
        cpu_line_gram.line_products(x, plan, geometry, images),
    )


@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "groups", "best"),
    [
        ((32, 64, 32, 32), 3, 1, 1, "structured"),
        ((32, 256, 7, 7), 3, 1, 1, "structured"),
        ((8, 3, 224, 224), 7, 2, 1, "lines"),
        ((8, 96, 56, 56), 7, 1, 96, "lines"),
        ((32, 512, 2, 2), 3, 1, 1, "im2col"),
        ((8, 512, 7, 7), 1, 1, 1, "im2col"),
        ((8, 960, 7, 7), 3, 1, 960, "im2col"),
    ],
)
def test_the_cost_model_chooses_by_shape(shape, kernel, stride, groups, best):
    geometry = conv_geometry((kernel, kernel), stride=stride, padding=kernel // 2, groups=groups)
    plan = product_plan(geometry, shape[2:])
    assert cpu_cost.estimate(geometry, plan, shape).best == best


@pytest.mark.parametrize("length", [7, 1024, 4003])
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_narrow_products_in_pieces(length, fresh, layout):
    first, second = (torch.randn(1, side, length, dtype=torch.float64) for side in (5, 9))
    if layout == "rows":
        first, second = (part.mT.contiguous().mT for part in (first, second))
    total = torch.full((1, 5, 9), torch.nan if fresh else 2.0, dtype=torch.float64)
    cpu_symmetric_product.add_product(total, first, second, fresh=fresh)
    expected = first @ second.mT + (0.0 if fresh else 2.0)
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize(
    ("shape", "groups", "per_group"),
    [
        ((8, 960, 7, 7), 960, 441),
        ((3, 4, 50, 50), 1, 10**6),
        ((5, 6, 4, 4), 3, 2**20),
        ((1, 2, 1), 2, 0),
    ],
)
def test_passes_cover_the_input_within_the_buffer(shape, groups, per_group):
    planned = cpu_buffers.one_pass(shape, groups, per_group)
    assert 1 <= planned.groups <= groups
    assert 1 <= planned.images <= shape[0]
    smallest = planned.groups == planned.images == 1
    limit = max(cpu_buffers.LEAST_ELEMENTS, torch.Size(shape).numel())
    assert smallest or planned.groups * planned.images * per_group <= limit
