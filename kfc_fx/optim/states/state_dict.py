"""The state dict: entries by parameter as torch.optim has them, and a text in every group."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from kfc_fx.engine.state import SavedState
from kfc_fx.errors import OptionError, counted, warn
from kfc_fx.optim.states.entries import AVERAGE, MASTER, NOTE, Entry, state_of
from kfc_fx.optim.states.live import FROZEN, OTHERS
from kfc_fx.optim.states.note import Note

RUN = "kfc"
"""Key of a group: what is of the run and of no parameter. A group is what every checkpoint keeps
as it is."""
VERSION = 1
RECORD = ("started", "waiting", "since", "counters", "likelihood", "seed", "most", "entries")


@dataclass(frozen=True)
class Place:
    """One of the optimizer's models, as a state is loaded into it."""

    names: Mapping[Tensor, str]
    """Of its parameters that the optimizer has."""
    parameters: Mapping[str, Tensor]
    """These by name, complex ones as pairs of real numbers."""
    divided: bool = False
    """Whether the blocks' state is divided among ranks, so that only some of it need be there."""


def packed(state_dict: dict[str, Any], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A state dict of torch.optim's form, from one with the tensors of the running optimizer.

    Args:
        records: of each model what is of no parameter, by the names of ``RECORD``.
    """
    live = state_dict["state"]
    state = {key: _copied(entry) for key, entry in live.items()}
    for key, entry in live.items():
        if FROZEN in entry:
            state[key][FROZEN] = {number: state[int(number)] for number in entry[FROZEN]}
    text = json.dumps({"version": VERSION, "models": list(records)})
    groups = [{**group, RUN: text} for group in state_dict["param_groups"]]
    return {**state_dict, "state": state, "param_groups": groups}


def unpacked(
    state_dict: Mapping[str, Any], parameters: Sequence[Tensor], places: Sequence[Place]
) -> list[tuple[SavedState, Mapping[str, Any]]]:
    """The state of each model, and its record, looked at as a whole before any of it is taken.

    Entries go to the parameters of their names; where the model has other names, to those in their
    places in the groups.

    Args:
        parameters: of the optimizer's groups, in their order.
        places: its models.

    Raises:
        OptionError: it is no such state dict, or it is not whole, or of other models.
    """
    records = _records(state_dict)
    if len(records) != len(places):
        raise OptionError(
            f"this state_dict is of {len(records)} models, and the optimizer has {len(places)}"
        )
    divided = any(place.divided for place in places)
    notes = list(_noted(state_dict, divided=divided))
    known = {(i, name) for i, place in enumerate(places) for name in place.names.values()}
    by_name = all((note.model, note.name) in known for _, note, _ in notes)
    found: list[dict[str, tuple[Note, Entry]]] = [{} for _ in places]
    for position, note, entry in notes:
        where = (note.model, note.name)
        if not by_name:
            where = _at(position, parameters, places)
        found[where[0]][where[1]] = (note, entry)
    states = []
    for own, record, place in zip(found, records, places, strict=True):
        _check_whole(own, record, place)
        _check_sizes(own, place)
        times = {name: record[name] for name in ("started", "waiting", "since")}
        state = replace(state_of(own), **times)
        states.append((state, record))
    return states


def _records(state_dict: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = state_dict["param_groups"]
    text = next((group[RUN] for group in groups if group.get(RUN)), None)
    if text is None:
        raise OptionError(
            f"this state_dict is not of a KFC optimizer: its groups have no entry {RUN!r}"
        )
    try:
        run = json.loads(text)
        version, records = run["version"], run["models"]
    except (ValueError, TypeError, KeyError) as error:
        raise OptionError(f"this state_dict is not whole: {RUN!r} of a group: {error}") from None
    if version != VERSION:
        raise OptionError(
            f"this state_dict is of version {version} of its form, and {VERSION} is read here: "
            "load it by the kfc_fx that saved it"
        )
    missing = [name for name in RECORD if any(name not in record for record in records)]
    if missing:
        raise OptionError(f"this state_dict is not whole: {missing[0]!r} is missing")
    return records  # type: ignore[no-any-return]


def _noted(state_dict: Mapping[str, Any], *, divided: bool) -> Iterator[tuple[int, Note, Entry]]:
    """Every entry with its place in the groups and its note; of frozen parameters once or twice."""
    listed = [key for group in state_dict["param_groups"] for key in group["params"]]
    positions = {key: number for number, key in enumerate(listed)}
    for key, entry in state_dict["state"].items():
        frozen = entry.get(FROZEN) or {}
        own = [(positions.get(key, -1), entry)] if _tensors(entry) else []
        given_ones = [*own, *((int(n), e) for n, e in frozen.items())]
        given_ones += [(p, e) for p, own in given_ones for e in (own.get(OTHERS) or {}).values()]
        for position, given in given_ones:
            try:
                note = Note.decoded(given[NOTE])
            except (KeyError, ValueError, TypeError, RuntimeError) as error:
                raise OptionError(
                    f"this state_dict is not whole: the note of {key} cannot be read "
                    f"({type(error).__name__}: {error})"
                ) from None
            missing = [name for name in note.held if not isinstance(given.get(name), Tensor)]
            of_block = {*note.held} - {AVERAGE, MASTER}
            if divided and note.block is not None and of_block <= {*missing}:
                missing = [name for name in missing if name not in of_block]  # its owner has it
            if missing:
                raise OptionError(
                    f"this state_dict is not whole: {missing[0]!r} of {note.name} is missing. "
                    + PLACES
                )
            yield position, note, given


PLACES = (
    "torch.distributed.checkpoint loads what the optimizer has a place for: call "
    "net.kfc.trace(*inputs) before get_optimizer_state_dict"
)


def _tensors(entry: Mapping[str, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in entry.values())


def _at(position: int, parameters: Sequence[Tensor], places: Sequence[Place]) -> tuple[int, str]:
    """Number of the model, and name, of the parameter at a place in the groups."""
    parameter = parameters[position] if 0 <= position < len(parameters) else None
    for number, place in enumerate(places):
        if parameter is not None and parameter in place.names:
            return number, place.names[parameter]
    raise OptionError(
        f"this state_dict is of other parameters: it has an entry for number {position}, and the "
        f"optimizer has {len(parameters)}"
    )


def _check_whole(found: Mapping[str, object], record: Mapping[str, Any], place: Place) -> None:
    """Raise :class:`OptionError` where entries were lost on the way here."""
    lost = record["entries"] - len(found)
    if lost <= 0:
        return
    without = [(name, p) for p, name in place.names.items() if name not in found]
    trained = [name for name, p in without if p.requires_grad]
    if trained or len(without) < lost:
        raise OptionError(
            f"this state_dict is not whole: {counted(record['entries'], 'parameter')} had state, "
            f"and that of {lost} is missing. {PLACES}"
        )
    warn(
        f"the loaded state has nothing for {counted(lost, 'parameter')} that are frozen here and "
        "were not where it was saved: set_optimizer_state_dict leaves these out. Their blocks "
        "begin anew once they are trained; freeze them after loading, or use opt.load_state_dict"
    )


def _check_sizes(found: Mapping[str, tuple[Note, Entry]], place: Place) -> None:
    """Raise :class:`OptionError` where state is of a parameter of another size."""
    for name, (note, entry) in found.items():
        size = tuple(place.parameters[name].shape)
        saved = size
        if note.block is not None:
            saved = tuple(note.block["weight_shape"])
        elif "m" in note.held:
            saved = tuple(entry["m"].shape)
        if saved != size:
            raise OptionError(
                f"the state of {note.name} is of a parameter of shape {saved}, and {name} has "
                f"{size}: load it into the model that it was saved with"
            )


def _copied(entry: Entry) -> Entry:
    copied: Entry = {name: own.clone() for name, own in entry.items() if isinstance(own, Tensor)}
    if OTHERS in entry:
        copied[OTHERS] = {number: _copied(own) for number, own in entry[OTHERS].items()}
    return copied
