"""What an optimizer's options ask of a compiled model."""

from __future__ import annotations

from kfc_fx.compilation import Compilation
from kfc_fx.errors import OptionError
from kfc_fx.optim.options import KFCOptions
from kfc_fx.statistics.request import StatisticsRequest


def check_model(compilation: Compilation, options: KFCOptions) -> None:
    """Raise :class:`OptionError` for options that do not go with a model or its backend."""
    if options.needs_inputs and any(p.is_complex() for p in compilation.model.parameters()):
        raise OptionError(
            "clip_by='exact', quadratic_model and adapt_damping take the exact Fisher matrix of "
            "all parameters, and some of the model's are complex: leave them out"
        )


def request_of(compilation: Compilation, options: KFCOptions) -> StatisticsRequest:
    """The statistics that options ask of a model."""
    return StatisticsRequest(
        forms=options.by_block.forms_of,
        fisher=options.statistics.fisher,
        scale_free=options.scale_free,
        samples=options.statistics.samples,
        keep_inputs=options.needs_inputs,
        seed=options.seed,
        maximize=options.maximize,
    )
