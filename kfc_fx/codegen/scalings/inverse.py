"""Generate "inverse": the damped inverses of both factors (KFC-pre)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kfc_fx.codegen.pieces.context import Context
from kfc_fx.codegen.pieces.decompositions import Decomposition
from kfc_fx.codegen.pieces.matrices import rotate_input
from kfc_fx.codegen.pieces.moments import stacked_gradient
from kfc_fx.codegen.spec import StackSpec, StateEntry
from kfc_fx.codegen.text.update_graph import Value
from kfc_fx.linalg.damped_inverse import damped_inverses, separable_damped_inverses

SUMMARY = """KFC-pre (Grosse & Martens 2016, algorithm 1).

    v = −lr Γ⁻¹ ∇ Ω⁻¹{clip};
    p ← momentum p + v; θ ← θ + {moved}."""
OPTIONS: tuple[str, ...] = ()
REFRESH_OPTIONS: tuple[str, ...] = ("damping",)
REFRESH_SUMMARY = "Damped inverses of all factors; a factor is its EMA over its mass."
START_SUMMARY: str | None = None


def state_entries(stack: StackSpec, *, momentum: bool) -> dict[str, StateEntry]:
    """Inverses, those of a separable Ω as bases and a scale, and the momentum."""
    factors = stack.factor_shapes
    entries = {"gamma_inverse": _inverse_entry(stack, "gamma")}
    if stack.forms.input != "separable":
        entries["omega_inverse"] = _inverse_entry(stack, "omega")
    else:
        entries["q_channel"] = StateEntry(factors["channel"], "identity")
        entries["q_offset"] = StateEntry(factors["offset"], "identity")
        entries["input_scale"] = StateEntry((stack.depth, 1, stack.first.columns), "ones")
    if momentum:
        entries["p"] = StateEntry(stack.matrix_shape, "zeros")
    return entries


def decompositions(context: Context, stack: StackSpec, *, first: bool) -> list[Decomposition]:
    """None: both factors of a block are inverted in one call."""
    return []


def refresh(context: Context, stack: StackSpec, *, first: bool) -> list[Value]:
    """New inverses."""
    update, key = context.update, stack.key
    mass = context.state("mass", stack).clamp(min=1e-12)
    mass = update.let(f"mass_{key}", mass, (stack.depth, 1, 1))
    factors = [context.state(factor, stack) / mass for factor in stack.factor_shapes]
    damping = context.option("damping", stack)
    if stack.forms.input != "separable":
        names = [f"omega_inverse_{key}", f"gamma_inverse_{key}"]
        call = update.call(damped_inverses, *factors, damping)
    else:
        names = [f"q_channel_{key}", f"q_offset_{key}", f"input_scale_{key}"]
        names.append(f"gamma_inverse_{key}")
        locations = (context.state("locations", stack) / mass).flatten() if stack.bias else None
        call = update.call(separable_damped_inverses, *factors, locations, damping)
    *found, lost = update.let_tuple([*names, f"failed_{key}"], call)
    context.result.update(zip(names, found, strict=True))
    return [lost]


def directions(context: Context, stacks: Sequence[StackSpec]) -> Iterator[tuple[Value, Value]]:
    """(gradient, v = −lr Γ⁻¹ ∇ Ω⁻¹) of each stack."""
    for stack in stacks:
        g = stacked_gradient(context, stack)
        yield g, _direction(context, stack, g)


def _direction(context: Context, stack: StackSpec, g: Value) -> Value:
    update, key, shape = context.update, stack.key, stack.matrix_shape
    inverse = context.state("gamma_inverse", stack)
    left = inverse * g if stack.forms.output == "diagonal" else inverse @ g
    if stack.forms.input == "diagonal":
        natural = left * context.state("omega_inverse", stack)
    elif stack.forms.input == "dense":
        natural = left @ context.state("omega_inverse", stack)
    else:
        bases = {name: context.state(f"q_{name}", stack) for name in ("channel", "offset")}
        rotated = rotate_input(update, stack, bases, left)
        scaled = rotated * context.state("input_scale", stack)
        scaled = update.let(f"scaled_{key}", scaled, shape)
        natural = rotate_input(update, stack, bases, scaled, back=True)
    return update.let(f"vector_{key}", natural * -context.arguments["lr"][key], shape)


def _inverse_entry(stack: StackSpec, factor: str) -> StateEntry:
    initial = "identity" if factor in stack.basis_shapes else "ones"
    return StateEntry(stack.factor_shapes[factor], initial)  # type: ignore[arg-type]
