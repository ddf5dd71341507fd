"""The work that the views show, against counts by hand and against what runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kfc_fx
from kfc_fx.inspect.block_entries import geometry_text
from kfc_fx.inspect.costs import fisher_work, gradient_work, site_costs
from kfc_fx.inspect.counting import Work, WorkCounter
from kfc_fx.inspect.document import build_document
from kfc_fx.inspect.inputs import parse_input
from kfc_fx.inspect.inspection import InspectionOptions, inspect_model
from kfc_fx.inspect.methods import patch_method
from kfc_fx.kernels.cpu_cost import estimate
from kfc_fx.kernels.geometry import conv_geometry
from kfc_fx.kernels.products import product_plan
from tests.inspect.small_networks import ConvNet

N, INSIDE, HIDDEN, OUTSIDE = 6, 20, 30, 10


def perceptron():
    return nn.Sequential(
        nn.Linear(INSIDE, HIDDEN, bias=False), nn.ReLU(), nn.Linear(HIDDEN, OUTSIDE, bias=False)
    )


def traced(model, *inputs):
    compiled = kfc_fx.compile(model)
    compiled.kfc.trace(*inputs)
    return compiled.kfc.graphs[0]


def test_the_gradient_of_a_perceptron():
    graph = traced(perceptron(), torch.randn(N, INSIDE))
    layers = 2 * N * INSIDE * HIDDEN, 2 * N * HIDDEN * OUTSIDE
    found = gradient_work(graph)
    assert found.forward.flops == sum(layers)
    # gradients of both weights, and of the second layer's input
    assert found.backward.flops == sum(layers) + layers[1]
    assert not found.uncounted


def test_a_fused_recurrent_layer_is_told_to_be_uncounted():
    model = nn.Sequential(nn.Linear(4, 4), Last(nn.LSTM(4, 4, batch_first=True)))
    found = build_document(inspect_model(model, "recurrent", [parse_input("2x3x4")]))
    (warning,) = [w for w in found["warnings"] if "not counted" in w]
    assert "rnn" in warning or "lstm" in warning


class Last(nn.Module):
    """The output of a recurrent layer, without its state."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


def test_the_fisher_pass_of_a_perceptron_computes_no_weight_gradient():
    graph = traced(perceptron(), torch.randn(N, INSIDE))
    assert fisher_work(graph).flops == 2 * N * HIDDEN * OUTSIDE


def test_the_statistics_of_a_perceptron_are_two_row_grams_a_layer():
    graph = traced(perceptron(), torch.randn(N, INSIDE))
    first, second = site_costs(graph)
    assert first.work.flops == 2 * N * (INSIDE**2 + HIDDEN**2)
    assert second.work.flops == 2 * N * (HIDDEN**2 + OUTSIDE**2)
    assert [call.op for call in first.calls] == ["row_gram", "row_gram"]


@pytest.mark.parametrize("scaling", ["adam", "spectral"])
def test_statistics_of_a_large_batch_are_of_a_part_of_it(scaling):
    def flops(batch: int) -> int:
        inputs = [parse_input(f"{batch}x{INSIDE}")]
        found = inspect_model(
            perceptron(), "perceptron", inputs, InspectionOptions(scaling=scaling)
        )
        return sum(block["flops"] for block in build_document(found)["blocks"])

    assert flops(32) == flops(128) == flops(256) / 2


def test_a_fisher_pass_is_counted_where_there_is_one():
    def found(scaling: str) -> tuple[int, int]:
        inspection = inspect_model(
            perceptron(),
            "perceptron",
            [parse_input(f"{N}x{INSIDE}")],
            InspectionOptions(scaling=scaling),
        )
        work = sum(fisher_work(graph).flops for graph in inspection.graphs)
        return build_document(inspection)["summary"]["statistics_flops"], work

    (own, _), (apart, work) = found("adam"), found("eigen")
    assert work > 0
    assert apart - own == work


def test_the_update_of_a_perceptron_by_inverses():
    options = InspectionOptions(scaling="inverse")
    found = inspect_model(perceptron(), "perceptron", [parse_input(f"{N}x{INSIDE}")], options)
    summary = build_document(found)["summary"]
    sides = INSIDE, HIDDEN, HIDDEN, OUTSIDE
    # a Cholesky factor and its inverse of every factor
    assert summary["refresh_flops"] == pytest.approx(sum(side**3 for side in sides), abs=4)
    products = 2 * HIDDEN * INSIDE * (HIDDEN + INSIDE) + 2 * OUTSIDE * HIDDEN * (OUTSIDE + HIDDEN)
    assert summary["update_flops"] >= products


def test_the_memory_of_factors_and_their_bases():
    found = inspect_model(perceptron(), "perceptron", [parse_input(f"{N}x{INSIDE}")])
    summary = build_document(found)["summary"]
    sides = INSIDE, HIDDEN, HIDDEN, OUTSIDE
    bases_and_eigenvalues = sum(side**2 + side for side in sides)
    assert summary["factor_bytes"] == 4 * bases_and_eigenvalues
    assert summary["factor_bytes_per_rank"] == summary["factor_bytes"]


def test_memory_is_what_the_engine_holds():
    found = inspect_model(ConvNet(), "ConvNet", [parse_input("4x2x6x6")])
    state = found.optimizer._engine.state
    held = sum(tensor.nbytes for own in state.values() for tensor in own.values())
    assert build_document(found)["summary"]["block_state_bytes"] == held


@pytest.mark.parametrize(
    ("shape", "kernel", "options"),
    [
        ((32, 64, 32, 32), (3, 3), {"padding": 1}),
        ((2, 8, 6, 6), (3, 3), {}),
        ((8, 32, 28, 28), (5, 5), {"padding": 2, "groups": 32}),
    ],
)
def test_the_method_is_the_one_that_the_op_chooses(shape, kernel, options):
    geometry = conv_geometry(kernel, **options)
    cost = estimate(geometry, product_plan(geometry, shape[2:]), shape)
    method, why, milliseconds = patch_method(shape, geometry)
    assert method == cost.best
    assert why.startswith(f"estimated {method} ")
    times = {"structured": cost.structured, "lines": cost.lines, "im2col": cost.im2col}
    assert milliseconds == min(times.values()) / 1e6


def test_a_pointwise_convolution_takes_rows():
    method, _, milliseconds = patch_method((2, 4, 5, 5), conv_geometry((1, 1)))
    assert method == "row"
    assert milliseconds is None


def test_bytes_are_those_of_arguments_and_results_without_views():
    x, y = torch.empty(8, 4, device="meta"), torch.empty(4, 2, device="meta")
    counter = WorkCounter()
    with counter:
        x.T.T @ y
    assert counter.work == Work(2 * 8 * 4 * 2, 4 * (32 + 8 + 16))


def test_decompositions_count_by_their_leading_terms():
    matrix = torch.empty(3, 10, 10, device="meta")
    for run, flops in (
        (torch.linalg.eigh, 9 * 1000 * 3),
        (torch.linalg.cholesky_ex, 1000),
        (torch.linalg.qr, 8 * 1000),
        (torch.cholesky_inverse, 2000),
    ):
        counter = WorkCounter()
        with counter:
            run(matrix)
        assert counter.work.flops == flops


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"padding": 1}, "3x3 padding 1"),
        ({"stride": (2, 1), "dilation": 2}, "3x3 stride 2x1 dilation 2"),
        ({"padding": "same", "groups": 4}, "3x3 padding 1 groups 4"),
    ],
)
def test_geometries_leave_defaults_out(options, text):
    assert geometry_text(conv_geometry((3, 3), **options)) == text
