"""Calls of a model's modules from outside of it, beside the model's own call.

A trainer may never call the model itself, but a module of it, or several one after the other: an
encoder and a decoder, a body and a head.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kfc_fx.errors import warn

INSTALLED = "_compiled_call_impl"
"""What ``nn.Module.__call__`` runs in place of ``_call_impl``."""

Enter = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any]], Any]
"""Runs an outermost call of a module, which is at a path of the model."""


@dataclass
class Inside:
    """Whether a call of the model runs, or its backward pass runs a part of it again."""

    depth: int = 0


class EntryCalls:
    """What is called in place of the modules of a model that hold parameters or hold others that
    do, itself excepted, while no call of it runs.

    Args:
        enter: what runs such a call with gradients enabled.
        inside: calls within a call of the model are no entries.
    """

    def __init__(self, model: nn.Module, enter: Enter, inside: Inside) -> None:
        self._model, self._enter, self._inside = model, enter, inside
        self._calls: dict[nn.Module, tuple[str, Callable[..., Any]]] = {}

    def refresh(self) -> None:
        """Take the calls of the modules that the model has now, but not of one whose calls somebody
        else has taken."""
        found: dict[nn.Module, tuple[str, Callable[..., Any]]] = {}
        for path, module in self._model.named_modules():
            if module is self._model or next(module.parameters(), None) is None:
                continue
            own = module.__dict__
            known_path, call = self._calls.get(module, ("", None))
            taken_by = own.get(INSTALLED)
            if taken_by not in (None, call):
                if is_entry_call(taken_by):
                    taken_by.is_shared = True
                continue
            if call is None or known_path != path:
                call = _entry_call(path, module, self._enter, self._inside)
            own[INSTALLED] = call
            found[module] = (path, call)
        for module in self._calls.keys() - found.keys():
            self._leave(module)
        self._calls = found

    @property
    def modules(self) -> Collection[nn.Module]:
        """Those whose calls are taken."""
        return self._calls.keys()

    def remove(self) -> None:
        """Leave the modules as they were."""
        for module in self._calls:
            self._leave(module)
        self._calls = {}

    def _leave(self, module: nn.Module) -> None:
        if module.__dict__.get(INSTALLED) is self._calls[module][1]:
            del module.__dict__[INSTALLED]


def is_entry_call(call: object) -> bool:
    """Whether a module's call is taken as an entry, and by nobody of the user's."""
    return getattr(call, "is_entry_call", False)


def _entry_call(path: str, module: nn.Module, enter: Enter, inside: Inside) -> Callable[..., Any]:
    """What stands in for a module's ``_call_impl``. Dynamo may trace through it, and where it runs
    frames of plain Python it is to leave this one alone."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() or inside.depth or not torch.is_grad_enabled():
            return module._call_impl(*args, **kwargs)
        if call.is_shared:  # type: ignore[attr-defined]
            call.is_shared = False  # type: ignore[attr-defined]
            warn(
                f"{path!r} is a module of several compiled models and was called from outside of "
                "them: its statistics go to the first that got an optimizer. Call the others whole"
            )
        return enter(path, module, args, kwargs)

    torch._dynamo.eval_frame.skip_code(call.__code__)
    call.is_entry_call, call.is_shared = True, False  # type: ignore[attr-defined]
    return call
