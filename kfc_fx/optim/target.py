"""What an optimizer is made for: compiled models, and the parameters that it updates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kfc_fx.capture.wrappers import unwrapped
from kfc_fx.compilation import Compilation
from kfc_fx.errors import OptionError
from kfc_fx.install import compilation_of, compile


@dataclass(frozen=True)
class Target:
    """Compiled models, and what ``torch.optim.Optimizer`` is given."""

    compilations: tuple[Compilation, ...]
    """In the order of their first parameter; the model that was named is the first."""
    chosen: list[Any]
    """Parameters, named parameters or groups."""


def target_of(given: Any, model: Any) -> Target:
    """The models of parameters, by the identity of these.

    Args:
        given: a model, which stands for all of its parameters; or parameters, named parameters or
            groups.
        model: a model that some of them belong to. A model that is not compiled is now, by the
            defaults.

    Raises:
        OptionError: there is no parameter, or none that belongs to a compiled model.
    """
    if isinstance(given, nn.Module):
        if model is not None:
            raise OptionError("KFC takes a model, or parameters and model=; got two models")
        model, given = given, given.parameters()
    if model is not None and not isinstance(model, nn.Module):
        raise OptionError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(given, Tensor) or not isinstance(given, Iterable):
        raise OptionError(
            "KFC takes a model, or an iterable of parameters, named parameters or groups; got "
            f"{type(given).__name__}"
        )
    chosen = [_with_list(entry) for entry in given]
    if not chosen:
        raise OptionError("there is nothing to optimize: there are no parameters")
    first: list[Compilation] = []
    if model is not None:
        _check_holds(model, chosen)
        model = unwrapped(model)
        first.append(Compilation.of(compile(model) if compilation_of(model) is None else model))
    found = tuple(dict.fromkeys([*first, *_owners(tensors_of(chosen), first)]))
    if not found:
        raise OptionError(
            "none of these parameters belongs to a compiled model: call kfc_fx.compile(model) "
            "first, or write KFC(params, model=model)"
        )
    return Target(found, chosen)


def tensors_of(chosen: Iterable[Any]) -> Iterator[Tensor]:
    """The parameters among parameters, named parameters and groups."""
    for entry in chosen:
        if isinstance(entry, dict):
            own = entry.get("params", ())
            yield from tensors_of([own] if isinstance(own, Tensor) else own)
        elif isinstance(entry, tuple):
            yield from (part for part in entry if isinstance(part, Tensor))
        elif isinstance(entry, Tensor):
            yield entry


def _check_holds(model: nn.Module, chosen: list[Any]) -> None:
    held = set(model.parameters())
    if not any(parameter in held for parameter in tensors_of(chosen)):
        raise OptionError(f"none of the parameters belongs to the model, a {type(model).__name__}")


def _with_list(entry: Any) -> Any:
    """A group with its parameters in a list: an iterator would be empty the next time."""
    own = entry.get("params") if isinstance(entry, dict) else None
    if own is None or isinstance(own, Tensor) or not isinstance(own, Iterable):
        return entry
    return {**entry, "params": list(own)}


def _owners(parameters: Iterable[Tensor], known: list[Compilation]) -> Iterator[Compilation]:
    """The compiled model of each parameter: of several the one with the most parameters, and of
    these the one that was compiled last."""
    candidates = sorted(
        Compilation.installed_ones(), key=lambda c: sum(1 for _ in c.model.parameters())
    )
    owner: dict[Tensor, Compilation] = {
        p: c for c in [*candidates, *known] for p in c.model.parameters()
    }
    yield from (owner[p] for p in parameters if p in owner)
