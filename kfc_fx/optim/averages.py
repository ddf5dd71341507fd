"""Polyak-averaged parameters in place of the trained ones, for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from kfc_fx.errors import StepError
from kfc_fx.optim.binding import Binding


@contextmanager
def averages_swapped_in(bindings: Sequence[Binding]) -> Iterator[None]:
    """Swap averaged parameters in while the context lasts.

    Raises:
        StepError: there are none.
    """
    held = [own for own in bindings if own.average]
    if not held:
        raise StepError("no averaged parameters: make KFC with average=τ and take a step first")
    kept = [
        {name: own.local_parameters[name].detach().clone() for name in own.average} for own in held
    ]
    try:
        for own in held:
            own.reshard()
            _copy_into(own.local_parameters, own.average)
        yield
    finally:
        for own, values in zip(held, kept, strict=True):
            own.reshard()
            _copy_into(own.local_parameters, values)


def _copy_into(own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)
