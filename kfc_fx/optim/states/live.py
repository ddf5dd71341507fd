"""``opt.state``: the state by parameter, as the running optimizer has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence

import torch
from torch import Tensor

from kfc_fx.errors import OptionError
from kfc_fx.optim.states.entries import NOTE, Entries, Entry
from kfc_fx.optim.states.note import Note

FROZEN = "frozen"
"""Entries of frozen parameters, by their number in the groups."""
OTHERS = "others"
"""Entries of the same parameter in further models."""


class ParameterStates(MutableMapping[Tensor, Entry]):
    """The entries of all parameters that have state.

    The first parameter that is trained has those of frozen ones besides, by their number in the
    groups: ``torch.distributed.checkpoint`` leaves out what it finds under a frozen parameter.

    Args:
        parameters: those of the optimizer's groups, in their order.
        models: names of a model's parameters, and its entries; several of these.
        restart: begins anew, without any state.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        models: Sequence[tuple[MutableMapping[Tensor, str], Entries]],
        restart: Callable[[], None],
    ) -> None:
        self._restart = restart
        self._places: dict[Tensor, list[tuple[Entries, str]]] = {}
        numbers: dict[Tensor, int] = {}
        for number, parameter in enumerate(parameters):
            for names, entries in models:
                name = names.get(parameter)
                if name is not None and name in entries:
                    self._places.setdefault(parameter, []).append((entries, name))
                    numbers[parameter] = number
        self._carrier = next((p for p in self._places if p.requires_grad), None)
        self._frozen = {str(numbers[p]): p for p in self._places if not p.requires_grad}

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, parameter: object) -> bool:
        return parameter in self._places

    def __getitem__(self, parameter: Tensor) -> Entry:
        if parameter not in self._places:
            return {}  # as the defaultdict of torch.optim has it
        entry, *others = (entries[name] for entries, name in self._places[parameter])
        if others:
            entry[OTHERS] = {str(number): own for number, own in enumerate(others)}
        if parameter is self._carrier:
            entry[FROZEN] = {number: self[own] for number, own in self._frozen.items()}
        return entry

    def __setitem__(self, parameter: Tensor, entry: Entry) -> None:
        """Write values into the state of a parameter: those that it has, in their sizes.

        Raises:
            OptionError: there is another entry, or one of another size.
        """
        own = self[parameter]
        wrong = [name for name in entry if name not in own]
        wrong += [n for n, v in entry.items() if n in own and _size(v) != _size(own[n])]
        if wrong:
            raise OptionError(
                f"opt.state of a KFC takes values for what it holds, in their sizes, and not "
                f"{', '.join(map(repr, wrong))}: use opt.load_state_dict"
            )
        note = Note.decoded(own[NOTE]) if own else None
        for name, value in entry.items():
            if not isinstance(value, Tensor) or value is own[name]:
                continue
            if note is not None and name in note.held:
                own[name].copy_(value)
            elif not torch.equal(own[name].cpu(), value.cpu()):
                raise OptionError(
                    f"{name!r} of opt.state cannot be written: it is counted, or waits for the "
                    "first step. Use opt.load_state_dict"
                )

    def __delitem__(self, parameter: Tensor) -> None:
        raise OptionError(
            "the state of one parameter belongs to that of its block, and KFC keeps it: "
            "opt.state.clear() begins anew with all"
        )

    def clear(self) -> None:
        """Begin anew, as an optimizer that has taken no step."""
        self._restart()
        self._places, self._frozen, self._carrier = {}, {}, None


def _size(value: object) -> object:
    return value.shape if isinstance(value, Tensor) else type(value)
