"""The tap on a model's output: its backward comes first in every backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kfc_fx.errors import OutputError
from kfc_fx.statistics.fisher_pass import FisherPass
from kfc_fx.statistics.gradient_pass import GradientPass
from kfc_fx.statistics.outputs import find_prediction, float_tensors, replace_tensors
from kfc_fx.statistics.setup import PassSetup

Run = Callable[[Sequence[Tensor | None]], None]
"""Takes the cotangents of the tapped tensors."""


class OutputTap(torch.autograd.Function):
    """Identity; its backward runs the passes, or opens them, then passes the cotangents on."""

    @staticmethod
    def forward(ctx: Any, runs: Sequence[Run], *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.set_materialize_grads(False)
        ctx.runs = runs
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        for run in ctx.runs:
            run(cotangents)
        return (None, *cotangents)


def tap(output: Any, setups: Sequence[PassSetup]) -> Any:
    """Put the output tap on every differentiable tensor of a model's output.

    Args:
        setups: one for each collector that takes statistics of this forward pass.

    Raises:
        OutputError: the output holds no prediction.
    """
    prediction = find_prediction(output)
    for setup in setups:
        setup.likelihood.examples(prediction)  # raises for an output without examples
    tensors = [tensor for tensor in float_tensors(output) if tensor.requires_grad]
    setups = [setup for setup in setups if setup.record.rows or setup.record.again]
    if not tensors or not setups:
        return output  # nothing to differentiate: a frozen or unused part of the model
    position = _position(prediction, tensors)
    # Passes of their own run at once, before those are opened that last as long as the loss's.
    runs: list[Run] = [
        FisherPass(setup, prediction) for setup in setups if setup.record.fisher == "sampled"
    ]
    runs += [
        GradientPass(setup, prediction, position)
        for setup in setups
        if setup.record.fisher == "empirical"
    ]
    tapped = OutputTap.apply(runs, *tensors)
    by_id = {id(old): new for old, new in zip(tensors, tapped, strict=True)}
    return replace_tensors(output, lambda tensor: by_id.get(id(tensor), tensor))


def collect(output: Any, setup: PassSetup) -> None:
    """Run the pass with sampled targets at once, without a loss's backward pass."""
    prediction = find_prediction(output)
    setup.likelihood.examples(prediction)
    FisherPass(setup, prediction)([])


def _position(prediction: Tensor, tensors: Sequence[Tensor]) -> int:
    for position, tensor in enumerate(tensors):
        if tensor is prediction:
            return position
    raise OutputError(
        "the prediction in the model's output does not depend on any trained parameter, "
        "so it has no curvature; check that it is not detached"
    )
