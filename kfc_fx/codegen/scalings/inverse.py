"""Generate "inverse": the damped inverses of both factors (KFC-pre)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kfc_fx.codegen.pieces.context import Context, StackContext
from kfc_fx.codegen.pieces.decompositions import Decomposition, Made
from kfc_fx.codegen.pieces.matrices import rotate_input
from kfc_fx.codegen.pieces.moments import stacked_gradient, vector
from kfc_fx.codegen.spec import StackSpec, StateEntry, UpdateSpec
from kfc_fx.codegen.text.update_graph import Value
from kfc_fx.linalg.damped_inverse import damped_inverses, separable_damped_inverses

SUMMARY = """One step of KFC-pre (Grosse & Martens 2016, algorithm 1).

v = −lr Γ⁻¹ ∇ Ω⁻¹{clip}; p ← momentum p + v; θ ← θ + {moved}."""
OPTIONS: tuple[str, ...] = ()
REFRESH_OPTIONS: tuple[str, ...] = ("damping",)
REFRESH_SUMMARY = "Damped inverses of all factors; a factor is its EMA over its mass."
FOLLOW_SUMMARY = ""
KEEPS_BASES = False
COUNTS_EXAMPLES = False


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
        entries["p"] = StateEntry(stack.matrix_shape, "zeros", is_moment=True)
    return entries


def decompositions(spec: UpdateSpec, stack: StackSpec) -> list[Decomposition]:
    """None: both factors of a block are inverted in one call."""
    return []


def refresh(local: StackContext, made: Made) -> tuple[dict[str, Value], list[Value]]:
    """New inverses."""
    update, stack = local.update, local.stack
    mass = update.let("mass", local.state("mass").clamp(min=1e-12), remark="above zero")
    factors = [local.state(factor) / mass for factor in stack.factor_shapes]
    damping = local.arguments["damping"]
    if stack.forms.input != "separable":
        names = ["omega_inverse", "gamma_inverse"]
        call = update.call(damped_inverses, *factors, damping)
    else:
        names = ["q_channel", "q_offset", "input_scale", "gamma_inverse"]
        locations = (local.state("locations") / mass).flatten() if stack.bias else None
        call = update.call(separable_damped_inverses, *factors, locations, damping)
    *found, lost = update.let_tuple([*names, "failed"], call)
    return dict(zip(names, found, strict=True)), [lost]


def directions(context: Context, stacks: Sequence[StackSpec]) -> Iterator[Value]:
    """v = −lr Γ⁻¹ ∇ Ω⁻¹ of each stack, and its part of ν where that is asked."""
    for stack in stacks:
        yield context.of_stack("vector", stack, _vector, lr=context.arguments["lr"][stack.key])


def _vector(local: StackContext) -> object:
    gradient, forms = stacked_gradient(local), local.stack.forms
    inverse = local.state("gamma_inverse")
    left = inverse * gradient if forms.output == "diagonal" else inverse @ gradient
    if forms.input == "diagonal":
        natural = left * local.state("omega_inverse")
    elif forms.input == "dense":
        natural = left @ local.state("omega_inverse")
    else:
        bases = {name: local.state(f"q_{name}") for name in ("channel", "offset")}
        rotated = rotate_input(local, bases, left)
        scaled = local.let("scaled", rotated * local.state("input_scale"))
        natural = rotate_input(local, bases, scaled, back=True)
    return vector(local, natural * -local.arguments["lr"], gradient)


def _inverse_entry(stack: StackSpec, factor: str) -> StateEntry:
    initial = "identity" if factor in stack.basis_shapes else "ones"
    return StateEntry(stack.factor_shapes[factor], initial)  # type: ignore[arg-type]
