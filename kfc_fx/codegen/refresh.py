"""Generate ``start`` and ``refresh``: factors into damped inverses or bases."""

from __future__ import annotations

import torch

from kfc_fx.codegen.accumulate import describe
from kfc_fx.codegen.layout import StackSpec
from kfc_fx.codegen.matrices import rotate, transposed
from kfc_fx.codegen.options import UpdateSpec
from kfc_fx.codegen.update_graph import UpdateGraph, Value
from kfc_fx.curvature.eigenbasis import eigenbasis, orthogonal_iteration
from kfc_fx.curvature.inverse import damped_inverses, separable_damped_inverses

SUMMARIES = {
    ("adam", "start"): "Eigenbases of all factors, from scratch.",
    ("adam", "refresh"): """Bases of all factors, and the moments turned into them.

    Narrow factors are decomposed; wide ones follow by one orthogonal iteration.
    """,
    ("inverse", "refresh"): "Damped inverses of all factors; a factor is its EMA over its mass.",
}


def refresh_graphs(spec: UpdateSpec) -> list[UpdateGraph]:
    """``refresh(state, damping) -> (new state entries, failed by stack)``, and ``start``.

    ``start`` is the first refresh of "adam", which has no basis to start from.
    """
    if spec.scaling == "inverse":
        return [_inverse_graph(spec)]
    return [_basis_graph(spec, name) for name in ("start", "refresh")]


def bases_of(stack: StackSpec) -> dict[str, str]:
    """Factor name to the state name of its basis."""
    return {factor: f"q_{factor}_{stack.key}" for factor in stack.basis_shapes}


def _sides(stack: StackSpec) -> dict[str, int]:
    return {factor: shape[-1] for factor, shape in stack.basis_shapes.items()}


def _basis_graph(spec: UpdateSpec, name: str) -> UpdateGraph:
    update = UpdateGraph(name, SUMMARIES["adam", name])
    state = update.argument("state")
    result: dict[str, Value] = {}
    failed: dict[str, list[Value]] = {}
    for stack in spec.stacks:
        update.section(describe(stack))
        for factor, basis in bases_of(stack).items():
            ema = state[f"{factor}_{stack.key}"]
            if name == "refresh" and _sides(stack)[factor] >= spec.orthogonal_iteration_from:
                call = update.call(orthogonal_iteration, ema, state[basis])
            else:
                call = update.call(eigenbasis, ema)
            found, lost = update.let_tuple((basis, f"failed_{factor}_{stack.key}"), call)
            result[basis] = found
            failed.setdefault(stack.key, []).append(lost)
        if not stack.basis_shapes:  # both factors are diagonal: nothing can fail
            none = update.call(torch.zeros_like, state[f"mass_{stack.key}"][:, 0, 0])
            failed[stack.key] = [none != 0]
        if name == "refresh":
            _turn_moments(update, spec, stack, state, result)
    return update.finish((result, failed))


def _turn_moments(
    update: UpdateGraph,
    spec: UpdateSpec,
    stack: StackSpec,
    state: Value,
    result: dict[str, Value],
) -> None:
    """Moments in the new basis, with ``R = Qᵀ_old Q_new`` of each factor.

    First moments turn exactly, ``R_Γᵀ m R_Ω``: it is as if they were kept in the original
    coordinates. Second moments take ``(R_Γ∘R_Γ)ᵀ v (R_Ω∘R_Ω)``, exact where the gradient's
    coordinates are uncorrelated; left alone they would belong to other directions wherever
    eigenvalues trade places.
    """
    key = stack.key
    turns, squares = {}, {}
    if not stack.basis_shapes:
        return
    for factor, shape in stack.basis_shapes.items():
        basis = f"q_{factor}_{key}"
        turn = update.let(f"turn_{factor}_{key}", transposed(state[basis]) @ result[basis], shape)
        turns[factor] = turn
        squares[factor] = update.let(f"turn2_{factor}_{key}", turn.square(), shape)
    if spec.momentum:
        result[f"m_{key}"] = rotate(update, stack, turns, state[f"m_{key}"])
    result[f"v_{key}"] = rotate(update, stack, squares, state[f"v_{key}"])


def _inverse_graph(spec: UpdateSpec) -> UpdateGraph:
    update = UpdateGraph("refresh", SUMMARIES["inverse", "refresh"])
    state, damping = update.argument("state"), update.argument("damping")
    result: dict[str, Value] = {}
    failed: dict[str, list[Value]] = {}
    for stack in spec.stacks:
        update.section(describe(stack))
        key = stack.key
        mass = update.let(f"mass_{key}", state[f"mass_{key}"].clamp(min=1e-12), (stack.depth, 1, 1))
        factors = [state[f"{factor}_{key}"] / mass for factor in stack.factor_shapes]
        if stack.forms.input != "separable":
            names = [f"omega_inverse_{key}", f"gamma_inverse_{key}"]
            call = update.call(damped_inverses, *factors, damping)
        else:
            names = [f"q_channel_{key}", f"q_offset_{key}", f"input_scale_{key}"]
            names.append(f"gamma_inverse_{key}")
            locations = (state[f"locations_{key}"] / mass).flatten() if stack.bias else None
            call = update.call(separable_damped_inverses, *factors, locations, damping)
        *found, lost = update.let_tuple([*names, f"failed_{key}"], call)
        result.update(zip(names, found, strict=True))
        failed[key] = [lost]
    return update.finish((result, failed))
