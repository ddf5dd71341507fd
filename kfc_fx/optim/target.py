"""What an optimizer is made for: a compiled model, and those of its parameters that it updates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from kfc_fx.compilation import Compilation
from kfc_fx.errors import OptionError
from kfc_fx.install import compilation_of, compile


def target_of(given: Any, model: Any) -> tuple[Compilation, list[Any]]:
    """What the compiler knows of a model, and parameters or groups of it.

    Args:
        given: the model, which stands for all of its parameters; or parameters, named parameters
            or groups of the model ``model``. A model that is not compiled is now, by the defaults.

    Raises:
        OptionError: there is no model in either, or no parameter.
    """
    if isinstance(given, nn.Module):
        if model is not None:
            raise OptionError("KFC takes a model, or parameters and model=; got two models")
        model, given = given, given.parameters()
    if not isinstance(model, nn.Module):
        raise OptionError(
            f"KFC takes a model, got {type(model if given is None else given).__name__}: write "
            "KFC(model), or for some parameters KFC(groups, model=model)"
        )
    if isinstance(given, Tensor) or not isinstance(given, Iterable):
        raise OptionError(
            f"KFC takes parameters as an iterable of tensors or groups, got {type(given).__name__}"
        )
    chosen = list(given)
    if not chosen:
        raise OptionError("there is nothing to optimize: the model has no parameters")
    return Compilation.of(compile(model) if compilation_of(model) is None else model), chosen
