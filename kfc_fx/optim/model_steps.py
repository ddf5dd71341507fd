"""The models of one optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kfc_fx.compilation import Compilation
from kfc_fx.distributed.ranks import Ranks
from kfc_fx.errors import OptionError
from kfc_fx.optim.model_step import ModelStep
from kfc_fx.optim.options import KFCOptions
from kfc_fx.optim.target import tensors_of


def model_steps(
    compilations: Sequence[Compilation],
    options: KFCOptions,
    chosen: Sequence[Any],
    ranks: Ranks,
) -> list[ModelStep]:
    """One for each compiled model; parameters of none go with the first.

    Raises:
        OptionError: an option that is for one model is given with several.
    """
    if len(compilations) > 1 and options.needs_inputs:
        raise OptionError(
            "clip_by='exact', quadratic_model and adapt_damping take the exact Fisher matrix of "
            f"one model, and the parameters are of {len(compilations)}: make a KFC for each"
        )
    known = {p for compilation in compilations for p in compilation.model.parameters()}
    given = [parameter for parameter in tensors_of(chosen) if parameter not in known]
    outside = {f"outside.{index}": parameter for index, parameter in enumerate(given)}
    first, *others = compilations
    return [
        ModelStep(first, options, outside, 0, ranks),
        *(ModelStep(own, options, {}, number, ranks) for number, own in enumerate(others, 1)),
    ]
