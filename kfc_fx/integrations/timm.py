"""timm: importing this module registers KFC with timm's optimizers, as ``--opt kfc``.

Write ``import kfc_fx.integrations.timm`` above ``timm.optim.create_optimizer_v2(model, "kfc")``, as
into timm's ``train.py``. The model is compiled there, in place; timm's groups for weight decay and
layer decay are KFC's groups. KFC's own options go through ``--opt-kwargs``, as in
``scaling=spectral``. ``backend=inductor`` is that of :func:`kfc_fx.compile`: ``--torchcompile``
would trace past kfc_fx.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import nn

import kfc_fx

try:
    _factory: Any = import_module("timm.optim._optim_factory")
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "kfc_fx.integrations.timm needs timm: pip install 'kfc_fx[trainers]'",
        name=error.name,
    ) from error

NAME = "kfc"
_registry = _factory.default_registry
_create_other = _registry.create_optimizer


def create_optimizer(
    model_or_params: Any, opt: str, *args: Any, **options: Any
) -> torch.optim.Optimizer:
    """As timm's registry creates an optimizer; KFC of the model that it is given.

    Raises:
        OptionError: an option is unknown to KFC, or the parameters are of no compiled model.
    """
    if opt.lower().split("_")[-1] == NAME:  # as timm reads "lookahead_kfc"
        backend = options.pop("backend", None)
        if isinstance(model_or_params, nn.Module):
            if backend is not None:
                kfc_fx.compile(model_or_params, backend=backend)
            options["model"] = model_or_params
        elif backend is not None:
            raise kfc_fx.OptionError("backend= is for a model, and these are parameters")
    made: torch.optim.Optimizer = _create_other(model_or_params, opt, *args, **options)
    return made


_registry.register(
    _factory.OptimInfo(
        name=NAME,
        opt_class=kfc_fx.KFC,
        description="Approximate natural gradient with Kronecker factors, by kfc_fx",
        has_eps=False,
        has_momentum=False,
        has_betas=False,
        second_order=False,  # it needs no graph of the backward pass
    )
)
_registry.create_optimizer = create_optimizer
