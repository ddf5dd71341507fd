"""The tap on a model's output: its backward comes first in every backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfc_fx.errors import OptionError, OutputError
from kfc_fx.statistics.fisher_pass import FisherPass
from kfc_fx.statistics.likelihoods.choice import LikelihoodChoice
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


def tap(output: Any, setups: Sequence[PassSetup], entry: str | None = None) -> Any:
    """Put the output tap on every differentiable tensor of a model's output.

    Args:
        setups: one for each collector that takes statistics of this forward pass.
        entry: path of the module whose output it is, where it is not the model's. What of it is a
            prediction is seen when a loss comes by: it may be an input of another module.

    Raises:
        OutputError: the output holds no prediction.
    """
    likeliest = {} if entry is not None else {own: _likeliest(output, own) for own in setups}
    tensors = {path: t for path, t in float_tensors(output).items() if t.requires_grad}
    if entry is None:
        setups = [setup for setup in setups if setup.record.rows or setup.record.again]
    if not tensors or not setups:
        return output  # nothing to differentiate: a frozen or unused part of the model
    passes = []
    for setup in setups:
        if entry is not None:
            found = _of_entry(tensors, entry, setup.choice)
        else:
            named = setup.choice.names_output
            found = _predictions(tensors, likeliest[setup], named=named)
        passes.append(LossPass(setup, found, entry))
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
    if setup.choice.likelihood is not None and (prediction.dim() or setup.choice.names_output):
        setup.choice.likelihood.check(prediction)
    return prediction


def _of_entry(
    tensors: Mapping[str, Tensor], entry: str, choice: LikelihoodChoice
) -> list[Prediction]:
    """Those of a module's output. Their values are not copied: most are inputs of other modules."""
    meant = choice.output if choice.names_output else None
    found = [
        Prediction.of(f"{entry}(){'.' * bool(path)}{path}", place, tensor, keep=False)
        for place, (path, tensor) in enumerate(tensors.items())
        if path == meant or meant not in tensors
    ]
    return sorted(found, key=lambda prediction: prediction.tensor.dim() == 0)


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
    if not found and likeliest.requires_grad and not named:  # the loss, and nothing else
        place = next(n for n, tensor in enumerate(tensors.values()) if tensor is likeliest)
        found = [Prediction.of("", place, likeliest, keep=False)]
    found.sort(key=lambda prediction: prediction.tensor is not likeliest)
    if not found or found[0].tensor is not likeliest:
        raise OutputError(
            "the prediction in the model's output does not depend on any trained parameter, "
            "so it has no curvature; check that it is not detached"
        )
    return found
