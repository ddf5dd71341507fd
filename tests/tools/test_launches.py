"""How many ops a step dispatches: layers of one shape and pointwise work go together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kfc_fx
from kfc_fx.codegen.pieces import orthogonal
from kfc_fx.codegen.spec import StackSpec
from kfc_fx.codegen.stacking import stack_blocks
from kfc_fx.codegen.text import products
from kfc_fx.kernels import cpu_matmul
from kfc_fx.optim import update_spec
from kfc_fx.tools.gpu.graph import resnet50_shaped
from tests.options import kfc

VIEWS = {
    *("alias", "detach", "expand", "permute", "select", "slice", "split", "split_with_sizes"),
    *("squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view"),
}


class DispatchedOps(TorchDispatchMode):
    """Counts ops that compute or copy: those of a list of tensors once, and once a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.tensors = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name = function._schema.name.split("::")
        if namespace == "aten" and name not in VIEWS:
            self.calls += 1
            self.tensors += len(args[0]) if isinstance(args[0], Sequence) else 1
        return function(*args, **(kwargs or {}))


def apart(blocks, *arguments: Callable) -> tuple[StackSpec, ...]:
    """Every block a stack of its own."""
    stacks = [stack_blocks([block], *arguments)[0] for block in blocks]
    return tuple(
        StackSpec(f"{i}_{s.key}", s.scaling, s.forms, s.blocks, s.device, s.dtype, s.converts)
        for i, s in enumerate(stacks)
    )


def ops_of_a_step(network: nn.Module, **options) -> DispatchedOps:
    """Of the first step that has neither statistics nor a refresh."""
    model = kfc_fx.compile(network)
    optimizer = kfc(model, lr=1e-4, **options)
    x, y = torch.randn(4, 3, 32, 32), torch.randint(1000, (4,))
    counted, schedule = DispatchedOps(), optimizer.schedule
    for number in range(10):
        plain = not (schedule.statistics_due(number) or schedule.refresh_due(number))
        F.cross_entropy(model(x), y).backward()
        with counted if plain else nullcontext():
            optimizer.step()
        if plain:
            return counted
        optimizer.zero_grad()
    raise AssertionError("every step had statistics or a refresh")


@pytest.mark.parametrize("share", [0.0, 0.7])
def test_a_step_of_resnet50_dispatches_a_tenth_of_a_loop_over_layers(share, monkeypatch):
    """Channels are an eighth: their number changes nothing but the time this takes. Products are
    counted as everywhere but on processors where oneDNN multiplies, which takes no batches."""
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    monkeypatch.setattr(cpu_matmul, "onednn_is_faster", lambda: False)
    torch.manual_seed(0)
    network = resnet50_shaped(8)
    assert len(list(network.parameters())) == 161
    options = {"input_factor": "separable", "orthogonalize": share}
    together = ops_of_a_step(network, **options).calls
    monkeypatch.setattr(update_spec, "stack_blocks", apart)
    monkeypatch.setattr(orthogonal, "shared", lambda stack: stack.key)
    loop = ops_of_a_step(network, **options).tensors
    assert together <= loop / 10, (together, loop)
