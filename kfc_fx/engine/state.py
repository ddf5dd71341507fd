"""The update's state: stacked tensors while running, by name when saved."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kfc_fx.codegen.pieces.bases import eigenvalue_entries
from kfc_fx.codegen.scalings.rules import rule_of
from kfc_fx.codegen.spec import StackSpec, StateEntry, UpdateSpec
from kfc_fx.engine.on_demand import OnDemand
from kfc_fx.linalg.eigenbasis import from_basis, in_basis
from kfc_fx.linalg.half import kept_dtype

OPTIONAL = ("m", "p", "examples")
"""Entries that a saved block may lack: its momentum was zero, or its scaling, with the same factors
and bases, has no count of examples."""


@dataclass
class SavedState:
    """State by name, independent of how blocks are stacked: what ``state_dict`` holds."""

    blocks: Mapping[str, dict[str, Tensor]]
    generic: dict[str, dict[str, Tensor]]
    average: dict[str, Tensor]
    master_weights: dict[str, Tensor]
    started: bool = False
    plan: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What each block is, as plain data. A run that goes on knows so of layers that it has not
    called yet."""
    waiting: bool = False
    """Whether there are blocks that have joined, and have no statistics yet."""
    parked: frozenset[str] = frozenset()
    """Blocks that have state and no place in the update, such as those of layers long frozen."""
    since: int = 0
    """Steps since parameters or groups were last changed."""
    elsewhere: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Blocks whose state is on other ranks, and the names of what there is of it."""

    @classmethod
    def empty(cls) -> SavedState:
        """Nothing: where an optimizer starts."""
        return cls({}, {}, {}, {})

    def without(self, names: Collection[str], blocks: Collection[str]) -> SavedState:
        """The same without what it holds of some parameters and blocks."""

        def left(state: Mapping[str, Any], gone: Collection[str]) -> dict[str, Any]:
            return {name: value for name, value in state.items() if name not in gone}

        return replace(
            self,
            blocks=left(self.blocks, blocks),
            generic=left(self.generic, names),
            average=left(self.average, names),
            master_weights=left(self.master_weights, names),
            plan=left(self.plan, blocks),
            elsewhere=left(self.elsewhere, blocks),
            parked=self.parked - set(blocks),
        )

    def renamed(self, names: Mapping[str, str], blocks: Mapping[str, str]) -> SavedState:
        """The same of a model whose parameters have other names now, but for what the plan says.

        Args:
            names: old name of a parameter to its new one; ``blocks``: the same of blocks.
        """

        def under(state: Mapping[str, Any], new: Mapping[str, str]) -> dict[str, Any]:
            return {new.get(name, name): value for name, value in state.items()}

        return replace(
            self,
            blocks=under(self.blocks, blocks),
            generic=under(self.generic, names),
            average=under(self.average, names),
            master_weights=under(self.master_weights, names),
            elsewhere=under(self.elsewhere, blocks),
            parked=frozenset(blocks.get(name, name) for name in self.parked),
        )


def state_entries(spec: UpdateSpec, stack: StackSpec) -> dict[str, StateEntry]:
    """State of a stack by name."""
    in_basis = spec.factors_in_basis_of(stack)
    entries = {
        name: StateEntry(shape, "zeros")
        for name, shape in stack.factor_shapes.items()
        if name not in in_basis
    }
    entries |= eigenvalue_entries(spec, stack)
    entries["mass"] = StateEntry((stack.depth, 1, 1), "zeros")
    if stack.has_bias_apart:
        entries["locations"] = StateEntry((stack.depth, 1, 1), "zeros")
    if stack.counts_examples:
        entries["examples"] = StateEntry((stack.depth, 1, 1), "ones")
    rule = rule_of(stack.scaling)
    return entries | rule.state_entries(stack, momentum=stack.scaling in spec.momentum)


def refreshed_entries(spec: UpdateSpec, stack: StackSpec) -> dict[str, StateEntry]:
    """The state of a stack that a refresh may change, by name: all but factors, counts and a
    momentum that stands apart from bases."""
    rule = rule_of(stack.scaling)
    found = eigenvalue_entries(spec, stack)
    found |= rule.state_entries(stack, momentum=stack.scaling in spec.momentum)
    stays = ("p",) if rule.KEEPS_BASES else ("p", "m")
    return {name: entry for name, entry in found.items() if name not in stays}


def fitting(
    spec: UpdateSpec, saved: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """The saved blocks that have what the spec keeps of their factors and bases, in the same sizes.

    Of another scaling or another form a part might fit, the count of statistics and the moments,
    say: those would go with factors that they do not belong to.
    """
    whole = {block: _with_both_forms(entries) for block, entries in saved.items()}
    found = {}
    for stack in spec.stacks:
        needed = {n: e.shape for n, e in state_entries(spec, stack).items() if n not in OPTIONAL}
        for block, (start, stop) in stack.spans.items():
            entries = whole.get(block, {})
            sizes = {name: tuple(entries[name].shape) for name in needed if name in entries}
            depth, count = stack.depth, stop - start
            if sizes == {n: (s[0] * count // depth, *s[1:]) for n, s in needed.items()}:
                found[block] = entries
    return found


def stacked_state(
    spec: UpdateSpec, saved: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """Stacked tensors by stack and name, from saved blocks where there are any.

    Args:
        saved: block name to state name to tensor, as :func:`fitting` returns it.
    """
    state: dict[str, dict[str, Tensor]] = {}
    for stack in spec.stacks:
        own = state.setdefault(stack.key, {})
        for name, entry in state_entries(spec, stack).items():
            tensor = _initial(spec, entry, stack)
            parts = {
                span: saved[block][name]
                for block, span in stack.spans.items()
                if name in saved.get(block, {})
            }
            if any(not part.is_contiguous() for part in parts.values()):
                # Eigenvectors, in columns as LAPACK leaves them: a product rounds by the layout.
                tensor = tensor.mT.contiguous().mT
            for span, part in parts.items():
                entries_of(tensor, stack, span).copy_(part)
            own[name] = tensor
    return state


def state_by_block(
    spec: UpdateSpec, state: Mapping[str, Mapping[str, Tensor]]
) -> Mapping[str, dict[str, Tensor]]:
    """The inverse of :func:`stacked_state`: block name to state name to tensor, views of the
    stacks."""
    places = {block: (stack, span) for stack in spec.stacks for block, span in stack.spans.items()}

    def of(block: str) -> dict[str, Tensor]:
        stack, span = places[block]
        return {name: entries_of(value, stack, span) for name, value in state[stack.key].items()}

    return OnDemand(places, of)


def entries_of(tensor: Tensor, stack: StackSpec, span: tuple[int, int]) -> Tensor:
    """Those of the entries ``[start, stop)`` of a stack, each of which may have several parts."""
    parts = len(tensor) // stack.depth
    return tensor[span[0] * parts : span[1] * parts]


def _with_both_forms(entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The saved entries of a block, and what they make of a factor in the other form: written out,
    or as its eigenvalues. Intervals may change from a run to the one that goes on with it."""
    found = dict(entries)
    for name, basis in entries.items():
        factor = name.removeprefix("q_")
        values = f"eigenvalues_{factor}"
        if factor == name:
            continue
        if factor in entries:
            found[values] = in_basis(entries[factor], basis)
        elif values in entries:
            found[factor] = from_basis(basis, entries[values])
    return found


def dtype_of(spec: UpdateSpec, stack: StackSpec, entry: StateEntry) -> torch.dtype:
    """The type in which an entry of the state of a stack is kept."""
    halves = spec.half_moments and entry.is_moment
    return kept_dtype(getattr(torch, stack.dtype), halves=halves)


def _initial(spec: UpdateSpec, entry: StateEntry, stack: StackSpec) -> Tensor:
    dtype = dtype_of(spec, stack, entry)
    tensor = torch.zeros(entry.shape, dtype=dtype, device=stack.device)
    if entry.initial == "ones":
        tensor.fill_(1)
    if entry.initial == "identity":
        tensor.diagonal(dim1=1, dim2=2).fill_(1)
    return tensor
