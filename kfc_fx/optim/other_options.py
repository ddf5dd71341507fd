"""Keywords that are no options of KFC: of a value beside it, of torch.optim, or misspelled."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import fields

from kfc_fx.errors import OptionError
from kfc_fx.optim.checks import Checked, checks_of
from kfc_fx.optim.generic import GENERIC
from kfc_fx.optim.options import KFCOptions
from kfc_fx.optim.scalings.scaling import Scaling
from kfc_fx.optim.scalings.table import SCALINGS
from kfc_fx.optim.statistics import Statistics

TORCH_OPTIONS = {
    "foreach": "the generated update calls torch's multi-tensor functions already",
    "fused": "compile_update=True fuses the pointwise ends of a step",
    "capturable": "cuda_graph=True records the step in a CUDA graph",
    "differentiable": "no gradient is taken through a step",
}
"""Options of torch's own optimizers that KFC has no use for, and why."""


def _holders() -> list[tuple[str, type[Checked]]]:
    """The option of KFC and the class of each value that has options of its own."""
    found: list[tuple[str, type[Checked]]] = [("scaling", kind) for kind in SCALINGS.values()]
    found.append(("statistics", Statistics))
    return found + [("generic", kind) for kind in GENERIC.values()]


def _places() -> dict[str, list[str]]:
    """What to write for an option of a value, by the option's name."""
    places: dict[str, list[str]] = {}
    for option, kind in _holders():
        for name in checks_of(kind):
            places.setdefault(name, []).append(f"{option}=kfc_fx.{kind.__name__}({name}=...)")
    return places


OWN = {"lr", "weight_decay", "model", "process_group", *(each.name for each in fields(KFCOptions))}
"""The names of KFC's own options."""
OTHERS = {*_places(), *TORCH_OPTIONS, *OWN} - {"lr", "weight_decay", "betas"}
"""All names of options that are not for a parameter group."""


def refuse_torch_options(**given: object) -> None:
    """Raise :class:`OptionError` for an option of :data:`TORCH_OPTIONS` that is not None or
    False."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise OptionError(f"{name}={value!r}: KFC has no such option, {TORCH_OPTIONS[name]}")


def refuse_unknown(names: Iterable[str], scaling: Scaling) -> None:
    """Raise :class:`OptionError` for a keyword that is no option of KFC, with the line to write.

    Args:
        scaling: what the optimizer takes.
    """
    places = _places()
    for name in names:
        if name in places:
            raise OptionError(f"KFC has no option {name!r}: {_where(places[name], scaling)}")
        near = difflib.get_close_matches(name, [*OWN, *places], n=1)
        if not near:
            raise OptionError(f"KFC has no option {name!r}; it has {', '.join(sorted(OWN))}")
        meant = near[0]
        hint = "" if meant in OWN else f", {_where(places[meant], scaling)}"
        raise OptionError(f"KFC has no option {name!r}; the nearest name is {meant!r}{hint}")


def _where(lines: list[str], scaling: Scaling) -> str:
    own = [line for line in lines if f".{type(scaling).__name__}(" in line]
    if own or not any(line.startswith("scaling") for line in lines):
        return f"write {' or '.join(own or lines)}"
    return f"{type(scaling).__name__} has none either; {' or '.join(lines)} has"
