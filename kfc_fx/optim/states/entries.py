"""One model's state as entries of its parameters, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kfc_fx.engine.on_demand import OnDemand
from kfc_fx.engine.state import SavedState
from kfc_fx.errors import OptionError
from kfc_fx.optim.states.note import Note
from kfc_fx.plan.spec import BlockSpec, block_name

STEP, NOTE, AVERAGE, MASTER = "step", "note", "average", "master_weight"
MOMENTS = ("m", "v")
SHAPED = (AVERAGE, MASTER)
"""What every rank has of a block's weight, whoever owns the block."""

Entry = dict[str, Any]


Entries = Mapping[str, Entry]
"""The state of one model, by name of a parameter: that of a block under the block's weight."""


def parameter_entries(
    state: SavedState,
    parameters: Mapping[str, Tensor],
    *,
    model: int,
    steps: int,
    average: bool,
    master_weights: bool,
    whole: Callable[[str, Tensor], Tensor] = lambda _, value: value,
) -> Entries:
    """The entries of one model, in the tensors of the running optimizer. What waits for a first
    step is there too, in its size, so that a checkpoint has a place for it.

    Args:
        state: of the model.
        parameters: those that the optimizer has, by name, complex ones as pairs of real numbers.
        model: number of the model among the optimizer's.
        steps: how many were taken.
        average: whether parameters are averaged.
        master_weights: whether parameters in half precision have copies in float32.
        whole: what is shaped like a parameter, by its name, as a checkpoint has it.
    """
    there = {*state.blocks, *state.elsewhere}
    plan = {name: block for name, block in state.plan.items() if name in there}
    weights = {block["weight"]: name for name, block in plan.items()}
    biases = {block["bias"] for block in plan.values()}
    known = {*weights, *biases, *state.generic, *state.average, *state.master_weights}

    def entry(name: str) -> Entry:
        parameter, block = parameters[name], weights.get(name)
        held: dict[str, Tensor] = {}
        waiting: dict[str, Tensor] = {}
        wide = torch.promote_types(parameter.dtype, torch.float32)
        if block is not None and block in state.blocks:
            held |= state.blocks[block]
        elif block is not None:
            pass  # its owner has it
        elif name in state.generic:
            held |= {key: whole(name, value) for key, value in state.generic[name].items()}
        elif name not in biases and parameter.requires_grad:
            zeros = torch.zeros_like(parameter, dtype=wide, requires_grad=False)
            waiting |= dict.fromkeys(MOMENTS, zeros)
        is_half = wide != parameter.dtype
        kept = wide if master_weights else parameter.dtype
        for key, values, wanted in (
            (MASTER, state.master_weights, master_weights and is_half),
            (AVERAGE, state.average, average),
        ):
            if name in values:
                held[key] = whole(name, values[name])
            elif wanted:
                waiting[key] = parameter.detach().to(kept, copy=True)
        elsewhere = () if block is None else state.elsewhere.get(block, ())
        note = Note(
            model,
            name,
            tuple(sorted({*held, *elsewhere})),
            tuple(key for key, value in held.items() if not value.is_contiguous()),
            None if block is None else dict(plan[block]),
            block in state.parked,
        )
        step = torch.tensor(float(steps))
        return {STEP: step, **held, **waiting, NOTE: note.encoded(parameter.device)}

    names = [name for name, p in parameters.items() if p.requires_grad or name in known]
    return OnDemand(names, entry)


def state_of(entries: Mapping[str, tuple[Note, Entry]]) -> SavedState:
    """What the entries of its parameters tell of a model's state.

    Args:
        entries: by the name that a parameter has now.
    """
    parked: set[str] = set()
    blocks: dict[str, Entry] = {}
    state = replace(SavedState.empty(), blocks=blocks)
    for name, (note, entry) in entries.items():
        there = [key for key in note.held if isinstance(entry.get(key), Tensor)]
        held = {key: _laid_out(entry[key], key in note.columns) for key in there}
        for key, values in ((AVERAGE, state.average), (MASTER, state.master_weights)):
            if key in held:
                values[name] = held.pop(key)
        if note.block is not None:
            block = _renamed(BlockSpec.from_dict(note.block), name, entries)
            if held:
                blocks[block.name] = held
            else:  # its owner has it
                state.elsewhere[block.name] = tuple(key for key in note.held if key not in SHAPED)
            state.plan[block.name] = block.as_dict()
            if note.parked:
                parked.add(block.name)
        elif held:
            state.generic[name] = held
    return replace(state, parked=frozenset(parked))


def _laid_out(value: Tensor, in_columns: bool) -> Tensor:
    return value.mT.contiguous().mT if in_columns else value.contiguous()


def _renamed(block: BlockSpec, weight: str, names: Mapping[str, object]) -> BlockSpec:
    """The block of a weight that may have another name now.

    What the names of weight and bias begin with may have changed, and has for both alike.

    Raises:
        OptionError: there is no parameter in the place of its bias.
    """
    if block.weight == weight or block.bias is None:
        return block.renamed(block_name(weight), {block.weight: weight})
    end = len(_common_end(block.weight, weight))
    before, now = (name[: len(name) - end] for name in (block.weight, weight))
    bias = now + block.bias.removeprefix(before)
    if not block.bias.startswith(before) or bias not in names:
        raise OptionError(
            f"the state is of a block of {block.weight} and {block.bias}. The first is {weight} "
            "here, and the second is not found: load the state into a model of the same layers"
        )
    return block.renamed(block_name(weight), {block.weight: weight, block.bias: bias})


def _common_end(one: str, other: str) -> str:
    """The longest end that two names share."""
    count = 0
    while count < min(len(one), len(other)) and one[-1 - count] == other[-1 - count]:
        count += 1
    return one[len(one) - count :]
