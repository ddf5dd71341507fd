"""Facts of nodes, from what a capture and an export note of them."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from kfc_fx.capture.nodes import concrete, dimensions, example_of, module_of, shape_of


def node(**meta: object) -> fx.Node:
    made = fx.Graph().placeholder("x")
    made.meta.update(meta)
    return made


def test_shapes_come_from_the_example_of_a_capture_or_of_an_export():
    captured, exported = torch.zeros(2, 3), torch.zeros(4)
    assert example_of(node(example_value=captured, val=exported)) is captured
    assert shape_of(node(example_value=captured)) == (2, 3)
    assert shape_of(node(val=exported)) == (4,)
    assert dimensions(node(val=exported)) == 1


@pytest.mark.parametrize("value", [node(), node(example_value=3), 3, None])
def test_what_is_no_tensor_has_no_shape(value):
    assert shape_of(value) is None
    assert dimensions(value) == 0


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_dynamic_size_is_what_the_capture_had():
    seen = []

    def backend(module, inputs):
        seen.append(next(n for n in module.graph.nodes if n.name == "l_x_"))
        return module

    x = torch.randn(6, 2)
    torch._dynamo.mark_dynamic(x, 0)
    torch.compile(lambda x: x.relu(), backend=backend)(x)
    (rows, columns) = shape_of(seen[0])
    assert isinstance(rows, torch.SymInt)
    assert (concrete(rows), concrete(columns)) == (6, 2)


@pytest.mark.parametrize(
    ("stack", "expected"),
    [
        (None, ("", "")),
        ({"a": ("L['self']._modules['layer1']._modules['0']", nn.Conv2d)}, ("layer1.0", "Conv2d")),
        (
            {"a": ("", nn.Module), "b": ("model.layer1.0", "torch.nn.Linear")},
            ("layer1.0", "Linear"),
        ),
        ({"a": ("L['model']", nn.Sequential)}, ("", "Sequential")),
    ],
)
def test_the_innermost_module(stack, expected):
    assert module_of(node(nn_module_stack=stack)) == expected
