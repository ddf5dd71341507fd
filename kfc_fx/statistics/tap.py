"""The tap on a model's output, whose backward is the first of a backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class OutputTap(torch.autograd.Function):
    """Identity; its backward runs the pass, or opens it, then passes the cotangents on."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., None], *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.set_materialize_grads(False)
        ctx.run = run
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ctx.run(cotangents)
        return (None, *cotangents)
