"""Generate the eigenbases of a stack's factors, and moments that turn with them."""

from __future__ import annotations

import torch

from kfc_fx.codegen.pieces.context import StackContext
from kfc_fx.codegen.pieces.decompositions import Decomposition, Made, decomposed
from kfc_fx.codegen.spec import StackSpec, StateEntry, UpdateSpec
from kfc_fx.codegen.text.update_graph import Value
from kfc_fx.linalg.eigenbasis import eigenbasis, in_basis
from kfc_fx.linalg.orthogonal_iteration import next_basis
from kfc_fx.linalg.rotation import turn_moments, turn_second_moment

REFRESH_SUMMARY = "Eigenbases of all factors, and the moments turned into them."
FOLLOW_SUMMARY = """Narrow factors are decomposed anew. Wide ones follow by one orthogonal
iteration, but at the ``first`` refresh, where there is no basis to go on from."""


def basis_entries(stack: StackSpec, momentum: str | None) -> dict[str, StateEntry]:
    """Bases, second moments in them, and a momentum.

    Args:
        momentum: its name; None for a stack without one.
    """
    bases = {f"q_{name}": StateEntry(s, "identity") for name, s in stack.basis_shapes.items()}
    moments = ("v",) if momentum is None else ("v", momentum)
    return bases | {
        name: StateEntry(stack.matrix_shape, "zeros", is_moment=True) for name in moments
    }


def eigenvalue_entries(spec: UpdateSpec, stack: StackSpec) -> dict[str, StateEntry]:
    """State of the factors that are kept in their bases."""
    shapes = {name: stack.basis_shapes[name] for name in spec.factors_in_basis_of(stack)}
    return {f"eigenvalues_{n}": StateEntry((s[0], 1, s[2]), "zeros") for n, s in shapes.items()}


def bases_of(local: StackContext) -> dict[str, Value]:
    """The bases by factor."""
    return {factor: local.state(f"q_{factor}") for factor in local.stack.basis_shapes}


def decompositions(spec: UpdateSpec, stack: StackSpec) -> list[Decomposition]:
    """The bases' own: narrow factors are decomposed; wide ones follow by one orthogonal
    iteration."""
    found = []
    for factor, shape in stack.basis_shapes.items():
        name = f"q_{factor}"
        if shape[-1] >= spec.orthogonal_iteration_from:
            tensors = (factor, name)
            found.append(Decomposition(stack, factor, name, next_basis, tensors, follows=True))
        else:
            found.append(Decomposition(stack, factor, name, eigenbasis, (factor,)))
    return found


def refresh_bases(local: StackContext, made: Made) -> tuple[dict[str, Value], list[Value]]:
    """New bases, and where a block failed."""
    entries: dict[str, Value] = {}
    failed: list[Value] = []
    for wanted in decompositions(local.spec, local.stack):
        basis, lost = decomposed(local, wanted, made)
        entries[wanted.name] = basis
        parts = local.stack.parts[wanted.factor]
        failed.append(lost.unflatten(0, (local.stack.depth, parts)).any(1) if parts > 1 else lost)
        if wanted.factor in local.spec.factors_in_basis_of(local.stack):
            values = local.update.call(in_basis, local.state(wanted.factor), basis)
            entries[f"eigenvalues_{wanted.factor}"] = values
    if not failed:  # both factors are diagonal: nothing can fail
        failed.append(local.update.call(torch.zeros_like, local.state("mass")[:, 0, 0]) != 0)
    return entries, failed


def turned_moments(
    local: StackContext, bases: dict[str, Value], *, first_moment: bool
) -> dict[str, Value]:
    """The moments in the new ``bases``."""
    factors = local.stack.basis_shapes
    turns = {factor: (local.state(f"q_{factor}"), bases[f"q_{factor}"]) for factor in factors}
    if not turns:
        return {}
    if not first_moment:
        v = local.update.call(turn_second_moment, local.state("v"), **turns)
        return {"v": local.update.let("v", v)}
    both = local.update.call(turn_moments, local.state("m"), local.state("v"), **turns)
    return dict(zip("mv", local.update.let_tuple("mv", both), strict=True))
