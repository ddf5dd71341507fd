"""Which parameter of a model a tensor is, by identity, at the moment it is used.

Dynamo runs one graph for all modules whose frames share code, with the parameters as its inputs.
So a name is a matter of each run, and not of the capture.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Collection
from functools import partial
from typing import Any

from torch import Tensor, nn


class ParameterNames:
    """Names of a model's parameters, looked up by the identity of the tensor.

    A tensor has a name if the model holds it as a parameter, and if it is not a stand-in that is
    there for a while: under ``torch.func.functional_call`` the model holds foreign tensors while
    its own still exist. Parameters that are sharded are the exception: in the forward pass of a
    module that ``fully_shard`` has wrapped, another tensor, of the whole parameter, takes the place
    of each, and it has the name of the shard.

    Args:
        model: whose parameters are named.
    """

    def __init__(self, model: nn.Module) -> None:
        self.version: int = 0
        """Grows whenever a name that was looked up may hold no more."""
        self._model = model
        self._names: dict[int, tuple[weakref.ref[Tensor], str | None]] = {}
        self._own: dict[str, weakref.ref[Tensor]] = {}
        if "_parameters" in vars(model):  # else it is being unpickled, and has none yet
            self.refresh()

    def refresh(self) -> None:
        """Take the parameters that the model holds now for its own."""
        held = dict(self._model.named_parameters())
        self._own = {name: weakref.ref(parameter) for name, parameter in held.items()}
        self._names = {}
        for name, parameter in held.items():
            self._keep(parameter, name)
        self.version += 1

    def refresh_if_renamed(self) -> None:
        """Refresh, if the model holds parameters under other names by now, as after one was
        reparametrised or a layer wrapped. In a call with foreign tensors names stay."""
        if self._own.keys() != dict(self._model.named_parameters()).keys():
            self.refresh()

    def refresh_if_trained(self, trained: Collection[int]) -> None:
        """Refresh, if the model holds others by now, and these are no stand-ins: an optimizer
        trains them.

        Args:
            trained: identities of the parameters of optimizers.
        """
        held = dict(self._model.named_parameters())
        new = [p for name, p in held.items() if self._own.get(name, _nothing)() is not p]
        if any(id(p) in trained for p in new) and all(
            id(p) in trained or not p.requires_grad for p in new
        ):
            self.refresh()

    def refresh_if_changed(self) -> None:
        """Refresh, if the model holds others by now, as after a layer was replaced. Not for the
        time of a call, which may be one with foreign tensors."""
        held = dict(self._model.named_parameters())
        own = {name: known() for name, known in self._own.items()}
        if held.keys() != own.keys() or any(held[name] is not own[name] for name in held):
            self.refresh()

    def name_of(self, tensor: object) -> str | None:
        """The parameter's name; None for a tensor that is no parameter of the model now."""
        known = self._names.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        if not isinstance(tensor, nn.Parameter):
            return None
        name = self._name_in_model(tensor)
        self._keep(tensor, name)
        return name

    def _name_in_model(self, tensor: Tensor) -> str | None:
        for name, parameter in self._model.named_parameters():
            if parameter is tensor:
                own = self._own.get(name, _nothing)()
                return name if own is None or is_sharded(own) else None
        return None

    def _keep(self, tensor: Tensor, name: str | None) -> None:
        known = weakref.ref(tensor, partial(self._forget, id(tensor)))
        self._names[id(tensor)] = (known, name)

    def _forget(self, identity: int, known: object) -> None:
        """A tensor is gone, and its identity may become another's."""
        if identity in self._names and self._names[identity][0] is known:
            del self._names[identity]
        self.version += 1


def _nothing() -> None:
    return None


def is_sharded(parameter: Tensor) -> bool:
    """Whether a parameter is a DTensor, of which this process holds a shard."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(parameter, module.DTensor)
