"""Every op is registered as the dispatcher and tracing compilers need it."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing

from kfc_fx.kernels.geometry import LINEAR, ConvGeometry
from kfc_fx.ops import patch_gram, row_gram, separable_gram
from kfc_fx.ops.convolution import decoded, encoded

GEOMETRY = encoded(ConvGeometry((3, 2), (1, 2), ((1, 1), (0, 1)), (1, 1), 2))


def test_a_geometry_as_numbers():
    assert GEOMETRY == [3, 2, 1, 2, 1, 0, 1, 1, 1, 1, 2]
    assert decoded(GEOMETRY) == ConvGeometry((3, 2), (1, 2), ((1, 1), (0, 1)), (1, 1), 2)
    assert decoded(encoded(LINEAR)) == LINEAR


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(dtype, bias):
    x = torch.randn(2, 4, 5, 6).to(dtype)
    ops = torch.ops.kfc_fx
    for method in ("auto", "structured", "im2col"):
        torch.library.opcheck(ops.patch_gram, (x, GEOMETRY, bias, method))
    torch.library.opcheck(ops.separable_gram, (x, GEOMETRY))
    torch.library.opcheck(ops.row_gram, (x, bias))


def all_statistics(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    arguments = {"padding": 1, "groups": 2}
    return (
        patch_gram(x, (3, 3), bias=True, **arguments) * 2,
        patch_gram(x, (3, 3), bias=True, method="structured", **arguments),
        *separable_gram(x, (3, 3), **arguments),
        row_gram(x.movedim(1, -1), bias=True),
    )


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_for_every_batch_size(backend):
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(all_statistics, backend=counter, fullgraph=True)
    for images in (2, 3, 5, 8):
        x = torch.randn(images, 4, 6, 5)
        if images == 2:
            torch._dynamo.mark_dynamic(x, 0)
        for found, expected in zip(compiled(x), all_statistics(x), strict=True):
            torch.testing.assert_close(found, expected)
    assert counter.frame_count == 1
