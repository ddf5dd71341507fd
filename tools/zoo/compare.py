"""Compare what a training step leaves behind in a compiled model and in the model itself."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kfc_fx.errors import OutputError
from kfc_fx.statistics.outputs import find_prediction, float_tensors
from kfc_fx.tools.zoo.case import ModelCase

TOLERANCE = 1e-6
"""Largest difference that passes, relative to the largest entry of the uncompiled tensor. Graphs
that run in eager mode are expected to differ by nothing at all."""

SEED = 20160611


class CheckError(Exception):
    """A model of the zoo fails a check; the message says which, and where."""


@dataclass(frozen=True)
class Observation:
    """Everything that a training step's forward and backward pass leaves behind."""

    prediction: str | None
    """Path of the prediction in the output; None where there is none."""
    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def observe(call: nn.Module, case: ModelCase, reset: Callable[[], None]) -> Observation:
    """Outputs, gradients and buffers of one forward and backward pass from a fixed state."""
    reset()
    output = call(*case.args, **case.kwargs)
    tensors = float_tensors(output)
    loss_of(output).backward()
    return Observation(
        _path_of_prediction(output),
        {f"output {i}": t.detach() for i, t in enumerate(tensors.values())},
        {name: p.grad for name, p in call.named_parameters() if p.grad is not None},
        {name: buffer.clone() for name, buffer in call.named_buffers()},
    )


def _path_of_prediction(output: Any) -> str | None:
    """Of the tensor whose likelihood is meant; None where there is none."""
    try:
        prediction = find_prediction(output)
    except OutputError:
        return None
    return next(path for path, tensor in float_tensors(output).items() if tensor is prediction)


def loss_of(output: Any) -> Tensor:
    """A loss that weighs every entry of every differentiable output differently."""
    tensors = float_tensors(output)
    parts = [
        (t * torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).reshape(t.shape)).mean()
        for t in tensors.values()
        if t.requires_grad
    ]
    if not parts:
        raise CheckError("no output depends on a trained parameter")
    return torch.stack([part.float() for part in parts]).sum()


def starting_state(model: nn.Module) -> Callable[[], None]:
    """A function that puts buffers, gradients and random number generators back."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def reset() -> None:
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
        torch.manual_seed(SEED)
        np.random.seed(SEED)  # the global generator, which models use
        random.seed(SEED)

    return reset


def compare(plain: Observation, other: Observation, what: str) -> float:
    """The largest relative difference between two observations.

    Raises:
        CheckError: one has tensors that the other lacks, or they differ by more than the
            tolerance; the message names the worst tensor.
    """
    worst = 0.0
    for kind in ("outputs", "gradients", "buffers"):
        expected, found = getattr(plain, kind), getattr(other, kind)
        if expected.keys() != found.keys():
            names = sorted(expected.keys() ^ found.keys())
            raise CheckError(f"{kind} of {what} and of the model differ: {', '.join(names[:5])}")
        for name in expected:
            error = relative_difference(expected[name], found[name])
            if not error <= TOLERANCE:
                raise CheckError(f"{kind} of {what} are off by {error:.1e} at {name}")
            worst = max(worst, error)
    return worst


def relative_difference(expected: Tensor, found: Tensor) -> float:
    """Largest difference over the largest entry; infinite for another shape or other NaNs."""
    if (expected.shape, expected.dtype) != (found.shape, found.dtype):
        return float("inf")
    if torch.equal(expected, found):
        return 0.0
    finite = expected.isfinite()
    if not torch.equal(finite, found.isfinite()) or not torch.equal(
        expected[~finite].nan_to_num(), found[~finite].nan_to_num()
    ):
        return float("inf")
    wide, other = expected[finite].double(), found[finite].double()
    if wide.numel() == 0 or torch.equal(wide, other):
        return 0.0
    scale = max(wide.abs().max().item(), torch.finfo(torch.float32).tiny)
    return (wide - other).abs().max().item() / scale
