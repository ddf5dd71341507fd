"""The tap on a model's output: its backward comes first in every backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfc_fx.errors import OptionError, OutputError
from kfc_fx.statistics.fisher_pass import FisherPass
from kfc_fx.statistics.loss_pass import LossPass, LossPasses
from kfc_fx.statistics.outputs import (
    find_prediction,
    float_tensors,
    replace_tensors,
)
from kfc_fx.statistics.prediction import Prediction, widened
from kfc_fx.statistics.setup import PassSetup


class OutputTap(torch.autograd.Function):
    """Identity; its backward opens the passes for statistics, then passes the cotangents on."""

    @staticmethod
    def forward(ctx: Any, passes: LossPasses, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.set_materialize_grads(False)
        ctx.passes = passes
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ctx.passes(cotangents)
        return (None, *cotangents)


def tap(output: Any, setups: Sequence[PassSetup]) -> Any:
    """Put the output tap on every differentiable tensor of a model's output.

    Args:
        setups: one for each collector that takes statistics of this forward pass.

    Raises:
        OutputError: the output holds no prediction.
    """
    likeliest = {setup: _likeliest(output, setup) for setup in setups}
    tensors = {path: t for path, t in float_tensors(output).items() if t.requires_grad}
    setups = [setup for setup in setups if setup.record.rows or setup.record.again]
    if not tensors or not setups:
        return output  # nothing to differentiate: a frozen or unused part of the model
    passes = [
        LossPass(setup, _predictions(tensors, likeliest[setup], named=setup.choice.names_output))
        for setup in setups
    ]
    losses = {place: t.grad_fn for place, t in enumerate(tensors.values()) if t.dim() == 0}
    tapped = OutputTap.apply(LossPasses(passes, losses), *tensors.values())
    by_id = {id(old): new for old, new in zip(tensors.values(), tapped, strict=True)}
    return replace_tensors(output, lambda tensor: by_id.get(id(tensor), tensor))


def collect(output: Any, setup: PassSetup) -> None:
    """Run the pass with sampled targets at once, without a loss's backward pass.

    Raises:
        OptionError: the likelihood is not known, which only a loss tells.
    """
    likelihood = setup.choice.likelihood
    if likelihood is None:
        raise OptionError(
            "initialize() takes statistics before there is a loss that tells the likelihood: name "
            "it, as in kfc_fx.compile(model, likelihood='categorical')"
        )
    prediction = _likeliest(output, setup)
    FisherPass(setup, likelihood, prediction, widened(prediction.detach())).begin()


def _likeliest(output: Any, setup: PassSetup) -> Tensor:
    """The prediction of an output, checked."""
    path = setup.choice.output
    if path and not setup.choice.names_output:
        found = float_tensors(output).get(path)  # an output in another form has another one
        path = path if found is not None and found.requires_grad else None
    prediction = find_prediction(output, path)
    if setup.choice.likelihood is not None:
        setup.choice.likelihood.check(prediction)
    return prediction


def _predictions(
    tensors: Mapping[str, Tensor], likeliest: Tensor, *, named: bool
) -> list[Prediction]:
    """The tensors of an output whose likelihood may be meant, the likeliest first.

    Args:
        tensors: those that depend on parameters, by their path.
        named: whether the user has named the likeliest, and no other can be meant.
    """
    found = [
        Prediction.of(path, place, tensor, keep=tensor is likeliest)
        for place, (path, tensor) in enumerate(tensors.items())
        if (tensor is likeliest if named else tensor.dim() > 0)
    ]
    found.sort(key=lambda prediction: prediction.tensor is not likeliest)
    if not found or found[0].tensor is not likeliest:
        raise OutputError(
            "the prediction in the model's output does not depend on any trained parameter, "
            "so it has no curvature; check that it is not detached"
        )
    return found
