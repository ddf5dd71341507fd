"""Generate the eigenbases of a stack's factors, and moments that turn with them."""

from __future__ import annotations

import torch

from kfc_fx.codegen.pieces.context import Context
from kfc_fx.codegen.pieces.decompositions import Decomposition, decomposed
from kfc_fx.codegen.pieces.matrices import rotate, transposed
from kfc_fx.codegen.spec import StackSpec, StateEntry, UpdateSpec
from kfc_fx.codegen.text.update_graph import Value
from kfc_fx.linalg.eigenbasis import eigenbasis, in_basis
from kfc_fx.linalg.orthogonal_iteration import orthogonal_iteration

START_SUMMARY = """Eigenbases of all factors, from scratch, and the moments turned into them.

    Blocks that were there before have moments, where others have joined."""
REFRESH_SUMMARY = """Bases of all factors, and the moments turned into them.

    Narrow factors are decomposed; wide ones follow by one orthogonal iteration."""


def basis_entries(stack: StackSpec) -> dict[str, StateEntry]:
    """State of the bases."""
    return {f"q_{name}": StateEntry(s, "identity") for name, s in stack.basis_shapes.items()}


def eigenvalue_entries(spec: UpdateSpec, stack: StackSpec) -> dict[str, StateEntry]:
    """State of the factors that are kept in their bases."""
    shapes = {name: stack.basis_shapes[name] for name in spec.factors_in_basis_of(stack)}
    return {f"eigenvalues_{n}": StateEntry((s[0], 1, s[2]), "zeros") for n, s in shapes.items()}


def bases_of(context: Context, stack: StackSpec) -> dict[str, Value]:
    """The bases by factor."""
    return {factor: context.state(f"q_{factor}", stack) for factor in stack.basis_shapes}


def decompositions(context: Context, stack: StackSpec, *, first: bool) -> list[Decomposition]:
    """The bases' own: narrow factors are decomposed; wide ones follow by one orthogonal
    iteration."""
    found = []
    for factor, shape in stack.basis_shapes.items():
        ema, name = context.state(factor, stack), f"q_{factor}"
        if not first and shape[-1] >= context.spec.orthogonal_iteration_from:
            tensors = (ema, context.state(name, stack))
            found.append(Decomposition(stack, factor, name, orthogonal_iteration, tensors))
        else:
            found.append(Decomposition(stack, factor, name, eigenbasis, (ema,)))
    return found


def refresh_bases(context: Context, stack: StackSpec, *, first: bool) -> list[Value]:
    """New bases into the result; returns what failed."""
    update, result = context.update, context.result
    failed: list[Value] = []
    for wanted in decompositions(context, stack, first=first):
        basis, lost = decomposed(context, wanted)
        result[wanted.key] = basis
        parts = stack.parts[wanted.factor]
        failed.append(lost.unflatten(0, (stack.depth, parts)).any(1) if parts > 1 else lost)
        if wanted.factor in context.spec.factors_in_basis_of(stack):
            name = f"eigenvalues_{wanted.factor}_{stack.key}"
            values = update.call(in_basis, context.state(wanted.factor, stack), basis)
            result[name] = update.let(name, values, (wanted.entries, 1, wanted.side))
    if not failed:  # both factors are diagonal: nothing can fail
        failed.append(update.call(torch.zeros_like, context.state("mass", stack)[:, 0, 0]) != 0)
    return failed


def turn_moments(context: Context, stack: StackSpec, *, first_moment: bool) -> None:
    """Moments in the new basis, with ``R = Qᵀ_old Q_new`` of each factor.

    First moments turn exactly, ``R_Γᵀ m R_Ω``: it is as if they were kept in the original
    coordinates. Second moments take ``(R_Γ∘R_Γ)ᵀ v (R_Ω∘R_Ω)``, exact where the gradient's
    coordinates are uncorrelated; left alone they would belong to other directions wherever
    eigenvalues trade places.
    """
    update, result, key = context.update, context.result, stack.key
    turns, squares = {}, {}
    for factor, shape in stack.basis_shapes.items():
        old, new = context.state(f"q_{factor}", stack), result[f"q_{factor}_{key}"]
        turn = update.let(f"turn_{factor}_{key}", transposed(old) @ new, shape)
        turns[factor] = turn
        squares[factor] = update.let(f"turn2_{factor}_{key}", turn.square(), shape)
    if not turns:
        return
    if first_moment:
        result[f"m_{key}"] = rotate(update, stack, turns, context.state("m", stack))
    result[f"v_{key}"] = rotate(update, stack, squares, context.state("v", stack))
